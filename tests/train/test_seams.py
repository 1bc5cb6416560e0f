"""The four seams: a layer, a head, an optimizer and a tracker enter from outside, and a run with all of them resumes.

Nothing of the package is touched: the toys in toys.py are what a user's own file would hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from conftest import RunScript, TrainHere, assert_same_bits, final_state, records
from toys import Collector, TwoDecays

from rnnlm import config
from rnnlm.config import ModelConfig, RunConfig
from rnnlm.model import heads, layers
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import State
from rnnlm.train import optim, trackers
from rnnlm.train.optim import OptimizerKind, register_optimizer
from rnnlm.train.trackers import Tracker


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Collector]]:
    """All four toys, as long as a test runs; the collectors that were started."""
    before = [list(names) for names in (config.CELLS, config.HEADS, config.OPTIMIZERS)]
    collectors: list[Collector] = []

    def start(directory: Path, run: RunConfig, step: int) -> Tracker:
        collectors.append(Collector(step))
        return collectors[-1]

    toys.register()
    monkeypatch.setattr(trackers, "TRACKERS", [*trackers.TRACKERS, start])
    yield collectors

    for names, old in zip((config.CELLS, config.HEADS, config.OPTIMIZERS), before, strict=True):
        names[:] = old
    del layers.LAYERS["decays"], heads._FACTORIES["parity"], optim._KINDS["signum"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_toys_from_outside_resumes_to_the_bit(
    train_here: TrainHere, experiment: Path, tmp_path: Path, registered: list[Collector], precision: str
) -> None:
    options = (f"--config={experiment}", *toys.OPTIONS, "--run.log_every_steps=5", "--eval.every_steps=10")
    options += (f"--train.precision={precision}",)
    whole = train_here(*options, f"--run.directory={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    first = train_here(*options, "--train.max_steps=10")
    assert first.returncode == 0, first.stderr
    tensors, state = final_state(tmp_path / "run", 10)
    assert tensors["hidden.layer0.traces"].dtype == torch.float64
    assert tensors["hidden.layer1.traces"].shape == (16, 2, 16)
    assert tensors["hidden.layer1.seen"].dtype == torch.int64
    assert tensors["hidden.layer1.energy"].shape == (16,)
    assert tensors["hidden.layer1.last"].dtype == torch.bfloat16
    assert state["layouts"] == {"layer0.traces": "fast, slow", "layer1.traces": "fast, slow"}
    assert "optimizer.head.weight.momentum" in tensors
    assert tensors["optimizer.head.weight.steps"].tolist() == 10

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
    options = (f"--config={experiment}", *toys.OPTIONS)
    assert train_here(*options, "--train.max_steps=10").returncode == 0
    old = TwoDecays.states
    monkeypatch.setattr(TwoDecays, "states", lambda self: (replace(old(self)[0], layout="slow, fast"), *old(self)[1:]))
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


@pytest.mark.slow
def test_toys_on_two_processes_have_the_bits_of_one(run_script: RunScript, experiment: Path, tmp_path: Path) -> None:
    options = (f"--config={experiment}", *toys.OPTIONS, "--train.exact_slices=2")
    script = Path(toys.__file__)
    one = run_script(script, *options, f"--run.directory={tmp_path}/one")
    assert one.returncode == 0, one.stderr
    assert run_script(script, *options, "--train.max_steps=10", processes=2).returncode == 0
    two = run_script(script, *options)
    assert two.returncode == 0 and "resuming from step 10" in two.stderr, two.stderr
    (mine, _), (theirs, _) = final_state(tmp_path / "run", 20), final_state(tmp_path / "one", 20)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_tracker_that_cannot_start_costs_nothing_but_a_warning(
    train_here: TrainHere, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_nowhere(directory: Path, run: RunConfig, step: int) -> Tracker:
        raise ConnectionError("no such host")

    monkeypatch.setattr(trackers, "TRACKERS", [start_nowhere])
    done = train_here(f"--config={experiment}", "--train.max_steps=2")
    assert done.returncode == 0 and "warning: start_nowhere: no such host; training without it" in done.stderr
    assert records(tmp_path / "run", "train")


def test_a_state_that_no_checkpoint_holds_is_refused_before_training(
    train_here: TrainHere, experiment: Path, registered: list[Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TwoDecays, "states", lambda self: (State("flags", (2,), torch.bool),))
    done = train_here(f"--config={experiment}", *toys.OPTIONS)
    assert done.returncode == 2 and "the state layer0.flags is of torch.bool" in done.stderr, done.stderr


def test_an_attempt_that_fails_at_its_start_holds_the_directory_to_nothing(
    train_here: TrainHere, experiment: Path, tmp_path: Path, registered: list[Collector]
) -> None:
    options = (f"--config={experiment}", "--train.max_steps=2")
    kind = OptimizerKind(lambda groups, config: torch.optim.Rprop(groups), lambda parameter, config: {})
    register_optimizer("cannot-skip", kind)
    refused = train_here(*options, "--optim.name=cannot-skip")
    assert refused.returncode == 2 and "cannot skip a step" in refused.stderr, refused.stderr
    assert not (tmp_path / "run/config.yaml").exists()
    assert train_here(*options).returncode == 0
    del optim._KINDS["cannot-skip"]
