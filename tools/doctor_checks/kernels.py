"""Kernels: whose run the recurrence, and whether dropout's masks are the same bits from all of them."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from doctor_checks.verdict import Verdict, right, untried, wrong
from rnnlm.model.dropout import Site, dropout, eager_dropout, find_kernel
from rnnlm.model.layers import GATES, STATES, Context, RecurrentLayer
from rnnlm.model.precision import DTYPES, cudnn_version, slow_recurrence

CUDNN = re.compile(r"cudnn|RNN_block|persistRNN|(LSTM|GRU|RNN)_elementWise|elemWiseRNN", re.IGNORECASE)
STEPWISE = re.compile(r"(lstm|gru)_cell_|tanh_kernel_cuda")  # PyTorch's own, one call for each position

Found = Literal["cudnn", "stepwise", "unknown"]


def check_recurrence(options: Namespace) -> Iterator[Verdict]:
    """For each precision, whether cuDNN runs all cells, by the names of the kernels that ran."""
    if options.device != "cuda":
        yield untried("recurrence in cuDNN", "no GPU is used here")
        return

    for precision, dtype in DTYPES.items():
        names = {cell: _kernel_names(cell, dtype) for cell in GATES}
        others = [cell for cell in GATES if recurrent_kernels(names[cell]) != "cudnn"]
        subject = f"recurrence in cuDNN, {precision}"
        if not others:
            yield right(subject, ", ".join(GATES))
            continue

        hint = slow_recurrence(precision, cudnn_version(), torch.cuda.get_device_capability())
        seen = ", ".join(sorted(names[others[0]])[:3])
        way_out = hint.partition(": ")[2] or "use another train.precision, or another build of PyTorch"
        yield wrong(subject, f"{', '.join(others)} ran in other kernels ({seen}); {way_out}")


def recurrent_kernels(names: Iterable[str]) -> Found:
    """Whose kernels these are, of a recurrent layer over a window."""
    seen = list(names)
    if any(STEPWISE.search(name) for name in seen):
        return "stepwise"
    return "cudnn" if any(CUDNN.search(name) for name in seen) else "unknown"


def _kernel_names(cell: str, dtype: torch.dtype) -> set[str]:
    """Of all kernels that a layer runs on the GPU, forward and backward."""
    layer = RecurrentLayer(cell, 128, 128).cuda()
    for weight in layer.parameters():
        torch.nn.init.uniform_(weight, -0.1, 0.1)
    x = torch.randn(16, 8, 128, device="cuda")
    states = [torch.zeros(8, 128, device="cuda") for _ in STATES[cell]]

    def run() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out, _ = layer(x, states, Context())
        out.float().sum().backward()

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return {event.name for event in profiler.events() if event.device_type == DeviceType.CUDA}


def check_masks(options: Namespace) -> Iterator[Verdict]:
    """Dropout's values and gradients by the kernels of each device against the eager form on the CPU, to the bit."""
    for device in ("cpu", "cuda"):
        subject = f"dropout on {device} has the reference's bits"
        if device == "cuda" and options.device != "cuda":
            yield untried(subject, "no GPU is used here")
            continue
        if slow := [name for name, dtype in DTYPES.items() if _is_slow(device, dtype)]:
            yield wrong(subject, f"no kernel for {', '.join(slow)}, only the slow form; see to numba, or Triton")
        elif found := differing_masks(device):
            yield wrong(subject, f"other bits in {', '.join(found)}; a run must stay on one kind of device; report it")
        else:
            yield right(subject, ", ".join(_precisions(device)))


def _precisions(device: str) -> list[str]:
    return list(DTYPES) if device == "cuda" else ["fp32", "bf16"]  # no run is in fp16 on a CPU


def _is_slow(device: str, dtype: torch.dtype) -> bool:
    names = {value: name for name, value in DTYPES.items()}
    return names[dtype] in _precisions(device) and find_kernel(device, dtype) is None


def differing_masks(device: str) -> list[str]:
    """Which of all precisions and kinds of masks differ in any bit."""
    found = []
    for precision, locked in product(_precisions(device), (False, True)):
        site = Site(0.3, locked, seed=7, place=11)
        x = torch.randn(9, 5, 67, generator=torch.Generator().manual_seed(0)).to(DTYPES[precision])
        if not torch.equal(_dropped(x, site, "cpu", eager=True), _dropped(x, site, device, eager=False)):
            found.append(f"{precision} {'locked' if locked else 'ordinary'}")
    return found


def _dropped(x: Tensor, site: Site, device: str, eager: bool) -> Tensor:
    """What is left of x (T, B, F), and its gradient for an outer one of x, joined: (2, T, B, F) on the CPU."""
    own = x.to(device, copy=True).requires_grad_()
    step, rows = torch.tensor(2**33 + 5, device=device), torch.arange(3, 3 + x.shape[1], device=device)
    if eager:
        out = eager_dropout(own, site, step, rows)
    else:
        out = dropout(own, site.probability, site.locked, site.seed, site.place, step, rows)
    out.backward(own.detach())
    assert own.grad is not None
    return torch.stack([out.detach(), own.grad]).cpu()
