"""What of the checkout goes to a cluster: which files, how much that is, and the archive that Ray unpacks on workers.

Hidden files stay behind, because that is where credentials lie; so do links that lead out of the checkout. The archive
has no dates in it: the same files give the same bytes, which Ray uploads once.
"""

import fnmatch
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

LEFT_OUT = ("build", "dist", "corpus", "benchmarks", "docs", "tests", "*.egg-info", "node_modules")
"""Folders and files at the top of the checkout that workers do not need. A file that is named is not left out."""
EVERYWHERE = (".*", "__pycache__", "*.pyc", "*.pem", "*.key", "token", "*.token")
MOST_BYTES = 256_000_000
"""Ray keeps the archive in the memory of the head node, and takes 512 MiB at most."""
SUBMITTED = "submitted"
"""Folder of the archive for files that lie elsewhere on the submitter's machine."""
FIRST_DATE = (1980, 1, 1, 0, 0, 0)


class Unfit(ValueError):
    """The checkout cannot be sent: one line that says why."""


def list_files(root: Path, excludes: Sequence[str] = ()) -> list[Path]:
    """The files that are sent, relative to `root` and sorted.

    Args:
        excludes: more of what `LEFT_OUT` is, as patterns of paths relative to `root`.
    """
    patterns, found = (*LEFT_OUT, *excludes), []
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)

        def is_sent(name: str, here: Path = here) -> bool:
            path = here / name
            return (
                not any(fnmatch.fnmatch(name, pattern) for pattern in EVERYWHERE)
                and not any(fnmatch.fnmatch(str(path), pattern.rstrip("/")) for pattern in patterns)
                and (root / path).resolve().is_relative_to(root.resolve())
            )

        folders[:] = [name for name in folders if is_sent(name)]
        found += [here / name for name in names if is_sent(name) and (root / here / name).is_file()]
    return sorted(found)


def check_size(root: Path, files: Iterable[Path], most_bytes: int = MOST_BYTES) -> int:
    """How many bytes the files have.

    Raises:
        Unfit: too many; the largest folders are named.
    """
    sizes: Counter[str] = Counter()
    for file in files:
        sizes["/".join(file.parts[:2]) if len(file.parts) > 1 else str(file)] += (root / file).stat().st_size
    total = sum(sizes.values())
    if total > most_bytes:
        largest = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.most_common(3))
        raise Unfit(
            f"{root} holds {total / 1e6:.0f} MB to upload, at most {most_bytes / 1e6:.0f} are sent: {largest}; leave "
            "some out with --exclude, and put data where the cluster can read it"
        )
    return total


def pack(root: Path, files: Iterable[Path], extra: Mapping[str, bytes], archive: Path) -> Path:
    """Write the archive: the files of the checkout, and `extra` ones by their name in it."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for file in files:
            add(out, file.as_posix(), (root / file).read_bytes(), executable=os.access(root / file, os.X_OK))
        for name in sorted(extra):
            add(out, name, extra[name])
    return archive


def add(archive: zipfile.ZipFile, name: str, content: bytes, *, executable: bool = False) -> None:
    info = zipfile.ZipInfo(name, FIRST_DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o755 if executable else 0o644) << 16
    archive.writestr(info, content)
