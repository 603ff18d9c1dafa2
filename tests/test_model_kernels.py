"""The native kernels against float64 and against PyTorch, on rounded inputs, so that only the kernels' own error shows.

Where they cannot run (another processor, no compiler at installation) the PyTorch side is tested alone, and the reason
stands in the test report.
"""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import kernels
from model.attention import Pattern, attend, choose_backend, prepare
from model.batch import PackedBatch, pack
from model.config import preset
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.rotary import Rotary, rotate

ROUNDING = 2.0**-8
"""The largest relative error of one rounding to bfloat16."""
ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1, 127, 128, 129, 130, 257, 700, 5)

native = pytest.mark.skipif(kernels.library()[0] is None, reason=kernels.library()[1])
attention = pytest.mark.skipif(kernels.attention_refusal(64) is not None, reason=kernels.attention_refusal(64) or "")


def random_projection(lengths: tuple[int, ...], heads: int, head_size: int) -> tuple[PackedBatch, Tensor]:
    """A batch, and its (T, 3 N, H) projection as an encoder has it."""
    batch = pack([[5] * length for length in lengths])
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(batch.num_tokens, 3 * heads, head_size, generator=generator) * 1.5
    return batch, qkv.bfloat16()


def run(
    backend: str,
    batch: PackedBatch,
    qkv: Tensor,
    window: int | None,
    theta: float | None = None,
    causal: bool = False,
) -> Tensor:
    heads, size = qkv.shape[1] // 3, qkv.shape[2]
    rotary = Rotary(size, theta)(batch.positions_T(), batch.max_seqlen) if theta else None
    with torch.no_grad():
        plan = prepare(backend, batch, Pattern(window, causal), dtype=qkv.dtype, rotary=rotary)
        assert plan.backend == backend
        return attend(*qkv.clone().split(heads, dim=1), plan)


def assert_close_to_exact(batch: PackedBatch, qkv: Tensor, window: int | None, causal: bool = False) -> None:
    """Two things are rounded, each by 2^-8 at most: the weights of the softmax, and the result."""
    got = run("native", batch, qkv, window, causal=causal).double()
    exact = run("reference", batch, qkv.double(), window, causal=causal)
    query_key, value = qkv.double().tensor_split([qkv.shape[1] // 3 * 2], dim=1)
    mean_of_sizes = run("reference", batch, torch.cat([query_key, value.abs()], dim=1), window, causal=causal)
    assert got.isfinite().all()
    assert ((got - exact).abs() <= 2.02 * ROUNDING * mean_of_sizes + 1e-6).all()


@attention
@pytest.mark.parametrize("head_size", kernels.HEAD_SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 1, 8, 31, 64, 200, 300])
def test_attention_agrees_with_float64(window: int | None, causal: bool, head_size: int) -> None:
    assert_close_to_exact(*random_projection(LENGTHS, 3, head_size), window, causal)


@attention
@given(
    lengths=st.lists(st.integers(1, 330), min_size=1, max_size=5).map(tuple),
    window=st.one_of(st.none(), st.integers(0, 300)),
    causal=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_attention_agrees_on_any_lengths(lengths: tuple[int, ...], window: int | None, causal: bool) -> None:
    assert_close_to_exact(*random_projection(lengths, 1, 64), window, causal)


@attention
@pytest.mark.parametrize("window", [None, 64])
def test_turning_on_the_way_equals_turning_before(window: int | None) -> None:
    batch, qkv = random_projection(LENGTHS, 2, 64)
    assert torch.equal(
        run("native", batch, qkv, window, theta=10_000.0), run("native", batch, turned(batch, qkv, 10_000.0), window)
    )


def turned(batch: PackedBatch, qkv: Tensor, theta: float) -> Tensor:
    heads = qkv.shape[1] // 3
    tables = Rotary(qkv.shape[2], theta)(batch.positions_T(), batch.max_seqlen)
    return torch.cat([rotate(qkv[:, : 2 * heads], *tables), qkv[:, 2 * heads :]], dim=1)


@attention
@pytest.mark.parametrize("window", [None, 8, 64, 200])
def test_a_sequence_has_the_same_bits_in_any_company(window: int | None) -> None:
    batch, qkv = random_projection(LENGTHS, 2, 64)
    together = run("native", batch, qkv, window)
    for start, stop in pairwise(batch.host_offsets()):
        alone = run("native", pack([[5] * (stop - start)]), qkv[start:stop], window)
        assert torch.equal(alone, together[start:stop])


@attention
def test_window_reaches_exactly_64_to_each_side() -> None:
    """A value that is visible moves the output; one token further it does not."""
    batch, qkv = random_projection((300,), 1, 64)
    qkv[:, 0] = 0  # every visible key has the same weight
    before = run("native", batch, qkv, 64)
    for key in (0, 100, 163, 299):
        changed = qkv.clone()
        changed[key, 2] += 40
        moved = (run("native", batch, changed, 64) != before).any(dim=2)[:, 0].nonzero().flatten()
        assert moved.tolist() == list(range(max(0, key - 64), min(300, key + 65)))


@attention
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    batch, qkv = random_projection((500, 40), 2, 64)
    qkv[:, :4] *= 40  # scores in the thousands: one key takes it all
    assert_close_to_exact(batch, qkv, None)
    assert_close_to_exact(batch, torch.zeros_like(qkv), None)


@attention
def test_a_nan_stays_visible() -> None:
    batch, qkv = random_projection((40, 30), 1, 64)
    qkv[3, 0, 5] = float("nan")
    out = run("native", batch, qkv, None)
    assert out[3].isnan().all()
    assert not out[40:].isnan().any()


@native
@pytest.mark.parametrize("width", [16, 256, 768])
@pytest.mark.parametrize("bias", [False, True])
def test_add_norm_is_addition_and_layer_norm(width: int, bias: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, added = 3 * torch.randn(37, width) + 5, torch.randn(37, width).bfloat16()
    want = x + added
    exact = norm.double()(want.double())
    out = kernels.add_norm(x, added, norm.float(), torch.empty(37, width, dtype=torch.bfloat16))
    assert torch.equal(x, want)
    assert ((out.double() - exact).abs() <= ROUNDING * exact.abs() + 1e-5).all()


@native
def test_geglu_is_gelu_times_gate_everywhere() -> None:
    edges = torch.tensor([0.0, -0.0, 1e-30, 50.0, -50.0, 1e38])
    value = torch.cat([torch.linspace(-12, 12, 4_090), edges]).bfloat16()
    gate = torch.linspace(-3, 3, len(value)).bfloat16()
    exact = F.gelu(value.double()) * gate.double()
    out = kernels.geglu(torch.cat([value, gate])[None])[0].double()
    # The error function is exact to 1.5e-7, which shows where the GELU is nearly 0.
    tail = 1e-6 * (value.double() * gate.double()).abs()
    assert ((out - exact).abs() <= ROUNDING * exact.abs() + tail).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_in_int8_are_within_half_a_step(dtype: torch.dtype) -> None:
    x = (torch.randn(37, 96, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[5] = 0
    quantized, scale = kernels.quantize_rows(x)
    assert torch.equal(scale[:5], x[:5].abs().amax(dim=1).float() / 127)
    assert scale[5] == 1
    assert ((quantized * scale[:, None] - x.float()).abs() <= 0.5001 * scale[:, None]).all()
    assert quantized.int().abs().amax(dim=1).tolist() == [127] * 5 + [0] + [127] * 31


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_shows_after_int8(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(3, 64, dtype=dtype)
    x[1, 40] = value
    quantized, scale = kernels.quantize_rows(x)
    out = kernels.scale_sums(
        torch._int_mm(quantized, torch.ones(64, 16, dtype=torch.int8)), scale, torch.ones(16), dtype
    )
    assert out[1].isnan().all() or out[1].isinf().all()
    assert torch.equal(out[[0, 2]], torch.full((2, 16), 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 24])
def test_sums_get_the_scales_of_row_and_column(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(10**7), 10**7, (33, width), generator=generator, dtype=torch.int32)
    rows, columns = torch.rand(33, generator=generator), torch.rand(width, generator=generator)
    exact = sums.double() * rows.double()[:, None] * columns.double()
    got = kernels.scale_sums(sums, rows, columns, dtype)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= ROUNDING * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_the_library_does_not_serve_pytorch_does(dtype: torch.dtype) -> None:
    """Odd widths and wide dtypes, with and without a library."""
    torch.manual_seed(0)
    x, added = torch.randn(5, 24, dtype=torch.promote_types(dtype, torch.float32)), torch.randn(5, 24).to(dtype)
    norm = nn.LayerNorm(24, dtype=x.dtype)
    want = norm(x + added).to(dtype)
    assert torch.equal(kernels.add_norm(x, added, norm, torch.empty_like(added)), want)
    value, gate = added.chunk(2, dim=-1)
    assert torch.equal(kernels.geglu(added), F.gelu(value) * gate)


@native
def test_an_encoder_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are as far from float32 as bfloat16 is, and close to each other."""
    config = preset("base", vocab_size=300, num_layers=4, hidden_size=128, intermediate_size=192, num_heads=2)
    torch.manual_seed(0)
    exact = Encoder(config, dtype=torch.float32)
    init_weights(exact, config)
    batch = pack([torch.randint(300, (n,)).numpy() for n in (1, 70, 300, 129)])
    outputs = {}
    for back in ("auto", "blocks"):
        encoder = Encoder(config, dtype=torch.bfloat16, attention=back)
        encoder.load_state_dict(exact.state_dict())
        with torch.no_grad():
            if back == "blocks":
                monkeypatch.setattr(kernels, "library", lambda: (None, "left out"))
            outputs[back] = encoder(batch)
    with torch.no_grad():
        truth = exact(batch)
    far = {back: (1 - F.cosine_similarity(out, truth, dim=-1)).max().item() for back, out in outputs.items()}
    assert max(far.values()) < 1e-4
    assert F.cosine_similarity(*outputs.values(), dim=-1).min() > 1 - 1e-4


def test_the_choice_says_why() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="needs bfloat16"):
        choose_backend("native", device=cpu, dtype=torch.float32, head_size=64)
    name, reason = choose_backend("auto", device=cpu, dtype=torch.bfloat16, head_size=48)
    assert name == "blocks"
    assert "native: " in reason


def test_off_means_off() -> None:
    code = "from model import kernels; print(kernels.library()[0], kernels.attention_refusal(64))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "", kernels.VARIABLE: "off"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.strip() == "None NIGHTLOOM_KERNELS is off"
