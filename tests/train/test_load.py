"""Models from checkpoints: nothing is initialised in vain, and every number of them is that of the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import FAULTY, RunHere, RunScript, TrainHere, Uninterrupted
from torch import nn

from rnnlm.checkpoint.checkpoint import find_newest
from rnnlm.cli import load_yaml
from rnnlm.config import Config, ModelConfig, RunConfig, TrainConfig
from rnnlm.errors import UserError
from rnnlm.model.heads import SoftmaxHead
from rnnlm.model.language_model import RecurrentLM
from rnnlm.model.layers import RecurrentLayer
from rnnlm.train.load import choose, load_model
from rnnlm.train.state import check_state
from rnnlm.train.step import TrainStep, _check_states


@pytest.fixture
def trained(uninterrupted: Uninterrupted) -> Path:
    """A run that is there before anything is refused."""
    return uninterrupted(1)


@pytest.fixture
def nothing_is_initialised(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drawing a weight is an error."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("initialised")

    with monkeypatch.context() as patch:
        for kind in (RecurrentLayer, SoftmaxHead):
            patch.setattr(kind, "initialise", refuse)
        patch.setattr(nn.init, "normal_", refuse)  # by nn.Embedding
        yield


@pytest.fixture
def unwritten_memory_is_nan(trained: Path) -> Iterator[None]:
    """Of torch.empty: PyTorch does so in deterministic mode."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.fixture
def alone() -> Iterator[Accelerator]:
    """One process on a CPU."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def config_of(run: Path) -> Config:
    sections = load_yaml(run / "config.yaml")
    return Config(
        model=ModelConfig(**sections["model"]),
        train=TrainConfig(**sections["train"]),
        run=RunConfig(**{**sections["run"], "directory": str(run)}),
    )


def test_a_model_that_is_loaded_is_the_checkpoints_to_the_last_number(
    trained: Path, nothing_is_initialised: None, unwritten_memory_is_nan: None
) -> None:
    config = config_of(trained)
    model, _, found = load_model(config, choose(config), torch.device("cpu"))
    saved = found.tensors("model")
    assert {*saved} == {name for name, _ in model.named_parameters()} == {*model.state_dict()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_all_that_a_step_changes_is_the_checkpoints(
    trained: Path, alone: Accelerator, nothing_is_initialised: None, unwritten_memory_is_nan: None
) -> None:
    """On resuming; the run's own tests compare bits of what is trained from there."""
    found, _ = find_newest(trained / "checkpoints", "step")
    assert found
    state = check_state(found.state, found.path)
    step = TrainStep(config_of(trained), state.vocab_size, alone, 0, 16, initialise=False)
    step.restore(found, state, same_substreams=True)
    for group, tensors in step.tensors().items():
        saved = found.tensors(group)
        assert {*saved} - {"ended"} == {*tensors}
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved[name]), name


def test_what_all_processes_have_together_is_taken_over_by_one(
    trained: Path, alone: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over all processes would else come out as many times too large as there are processes."""
    found, _ = find_newest(trained / "checkpoints", "step")
    assert found
    health = {**found.state["health"], "resets": 5}
    state = check_state({**found.state, "interval": [7, 8, 0], "health": health}, found.path)
    for is_main, sums, resets in ((True, [7, 8, 0], 5), (False, [0, 0, 0], 0)):
        step = TrainStep(config_of(trained), state.vocab_size, alone, 0, 16)
        with monkeypatch.context() as patch:
            patch.setattr(type(alone), "is_main_process", is_main)
            step.restore(found, state, same_substreams=False)
        assert step.interval.sums.tolist() == sums and int(step.guard.resets) == resets
        assert step.guard.counts.tolist() == state.health.counts, "which each process has alike"


def test_a_resumed_run_initialises_nothing(
    trained: Path, train_here: TrainHere, experiment: Path, tmp_path: Path, nothing_is_initialised: None
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    options = (f"--config={experiment}", "--train.epochs=3", "--train.max_steps=21")
    resumed = train_here(*options)
    assert resumed.returncode == 0 and "resuming from step 20" in resumed.stderr, resumed.stderr
    begun = train_here(*options, f"--run.directory={tmp_path}/new")
    assert begun.returncode == 1 and "AssertionError: initialised" in begun.stderr, "control"


def test_a_buffer_that_no_checkpoint_holds_is_refused() -> None:
    model = RecurrentLM(ModelConfig(embedding_size=4, hidden_size=4, layers=1), 300, seed=1)
    model.layers[0].register_buffer("constant", torch.ones(2), persistent=False)
    _check_states(model)
    model.layers[0].register_buffer("average", torch.ones(2))
    with pytest.raises(UserError, match="the buffer layers.0.average is in no checkpoint; make it a state"):
        _check_states(model)


@pytest.mark.slow
def test_one_process_reads_the_checkpoint_for_both(run_script: RunScript, experiment: Path, tmp_path: Path) -> None:
    """Large files on a disk that all share would be read and hashed as often as there are processes."""
    options = (f"--config={experiment}", "--train.max_steps=4")
    assert run_script(FAULTY, "reads", "0", *options, processes=2).returncode == 0
    for log in tmp_path.glob("read-*"):
        log.unlink()
    done = run_script(FAULTY, "reads", "0", *options, "--train.max_steps=6", processes=2)
    assert done.returncode == 0 and "resuming from step 4" in done.stderr, done.stderr
    first, second = ((tmp_path / f"read-{rank}").read_text().splitlines() for rank in (0, 1))
    assert [Path(line).name for line in first] == [f"{group}.safetensors" for group in ("model", "optimizer", "hidden")]
    assert not second


def test_what_is_read_instead_is_named_when_it_is_found(trained: Path, run_here: RunHere, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for best in (run / "checkpoints").glob("best-*"):
        (best / "manifest.json").write_text("{}")
    options = (f"--run.directory={run}", "--eval.batch_size=4")
    done = run_here("launch/eval.py", *options)
    assert done.returncode == 0 and f"; reading {run}/checkpoints/step-00000020 instead" in done.stderr, done.stderr

    for path in (run / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{}")
    refused = run_here("launch/eval.py", *options)
    assert refused.returncode == 2 and "; reading " not in refused.stderr, refused.stderr
    assert "every checkpoint is damaged" in refused.stderr
