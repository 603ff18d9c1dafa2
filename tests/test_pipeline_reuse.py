"""Chunks that stayed the same keep their vectors, everything else is as if it had been embedded anew."""

import json
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_embedding import documents_of
from test_pipeline_table import RECIPE

from pipeline.chunks import ChunkingConfig
from pipeline.keys import KEY, Keys
from pipeline.quarantine import QUARANTINED
from pipeline.reuse import FOUND, Former, put_back, take_found
from pipeline.table import CHUNK_HASH, EmbeddingTable
from pipeline.tokens import TokenizeStage
from pipeline.work import POSITION
from pipeline.workers import EmbedAndWrite, Job, Workers

CLOSE = 1e-5
SENTENCE = "vectors stay where chunks of a document say what they said on the night before"
WORDS = SENTENCE.split()
ALONE = ChunkingConfig("both", 110, "none")


def paragraphs(count: int, seed: int = 0) -> list[str]:
    """87 to 104 tokens each, so that each is a chunk of ALONE."""
    draw = np.random.default_rng(seed)
    return [f"Paragraph {i}: " + " ".join(draw.choice(WORDS, 26)) + ".\n\n" for i in range(count)]


class Nights:
    """A table that is written by the worker's own code, in this process."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        chunking: ChunkingConfig = ALONE,
        prompt: str = "",
        vector_type: str = "float32",
    ) -> None:
        recipe = replace(
            RECIPE, granularity=chunking.granularity, context=chunking.context, dim=64, vector_type=vector_type
        )
        recipe = replace(recipe, chunk_tokens=chunking.chunk_tokens if chunking.chunked else None)
        self.table = EmbeddingTable.create(str(folder), recipe, model="m", carried=[pa.field("year", pa.int64())])
        self.tokenize = TokenizeStage(model, chunking, prompt)
        self.embedding = {"model_path": str(model), "dtype": "float32", "vector_type": vector_type}
        self.chunking, self.prompt = chunking, prompt

    def worker(self, removals: Keys) -> EmbedAndWrite:
        job = Job(
            uri=self.table.uri,
            run="r",
            columns=None,  # type: ignore[arg-type]
            chunking=self.chunking,
            prompt=self.prompt,
            embedding=self.embedding,
            workers=Workers(1, "cpu", 1, None, 10_000),
            commit_every_s=0,
            former=Former.of(self.table, removals),
        )
        return EmbedAndWrite(job, None)

    def night(self, texts: list[str], worker: EmbedAndWrite | None = None) -> dict:
        """Embed documents d0, d1, ... in place of those of that name; what the worker says of it."""
        documents = documents_of(texts)
        positions = pa.array(range(len(texts)), pa.int64())
        tokens = self.tokenize(documents.append_column(POSITION, positions))
        keys = self.table.keys()
        worker = worker or self.worker(keys)
        if worker.job.former:
            tokens = take_found(tokens, worker.job.former)
        (row,) = worker(tokens).to_pylist()
        ids = np.frombuffer(row["ids"], KEY)
        self.table.commit([row["fragment"]] if row["fragment"] else [], ids[keys.known(ids)], keys, run="r")
        return row

    def rows(self) -> list[dict]:
        rows = self.table.dataset.to_table().to_pylist()
        return sorted(rows, key=lambda row: (row["document_id"], row["chunk"]))


def assert_as_new(nights: Nights, fresh: Nights) -> None:
    """Both tables hold the same rows, the vectors within what other batches change."""
    assert nights.table.schema.equals(fresh.table.schema)
    found, expected = nights.rows(), fresh.rows()
    assert [{**row, "vector": None} for row in found] == [{**row, "vector": None} for row in expected]
    step = 1 if nights.table.recipe.vector_type == "int8" else CLOSE
    vectors, others = (np.array([row["vector"] for row in rows], np.float32) for rows in (found, expected))
    np.testing.assert_allclose(vectors, others, atol=step)


@pytest.mark.parametrize("vector_type", ["float32", "float16", "int8"])
def test_one_changed_sentence_encodes_one_chunk(tmp_path, tiny_model_folder, vector_type):
    chunking = replace(ALONE, granularity="chunk")
    nights = Nights(tmp_path / "a", tiny_model_folder, chunking, vector_type=vector_type)
    old = paragraphs(20)
    first = nights.night(["".join(old), "another document"])
    assert (first["reused"], first["chunks"]) == (0, 21)
    before = {row[CHUNK_HASH]: row["vector"] for row in nights.rows()}
    new = [*old[:7], old[7].replace("Paragraph 7:", "Another beginning:"), *old[8:]]
    second = nights.night(["".join(new)])
    assert (second["reused"], second["chunks"]) == (19, 20)
    assert second["tokens"] < 1.5 * first["tokens"] / 21
    kept = [row for row in nights.rows() if row["document_id"] == "d0" and row[CHUNK_HASH] in before]
    assert len(kept) == 19
    assert all(row["vector"] == before[row[CHUNK_HASH]] for row in kept)  # copied as they are stored
    fresh = Nights(tmp_path / "b", tiny_model_folder, chunking, vector_type=vector_type)
    fresh.night(["".join(new), "another document"])
    assert_as_new(nights, fresh)


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_moved_doubled_and_dropped_chunks(tmp_path, tiny_model_folder, prompt):
    nights = Nights(tmp_path / "a", tiny_model_folder, prompt=prompt)
    old = paragraphs(8)
    nights.night(["".join(old), "".join(paragraphs(3, seed=1)), "stays"])
    # Of d0 the first goes to the end, one is there twice, one is new and there twice, one is gone; d1 is d0's again.
    new = [*old[1:4], old[2], "New: " + old[5], "New: " + old[5], old[6], old[7], old[0]]
    texts = ["".join(new), "".join(old[3:6])]
    row = nights.night(texts)
    chunks = [r for r in nights.rows() if r["document_id"] in ("d0", "d1") and r["chunk"] >= 0]
    assert len(chunks) == row["chunks"] - 2 == 12
    # Not the two new ones; with a prompt the first token of the text is another one after it than within the text.
    assert row["reused"] == 10 if not prompt else 7 <= row["reused"] <= 10
    assert [r[CHUNK_HASH] is None for r in nights.rows()] == [r["chunk"] == -1 for r in nights.rows()]
    fresh = Nights(tmp_path / "b", tiny_model_folder, prompt=prompt)
    fresh.night([*texts, "stays"])
    assert_as_new(nights, fresh)
    assert [r["char_start"] for r in chunks[:3]] == [0, len(new[0]), len(new[0] + new[1])]


def test_a_document_of_known_chunks_only_needs_no_encoder(tmp_path, tiny_model_folder):
    nights = Nights(tmp_path / "a", tiny_model_folder, replace(ALONE, granularity="chunk"))
    old = paragraphs(4)
    nights.night(["".join(old)])
    row = nights.night(["".join(old[:3])])
    assert (row["tokens"], row["reused"], row["chunks"]) == (0, 3, 3)
    assert len(np.frombuffer(row["positions"], np.int64)) == 1
    assert [r["chunk"] for r in nights.rows()] == [0, 1, 2]


@pytest.mark.parametrize(
    "chunking", [ChunkingConfig("both", 110, "late"), ChunkingConfig("document")], ids=["late", "document"]
)
def test_vectors_that_know_their_document_are_not_reused(tmp_path, tiny_model_folder, chunking):
    nights = Nights(tmp_path / "a", tiny_model_folder, chunking)
    assert CHUNK_HASH not in nights.table.schema.names
    assert Former.of(nights.table, Keys.empty()) is None
    text = "".join(paragraphs(4))
    first = nights.night([text])
    second = nights.night([text + "."])
    assert second["reused"] == 0
    assert second["tokens"] >= first["tokens"]


def test_a_carried_column_of_that_name_is_no_hash(tmp_path):
    carried = [pa.field(CHUNK_HASH, pa.string())]
    table = EmbeddingTable.create(str(tmp_path / "t"), RECIPE, model="m", carried=carried)
    assert Former.of(table, Keys.empty()) is None


def test_a_former_vector_that_is_not_finite_is_made_anew(tmp_path, tiny_model_folder):
    nights = Nights(tmp_path / "a", tiny_model_folder)
    old = paragraphs(4)
    nights.night(["".join(old)])
    rows = nights.table.dataset.to_table()
    vectors = np.stack(rows["vector"].to_numpy())
    vectors[2] = np.nan
    broken = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 64)
    rows = rows.set_column(
        rows.column_names.index("vector"), rows.schema.field("vector"), broken.cast(rows["vector"].type)
    )
    lance.write_dataset(rows, nights.table.uri, mode="overwrite")
    nights.table = EmbeddingTable.open(nights.table.uri)
    row = nights.night(["".join([*old, "One more."])])
    assert row["reused"] in (2, 3)
    assert np.isfinite([r["vector"] for r in nights.rows()]).all()


def test_what_is_known_of_a_dead_document_is_left_out(tmp_path, tiny_model_folder):
    nights = Nights(tmp_path / "a", tiny_model_folder)
    texts = ["".join(paragraphs(4)), "".join(paragraphs(4, seed=1)), "".join(paragraphs(4, seed=2))]
    nights.night(texts)
    before = nights.rows()
    worker = nights.worker(nights.table.keys())

    class FailsOnce:
        """The encoder, for which one document is dead."""

        def __init__(self) -> None:
            self.stage = worker.stage

        def embed(self, tokens):
            names = tokens["document_id"].to_pylist()
            errors = [QUARANTINED if name == "d1" else None for name in names]
            lists = [name for name in tokens.column_names if name.startswith("row_")]
            for name in lists:
                values = [v if e is None else [] for v, e in zip(tokens[name].to_pylist(), errors, strict=True)]
                at = tokens.column_names.index(name)
                tokens = tokens.set_column(at, name, pa.array(values, tokens[name].type))
            at = tokens.column_names.index("error")
            yield from self.stage.embed(tokens.set_column(at, "error", pa.array(errors, pa.string())))

    worker.stage = FailsOnce()
    row = nights.night([text + "And more." for text in texts], worker)
    assert [dead["document_id"] for dead in json.loads(row["dead"])] == ["d1"]
    assert row["reused"] >= 6
    assert [r for r in nights.rows() if r["document_id"] == "d1"] == [r for r in before if r["document_id"] == "d1"]
    assert np.frombuffer(row["positions"], np.int64).tolist() == [0, 2]


def test_rows_join_in_the_order_of_documents_and_chunks(tmp_path, tiny_model_folder):
    nights = Nights(tmp_path / "a", tiny_model_folder)
    old = [paragraphs(5, seed) for seed in range(3)]
    nights.night(["".join(text) for text in old])
    former = Former.of(nights.table, nights.table.keys())
    assert former is not None
    hashes, vectors = former.chunks_of(pa.chunked_array([["d0", "d2", "unheard of"]]))
    assert len(hashes) == len(vectors) == 10
    assert (hashes[1:] > hashes[:-1]).all()
    assert len(former.chunks_of(pa.chunked_array([["unheard of"]]))[0]) == 0
    tokens = nights.tokenize(documents_of(["".join(text[:2] + text[3:]) for text in old]))
    taken = take_found(tokens, former)
    assert [len(found) for found in taken[FOUND].to_pylist()] == [4, 4, 4]
    assert taken["row_chunk"].to_pylist() == [[-1]] * 3
    stage = nights.worker(nights.table.keys()).stage
    (part,) = stage.embed(taken.drop_columns([name for name in taken.column_names if name.startswith("nightloom.")]))
    rows, reused = put_back(part.rows, taken.slice(0, 3), ["d1"])
    keys = set(zip(rows["document_id"].to_pylist(), rows["chunk"].to_pylist(), strict=True))
    assert reused == 8
    assert len(keys) == len(rows) == 11
    assert rows["chunk"].to_pylist() == [-1, 0, 1, 2, 3, -1, -1, 0, 1, 2, 3]
