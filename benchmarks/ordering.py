"""Does sentence ordering help a small model, or hurt it? Two arms, the same seeds, on the bundled corpus.

    python -m benchmarks.ordering [--seeds 2] [--tokens 400000] [--weight 0.5]

Each arm trains the shape of jobs/configs/tiny.toml with the bundled tokenizer; one has ordered and swapped pairs with a
head on [CLS] beside the masked tokens, the other masked tokens alone. Both are asked for the same held-out masked
tokens in plain sequences, and the one with pairs for their order, on held-out pairs. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.setting import HOME, environment, keep, say
from jobs.configuration import PrepareConfiguration, load
from jobs.objective import LanguageModelling
from jobs.phases import ObjectiveSettings, PretrainConfiguration, plan_phases
from jobs.prepare import run_prepare
from jobs.replicas import Replicas
from jobs.state import begin
from jobs.training import Signals, resume
from pipeline.shards import TokenShards

ROOT = HOME.parent
BIN = 2048


def settings_of(
    tokens: str, output: str, options: argparse.Namespace, seed: int, weight: float
) -> PretrainConfiguration:
    phase = {
        "tokens": options.tokens,
        "max_tokens": 256,
        "tokens_per_bin": BIN,
        "tokens_per_step": BIN,
        "learning_rate": 3e-3,
        "warmup_tokens": options.tokens // 20,
        "decay_tokens": options.tokens // 4,
    }
    given = {"tokens": tokens, "output": output, "seed": seed, "objective.ordering_weight": weight}
    given |= {f"phases.only.{name}": value for name, value in phase.items()}
    given |= {"keep.checkpoint_every": 100_000, "keep.evaluate_every": 0, "work.device": "cpu"}
    given |= {f"model.{name}": value for name, value in options.shape.items()}
    return load(PretrainConfiguration, file=None, sets=(), given=given)


def train(tokens: str, options: argparse.Namespace, seed: int, weight: float) -> dict[str, Any]:
    """One run of an arm; what it says of held-out text."""
    with tempfile.TemporaryDirectory(prefix="nightloom-ordering-") as output:
        settings = settings_of(tokens, output, options, seed, weight)
        shards, replicas, phases = TokenShards.open(tokens), Replicas(), plan_phases(settings)
        state = begin(settings, shards.manifest, replicas)
        objective = LanguageModelling(shards, settings.objective)
        result = resume(settings, phases, objective, state, replicas, Signals())
        # Plain sequences for both arms: with pairs, documents are cut in another way.
        plain = plan_phases(settings_of(tokens, output, options, seed, 0.0))[0]
        asked = LanguageModelling(shards, ObjectiveSettings())
        found = asked.evaluate(state, replicas, asked.held_out(plain, replicas))
        pairs = objective.evaluate(state, replicas, objective.held_out(phases[0], replicas)) if weight else {}
    return {"seed": seed, "weight": weight, "steps": result["step"]} | {
        name: round(value, 4) for name, value in (found | {k: v for k, v in pairs.items() if "ordering" in k}).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=400_000, help="nominal tokens of a run")
    parser.add_argument("--weight", type=float, default=0.5, help="of ordering, in the arm that has it")
    parser.add_argument("--token-shards", default="", help="prepared ones; by default the bundled corpus's are made")
    parser.add_argument("--tag", default="", help="a word more in the record's name")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    options = parser.parse_args()
    options.shape = {
        "preset": "ettin-17m",
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_layers": 4,
        "num_heads": 2,
    }
    record: dict[str, Any] = {"benchmark": "ordering", "tag": options.tag, "environment": environment()}
    record |= {"tokens": options.tokens, "weight": options.weight, "shape": options.shape, "runs": []}
    with tempfile.TemporaryDirectory(prefix="nightloom-ordering-tokens-") as folder:
        tokens = options.token_shards
        if not tokens:
            tokens = f"{folder}/tokens"
            given = {"source": str(ROOT / "corpus" / "documents.parquet"), "tokens": tokens, "heldout": 0.1}
            given |= {"tokenizer": str(ROOT / "models" / "nightloom-small")}
            run_prepare(load(PrepareConfiguration, file=None, sets=(), given=given))
        for seed in range(options.seeds):
            for weight in (0.0, options.weight):
                record["runs"].append(train(tokens, options, seed, weight))
                say(str(record["runs"][-1]))
    print("| ordering weight | held-out masked-token loss, by seed | mean | ordering accuracy |\n|---|---|---:|---:|")
    for weight in (0.0, options.weight):
        runs = [run for run in record["runs"] if run["weight"] == weight]
        losses = [run["heldout_loss"] for run in runs]
        right = [run["heldout_ordering_accuracy"] for run in runs if "heldout_ordering_accuracy" in run]
        accuracy = f"{statistics.mean(right):.1%}" if right else ""
        print(f"| {weight} | {', '.join(map(str, losses))} | {statistics.mean(losses):.4f} | {accuracy} |")
    say(f"kept in {keep(record, options.out)}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
