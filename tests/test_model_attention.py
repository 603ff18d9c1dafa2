"""Every back-end against `reference`, in float64 where it can: forward, gradients, reach of the window, isolation.

Lengths are uneven, with 1 among them and neighbours of the window and of the query block, so that an error of one at a
boundary has somewhere to show.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import BACKENDS, _to_blocks, _unfolded, attend, choose_backend, equal_runs, prepare
from model.batch import PackedBatch, pack
from model.config import QUERY_BLOCK, EncoderConfig
from model.errors import InputError
from model.patterns import Pattern, window_bias

HEADS, HEAD_SIZE = 2, 16
LENGTHS = (1, 2, 63, 64, 65, 1, 127, 128, 129, 130, 130, 257, 5)
PATTERNS = [Pattern(window, causal) for window in (None, 0, 1, 8, 64, 200) for causal in (False, True)]

# The CUDA kernels take half precision only, or lose bits to TF32; `reference` then runs on the same rounded numbers.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KERNELS = [
    pytest.param("blocks", "cpu", torch.float64, id="blocks"),
    pytest.param("blocks", "cuda", torch.float64, id="blocks-cuda", marks=[pytest.mark.gpu, cuda]),
    pytest.param("xformers", "cuda", torch.float16, id="xformers", marks=[pytest.mark.gpu, cuda]),
    pytest.param("varlen", "cuda", torch.bfloat16, id="varlen", marks=[pytest.mark.gpu, cuda]),
]
every_kernel = pytest.mark.parametrize("backend, device, dtype", KERNELS)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, cuda])])


def random_inputs(
    lengths: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[PackedBatch, Tensor]:
    """A batch of `lengths`, and queries, keys and values for it as one (3, T, N, H) tensor."""
    batch = pack([[7] * length for length in lengths])
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, batch.num_tokens, HEADS, HEAD_SIZE, dtype=torch.float64, generator=generator)
    return batch.to(device), qkv.to(device, dtype)


def run(backend: str, batch: PackedBatch, qkv: Tensor, pattern: Pattern) -> Tensor:
    return attend(*qkv, prepare(backend, batch, pattern, dtype=qkv.dtype))


def forward_and_gradient(backend: str, batch: PackedBatch, qkv: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    leaf = qkv.clone().requires_grad_()
    out = run(backend, batch, leaf, pattern)
    # A weight for each output, so that no gradient cancels.
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
    out.backward(weight.to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def assert_agrees(backend: str, batch: PackedBatch, qkv: Tensor, pattern: Pattern) -> None:
    ours = forward_and_gradient(backend, batch, qkv, pattern)
    exact = forward_and_gradient("reference", batch, qkv.double(), pattern)
    for got, want, what in zip(ours, exact, ("output", "gradient"), strict=True):
        assert got.dtype == qkv.dtype
        worst = (got.double() - want).abs().max().item()
        assert worst <= TOLERANCE[qkv.dtype] * max(1.0, want.abs().max().item()), f"{what} is off by {worst}"


def test_reference_is_softmax_by_hand() -> None:
    """One query at a time, with a Python loop over the keys that the definition names."""
    batch, qkv = random_inputs((3, 1, 5))
    q, k, v = qkv
    for pattern in (Pattern(), Pattern(1), Pattern(None, True), Pattern(2, True)):
        out = run("reference", batch, qkv, pattern)
        for start, stop in pairwise(batch.host_offsets()):
            for i in range(start, stop):
                keys = [
                    j
                    for j in range(start, stop)
                    if (pattern.window is None or abs(i - j) <= pattern.window) and (j <= i or not pattern.causal)
                ]
                for n in range(HEADS):
                    weights = torch.softmax(k[keys, n] @ q[i, n] / HEAD_SIZE**0.5, dim=0)
                    torch.testing.assert_close(out[i, n], weights @ v[keys, n], rtol=0, atol=1e-13)


@every_kernel
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"w{p.window}{'-causal' if p.causal else ''}")
def test_backend_agrees_with_reference(backend: str, device: str, dtype: torch.dtype, pattern: Pattern) -> None:
    assert_agrees(backend, *random_inputs(LENGTHS, device, dtype), pattern)


@every_kernel
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (64,), (65,), (66,), (128,), (129,), (385,), (300, 1), (1, 300)])
def test_backend_agrees_at_the_edges_of_a_batch(
    backend: str, device: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    for pattern in (Pattern(), Pattern(64)):
        assert_agrees(backend, *random_inputs(lengths, device, dtype), pattern)


BORDERS = [1, 2, 3, 7, 8, 9, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK]


@given(
    lengths=st.lists(st.one_of(st.sampled_from(BORDERS), st.integers(1, 160)), min_size=1, max_size=6).map(tuple),
    window=st.one_of(st.none(), st.integers(0, 150)),
    causal=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_blocks_agree_with_reference_on_any_lengths(lengths: tuple[int, ...], window: int | None, causal: bool) -> None:
    assert_agrees("blocks", *random_inputs(lengths), Pattern(window, causal))


@every_kernel
def test_strided_inputs_give_the_same(backend: str, device: str, dtype: torch.dtype) -> None:
    """The encoder hands over slices of one projection; the copy that a test makes must not hide a stride bug."""
    batch, qkv = random_inputs(LENGTHS, device, dtype)
    fused = torch.cat(list(qkv), dim=1)
    views = fused.split(HEADS, dim=1)
    assert not views[1].is_contiguous()
    for pattern in (Pattern(), Pattern(64)):
        plan = prepare(backend, batch, pattern, dtype=dtype)
        assert torch.equal(attend(*views, plan), run(backend, batch, qkv, pattern))


def reached(backend: str, device: str, dtype: torch.dtype, pattern: Pattern, length: int, j: int) -> list[int]:
    """Outputs that change with the value of token j, between two other documents that must not."""
    batch, qkv = random_inputs((90, length, 70), device, dtype)
    qkv[0] = 0  # equal weights, so that half precision rounds none of them away
    before = run(backend, batch, qkv, pattern)
    changed = qkv.clone()
    changed[2, 90 + j] += 100
    rows = (run(backend, batch, changed, pattern) != before).flatten(1).any(dim=1).nonzero().flatten() - 90
    return rows.tolist()


@every_kernel
@pytest.mark.parametrize("j", [0, 1, 63, 64, 127, 128, 150, 299])
def test_window_of_64_reaches_exactly_64(backend: str, device: str, dtype: torch.dtype, j: int) -> None:
    """local_attention 128: token j changes i when |i - j| <= 64, and 63 or 65 is another set."""
    within = {reach: [i for i in range(300) if abs(i - j) <= reach] for reach in (63, 64, 65)}
    for reach, rows in within.items():
        assert reached(backend, device, dtype, Pattern(reach), 300, j) == rows
    assert within[63] != within[64] != within[65]


@every_kernel
def test_causal_window_reaches_back_only(backend: str, device: str, dtype: torch.dtype) -> None:
    assert reached(backend, device, dtype, Pattern(64, True), 300, 100) == list(range(100, 165))
    assert reached(backend, device, dtype, Pattern(None, True), 300, 100) == list(range(100, 300))


@every_kernel
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(64), Pattern(8, True)], ids=str)
def test_documents_are_isolated(backend: str, device: str, dtype: torch.dtype, pattern: Pattern) -> None:
    """Another document's queries, keys and values change no bit of this one's output; its gradient there is zero."""
    lengths = (40, 1, 100, 129, 3)
    batch, qkv = random_inputs(lengths, device, dtype)
    offsets = batch.host_offsets()
    before = run(backend, batch, qkv, pattern)
    for start, stop in pairwise(offsets):
        others = torch.ones(batch.num_tokens, dtype=torch.bool, device=device)
        others[start:stop] = False
        changed = qkv.clone()
        changed[:, start:stop] = 50 * torch.randn_like(changed[:, start:stop])
        after = run(backend, batch, changed, pattern)
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[~others], before[~others])

        leaf = qkv.clone().requires_grad_()
        run(backend, batch, leaf, pattern)[start:stop].sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[:, others].abs().max() == 0


def test_equal_runs_cover_the_batch() -> None:
    assert equal_runs((0, 3, 6, 8)) == [(0, 2, 3), (6, 1, 2)]
    assert equal_runs((0, 1)) == [(0, 1, 1)]


def test_a_window_over_the_longest_sequence_is_no_window() -> None:
    batch, qkv = random_inputs((65, 30))
    assert prepare("blocks", batch, Pattern(64), dtype=qkv.dtype).pattern == Pattern(None)
    assert prepare("blocks", batch, Pattern(63, True), dtype=qkv.dtype).pattern == Pattern(63, True)


def test_choice_is_explained() -> None:
    cpu = torch.device("cpu")
    name, reason = choose_backend("auto", device=cpu, dtype=torch.float32, head_size=64)
    assert name == "blocks"
    assert "varlen: needs CUDA" in reason
    for name in ("reference", "blocks"):
        assert choose_backend(name, device=cpu, dtype=torch.float64, head_size=64) == (name, "asked for")


@pytest.mark.parametrize("name, said", [("varlen", "needs CUDA"), ("xformers", "needs CUDA"), ("flash", "known are")])
def test_a_backend_that_cannot_run_is_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        choose_backend(name, device=torch.device("cpu"), dtype=torch.float32, head_size=64)


@pytest.mark.parametrize(
    "config", [{"causal": True}, {}, {"local_attention": 100}, {"causal": True, "sliding_window": 65}]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_xformers_takes_what_a_windowed_layer_asks_of_it(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Windows of 63, 64, 50 and 64: the operator says itself what it refuses. Here that is a CPU, and nothing else."""
    cutlass = pytest.importorskip("xformers.ops.fmha.cutlass")
    asked: list[Any] = []

    def note(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor) -> Tensor:
        asked.append(Inputs(q, k, v, attn_bias))
        return q

    from xformers.ops.fmha.common import Inputs

    shape = EncoderConfig(**config)
    batch, qkv = random_inputs((300, 10), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xformers.ops.memory_efficient_attention", note)
        run("xformers", batch, qkv, Pattern(shape.window, shape.causal))
    for operator in (cutlass.FwOp, cutlass.BwOp):
        reasons = operator.not_supported_reasons(asked[0])
        assert [reason for reason in reasons if not reason.startswith("device=cpu")] == []


def test_rows_of_a_bias_begin_at_a_multiple_of_16_bytes() -> None:
    """The same without xformers, whatever the window; what a row holds is as before."""
    batch = pack([[7] * 200, [7] * 3])
    for window in range(1, 20):
        bias = window_bias(batch, Pattern(window), torch.float16)
        assert bias is not None
        assert bias.shape == (7, 1, QUERY_BLOCK, QUERY_BLOCK + 2 * window)
        assert [stride % 8 for stride in bias.stride()[:3]] == [0, 0, 0]


@pytest.mark.parametrize(
    "capability, dtype, head_size, expected",
    [
        ((7, 5), torch.float16, 64, "xformers"),
        ((7, 5), torch.bfloat16, 64, "blocks"),
        ((7, 0), torch.float16, 64, "blocks"),
        ((8, 0), torch.float32, 64, "xformers"),
        ((8, 0), torch.float32, 4, "xformers"),
        ((8, 0), torch.float32, 6, "blocks"),
        ((8, 0), torch.float64, 64, "blocks"),
        ((7, 5), torch.float16, 12, "blocks"),
        ((10, 0), torch.float32, 64, "blocks"),
        ((12, 0), torch.float16, 264, "blocks"),
    ],
)
def test_auto_takes_xformers_only_where_it_runs(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if expected == "xformers":
        pytest.importorskip("xformers.ops")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert choose_backend("auto", device=device, dtype=dtype, head_size=head_size)[0] == expected
    if expected == "blocks":
        with pytest.raises(InputError, match="'xformers' cannot run here: needs"):
            choose_backend("xformers", device=device, dtype=dtype, head_size=head_size)


def test_every_backend_is_tested() -> None:
    """`native` takes bfloat16 only: test_model_kernels.py and test_model_differentiable.py have its tests."""
    assert {case.values[0] for case in KERNELS} | {"reference", "native"} == set(BACKENDS)


@pytest.mark.parametrize("before, after", [(64, 64), (64, 0), (0, 0), (5, 5)])
@pytest.mark.parametrize("total", [1, 32, 67])
def test_overlapping_blocks_and_their_gradient(total: int, before: int, after: int) -> None:
    x = torch.randn(total, 2, 3, dtype=torch.float64, requires_grad=True)
    blocks = _to_blocks(x, before, after)
    assert torch.equal(blocks, _unfolded(x, before, after))
    weight = torch.randn(blocks.shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad((b * weight).sum(), x)[0] for b in (blocks, _unfolded(x, before, after)))
    torch.testing.assert_close(found, expected)
