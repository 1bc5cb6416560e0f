"""The four seams: a layer, a head, an optimizer and a tracker enter from outside, and a run with all of them resumes.

Nothing of the package is touched: each toy below is what a user's own file would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TrainHere, assert_same_bits, final_state, records
from torch import Tensor, nn

from rnnlm import config
from rnnlm.config import ModelConfig, OptimConfig, RunConfig
from rnnlm.model import heads, layers
from rnnlm.model.heads import Head, register_head
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import Context, Layer, State, register_layer
from rnnlm.train import optim, trackers
from rnnlm.train.optim import Groups, OptimizerKind, register_optimizer
from rnnlm.train.trackers import Tracker


class TwoDecays(Layer):
    """Two traces of the input that fade at different rates, weighed by how long ago the row began.

    Its states are a matrix in fp64 and a count in int64; it adds what the layer below has left in `shared`.
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float):
        super().__init__()
        self.output_size, self.rate = hidden_size, dropout
        self.weight = nn.Parameter(torch.empty(hidden_size, input_size))

    def states(self) -> tuple[State, ...]:
        return (
            State("traces", (2, self.output_size), torch.float64, layout="fast, slow"),
            State("seen", (), torch.int64, fill=3),
        )

    def forward(self, x: Tensor, states: Sequence[Tensor], context: Context) -> tuple[Tensor, list[Tensor]]:
        traces, seen = states  # (B, 2, H), (B,)
        decay, out = torch.tensor([0.5, 0.9], dtype=torch.float64)[:, None], []
        new = context.dropout(x @ self.weight.T, "recurrent", self.rate, locked=True).double()  # (T, B, H)
        for token in new:
            traces, seen = traces * decay + token[:, None], seen + 1
            out.append((traces.sum(dim=1) / seen[:, None].double().sqrt()).tanh().float())

        result = torch.stack(out)
        below = context.shared.get("two decays")
        context.shared["two decays"] = result
        return (result if below is None else result + below), [traces, seen]

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        self.weight.data.normal_(0, 0.3, generator=generator("weight"))


class Parity(Head):
    """Whether the next id is odd."""

    predicts_tokens = False

    def __init__(self, config: ModelConfig, input_size: int, embedding: nn.Embedding, chunk: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, input_size))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.token_losses(x, targets).sum()

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        classes = torch.where(targets < 0, -1, targets % 2)
        losses = F.cross_entropy(
            (x @ self.weight.T).flatten(0, 1), classes.flatten(), ignore_index=-1, reduction="none"
        )
        return losses.view(targets.shape)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def initialise(self, config: ModelConfig, generator: Callable[[str], torch.Generator]) -> None:
        self.weight.data.normal_(0, 0.1, generator=generator("parity"))


class SignOfMomentum(torch.optim.Optimizer):
    """Signum (Bernstein et al. 2018), which reads the flag on the device that skips a step."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        skip = getattr(self, "found_inf", torch.zeros(())) > 0
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter]["momentum"]
                new = 0.9 * momentum + 0.1 * parameter.grad
                momentum.copy_(torch.where(skip, momentum, new))
                parameter.sub_(torch.where(skip, 0.0, group["lr"] * momentum.sign()))


def build_signum(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return SignOfMomentum(groups, {"lr": config.learning_rate})


class Collector(Tracker):
    """Keeps what it is given."""

    name = "collector"

    def __init__(self, step: int):
        self.started, self.lines = step, list[tuple[str, Any]]()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        self.lines.append((kind, record["step"]))

    def picture(self, path: Path) -> None:
        self.lines.append(("picture", path.read_bytes()[1:4]))

    def text(self, step: int, text: str) -> None:
        self.lines.append(("text", step))

    def close(self) -> None:
        self.lines.append(("close", None))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Collector]]:
    """All four toys, as long as a test runs; the collectors that were started."""
    before = [list(names) for names in (config.CELLS, config.HEADS, config.OPTIMIZERS)]
    collectors: list[Collector] = []

    def start(directory: Path, run: RunConfig, step: int) -> Tracker:
        collectors.append(Collector(step))
        return collectors[-1]

    register_layer("decays", lambda model, width: TwoDecays(width, model.hidden_size, model.dropout))
    register_head("parity", Parity)
    register_optimizer(
        "signum", OptimizerKind(build_signum, lambda parameter, config: {"momentum": torch.zeros_like(parameter)})
    )
    monkeypatch.setattr(trackers, "TRACKERS", [*trackers.TRACKERS, start])
    yield collectors

    for names, old in zip((config.CELLS, config.HEADS, config.OPTIMIZERS), before, strict=True):
        names[:] = old
    del layers.LAYERS["decays"], heads._FACTORIES["parity"], optim._KINDS["signum"]


TOYS = ("--model.cell=decays", "--model.head=parity", "--optim.name=signum", "--optim.horizon_steps=20")


def test_a_run_of_toys_from_outside_resumes_to_the_bit(
    train_here: TrainHere, experiment: Path, tmp_path: Path, registered: list[Collector]
) -> None:
    options = (f"--config={experiment}", *TOYS, "--run.log_every_steps=5", "--eval.every_steps=10")
    whole = train_here(*options, f"--run.directory={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    first = train_here(*options, "--train.max_steps=10")
    assert first.returncode == 0, first.stderr
    tensors, state = final_state(tmp_path / "run", 10)
    assert tensors["hidden.layer0.traces"].dtype == torch.float64
    assert tensors["hidden.layer1.traces"].shape == (16, 2, 16)
    assert tensors["hidden.layer1.seen"].dtype == torch.int64
    assert state["layouts"] == {"layer0.traces": "fast, slow", "layer1.traces": "fast, slow"}
    assert "optimizer.head.weight.momentum" in tensors

    second = train_here(*options)
    assert second.returncode == 0 and "resuming from step 10" in second.stderr, second.stderr
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    losses = [line["loss"] for line in records(tmp_path / "whole", "train")]
    assert all(0 < loss < 0.8 for loss in losses) and losses[-1] < losses[0], "two classes: ln 2 at the start"


def test_a_tracker_from_outside_gets_lines_pictures_and_texts(
    train_here: TrainHere, experiment: Path, registered: list[Collector]
) -> None:
    assert train_here(f"--config={experiment}", "--train.max_steps=10").returncode == 0
    assert train_here(f"--config={experiment}", "--optim.horizon_steps=0").returncode == 0
    first, second = registered
    assert (first.started, second.started) == (0, 10)
    assert [line for line in first.lines if line[0] == "train"] == [("train", step) for step in (3, 6, 9, 10)]
    assert ("valid", 10) in first.lines and ("text", 10) in first.lines
    assert first.lines[-2:] == [("picture", b"PNG"), ("close", None)]


def test_a_layer_that_lays_its_states_out_anew_does_not_read_old_ones(
    train_here: TrainHere, experiment: Path, registered: list[Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"--config={experiment}", *TOYS)
    assert train_here(*options, "--train.max_steps=10").returncode == 0
    old = TwoDecays.states
    monkeypatch.setattr(TwoDecays, "states", lambda self: (replace(old(self)[0], layout="slow, fast"), old(self)[1]))
    refused = train_here(*options)
    assert refused.returncode == 2 and "slow, fast" in refused.stderr, refused.stderr


def toy_model(cell: str) -> RecurrentLM:
    return RecurrentLM(ModelConfig(cell=cell, embedding_size=6, hidden_size=8, layers=2), 37, seed=5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "decays"])
def test_two_windows_equal_one_and_rows_are_independent(cell: str, registered: list[Collector]) -> None:
    """What every layer must hold."""
    model = toy_model(cell)
    tokens = torch.randint(0, 37, (4, 22), generator=torch.Generator().manual_seed(2))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole, after = model.token_losses(inputs, model.zero_hidden(4), targets)

    first, hidden = model.token_losses(inputs[:, :9], model.zero_hidden(4), targets[:, :9])
    second, joined = model.token_losses(inputs[:, 9:], hidden, targets[:, 9:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-5, atol=1e-6)
    for name, state in after.items():
        torch.testing.assert_close(joined[name], state, rtol=1e-5, atol=1e-6)

    half, after_half = model.token_losses(inputs[2:], model.zero_hidden(2), targets[2:])
    torch.testing.assert_close(half, whole[2:], rtol=1e-5, atol=1e-6)
    for name, state in after.items():
        torch.testing.assert_close(after_half[name], state[2:], rtol=1e-5, atol=1e-6)
    changed, _ = model.token_losses(inputs.index_fill(0, torch.tensor([0]), 7), model.zero_hidden(4), targets)
    assert torch.equal(changed[1:], whole[1:]) and not torch.equal(changed[0], whole[0])


def test_text_cannot_be_asked_of_a_head_that_predicts_no_tokens(
    train_here: TrainHere, experiment: Path, tmp_path: Path, registered: list[Collector]
) -> None:
    assert train_here(f"--config={experiment}", "--model.head=parity", "--train.max_steps=2").returncode == 0
    assert not (tmp_path / "run/samples.md").exists()
    valid = records(tmp_path / "run", "valid")
    assert valid and all(0 < line["loss"] < 0.8 for line in valid)
