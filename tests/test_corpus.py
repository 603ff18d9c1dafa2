"""Training pairs out of structure: what a page's sections are, which sentences stay out, how a pair is drawn."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from corpus.pairs import NEAR, RUN, TWIN, Pairs, runs, sentences, told_headings, write_units
from corpus.structure import page_sections, split_of

PAGE = """<html><head><title>no</title></head><body><h1>2.1. Of <em>foxes</em>&para;</h1><p>The fox is quick.</p>
<script>no</script><h2>Dens</h2><p>A fox digs a den under the roots of an old tree, and sleeps there.</p><p>Night.</p>
<div class="sphinxsidebar"><p>no</p></div></body></html>"""


def section(heading: str, text: str, document: str = "page", split: str = "train") -> dict[str, str]:
    names = {"source": "git-doc", "document": document, "title": heading, "heading": heading}
    return names | {"text": text, "split": split}


def test_a_page_falls_into_its_headings_without_furniture() -> None:
    found = list(page_sections("git-doc", "page", PAGE))
    assert [(s.title, s.heading) for s in found] == [("Of foxes", "Of foxes"), ("Of foxes", "Dens")]
    assert found[0].text == "The fox is quick."
    assert found[1].text.split("\n\n")[-1] == "Night."


def test_a_split_follows_from_the_name() -> None:
    splits = [split_of("git-doc", f"page {i}") for i in range(1000)]
    assert splits == [split_of("git-doc", f"page {i}") for i in range(1000)]
    assert 60 < splits.count("test") < 140
    assert 60 < splits.count("choice") < 140


def test_a_heading_that_many_pages_have_carries_the_title() -> None:
    rows = [section(h, "text", f"page {i}") for i in range(30) for h in (f"git-{i}", "OPTIONS")]
    assert [heading for _, heading in told_headings(rows)][:2] == ["git-0", "git-0 OPTIONS"]


def test_long_sentences_come_in_pieces() -> None:
    two = "A fox runs by here. It sleeps in dens."
    assert list(sentences(two)) == ["A fox runs by here.", "It sleeps in dens."]
    assert [len(s.split()) for s in sentences(" ".join(["word"] * 100))] == [40, 40, 20]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("units")
    words = ["fox", "dog", "night", "cluster", "vector", "window", "crash", "token", "lazy", "quick", "den", "tree"]
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"The {' '.join(rng.choice(words, 9))}." for _ in range(length))

    held = text(1)
    rows = [section(f"Section {i}", text(5), f"page {i}") for i in range(20)]
    rows.append(section("Copied", f"{text(2)} {held}", "copy"))
    rows.append(section("Held out", text(3), "other", "test"))
    pq.write_table(pa.Table.from_pylist(rows), folder / "sections.parquet")
    write_units(str(folder / "sections.parquet"), str(tiny_tokenizer_folder), str(folder / "units.npz"), [held])
    return folder / "units.npz", held


def test_held_out_sentences_are_dropped(drawn: tuple[Path, str], tiny_tokenizer_folder: Path) -> None:
    units, held = drawn
    assert len(list(runs(held))) == len(held.split()) - RUN + 1
    with np.load(units) as arrays:
        assert len(arrays["offsets"]) - 1 == 20 * 5 + 2
        tokenizer = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
        assert held not in tokenizer.decode(arrays["tokens"].tolist())


def test_a_batch_follows_from_seed_and_step(drawn: tuple[Path, str], tiny_tokenizer_folder: Path) -> None:
    pairs = Pairs(str(drawn[0]), str(tiny_tokenizer_folder))
    first, again = pairs.batch(7, 3, 40), pairs.batch(7, 3, 40)
    assert all(np.array_equal(a, b) for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True))
    other = pairs.batch(7, 4, 40)
    assert any(not np.array_equal(a, b) for a, b in zip(first[1], other[1], strict=True))
    assert len(first[0]) == len(first[1]) == 40
    assert all(0 < len(passage) <= 160 + 24 for passage in first[1])


def test_near_places_are_hard_to_tell_apart_and_not_the_same(
    drawn: tuple[Path, str], tiny_tokenizer_folder: Path
) -> None:
    pairs = Pairs(str(drawn[0]), str(tiny_tokenizer_folder))
    (source,) = pairs.names
    for seed in range(20):
        places = pairs.near(source, np.random.default_rng(seed), 160)
        sections = np.searchsorted(pairs.starts, [first for first, _, _ in places])
        assert 1 < len(set(sections)) == len(places) <= NEAR
        alike = pairs.sketches[sections] @ pairs.sketches[sections].T
        assert alike[~np.eye(len(places), dtype=bool)].max() < TWIN
        assert alike[0, 1:].tolist() == sorted(alike[0, 1:], reverse=True)
    first, again = (pairs.batch(7, 3, 40, near=1.0) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True))
    assert first[2] == [source] * 40


def test_a_long_section_is_cut_into_pieces_without_its_heading(
    drawn: tuple[Path, str], tiny_tokenizer_folder: Path
) -> None:
    pairs = Pairs(str(drawn[0]), str(tiny_tokenizer_folder))
    (source,) = pairs.names
    pairs.starts = pairs.starts[[0, -1]]  # one section, of everything
    pairs.sections[source], pairs.chances[source] = np.array([0]), np.array([1.0])
    pieces = pairs.near(source, np.random.default_rng(0), 40)
    assert len(pieces) == NEAR
    assert pieces[0][0] == 0
    assert pieces[-1][1] == pairs.starts[-1]
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    assert all(len(heading) == 0 for _, _, heading in pieces)


def test_thinning_keeps_whole_words(drawn: tuple[Path, str], tiny_tokenizer_folder: Path) -> None:
    pairs = Pairs(str(drawn[0]), str(tiny_tokenizer_folder))
    ids = pairs.text(range(3))
    left = pairs.thinned(ids, 0.4, np.random.default_rng(0))
    assert 2 < len(left) < len(ids)
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
    assert set(tokenizer.decode(left.tolist()).split()) <= set(tokenizer.decode(ids.tolist()).split())
