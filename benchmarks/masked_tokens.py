"""What does a trained model know about masked tokens, beside counts of words?

    python -m benchmarks.masked_tokens TOKENS [--model NAME=FOLDER ...] [--max-tokens 512 4096] [--rate 0.2]

TOKENS is what `nightloom prepare` wrote. Every model is asked for the same held-out masked tokens, whatever the length
that documents are cut to: masks follow the place in the document. Beside it, from the training share: unigrams, an
interpolated bigram (Kneser-Ney) that is told the token before, and one on both sides that is told the tokens before and
after, masked or not: they are told more than the model is. Losses are means in nats, with 95 % intervals by bootstrap
over documents, and by place in the document. The last line is JSON.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.setting import HOME, environment, keep, say
from jobs.objective import on_device
from jobs.replicas import Replicas
from model.folder import read_folder
from model.heads import MaskedLanguageModel
from model.weights import load_model
from pipeline.masking import MaskingConfig
from pipeline.shards import TRAIN, TokenShards
from pipeline.stream import Bin, StreamConfig, TokenStream

DISCOUNT = 0.75
PLACES = (0, 512, 1024, 2048, 4096)
"""Where buckets of places in the document begin."""


@dataclass(frozen=True)
class Asked:
    """Held-out masked tokens in the order of their documents and places. M of them."""

    documents_M: np.ndarray
    places_M: np.ndarray
    targets_M: np.ndarray
    before_M: np.ndarray
    """What stands before it, in truth; a special token at the edge of a sequence."""
    after_M: np.ndarray
    losses_M: np.ndarray
    """What was lost there, where a model was asked."""

    def only(self, chosen: np.ndarray) -> "Asked":
        return Asked(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def ask(bins: Sequence[Bin], model: MaskedLanguageModel | None = None) -> Asked:
    """The masked tokens of some bins, and a model's losses there."""
    parts: list[tuple[np.ndarray, ...]] = []
    for item in bins:
        clear_T = item.tokens_T.copy()
        clear_T[item.masked_M] = item.targets_M
        documents_T = np.repeat(item.documents_S, np.diff(item.cu_seqlens))
        losses_M = np.zeros(len(item.masked_M))
        if model is not None:
            batch, masked, targets, _ = on_device(item, Replicas())
            with torch.inference_mode():
                losses_M = F.cross_entropy(model(batch, masked).float(), targets, reduction="none").numpy()
        m = item.masked_M  # never at an edge: special tokens are not masked
        parts.append((documents_T[m], item.positions_T[m], item.targets_M, clear_T[m - 1], clear_T[m + 1], losses_M))
    joined = Asked(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return joined.only(np.lexsort((joined.places_M, joined.documents_M)))


class Counts:
    """Unigrams and bigrams of the training share."""

    def __init__(self, shards: TokenShards) -> None:
        self.size = shards.manifest.vocab_size
        self.unigrams = np.zeros(self.size, np.int64)
        pairs = []
        for entry in shards.manifest.shards[TRAIN]:
            shard = shards.shard(entry)
            tokens_N = np.asarray(shard.tokens_N, np.int64)
            self.unigrams += np.bincount(tokens_N, minlength=self.size)
            within = np.ones(len(tokens_N), bool)
            within[shard.offsets_D[1:][:-1]] = False  # the first token of a document follows nothing
            pairs.append((tokens_N[:-1] * self.size + tokens_N[1:])[within[1:]])
        self.pairs, self.counts = np.unique(np.concatenate(pairs), return_counts=True)
        first, second = self.pairs // self.size, self.pairs % self.size
        self.total, self.kinds = np.bincount(first, self.counts, self.size), np.bincount(first, minlength=self.size)
        # How many different tokens one follows, a little for those that follow none.
        self.lower = (np.bincount(second, minlength=self.size) + 0.5) / (len(self.pairs) + 0.5 * self.size)

    def unigram(self) -> np.ndarray:
        """Probability of every token, one added to each count."""
        return (self.unigrams + 1) / (self.unigrams.sum() + self.size)

    def bigram(self, given: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Kneser-Ney probabilities of tokens after others; arrays of one shape."""
        wanted = given * self.size + token
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == wanted, self.counts[at], 0)
        some = np.maximum(self.total[given], 1)
        rest = np.where(self.total[given] > 0, DISCOUNT * self.kinds[given] / some, 1.0)
        return np.maximum(seen - DISCOUNT, 0) / some + rest * self.lower[token]

    def both_sides(self, asked: Asked) -> np.ndarray:
        """Losses of p(token | before) p(after | token), normalised over the vocabulary."""
        vocabulary, losses = np.arange(self.size), np.empty(len(asked.targets_M))
        for i, (before, after, target) in enumerate(zip(asked.before_M, asked.after_M, asked.targets_M, strict=True)):
            there = self.bigram(np.full(self.size, before), vocabulary)
            there *= self.bigram(vocabulary, np.full(self.size, after))
            losses[i] = -np.log(there[target] / there.sum())
        return losses


def interval(documents_M: np.ndarray, losses_M: np.ndarray, samples: int = 1000) -> tuple[float, float, float]:
    """Mean loss a token, and its 2.5 and 97.5 percentiles where documents are drawn again."""
    _, numbers = np.unique(documents_M, return_inverse=True)
    sums, counts = np.bincount(numbers, losses_M), np.bincount(numbers)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(sums), (samples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return float(losses_M.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def summary(documents_M: np.ndarray, places_M: np.ndarray, losses_M: np.ndarray) -> dict[str, Any]:
    mean, low, high = interval(documents_M, losses_M)
    found: dict[str, Any] = {"loss": round(mean, 4), "interval": [round(low, 4), round(high, 4)], "by_place": {}}
    for start, stop in zip(PLACES, (*PLACES[1:], np.inf), strict=True):
        chosen = (places_M >= start) & (places_M < stop)
        if chosen.any():
            found["by_place"][f"from {start}"] = {
                "loss": round(float(losses_M[chosen].mean()), 4),
                "tokens": int(chosen.sum()),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER; may be repeated")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[512], help="lengths that documents are cut to")
    parser.add_argument("--rate", type=float, default=0.3, help="share of the tokens that is masked")
    parser.add_argument("--documents-over", type=int, default=0, help="only documents of more tokens than this")
    parser.add_argument("--both-sides", type=int, default=5000, help="masked tokens for the bigram on both sides")
    parser.add_argument("--curve", type=Path, help="metrics.jsonl of the run, whose losses are kept with the record")
    parser.add_argument("--tag", default="", help="a word more in the record's name")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    options = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "masked_tokens", "tag": options.tag, "environment": environment()}
    record |= {"rate": options.rate, "documents_over": options.documents_over, "losses": {}}
    shards = TokenShards.open(options.tokens)
    masking = MaskingConfig(evaluation_rate=options.rate)
    bins = {
        length: list(TokenStream(shards, StreamConfig(length, max(8192, length), masking=masking)).evaluation())
        for length in options.max_tokens
    }
    plain = ask(bins[max(bins)])
    ends = {d: plain.places_M[plain.documents_M == d].max() for d in np.unique(plain.documents_M)}
    long = np.array([ends[d] for d in plain.documents_M]) >= options.documents_over
    plain = plain.only(long)
    record["masked"], record["documents"] = len(plain.targets_M), len(np.unique(plain.documents_M))
    say(f"{record['masked']} masked tokens of {record['documents']} held-out documents")
    counts = Counts(shards)
    record["train_tokens"] = int(counts.unigrams.sum())
    p = counts.unigrams[counts.unigrams > 0] / counts.unigrams.sum()
    record["unigram_entropy"] = round(float(-(p * np.log(p)).sum()), 4)
    table = {
        "unigram": -np.log(counts.unigram()[plain.targets_M]),
        "bigram, told the token before": -np.log(counts.bigram(plain.before_M, plain.targets_M)),
    }
    for name, losses in table.items():
        record["losses"][name] = summary(plain.documents_M, plain.places_M, losses)
    some = plain.only(np.sort(np.random.default_rng(0).permutation(len(plain.targets_M))[: options.both_sides]))
    if options.both_sides:
        record["losses"]["bigrams, told both neighbours"] = summary(
            some.documents_M, some.places_M, counts.both_sides(some)
        )
    for name, folder in (item.split("=", 1) for item in options.model):
        model = load_model(read_folder(folder), "ModernBertForMaskedLM")
        assert isinstance(model, MaskedLanguageModel)
        for length in options.max_tokens:
            asked = ask(bins[length], model).only(long)
            assert np.array_equal(asked.targets_M, plain.targets_M)
            label = f"{name}, documents cut at {length}"
            record["losses"][label] = summary(asked.documents_M, asked.places_M, asked.losses_M)
            say(f"{label}: {record['losses'][label]['loss']}")
        record.setdefault("parameters", {})[name] = sum(x.numel() for x in model.parameters())
    if options.curve:
        lines = [json.loads(text) for text in options.curve.read_text().splitlines()]
        record["curve"] = [
            {key: line[key] for key in ("step", "tokens", "loss", "heldout_loss", "learning_rate")}
            for line in lines
            if line.get("heldout_loss") is not None
        ]
        record["seconds_of_steps"] = round(sum(line["seconds"] for line in lines))
    say(f"kept in {keep(record, options.out)}")
    print(
        "| | loss | 95 % | "
        + " | ".join(f"from {place}" for place in PLACES)
        + " |\n|---|---:|---|"
        + "---:|" * len(PLACES)
    )
    for name, values in record["losses"].items():
        places = [values["by_place"].get(f"from {place}", {}).get("loss", "") for place in PLACES]
        print(
            f"| {name} | {values['loss']} | {values['interval'][0]} to {values['interval'][1]} | "
            + " | ".join(map(str, places))
            + " |"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
