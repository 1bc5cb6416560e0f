"""The chunked loss equals F.cross_entropy in value and gradient, in every precision, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rnnlm.config import ModelConfig
from rnnlm.model import cross_entropy
from rnnlm.model.cross_entropy import (
    _plain_slope,
    chunk_tokens,
    linear_cross_entropy,
    negligible,
    softmax_slope,
    token_losses,
)
from rnnlm.model.language_model import RecurrentLM


def example(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw, dtype=dtype).requires_grad_()
        for shape in ((tokens, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(-1, vocabulary, (tokens,), generator=draw)
    targets[tokens // 2] = -1
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


@settings(max_examples=12)
@given(
    st.integers(0, 40), st.integers(1, 6), st.integers(1, 90), st.integers(0, 50), st.booleans(), st.integers(0, 2**31)
)
def test_fp32_of_any_shape_equals_fp64(
    tokens: int, width: int, vocabulary: int, chunk: int, filtered: bool, seed: int
) -> None:
    """Through the compiled kernel; masked targets, no tokens and one piece among them."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    inputs = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    targets = torch.randint(-1, vocabulary, (tokens,), generator=draw)
    loss = linear_cross_entropy(*inputs, targets, chunk, filtered)
    found = torch.autograd.grad(loss, inputs)

    wide = [each.detach().double().requires_grad_() for each in inputs]
    expected = F.cross_entropy(wide[0] @ wide[1].T + wide[2], targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=1e-5)
    for mine, theirs in zip(found, torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_slope_is_the_plain_one(dtype: torch.dtype) -> None:
    """Also for logits far apart, and for what is not finite; rows on both sides of the kernel's groups."""
    draw = torch.Generator().manual_seed(0)
    logits, bias = 3 * torch.randn((70, 301), generator=draw), torch.randn(301, generator=draw)
    logits[0, 7], logits[1, 9], logits[2] = 300.0, -torch.inf, -200.0
    targets = torch.randint(-1, 301, (70,), generator=draw)
    targets[:5] = torch.tensor([7, 8, 0, -1, 300])
    logits = logits.to(dtype)

    wanted = _plain_slope(logits.double(), bias.double(), targets, True)
    found = softmax_slope(logits.clone(), bias, targets, True)
    rounding = torch.finfo(dtype).eps / 2 + 1e-6
    for mine, theirs, error in zip(found, wanted, (2e-6, rounding, 2e-6, 2e-6), strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine.double(), theirs, rtol=error, atol=1e-6)

    for bad in (torch.nan, torch.inf, -torch.nan):
        spoilt = logits.clone()
        spoilt[3:5, 40] = bad
        losses, slope, _, _ = softmax_slope(spoilt, bias, targets)
        assert losses[3] == 0 and not slope[3].any(), "masked"
        assert not losses[4].isfinite() and slope[4].isnan().any()


def test_no_bit_depends_on_the_number_of_threads() -> None:
    draw, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    logits, bias = torch.randn((150, 64), generator=draw), torch.randn(64, generator=draw)
    targets = torch.randint(-1, 64, (150,), generator=draw)
    found = []
    for threads in (1, 2, 64):  # the last is more than there are
        torch.set_num_threads(threads)
        found.append(softmax_slope(logits.clone(), bias, targets)[:3])
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))


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


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])  # from guesses to certainty
def test_in_bf16_no_gradient_is_further_from_fp64_than_the_usual_loops(spread: float) -> None:
    """The usual loop: bf16 logits, then cross entropy in fp32, by autocast. Chance alone makes 3 % in one example."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (256, 128), "weight": (3000, 128), "bias": (3000,)}
    inputs = [torch.randn(shape, generator=draw) for shape in shapes.values()]
    inputs[1] *= spread
    targets = torch.randint(0, 3000, (256,), generator=draw)
    targets[:128] = (inputs[0] @ inputs[1].T)[:128].argmax(dim=1)  # half of them as a trained model has them

    def usual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(*inputs, targets)

    def gradients(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = function(*leaves)
        return [each.double() for each in torch.autograd.grad(loss, leaves)]

    exact = gradients(usual, torch.float64)
    both = zip(shapes, exact, gradients(ours, torch.float32), gradients(usual, torch.float32), strict=True)
    for name, true, mine, theirs in both:
        error, allowed = ((each - true).norm() / true.norm() for each in (mine, theirs))
        assert error <= 1.05 * allowed, f"{name}: {error:.2e}, the usual loop {allowed:.2e}"


def test_filtering_leaves_out_what_is_negligible_and_no_more() -> None:
    """Where three of four pieces are as good as impossible; of the bias not a bit changes."""
    x, weight, bias, targets = example(64, 16, 400, torch.float32)
    with torch.no_grad():
        bias[100:] -= 40
    targets = targets.clamp(max=99)
    whole = torch.autograd.grad(linear_cross_entropy(x, weight, bias, targets, 16), [x, weight, bias])
    found = torch.autograd.grad(linear_cross_entropy(x, weight, bias, targets, 16, True), [x, weight, bias])

    assert torch.equal(found[2], whole[2])
    assert not torch.equal(found[1][100:], whole[1][100:]), "they were left out"
    for mine, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=64 * 400 * negligible(torch.float32))


def test_what_filtering_leaves_out_enters_together() -> None:
    """Many pieces that are negligible each, and a quarter of the probability together: no gradient misses it."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn((64, 32), generator=draw), 0.05 * torch.randn((5000, 32), generator=draw) + 0.3
    bias = torch.zeros(5000).index_fill(0, torch.arange(100), 5.0)  # the others: a quarter of the probability
    inputs, targets = [each.requires_grad_() for each in (x, weight, bias)], torch.arange(64)

    def gradients(filtered: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(linear_cross_entropy(*inputs, targets, 0, filtered), inputs)

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        assert ((mine - theirs).norm() / theirs.norm()).item() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        slope = softmax_slope((x @ weight.T).detach(), bias.detach(), targets, True)[3]
    assert slope is not None and (slope[100:] < negligible(torch.bfloat16)).all(), "they were left out"


def test_gradients_are_given_once() -> None:
    x, weight, bias, targets = example(8, 3, 5, torch.float32)
    loss = linear_cross_entropy(x, weight, bias, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


def test_chunks_are_equal_and_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunk_tokens(2048, 50_257, 2) == 2048
    assert chunk_tokens(2048, 50_257, 4) == 1024
    assert [chunk_tokens(700, 10_000, item_bytes) for item_bytes in (2, 4, 8)] == [700, 350, 175]
    assert chunk_tokens(0, 10, 4) == chunk_tokens(1, 10, 4) == 1
    assert chunk_tokens(5, 2**40, 4) == 1, "one token at least"

    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 10 * 11 * 8)
    x, weight, bias, targets = example(64, 5, 11, torch.float64)
    with Largest() as seen:
        loss = linear_cross_entropy(x, weight, bias, targets)
    assert seen.elements <= max(10 * 11, x.numel())
    expected = F.cross_entropy(x @ weight.T + bias, targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


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
