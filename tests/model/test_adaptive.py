"""The adaptive softmax equals PyTorch's, sums to 1, and touches only the clusters in use."""

from __future__ import annotations

import pytest
import torch

from rnnlm.config import Config, ModelConfig
from rnnlm.errors import UserError
from rnnlm.faults import find_faults
from rnnlm.model.adaptive import AdaptiveHead, default_cutoffs
from rnnlm.model.heads import LossOptions
from rnnlm.model.language_model import RecurrentLM

WIDTH, VOCABULARY, CUTOFFS = 16, 50, [10, 30]


def example(
    dtype: torch.dtype = torch.float64, options: LossOptions | None = None, biased: bool = False
) -> tuple[AdaptiveHead, torch.Tensor, torch.Tensor]:
    """A head, x (T, B, H), and targets (T, B) in all clusters, some of them masked."""
    config = ModelConfig(head="adaptive", adaptive_cutoffs=CUTOFFS, adaptive_factor=2)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    draw = torch.Generator().manual_seed(0)
    head = AdaptiveHead(config, WIDTH, embedding, options or LossOptions()).to(dtype)
    for name, parameter in head.named_parameters():
        spread = 1.0 if biased or not name.endswith("bias") else 0.0
        parameter.data = spread * torch.randn(parameter.shape, generator=draw, dtype=dtype)

    x = torch.randn((9, 7, WIDTH), generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(-1, VOCABULARY, (9, 7), generator=draw)
    assert torch.bucketize(targets, torch.tensor([0, *CUTOFFS]), right=True).unique().tolist() == [0, 1, 2, 3]
    return head, x, targets


def theirs(head: AdaptiveHead) -> torch.nn.AdaptiveLogSoftmaxWithLoss:
    """PyTorch's with the same weights, which has no biases in its clusters."""
    made = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH, VOCABULARY, CUTOFFS, div_value=2.0, head_bias=True).double()
    made.head.weight.data, made.head.bias.data = head.weight.data.clone(), head.bias.data.clone()
    for tail, cluster in zip(made.tail, head.clusters, strict=True):
        tail[0].weight.data, tail[1].weight.data = cluster.projection.data.clone(), cluster.weight.data.clone()
    return made


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(5)])
def test_losses_and_gradients_equal_pytorchs(options: LossOptions) -> None:
    head, x, targets = example(options=options)
    other, seen = theirs(head), targets.flatten() >= 0
    copy = x.detach().flatten(0, 1)[seen].requires_grad_()
    expected = -other(copy, targets.flatten()[seen]).output
    expected.sum().backward()

    loss = head.loss(x, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-13, atol=0)
    losses = head.token_losses(x, targets).flatten()
    torch.testing.assert_close(losses[seen], expected.detach(), rtol=1e-12, atol=1e-13)
    assert not losses[~seen].any()

    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(0, 1)[seen], copy.grad, rtol=1e-11, atol=1e-12)
    assert not x.grad.flatten(0, 1)[~seen].any()
    pairs = [(head.weight, other.head.weight), (head.bias, other.head.bias)]
    for tail, cluster in zip(other.tail, head.clusters, strict=True):
        pairs += [(cluster.projection, tail[0].weight), (cluster.weight, tail[1].weight)]
    for mine, wanted in pairs:
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-11, atol=1e-12)


def test_log_probabilities_equal_pytorchs_sum_to_one_and_hold_the_losses() -> None:
    head, x, targets = example()
    rows = x.detach().flatten(0, 1)
    torch.testing.assert_close(head.logits(rows), theirs(head).log_prob(rows), rtol=1e-12, atol=1e-12)

    head, x, targets = example(biased=True)
    found = head.logits(rows)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(len(rows)).double(), rtol=1e-13, atol=0)
    wanted = -found.gather(1, targets.flatten().clamp(min=0)[:, None])[:, 0].masked_fill(targets.flatten() < 0, 0)
    torch.testing.assert_close(head.token_losses(x, targets).flatten(), wanted.detach(), rtol=1e-12, atol=1e-12)


def test_a_cluster_without_targets_has_gradients_of_zero_and_no_products() -> None:
    head, x, targets = example()
    targets = targets.clamp(max=CUTOFFS[1] - 1)  # none in the last cluster
    head.clusters[1].weight.data.fill_(torch.nan)
    loss = head.loss(x, targets)
    loss.backward()
    assert loss.isfinite()
    assert all(not parameter.grad.any() for parameter in head.clusters[1].parameters())  # there, as DDP wants them
    assert all(parameter.grad.any() for parameter in head.clusters[0].parameters())

    empty = head.loss(x[:0], targets[:0])
    assert empty.item() == 0


def test_in_bf16_the_loss_is_close_to_fp64() -> None:
    head, x, targets = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(x, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(head.double().loss(x.double(), targets).item(), rel=5e-3)


def test_default_cutoffs_lie_within_every_vocabulary() -> None:
    assert default_cutoffs(793_471) == [20_000, 100_000]
    assert default_cutoffs(50_257) == [6_282, 31_410]
    for size in range(2, 300):
        cutoffs = default_cutoffs(size)
        assert cutoffs == sorted(set(cutoffs))
        assert 0 < cutoffs[0] <= cutoffs[-1] < size


def test_what_cannot_work_is_said() -> None:
    found = find_faults(Config(model=ModelConfig(head="adaptive", tied=True, adaptive_cutoffs=[5, 5])))
    assert len(found) == 2
    assert "model.tied=True" in found[0]
    assert "model.adaptive_cutoffs=[5, 5]: must be ids above 0 that rise" in found[1]
    assert find_faults(Config(model=ModelConfig(tied=True, adaptive_cutoffs=[0, 5])))

    config = ModelConfig(head="adaptive", adaptive_cutoffs=[10, 37], embedding_size=4, hidden_size=4)
    with pytest.raises(UserError, match=r"model.adaptive_cutoffs=\[10, 37\]: the vocabulary has 37 pieces"):
        RecurrentLM(config, 37, seed=1)


def test_before_training_all_pieces_are_about_as_likely() -> None:
    config = ModelConfig(head="adaptive", embedding_size=8, hidden_size=8, init_range=1e-6, adaptive_cutoffs=[2, 20])
    head = RecurrentLM(config, VOCABULARY, seed=0).head
    torch.testing.assert_close(head.logits(torch.ones(3, 8)).exp(), torch.full((3, VOCABULARY), 1 / VOCABULARY))
