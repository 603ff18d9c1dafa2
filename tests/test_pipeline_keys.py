"""Keys: bytes compare as bytes, whatever stands in them; what is known, changed, and where it lies."""

import random

import numpy as np
import pyarrow as pa

from pipeline.keys import Keys, as_keys, hash_ids, is_among


def test_hashes_compare_as_bytes():
    draw = random.Random(3)
    raw = [bytes(draw.choice((0, 1, 255)) for _ in range(16)) for _ in range(300)]
    column = pa.array(raw, pa.binary(16))
    keys = as_keys(column)
    assert [k.ljust(16, b"\0") for k in np.sort(keys).tolist()] == sorted(raw)
    assert [k.ljust(16, b"\0") for k in as_keys(column[7:9]).tolist()] == raw[7:9]
    known = np.sort(keys[:150])
    assert is_among(keys, known).tolist() == [value in set(raw[:150]) for value in raw]
    assert not is_among(keys, known[:0]).any()


def test_keys_find_documents_and_their_fragments():
    names = [f"{n}" for n in range(50)]
    ids = hash_ids(pa.array(names))
    texts = hash_ids(pa.array([f"text {n}" for n in range(50)]))
    order = np.argsort(ids, kind="stable")
    keys = Keys(ids[order], texts[order], (np.arange(50) // 10)[order])
    assert keys.known(hash_ids(pa.array(["7", "70", ""]))).tolist() == [True, False, False]
    assert keys.unchanged(ids, texts).all()
    assert keys.unchanged(ids[:3], texts[1:4]).tolist() == [False] * 3
    assert keys.fragments_of(ids[[3, 4, 25]]) == {0, 2}
    assert keys.fragments_of(hash_ids(pa.array(["nobody"]))) == set()
    assert not Keys.empty().known(ids).any()
    assert not Keys.empty().unchanged(ids, texts).any()
