"""Losses of three small runs, as they were committed: a change of bits is a decision, made by

    pytest tests/train/test_baselines.py --record-baselines

which writes baselines.json anew. Between two machines the last bits may differ, since libraries choose their kernels by
the processor. So some products and functions, of the shapes that the runs use, are computed first: where their bits and
PyTorch's version are the recorded ones, every loss and gradient norm must be so to the bit; elsewhere to rounding.
"""

from __future__ import annotations

import hashlib
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import records
from small_runs import small_config, train_small
from torch import Tensor, nn

from rnnlm.data.adopt import adopt

FILE = Path(__file__).with_name("baselines.json")
STEPS, VOCABULARY = 12, 40
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "lstm with softmax, adam": {"optim": {"learning_rate": 0.02}, "train": {"accumulation": 2}},
    "gru, tied, locked dropout, adamw, cosine": {
        "model": {"cell": "gru", "tied": True, "dropout": 0.3, "dropout_kind": "locked"},
        "optim": {"name": "adamw", "weight_decay": 0.1, "learning_rate": 0.03, "schedule": "cosine", "warmup_steps": 3},
    },
    "rnn in bf16, sgd with momentum, plateau": {
        "model": {"cell": "rnn", "init": "uniform", "layers": 1},
        "optim": {"name": "sgd", "momentum": 0.9, "learning_rate": 0.5, "schedule": "plateau", "plateau_factor": 0.5},
        "train": {"precision": "bf16"},
    },
}
ROUNDING = {"bf16": 1e-3, "fp32": 1e-5}  # relative, by the arithmetic of a run's layers

Numbers = list[float]  # loss and gradient norm of step after step


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams of tokens that no tokenizer made, so that no library's release changes them."""
    directory, draw = tmp_path_factory.mktemp("tokens"), random.Random(0)
    for name, count in (("train", 2000), ("valid", 300)):
        ids = [0]
        while len(ids) < count:  # each follows from the one before, but for one in five
            ids.append(draw.randrange(VOCABULARY) if draw.random() < 0.2 else (3 * ids[-1] + 1) % VOCABULARY)
        source = directory / f"{name}.bin"
        source.write_bytes(np.array(ids, "<u2").tobytes())
        adopt(source, directory / name, VOCABULARY, 0, "uint16", None)
    return directory


def numbers(tokens: Path, run: Path, name: str) -> Numbers:
    """Train, and return what was logged of each step."""
    sections = {section: dict(values) for section, values in RUNS[name].items()}
    sections["train"] = {"max_steps": STEPS, **sections.get("train", {})}
    sections["run"] = {"log_every_steps": 1, "save_every_steps": STEPS}
    train_small(small_config(run, tokens, **sections))
    return [number for line in records(run, "train") for number in (line["loss"], line["gradient_norm"])]


def arithmetic() -> str:
    """Stands for what this machine and this PyTorch make of the operations in the runs, forward and backward."""
    sha256 = hashlib.sha256(torch.__version__.encode())

    def add(out: Tensor, *leaves: Tensor) -> None:
        values = (out.sigmoid() * out.tanh()).float().logsumexp(-1).exp()
        values.pow(2).sum().sqrt().backward()  # type: ignore[no-untyped-call]
        for tensor in (out.detach(), values.detach(), *(leaf.grad for leaf in leaves)):
            assert tensor is not None
            sha256.update(tensor.float().numpy().tobytes())

    for seed, dtype in product(range(4), (torch.float32, torch.bfloat16)):
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            torch.manual_seed(seed)
            for rows, inner, outer in product((4, 16, 32), (5, 6), (6, 12, 40)):
                leaves = [torch.randn(shape).requires_grad_() for shape in ((rows, inner), (outer, inner), (outer,))]
                add(F.linear(*leaves), *leaves)
            kinds = (nn.LSTM, nn.GRU) if dtype == torch.float32 else (nn.RNN,)
            for kind, rows, inner in product(kinds, (2, 4), (5, 6)):
                layer, x = kind(inner, 6), torch.randn(8, rows, inner).requires_grad_()
                add(layer(x)[0], x, *layer.parameters())
    return sha256.hexdigest()[:16]


def differences(found: Numbers, recorded: list[str], rounding: float) -> list[str]:
    """What differs from a record, by more than `rounding`, relative; 0: by any bit."""
    pairs = [(one, float.fromhex(other)) for one, other in zip(found, recorded, strict=True)]
    return [
        f"step {place // 2 + 1}, {('loss', 'gradient norm')[place % 2]}: {one!r}, recorded {other!r}"
        for place, (one, other) in enumerate(pairs)
        if one != other and not abs(one - other) <= rounding * abs(other)
    ]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_that_were_committed(
    pytestconfig: pytest.Config, tokens: Path, tmp_path: Path, name: str
) -> None:
    found, record = numbers(tokens, tmp_path / "run", name), json.loads(FILE.read_text()) if FILE.exists() else {}
    if pytestconfig.getoption("--record-baselines"):
        record |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
        record |= {"arithmetic": arithmetic(), name: [number.hex() for number in found]}
        FILE.write_text(json.dumps(record, indent=1) + "\n")
        return

    precision = RUNS[name].get("train", {}).get("precision", "fp32")
    exact = arithmetic() == record["arithmetic"]
    how = "bit for bit" if exact else f"to {ROUNDING[precision]:g}, as this arithmetic is not the recorded one"
    print(f"{name}: compared {how} ({record['torch']}, {record['cpu']})")
    assert not differences(found, record[name], 0.0 if exact else ROUNDING[precision]), f"compared {how}"


def test_a_record_differs_by_a_bit_and_by_more_than_rounding() -> None:
    """Both ways of comparing can fail."""
    numbers = [3.5, 0.25, 3.25, 0.125]
    recorded = [number.hex() for number in numbers]
    assert differences(numbers, recorded, 0.0) == []
    assert differences([3.5, 0.25, np.nextafter(3.25, 4), 0.125], recorded, 0.0) == [
        "step 2, loss: np.float64(3.2500000000000004), recorded 3.25"
    ]
    assert differences([3.5, 0.25 * (1 + 2e-6), 3.25, 0.125], recorded, 1e-5) == []
    assert len(differences([3.5, 0.25 * (1 + 2e-5), 3.25, float("nan")], recorded, 1e-5)) == 2
    with pytest.raises(ValueError, match="longer"):
        differences(numbers[:2], recorded, 1.0)
