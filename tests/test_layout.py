"""The layout is a test: which way imports go, what the CPU stages load, how long a file may be, what it may be called.

Read from the syntax tree, so that imports inside functions and under TYPE_CHECKING count like any other. ruff bans the
same imports per folder (`model/ruff.toml` and its siblings) and says so in the editor; this file is the whole rule.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("model", "pipeline", "jobs", "cluster")
ANYTHING = None

MAY_IMPORT: dict[str, frozenset[str] | None] = {
    "model": frozenset({"model", "torch", "xformers", "safetensors", "tokenizers", "huggingface_hub", "numpy"}),
    "pipeline": frozenset(
        {"pipeline", "model", "ray", "pyarrow", "polars", "s3fs", "fsspec", "lance", "numpy", "tokenizers", "torch"}
    ),
    "cluster": frozenset({"cluster", "ray"}),
    "jobs": ANYTHING,
}
"""Folder -> packages beside the standard library."""

BARRED = {"pipeline": ("ray.train", "ray.serve", "ray.tune"), "model": ("torch.distributed.elastic",)}
"""Parts of a permitted package that stay out."""

CPU_STAGES = (
    "columns",
    "documents",
    "tokens",
    "chunks",
    "packing",
    "sources",
    "storage",
    "survey",
    "table",
    "work",
    "permutation",
    "preparation",
    "shards",
    "stream",
    *("examples", "example_stream"),
    *("dead", "gates", "probes", "quarantine", "reuse", "workers"),
)
"""Files of `pipeline/` whose worker processes must not pay for torch: about 200 MB and a second each."""

MAX_LINES = 400
MIN_LINES = 80
SMALL = {
    "model/errors.py": "one exception that everything else imports",
    "model/distillation.py": "one loss, and the ranking in it",
    "model/pooling.py": "one operation that three stages share",
    "model/rotary.py": "one table of angles",
    "model/memory.py": "one formula",
    "pipeline/keys.py": "the keys that survey, table and dead letters share",
    "jobs/model_commands.py": "the parsers of one family of commands",
    "jobs/pretrain.py": "what the loop and the group, which serve other jobs too, leave to pretraining",
    "jobs/cluster_commands.py": "the parsers of one family of commands",
}
"""Files under MIN_LINES, and why they are a subject of their own."""

UNTESTED_ALONE = {"model/errors.py": "an exception without a branch; every test of bad input goes through it"}
CROSS_CUTTING = {
    *("test_layout.py", "conftest.py", "seaweed.py", "clusters.py", "pages.py", "browser.py"),
    *("test_autoscaling.py", "test_docs_cluster.py", "test_manifests.py", "test_preemption.py"),
    *("nights.py", "faults.py", "strikes.py", "test_faults.py", "test_faults_cluster.py", "test_faults_ray_data.py"),
    *("test_drop_in.py", "test_nights.py", "test_secrets.py", "test_security.py", "test_two_runs.py"),
    "test_benchmarks_gpu.py",
    *("test_corpus.py", "test_make_small.py"),
}
"""Files in `tests/` that belong to no single source file."""

BANNED_NAMES = {"util", "utils", "common", "base", "manager", "helper", "helpers", "misc", "registry"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file. `from ray import train` gives both `ray` and `ray.train`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: relative import; write the package's name"
            assert node.module
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", OURS)
def test_imports_go_one_way(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    wrong = []
    for path in sources(folder):
        for line, module in imported(path):
            top = module.split(".")[0]
            if allowed is not ANYTHING and top not in allowed and top not in sys.stdlib_module_names:
                wrong.append(f"{label(path)}:{line} imports {module}")
            if any(module == bar or module.startswith(bar + ".") for bar in BARRED.get(folder, ())):
                wrong.append(f"{label(path)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_package_that_the_installation_names() -> None:
    listed = [
        line
        for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        if line.startswith("packages =")
    ]
    assert listed == ["packages = [" + ", ".join(f'"{name}"' for name in OURS) + "]"]
    for folder in OURS:
        assert (ROOT / folder / "__init__.py").is_file()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_nothing_imports_tests_or_benchmarks() -> None:
    for path in sources(*OURS):
        for line, module in imported(path):
            assert module.split(".")[0] not in ("tests", "benchmarks"), f"{label(path)}:{line}"


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level modules in a fresh interpreter after importing `modules` from the checkout."""
    code = f"import sys, {', '.join(modules)}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("stage", CPU_STAGES)
def test_cpu_stages_load_no_torch(stage: str) -> None:
    assert "torch" not in loaded_by([f"pipeline.{stage}"])


def test_configuration_loads_neither_torch_nor_ray() -> None:
    assert not {"torch", "ray", "pyarrow"} & loaded_by(["model.config", "model.errors", "model.folder"])


@pytest.mark.parametrize("path", sources(*OURS, "tests", "benchmarks"), ids=label)
def test_file_is_one_readable_subject(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= MAX_LINES, f"{label(path)} has {lines} lines; split it by subject (at most {MAX_LINES})"
    owned = path.relative_to(ROOT).parts[0] in OURS
    if owned and path.name != "__init__.py" and label(path) not in SMALL:
        assert lines >= MIN_LINES, f"{label(path)} has {lines} lines; merge it, or name it in SMALL with the reason"
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{label(path)} needs a module docstring that says what it owns"
    if owned:
        assert text.isascii(), f"{label(path)} is not ASCII; write escapes"


@pytest.mark.parametrize("path", sources(*OURS), ids=label)
def test_file_name_says_its_subject(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert not BANNED_NAMES & set(parts), f"{label(path)}: a name that says nothing"
    assert parts[-1] == "__init__" or parts[-1] not in sys.stdlib_module_names, (
        f"{label(path)} is named like a standard module"
    )


@pytest.mark.parametrize("path", sources(*OURS), ids=label)
def test_import_has_no_side_effect(path: Path) -> None:
    """No bare call at the top level of a module: nothing is configured, opened, registered or printed by an import."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        bare_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        assert not bare_call, f"{label(path)}:{node.lineno} runs when the module is imported"


def name_of_test(path: Path) -> str:
    """model/encoder.py -> test_model_encoder.py."""
    return "test_" + "_".join(path.relative_to(ROOT).with_suffix("").parts) + ".py"


def test_every_source_file_has_its_test_file() -> None:
    wanted = {
        name_of_test(path): label(path)
        for path in sources(*OURS)
        if path.name != "__init__.py" and label(path) not in UNTESTED_ALONE
    }
    present = {path.name for path in (ROOT / "tests").glob("*.py")}
    missing = [f"{source} has no tests/{name}" for name, source in wanted.items() if name not in present]
    assert not missing, "\n".join(missing)


def test_every_test_file_names_its_source() -> None:
    """A test file is called after one source file; a second one on it adds a word: test_model_encoder_gpu.py."""
    known = {name_of_test(path).removesuffix(".py") for path in sources(*OURS) if path.name != "__init__.py"}
    strays = [
        path.name
        for path in (ROOT / "tests").glob("*.py")
        if path.name not in CROSS_CUTTING
        and not any(path.stem == name or path.stem.startswith(name + "_") for name in known)
    ]
    assert not strays, f"{strays}: named after no source file, and not in CROSS_CUTTING"


def test_readme_names_every_source_file() -> None:
    """The tree in the README has one line a file: none forgotten, none that is gone."""
    tree, folder = set(), ""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        elif name.endswith(".py") and line.startswith("  "):
            tree.add(folder + name)
    assert tree == {label(path) for path in sources(*OURS) if path.name != "__init__.py"}
