"""The backward passes of the native kernels against float64, on rounded inputs, so that only the kernels' own error
shows; and the operators as autograd and torch.compile see them.

Where the kernels cannot run (another processor, no compiler at installation) this file is skipped, with the reason.
"""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import differentiable, kernels
from model.attention import attend, prepare
from model.batch import PackedBatch, pack
from model.config import preset
from model.encoder import Encoder, init_weights
from model.heads import MaskedLanguageModel
from model.losses import IGNORED, Pretraining
from model.patterns import Pattern
from model.rotary import Rotary

ROUNDING = 2.0**-8
"""The largest relative error of one rounding to bfloat16."""
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1, 127, 128, 129, 130, 257, 700, 5)

pytestmark = pytest.mark.skipif(kernels.attention_refusal(64) is not None, reason=kernels.attention_refusal(64) or "")


def random_projection(lengths: tuple[int, ...], heads: int, head_size: int) -> tuple[PackedBatch, Tensor, Tensor]:
    """A batch, its (T, 3 N, H) projection as an encoder has it, and a gradient for the output (T, N, H)."""
    batch = pack([[5] * length for length in lengths])
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(batch.num_tokens, 3 * heads, head_size, generator=generator) * 1.5
    return batch, qkv.bfloat16(), torch.randn(batch.num_tokens, heads, head_size, generator=generator).bfloat16()


def gradient(
    backend: str, batch: PackedBatch, qkv: Tensor, d_out: Tensor, pattern: Pattern, theta: float | None = None
) -> Tensor:
    leaf = qkv.clone().requires_grad_()
    rotary = Rotary(qkv.shape[2], theta)(batch.positions_T(), batch.max_seqlen) if theta else None
    plan = prepare(backend, batch, pattern, dtype=qkv.dtype, rotary=rotary)
    assert plan.backend == backend
    attend(*leaf.split(qkv.shape[1] // 3, dim=1), plan).backward(d_out.to(qkv.dtype))
    assert leaf.grad is not None
    return leaf.grad


def assert_close_to_exact(batch: PackedBatch, qkv: Tensor, d_out: Tensor, pattern: Pattern) -> None:
    """The gradients of queries, of keys and of values, each by the size of its error beside its own.

    Errors come to 0.7 roundings, and to 1.4 where a query sees two or three keys: what is taken off each slope, the
    mean of all, is made from the rounded output, and there leaves little.
    """
    got = gradient("native", batch, qkv, d_out, pattern)
    exact = gradient("reference", batch, qkv.double(), d_out.double(), pattern)
    assert got.isfinite().all()
    for mine, true in zip(got.double().chunk(3, dim=1), exact.chunk(3, dim=1), strict=True):
        # A window of one key has weights of 1 and no gradient of queries and keys but rounding.
        assert (mine - true).norm() <= 1.6 * ROUNDING * true.norm() + ROUNDING * 1e-2 * d_out.double().norm()
        # No value is far off by itself, as the edge of a wrong mask would be.
        assert (mine - true).abs().max() <= 8 * ROUNDING * max(true.abs().max().item(), 1.0)


@pytest.mark.parametrize("head_size", kernels.HEAD_SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 1, 8, 31, 64, 200, 600])
def test_gradients_of_attention_agree_with_float64(window: int | None, causal: bool, head_size: int) -> None:
    assert_close_to_exact(*random_projection(LENGTHS, 2, head_size), Pattern(window, causal))


@given(
    lengths=st.lists(st.integers(1, 1100), min_size=1, max_size=4).map(tuple),
    window=st.one_of(st.none(), st.integers(0, 600)),
    causal=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_gradients_of_attention_agree_on_any_lengths(
    lengths: tuple[int, ...], window: int | None, causal: bool
) -> None:
    """Past 512 keys, which are packed at a time, too."""
    assert_close_to_exact(*random_projection(lengths, 1, 64), Pattern(window, causal))


@pytest.mark.parametrize("causal", [False, True])
def test_a_gradient_reaches_exactly_what_was_seen(causal: bool) -> None:
    batch, qkv, _ = random_projection((100, 700, 50), 1, 64)
    for query in (5, 300, 511, 512, 699):  # the first, looking back only, sees itself: there is no gradient of that
        d_out = torch.zeros(batch.num_tokens, 1, 64)
        d_out[100 + query] = 1
        reached = gradient("native", batch, qkv, d_out, Pattern(64, causal))
        keys = set(range(max(0, query - 64), min(700, query + 1 + (0 if causal else 64))))
        assert set((reached[:, 0] != 0).any(dim=1).nonzero().flatten().tolist()) == {100 + query}
        for part in (reached[:, 1], reached[:, 2]):
            assert set((part != 0).any(dim=1).nonzero().flatten().tolist()) == {100 + key for key in keys}


@pytest.mark.parametrize("window", [None, 64])
def test_gradients_pass_through_the_turning(window: int | None) -> None:
    """Against turning in float64: queries and keys are rounded once more on the way there, their gradients are not."""
    batch, qkv, d_out = random_projection(LENGTHS, 2, 64)
    got = gradient("native", batch, qkv, d_out, Pattern(window), theta=10_000.0).double()
    exact = gradient("reference", batch, qkv.double(), d_out.double(), Pattern(window), theta=10_000.0)
    apart = gradient("blocks", batch, qkv, d_out, Pattern(window), theta=10_000.0).double()
    assert (got - exact).norm() <= 1.5 * ROUNDING * exact.norm()
    assert (got - exact).norm() <= (apart - exact).norm()


@pytest.mark.parametrize("window", [None, 64])
def test_a_sequence_has_the_same_gradient_in_any_company_and_on_any_threads(window: int | None) -> None:
    batch, qkv, d_out = random_projection(LENGTHS, 2, 64)
    together = gradient("native", batch, qkv, d_out, Pattern(window))
    for start, stop in pairwise(batch.host_offsets()):
        part = slice(start, stop)
        alone = gradient("native", pack([[5] * (stop - start)]), qkv[part], d_out[part], Pattern(window))
        assert torch.equal(alone, together[part])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(gradient("native", batch, qkv, d_out, Pattern(window)), together)
    finally:
        torch.set_num_threads(threads)


def test_scores_far_apart_have_finite_gradients() -> None:
    batch, qkv, d_out = random_projection((500, 40), 2, 64)
    qkv[:, :4] *= 40  # scores in the thousands: one key takes it all
    got = gradient("native", batch, qkv, d_out, Pattern())
    exact = gradient("reference", batch, qkv.double(), d_out.double(), Pattern())
    assert got.isfinite().all()
    values = slice(4, 6)
    assert (got[:, values] - exact[:, values]).norm() <= 1.5 * ROUNDING * exact[:, values].norm()
    assert gradient("native", batch, torch.zeros_like(qkv), d_out, Pattern()).isfinite().all()


def test_a_nan_stays_visible() -> None:
    batch, qkv, d_out = random_projection((40, 30), 1, 64)
    qkv[3, 0, 5] = float("nan")
    got = gradient("native", batch, qkv, d_out, Pattern())
    assert got[3, 0].isnan().all()
    assert got[:40, 1:].isnan().any(dim=2).all()
    assert not got[40:].isnan().any()


@pytest.mark.parametrize("width", [16, 256, 768])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_the_norm_and_its_gradients(width: int, bias: bool, added: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, more, d_x, d_normed = (torch.randn(37, width) for _ in range(4))
    x, more, d_normed = 3 * x + 5, more.bfloat16(), d_normed.bfloat16()

    def through(x: Tensor, more: Tensor, norm: nn.LayerNorm) -> list[Tensor]:
        x, more = x.clone().requires_grad_(), more.clone().requires_grad_()
        norm.zero_grad()
        if added and x.dtype == torch.float32:
            total, normed = differentiable.add_norm(x, more, norm)
        elif added:
            total, normed = x + more, norm(x + more)
        else:
            total, normed = 1 * x, differentiable.norm(x, norm, more.dtype)
        torch.autograd.backward([total, normed], [d_x.to(total), d_normed.to(normed)])
        gradients = [p.grad for p in (x, more if added else x, *norm.parameters())]
        return [total.detach(), normed.detach(), *(g.clone() for g in gradients if g is not None)]

    got, exact = through(x, more, norm), through(x.double(), more.double(), norm.double())
    assert [g.dtype for g in got[:4]] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
        more.dtype if added else x.dtype,
    ]
    for mine, true in zip(got, exact, strict=True):
        error = ROUNDING if mine.dtype == torch.bfloat16 else 1e-5
        assert ((mine.double() - true).abs() <= error * true.abs() + 2e-4 * error / ROUNDING + 2e-5).all()


def test_geglu_and_its_gradient() -> None:
    """Over all that bfloat16 tells apart between -12 and 12."""
    value = torch.arange(-12, 12, 0.01).bfloat16().unique()
    value = value[: len(value) // 16 * 16]
    gate, d_out = torch.randn(2, len(value), generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.cat([value, gate])[None].to(dtype).requires_grad_()
        out = differentiable.geglu(x) if dtype == torch.bfloat16 else F.gelu(value.double()) * x[:, len(value) :]
        if dtype == torch.float64:
            out = F.gelu(x[:, : len(value)]) * x[:, len(value) :]
        out.backward(d_out[None].to(dtype))
        assert x.grad is not None
        results.append((out.detach().double(), x.grad.double()))
    for mine, true in zip(*results, strict=True):
        assert ((mine - true).abs() <= ROUNDING * true.abs() + 2e-6).all()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 300, 14_000])
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_cross_entropy_and_its_slopes(width: int, z_weight: float, size: float) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = (size * torch.randn(33, width, generator=generator)).bfloat16()
    targets = torch.randint(width, (33,), generator=generator)
    targets[:2] = torch.tensor([0, width - 1])
    targets[2:8] = logits[2:8].argmax(dim=1)
    exact = logits.double().requires_grad_()
    log_z = exact.logsumexp(dim=1)
    losses = F.cross_entropy(exact, targets, reduction="none")
    (losses + z_weight * log_z**2).sum().backward()
    right = (logits.gather(1, targets[:, None])[:, 0] >= logits.amax(dim=1)).sum()
    before = logits.clone()
    for learning in (False, True):
        loss_R, log_z_R, correct, slopes = kernels.cross_entropy(logits, targets, z_weight, learning=learning)
        torch.testing.assert_close(loss_R.double(), losses.detach(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(log_z_R.double(), log_z.detach(), rtol=1e-5, atol=2e-5)
        assert correct == right
        assert learning or torch.equal(logits, before)
    assert exact.grad is not None
    assert ((slopes.double() - exact.grad).abs() <= 1.05 * ROUNDING * exact.grad.abs() + 1e-5).all()


def test_cross_entropy_shows_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf):
        logits = torch.zeros(2, 40).bfloat16()
        logits[1, 7] = bad
        loss_R, _, _, slopes = kernels.cross_entropy(logits, torch.tensor([3, 3]), 0.0, learning=True)
        assert loss_R[0].item() == pytest.approx(math.log(40))
        assert not loss_R[1].isfinite()
        assert slopes[1].isnan().any()


def test_the_operators_are_what_they_say_to_autograd_and_the_compiler() -> None:
    batch, qkv, _ = random_projection((3, 40), 1, 64)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split(1, dim=1))
    tables = Rotary(64, 10_000.0)(batch.positions_T(), batch.max_seqlen)
    x, weight, more = torch.randn(5, 32), torch.ones(32), torch.randn(5, 32).bfloat16()
    leaves = [t.requires_grad_() for t in (x, more, weight)]
    for operator, arguments in (
        (differentiable._attend, (q, k, v, batch.cu_seqlens, 8, 8, *tables)),
        (differentiable._norm, (leaves[0], leaves[2], None, 1e-5)),
        (differentiable._add_norm, (*leaves, None, 1e-5)),
        (differentiable._geglu, (torch.randn(5, 64).bfloat16().requires_grad_(),)),
    ):
        torch.library.opcheck(operator, arguments, atol=1e-2, rtol=1e-2)


def test_an_encoder_learns_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of every parameter is as near to float32's as PyTorch's own operators bring it."""
    config = preset("base", vocab_size=300, num_layers=4, hidden_size=128, intermediate_size=192, num_heads=2)
    torch.manual_seed(0)
    state = MaskedLanguageModel(Encoder(config))
    init_weights(state, config)
    batch = pack([torch.randint(300, (n,)).numpy() for n in (1, 70, 300, 129)])
    masked, none = torch.arange(0, 500, 3), torch.full((4,), IGNORED)
    targets, found = torch.randint(300, (len(masked),)), {}
    for way in ("float32", "kernels", "PyTorch"):
        model = Pretraining(MaskedLanguageModel(Encoder(config, dtype=None if way == "float32" else torch.bfloat16)))
        model.language_model.load_state_dict(state.state_dict())
        with monkeypatch.context() as patch:
            if way == "PyTorch":
                patch.setattr(kernels, "library", lambda: (None, "left out"))
                model.language_model.model.attention = "blocks"
            loss, sums = model(batch, masked, targets, none, 1 / len(masked))
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[way] = loss.item(), sums, gradients
    assert found["kernels"][0] == pytest.approx(found["float32"][0], abs=2e-3)
    assert found["kernels"][2].keys() == found["float32"][2].keys()
    for name, true in found["float32"][2].items():
        mine, theirs = ((found[way][2][name] - true).norm() / true.norm() for way in ("kernels", "PyTorch"))
        assert mine <= max(1.2 * theirs, 0.01), f"{name}: {mine:.4f}, {theirs:.4f}"
