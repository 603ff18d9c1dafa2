"""`Embedder` against sentence-transformers on hostile texts, and a text's vector against itself in other company."""

import json
import platform
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from model import Embedder
from model.batch import PackedBatch, pack
from model.embedder import choose_dtype, keep_freed_memory, scrub
from model.encoder import Encoder
from model.errors import InputError
from model.folder import load_tokenizer

TOLERANCE = 1e-5
BFLOAT16_ALONE = 3e-3
"""Largest difference of a component of a unit vector, alone against in company, in bfloat16; see docs/numerics.md."""

HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "one character": "a",
    "NUL": "before\x00after\x00",
    "right to left": "\u0645\u0631\u062d\u0628\u0627 \u202e\u05e9\u05dc\u05d5\u05dd\u202c",
    "emoji": "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea \u2764\ufe0f" * 3,
    "combining": "e\u0301" * 40,
    "special tokens as text": "[CLS] [MASK] [SEP] [PAD]",
    "noncharacters": "\ufffe\uffff\U0010ffff",
    "padded with blanks": "   a   ",
    "long": " ".join(SENTENCES * 40),
    "one long word": "x" * 5000,
    **{f"sentence {i}": sentence for i, sentence in enumerate(SENTENCES)},
}
TEXTS = list(HOSTILE.values())
LONE = ["a\ud800b", "\udfff", "\ud83d", "fine \ud83d\ude00"]


@pytest.fixture(scope="module")
def ours(tiny_model_folder: Path) -> Embedder:
    return Embedder(tiny_model_folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(tiny_model_folder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(tiny_model_folder), device="cpu", local_files_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_name": "query"},
        {"prompt_name": "document"},
        {"prompt": "any words: "},
        {"truncate_dim": 24, "normalize_embeddings": True},
        {"normalize_embeddings": False},  # their default: a Normalize module acts all the same
    ],
    ids=str,
)
def test_hostile_texts_as_sentence_transformers(ours: Embedder, theirs: Any, options: dict[str, Any]) -> None:
    got, expected = ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options)
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    worst = dict(zip(HOSTILE, np.abs(got - expected).max(axis=1)))
    assert max(worst.values()) < TOLERANCE, worst


def test_lone_surrogates_are_replaced(ours: Embedder, theirs: Any) -> None:
    """sentence-transformers cannot take them; replaced by U+FFFD it can. A pair written as two halves is whole."""
    assert [scrub(t) for t in LONE] == ["a\ufffdb", "\ufffd", "\ufffd", "fine \U0001f600"]
    np.testing.assert_allclose(ours.encode(LONE), theirs.encode([scrub(t) for t in LONE]), rtol=0, atol=TOLERANCE)


def test_a_prompt_that_ends_in_half_a_character(ours: Embedder) -> None:
    np.testing.assert_allclose(ours.encode(["x"], prompt="\ud800")[0], ours.encode("\ufffdx"), rtol=0, atol=TOLERANCE)


def test_a_single_string_gives_a_single_vector(ours: Embedder) -> None:
    one = ours.encode(SENTENCES[0], prompt_name="query")
    assert one.shape == (64,)
    np.testing.assert_allclose(one, ours.encode(SENTENCES, prompt_name="query")[0], rtol=0, atol=TOLERANCE)


def test_no_text_gives_no_vector(ours: Embedder) -> None:
    assert ours.encode([]).shape == (0, 64)
    assert ours.encode([], truncate_dim=8).shape == (0, 8)


def test_different_texts_get_different_vectors(ours: Embedder) -> None:
    """Else every comparison in this file would be idle."""
    cosine = ours.encode(SENTENCES) @ ours.encode(SENTENCES).T
    assert cosine[~np.eye(len(SENTENCES), dtype=bool)].max() < 0.98


def test_neither_order_nor_budget_matters(ours: Embedder) -> None:
    expected = ours.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(ours.encode([TEXTS[i] for i in order]), expected[order], rtol=0, atol=TOLERANCE)
    for budget in (1, 40, 600, 100_000):
        got = ours.encode(TEXTS, tokens_per_batch=budget)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("most", [600, 40])
def test_a_batch_that_does_not_fit_is_halved(ours: Embedder, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of so many tokens; a text that fills it by itself is the caller's to hear of."""
    expected, embed, tried = ours.encode(TEXTS), ours.embed_segments, []

    def small(batch: PackedBatch, *ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tried.append(batch.num_tokens)
        if batch.num_tokens > most:
            raise torch.OutOfMemoryError("the device is out of memory")
        return embed(batch, *ranges)

    monkeypatch.setattr(ours, "embed_segments", small)
    if most < ours.max_tokens:
        with pytest.raises(torch.OutOfMemoryError):
            ours.encode(TEXTS)
        assert tried[-1] == ours.max_tokens
        return
    np.testing.assert_allclose(ours.encode(TEXTS), expected, rtol=0, atol=TOLERANCE)
    failed = [count for count in tried if count > most]
    assert failed
    assert all(2 * later <= earlier for earlier, later in pairwise(failed))  # what was learned holds for the rest


def test_long_texts_end_in_the_closing_token(ours: Embedder, tiny_model_folder: Path) -> None:
    ids = load_tokenizer(tiny_model_folder).encode(HOSTILE["long"]).ids
    assert len(ids) > ours.max_tokens == 512
    batch = pack([[*ids[:511], 3]])
    sums, weights = ours.embed_segments(batch, np.array([0]), np.array([512]))
    np.testing.assert_allclose(ours.encode(HOSTILE["long"]), ours.finish(sums, weights)[0], rtol=0, atol=TOLERANCE)


def in_company(embedder: Embedder, rng: np.random.Generator) -> float:
    """Largest difference of any component between a document alone and first, last, or amid others."""
    document = rng.integers(5, 400, int(rng.integers(1, 400)))
    others = [rng.integers(5, 400, int(n)) for n in rng.integers(1, 400, int(rng.integers(1, 8)))]

    def vector(place: int) -> np.ndarray:
        company = [*others[:place], document, *others[place:]] if place >= 0 else [document]
        batch = pack(company)
        start = batch.host_offsets()[max(place, 0)]
        sums, weights = embedder.embed_segments(batch, np.array([start]), np.array([start + len(document)]))
        return embedder.finish(sums, weights)[0]

    alone = vector(-1)
    places = {0, len(others), len(others) // 2}
    return max(float(np.abs(vector(place) - alone).max()) for place in places)


def test_a_vector_is_the_same_alone_first_last_and_among_others(ours: Embedder) -> None:
    rng = np.random.default_rng(1)
    assert max(in_company(ours, rng) for _ in range(40)) < TOLERANCE


def test_a_bfloat16_vector_is_nearly_the_same_in_company(tiny_model_folder: Path) -> None:
    """Only the shapes of the products differ, and with them, maybe, the order of their sums."""
    embedder, rng = Embedder(tiny_model_folder, dtype="bfloat16"), np.random.default_rng(1)
    assert max(in_company(embedder, rng) for _ in range(40)) < BFLOAT16_ALONE


@pytest.mark.parametrize("dtype, cosine", [("bfloat16", 0.999), ("float16", 0.9999)])
def test_half_precision_is_close_to_float32(ours: Embedder, tiny_model_folder: Path, dtype: str, cosine: float) -> None:
    half = Embedder(tiny_model_folder, dtype=dtype).encode(TEXTS)
    assert half.dtype == np.float32
    assert (half * ours.encode(TEXTS)).sum(axis=1).min() > cosine


def test_segments_are_parts_of_a_batch(ours: Embedder) -> None:
    """Ranges overlap, repeat and come in any order; their sums add up."""
    batch = pack([[2, *range(10, 60), 3], [2, 9, 3]])
    starts, ends = np.array([52, 0, 20, 0]), np.array([55, 20, 52, 52])
    sums, weights = ours.embed_segments(batch, starts, ends)
    assert (sums.shape, sums.dtype, weights.dtype) == ((4, 64), np.float32, np.float32)
    assert weights.tolist() == [3, 20, 32, 52]
    np.testing.assert_allclose(sums[1] + sums[2], sums[3], rtol=0, atol=1e-4)
    unit = ours.finish(sums, weights)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    raw = ours.finish(sums, weights, normalize=False, truncate_dim=5)
    np.testing.assert_allclose(raw, (sums / weights[:, None])[:, :5], rtol=1e-6)


def test_the_folder_may_set_prompt_and_dimension(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "m"))
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"default_prompt_name": "query", "truncate_dim": 16}))
    default, plain = Embedder(folder, dtype="float32"), Embedder(tiny_model_folder, dtype="float32")
    assert default.dim == 16
    expected = plain.encode(SENTENCES, prompt_name="query", truncate_dim=16)
    np.testing.assert_allclose(default.encode(SENTENCES), expected, rtol=0, atol=TOLERANCE)
    assert default.encode(SENTENCES, truncate_dim=64).shape == (4, 16)
    no_prompt = default.encode(SENTENCES, prompt="")
    np.testing.assert_allclose(no_prompt, plain.encode(SENTENCES, truncate_dim=16), rtol=0, atol=TOLERANCE)


def test_weights_stay_float32_where_rounding_would_stay(tiny_model_folder: Path) -> None:
    """Products in the compute type; embedding and norms in float32."""
    embedder = Embedder(tiny_model_folder, dtype="bfloat16")
    for name, parameter in embedder.encoder.named_parameters():
        is_product = any(part in name for part in ("Wqkv", "Wi", "Wo"))
        assert parameter.dtype == (torch.bfloat16 if is_product else torch.float32), name
        assert not parameter.requires_grad
    assert isinstance(embedder.encoder, Encoder)


def test_an_embedder_says_what_it_is(ours: Embedder) -> None:
    assert (ours.dtype, ours.dtype_reason) == (torch.float32, "asked for")
    assert ours.attention_name == "blocks" or torch.cuda.is_available()
    assert (ours.dim, ours.max_tokens, ours.pooling, ours.normalize) == (64, 512, "mean", True)
    assert len(ours.weights_hash) == len(ours.tokenizer_hash) == 32


def test_dtype_is_chosen_with_a_reason() -> None:
    dtype, reason = choose_dtype("auto", torch.device("cpu"))
    assert dtype in (torch.float32, torch.bfloat16)
    assert reason
    with pytest.raises(InputError, match="dtype 'int8' is not known; use auto, float32, bfloat16, float16"):
        choose_dtype("int8", torch.device("cpu"))


def test_an_unknown_prompt_is_refused(ours: Embedder) -> None:
    with pytest.raises(InputError, match="has no prompt 'passage'; it has document, query"):
        ours.encode(SENTENCES, prompt_name="passage")


@pytest.mark.parametrize("device, said", [("abacus", "device 'abacus' is not known"), ("cuda", "no CUDA device")])
def test_a_device_that_is_not_there(tiny_model_folder: Path, device: str, said: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match=said) as caught:
        Embedder(tiny_model_folder, device=device)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_the_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "m"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        | {"id": 400, "content": "one too many"}
    )
    spec["model"]["vocab"]["one too many"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="ids up to 400, the weights have 400 rows"):
        Embedder(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gpu_vectors_are_close_to_the_cpus(ours: Embedder, tiny_model_folder: Path, dtype: str) -> None:
    got = Embedder(tiny_model_folder, device="cuda", dtype=dtype).encode(TEXTS)
    assert (got * ours.encode(TEXTS)).sum(axis=1).min() > 0.999


def test_freed_memory_is_kept_where_the_c_library_is_glibc() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
