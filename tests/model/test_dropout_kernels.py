"""Dropout in one pass: the bits of the eager form, forward and backward, and that form where there is no compiler."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rnnlm.model
from rnnlm.model import dropout_kernels
from rnnlm.model.dropout import Kernel, Site, dropout, eager_dropout, find_kernel, place_number
from rnnlm.model.random_bits import start_number

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EDGES = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-40, 3e38, -1.0, 65504.0)


def assert_same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Any NaN is as good as another: PyTorch's own differ between the middle and the end of a tensor."""
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    assert torch.equal(mine.isnan(), theirs.isnan())
    kept = ~theirs.isnan()
    assert torch.equal(mine[kept].view(BITS[mine.dtype]), theirs[kept].view(BITS[mine.dtype]))


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Ordinary numbers, with an edge of the format at every seventh place."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    some = x.view(-1)[::7]
    some.copy_(torch.tensor(EDGES, dtype=torch.float64).repeat(len(some))[: len(some)])
    return x


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads, for the smallest of tensors."""
    before = torch.get_num_threads()
    monkeypatch.setattr(dropout_kernels, "PER_THREAD", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


numbers = st.integers(0, 2**63 - 1) | st.integers(0, 2**33)


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 40)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
    probability=st.floats(1e-9, 0.999) | st.sampled_from([2**-33, 0.5, 0.25]),
    locked=st.booleans(),
    numbers=st.tuples(numbers, numbers, st.integers(0, 2**32 - 1)),
    first_row=st.integers(0, 2**62),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]),
)
def test_kernel_has_the_bits_of_the_eager_form(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    probability: float,
    locked: bool,
    numbers: tuple[int, int, int],
    first_row: int,
    layout: str,
) -> None:
    x, rows = values(shape, dtype), first_row + 3 * torch.arange(shape[1])
    if layout == "transposed":
        x = values((shape[2], shape[0], shape[1]), dtype).permute(1, 2, 0)
    elif layout == "strided":
        x = values((*shape[:2], 2 * shape[2]), dtype)[..., ::2]
        rows = rows.repeat_interleave(2)[::2]
    elif layout == "expanded":
        x = values((1, 1, shape[2]), dtype).expand(shape)

    seed, step, place = numbers[0], torch.tensor(numbers[1]), numbers[2]
    expected = eager_dropout(x, Site(probability, locked, seed, place), step, rows)
    assert_same_bits(dropout(x, probability, locked, seed, place, step, rows), expected)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_real_sizes_forward_and_backward_on_any_number_of_threads(
    dtype: torch.dtype, locked: bool, many_threads: None
) -> None:
    step, rows, place = torch.tensor(2**33 + 5), torch.arange(20) + 40, place_number("layer0.output")
    x, outer = values((35, 20, 65), dtype).requires_grad_(), values((35, 20, 65), dtype, seed=1)
    site = Site(0.3, locked, 42, place)
    mine, theirs = dropout(x, *site, step, rows), eager_dropout(x, site, step, rows)
    assert type(mine.grad_fn).__name__ == "_DropoutBackward", "else the eager form is compared with itself"
    assert_same_bits(mine.detach(), theirs.detach())
    assert_same_bits(*(torch.autograd.grad(out, x, outer)[0] for out in (mine, theirs)))


def test_nothing_but_step_and_rows_is_kept_for_the_backward_pass() -> None:
    x, step, rows = torch.ones(3, 4, 50, requires_grad=True), torch.tensor(1), torch.arange(4)
    shapes: list[tuple[int, ...]] = []

    def pack(kept: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(kept.shape))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        dropout(x, 0.5, False, 1, 2, step, rows)
    assert sorted(shapes) == [(), (4,)]

    out = dropout(x, 0.5, False, 1, 2, step, rows)
    step += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_of_any_order_are_those_of_the_function() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    step, rows = torch.tensor(1), torch.arange(3)

    def function(x: torch.Tensor) -> torch.Tensor:
        return dropout(x.sin(), 0.5, False, 1, 2, step, rows)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.slow
def test_tensors_without_values_pass_in_their_shape_and_precision() -> None:
    x = torch.ones(3, 4, 5, dtype=torch.bfloat16, device="meta", requires_grad=True)
    step, rows = torch.zeros((), dtype=torch.int64, device="meta"), torch.arange(4, device="meta")
    out = dropout(x, 0.5, True, 1, 2, step, rows)
    out.sum().backward()
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert x.grad is not None and x.grad.is_meta


def test_without_a_compiler_the_masks_are_the_same_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, step, rows = values((3, 4, 50), torch.float32), torch.tensor(1), torch.arange(4)
    expected = dropout(x, 0.5, False, 1, 2, step, rows)
    find_kernel.cache_clear()
    monkeypatch.delattr(rnnlm.model, "dropout_kernels")
    monkeypatch.setitem(sys.modules, "rnnlm.model.dropout_kernels", None)
    try:
        assert_same_bits(dropout(x, 0.5, False, 1, 2, step, rows), expected)
        assert dropout(x, 0.5, False, 1, 2, step, rows).isfinite().any()
    finally:
        find_kernel.cache_clear()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: dropout runs in its slow form, with the same masks (")


@pytest.fixture
def triton_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The GPU's kernel, run by Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the first import
    pytest.importorskip("triton")
    with np.errstate(all="ignore"):  # it computes by NumPy, which warns of infinities
        yield importlib.import_module("rnnlm.model.dropout_triton").drop


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_for_gpus_has_the_bits_of_the_eager_form(
    triton_kernel: Kernel, dtype: torch.dtype, locked: bool
) -> None:
    for place in ("embedding", "layer1.output"):  # their numbers are on both sides of 2^31
        site = Site(0.3, locked, 2**62 + 7, place_number(place))
        x, step, rows = values((2, 9, 130), dtype), torch.tensor(2**40 + 3), 2**33 + 3 * torch.arange(9)
        scale = torch.ones((), dtype=dtype).mul_(1 / 0.7).item()
        start = start_number(site.seed, site.place)
        mine = triton_kernel(x, start, step, rows, locked, math.floor(0.3 * 2**32), scale)
        assert_same_bits(mine, eager_dropout(x, site, step, rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_a_gpu_are_those_of_a_cpu(dtype: torch.dtype, locked: bool) -> None:
    step, rows, site = torch.tensor(2**40 + 3), 2**33 + 3 * torch.arange(20), Site(0.3, locked, 2**62 + 7, 2**31 + 1)
    x, outer = values((35, 20, 650), dtype), values((35, 20, 650), dtype, seed=1)
    found = []
    for device in ("cpu", "cuda"):
        here = x.to(device).requires_grad_()
        out = dropout(here, *site, step.to(device), rows.to(device))
        found.append([out.detach().cpu(), torch.autograd.grad(out, here, outer.to(device))[0].cpu()])
    for mine, theirs in zip(*found, strict=True):
        assert_same_bits(mine, theirs)
