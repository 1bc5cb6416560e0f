"""The chunked loss equals F.cross_entropy in value and gradient, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rnnlm.config import ModelConfig
from rnnlm.model.cross_entropy import linear_cross_entropy, token_losses
from rnnlm.model.language_model import RecurrentLM


def example(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw, dtype=dtype).requires_grad_()
        for shape in ((tokens, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(-1, vocabulary, (tokens,), generator=draw)
    assert (targets == -1).any()
    return [x, weight, bias, targets]


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_value_and_gradients_equal_cross_entropy_in_fp64(chunk: int) -> None:
    x, weight, bias, targets = example(64, 5, 11, torch.float64)
    expected = F.cross_entropy(x @ weight.T + bias, targets, ignore_index=-1, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.37, [x, weight, bias])

    loss = linear_cross_entropy(x, weight, bias, targets, chunk)
    found = torch.autograd.grad(loss * 0.37, [x, weight, bias])
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_token_losses_are_the_unsummed_loss() -> None:
    x, weight, bias, targets = example(50, 5, 11, torch.float64)
    expected = F.cross_entropy(x @ weight.T + bias, targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(token_losses(x, weight, bias, targets, 8), expected.detach(), rtol=1e-13, atol=1e-14)


def test_far_logits_neither_overflow_nor_vanish() -> None:
    x = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight, bias = torch.tensor([[1e4], [-1e4]]), torch.zeros(2)
    loss = linear_cross_entropy(x, weight, bias, torch.tensor([0, 0]), 1)
    assert loss.item() == 2e4
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0], [-2e4]]


def test_bf16_is_close_to_fp64_and_sums_in_fp32() -> None:
    x, weight, bias, targets = example(512, 32, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, bias, targets, 64)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, [x, weight, bias])

    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    expected = linear_cross_entropy(*wide, targets, 64)
    wanted = torch.autograd.grad(expected, wide)
    assert abs(loss.item() / expected.item() - 1) < 2e-3
    for mine, theirs in zip(grads, wanted, strict=True):
        assert ((mine.double() - theirs).norm() / theirs.norm()).item() < 1e-2


def test_in_bf16_the_gradient_of_the_bias_is_that_of_fp32() -> None:
    """With whole numbers the products are exact in bf16, so that only what comes after them could round."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-2, 3, shape, generator=draw).float() for shape in ((512, 8), (50, 8)))
    bias = torch.randn(50, generator=draw).requires_grad_()
    targets = torch.randint(0, 50, (512,), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, bias, targets, 64)
    (found,) = torch.autograd.grad(loss, [bias])

    wide = bias.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(linear_cross_entropy(x.double(), weight.double(), wide, targets, 64), [wide])
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-5


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_no_tensor_of_a_training_step_reaches_tokens_times_vocabulary(tied: bool) -> None:
    rows, window, vocabulary, chunk = 32, 40, 5000, 512
    model = RecurrentLM(ModelConfig(embedding_size=16, hidden_size=24, layers=1, tied=tied), vocabulary, 0, chunk)
    tokens = torch.zeros(rows, window, dtype=torch.int64)
    ids = torch.arange(rows)

    with Largest() as seen:
        loss, _, _ = model(tokens, model.zero_hidden(rows), tokens, torch.tensor(0), ids)
        loss.backward()
    assert 0 < seen.elements <= chunk * vocabulary < rows * window * vocabulary

    with Largest() as control:  # the same measure does see logits that are made whole
        F.cross_entropy(torch.zeros(rows * window, vocabulary), tokens.flatten())
    assert control.elements >= rows * window * vocabulary
