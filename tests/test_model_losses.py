"""The masked-token loss in strips against the plain one, value and gradient; parts that add up; the ordering head."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model import losses
from model.batch import PackedBatch, pack
from model.config import EncoderConfig
from model.decoder import CausalLanguageModel, Decoder
from model.encoder import Encoder, init_weights
from model.heads import MaskedLanguageModel
from model.losses import IGNORED, MaskedCrossEntropy, Pretraining, next_token_loss

VOCAB, WIDTH = 300, 32


def small_model(dtype: torch.dtype | None = None, **options: Any) -> Pretraining:
    config = EncoderConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_layers=3, num_heads=2, initializer_range=0.1
    )
    torch.manual_seed(0)
    model = Pretraining(MaskedLanguageModel(Encoder(config, dtype=dtype)), **options)
    init_weights(model, config, torch.Generator().manual_seed(0))
    return model


def example(lengths: tuple[int, ...] = (7, 1, 40, 90), seed: int = 0) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = pack([torch.randint(VOCAB, (n,), generator=generator).numpy() for n in lengths])
    masked = (torch.rand(batch.num_tokens, generator=generator) < 0.3).nonzero().flatten()
    return batch, masked, torch.randint(VOCAB, (len(masked),), generator=generator)


def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, t: torch.Tensor, z: float) -> torch.Tensor:
    logits = F.linear(h, w, b)
    return F.cross_entropy(logits, t, reduction="sum") + z * (logits.logsumexp(1) ** 2).sum()


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
def test_strips_give_the_plain_loss_and_its_gradients(
    z_weight: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.STRIP, "cpu", 1)  # strips of WIDTH rows: 103 rows end with a short one
    torch.manual_seed(0)
    hidden = torch.randn(103, WIDTH, dtype=torch.float64)
    weight, offset = torch.randn(VOCAB, WIDTH, dtype=torch.float64), torch.randn(VOCAB, dtype=torch.float64)
    targets = torch.randint(VOCAB, (103,))
    results = []
    for loss_of in (plain, lambda *a: MaskedCrossEntropy.apply(*a, True)[0]):
        leaves = [x.clone().requires_grad_() for x in ([hidden, weight] + ([offset] if bias else []))]
        loss = loss_of(*leaves[:2], leaves[2] if bias else None, targets, z_weight)
        (0.37 * loss).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_sums_count_what_they_say() -> None:
    model = small_model().double()
    batch, masked, targets = example()
    _, sums = model(batch, masked, targets, torch.full((4,), IGNORED))
    logits = model.language_model(batch, masked)
    assert sums[0].item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-12)
    assert sums[1].item() == pytest.approx((logits.logsumexp(1) ** 2).sum().item(), rel=1e-12)
    assert sums[2].item() == (logits.argmax(1) == targets).sum().item()
    assert not sums.requires_grad


def test_a_batch_in_parts_has_the_gradient_of_the_whole() -> None:
    """The scale is one over the masked tokens of all parts together, so uneven parts weigh as they should."""
    lengths = (7, 1, 40, 90)
    batch, masked, targets = example(lengths)
    whole, parts = small_model().double(), small_model().double()
    scale = 1 / len(masked)
    ignored = torch.full((4,), IGNORED)
    whole(batch, masked, targets, ignored, scale)[0].backward()
    offsets = batch.host_offsets()
    for first, last in ((0, 3), (3, 4)):
        low, high = offsets[first], offsets[last]
        inside = (masked >= low) & (masked < high)
        part = pack([batch.tokens_T[offsets[i] : offsets[i + 1]].numpy() for i in range(first, last)])
        parts(part, masked[inside] - low, targets[inside], ignored[first:last], scale)[0].backward()
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_batch_without_a_masked_token_gives_zero_gradients() -> None:
    model = small_model()
    batch, _, _ = example()
    nothing = torch.empty(0, dtype=torch.int64)
    loss, sums = model(batch, nothing, nothing, torch.full((4,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not sums.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_mixed_precision_stays_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    batch, masked, targets = example()
    ignored = torch.full((4,), IGNORED)
    mixed, full = small_model(dtype), small_model()
    for model in (mixed, full):
        # float16 needs a large factor in the backward pass and none in what is reported.
        loss, _ = model(batch, masked, targets, ignored, 1024.0 / len(masked))
        loss.backward()
    for mine, theirs in zip(mixed.parameters(), full.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - theirs.grad).norm() < tolerance * theirs.grad.norm()


def test_ordering_is_learned_from_its_labels_alone() -> None:
    model = small_model(ordering=True).double()
    batch, masked, targets = example()
    labels = torch.tensor([0, IGNORED, 1, 1])
    loss, sums = model(batch, masked, targets, labels, 0.0, 0.5)
    assert model.ordering is not None
    first = batch.cu_seqlens[:-1].long()
    logits = model.ordering(model.language_model.model(batch)[first], torch.float64).double()
    expected = F.cross_entropy(logits[[0, 2, 3]], torch.tensor([0, 1, 1]), reduction="sum")
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert sums[3].item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums[4].item() == (logits[[0, 2, 3]].argmax(1) == torch.tensor([0, 1, 1])).sum().item()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()), "no parameter is left out, whatever the weights"


def test_without_a_weight_there_is_no_ordering_head() -> None:
    assert not any("ordering" in name for name, _ in small_model().named_parameters())


def test_the_next_token_is_never_another_documents() -> None:
    """Loss and gradients of a packed batch are the sums over its documents; one of a single token adds nothing."""
    config = EncoderConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, causal=True,
        pad_id=0, cls_id=1, sep_id=2,
    )  # fmt: skip
    model = CausalLanguageModel(Decoder(config))
    init_weights(model, config, torch.Generator().manual_seed(0))
    model.double()
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 300, (length,), generator=generator) for length in (5, 1, 90, 2)]
    count = sum(len(document) - 1 for document in documents)
    expected = torch.zeros((), dtype=torch.float64)
    for document in documents:
        if len(document) > 1:
            logits = model(pack([document.numpy()]))
            expected = expected + F.cross_entropy(logits[:-1], document[1:], reduction="sum") / count
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss, sums = next_token_loss(model, pack([document.numpy() for document in documents]), 1 / count)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums[0] / count, expected.detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_decoder_learns_a_text_by_heart() -> None:
    config = EncoderConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, causal=True,
        pad_id=0, cls_id=1, sep_id=2,
    )  # fmt: skip
    model = CausalLanguageModel(Decoder(config))
    init_weights(model, config, torch.Generator().manual_seed(0))
    texts = [torch.randperm(50, generator=torch.Generator().manual_seed(i)).numpy() for i in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss, sums = next_token_loss(model, pack(texts), 1 / 98)
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # 3.9 untrained
    assert sums[2] > 90  # of 98 tokens
