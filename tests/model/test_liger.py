"""liger-kernel's softmax, in Triton's interpreter on a CPU, gives the losses and slopes of the plain path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rnnlm.model.cross_entropy import _plain_slope
from rnnlm.model.liger import liger_softmax, liger_takes


def compare(tokens: int, vocabulary: int) -> None:
    """Run in a process of its own: Triton asks for its interpreter when it is imported."""
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn((tokens, vocabulary), generator=draw)
    logits[3, 1] = 60.0  # one that leaves nothing to the others
    targets = torch.randint(-1, vocabulary, (tokens,), generator=draw)
    targets[:2] = torch.tensor([-1, vocabulary - 1])

    slope = logits.clone()
    losses = liger_softmax(slope, targets)
    wanted, wanted_slope, _, _ = _plain_slope(logits.double(), torch.zeros(vocabulary).double(), targets, False)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(slope.double(), wanted_slope, rtol=1e-5, atol=1e-7)
    assert not slope[targets < 0].any()


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs the extra gpu")
@pytest.mark.parametrize(("tokens", "vocabulary"), [(17, 300), (5, 40_000)])
def test_the_interpreted_kernel_gives_losses_and_slopes(tokens: int, vocabulary: int) -> None:
    code = f"import test_liger; test_liger.compare({tokens}, {vocabulary})"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_on_a_cpu_it_is_not_asked() -> None:
    assert not liger_takes(torch.zeros(2, 2))
