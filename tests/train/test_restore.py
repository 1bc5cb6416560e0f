"""Negative controls of the comparison that all tests of resuming rest on: whatever a restore leaves out, it shows.

Two small runs in which everything that a checkpoint holds matters: `adam` cuts its learning rate when validation
stalls, remembers losses for the rule of spikes, has a hidden state reset, a planned change of its windows, and steps
that are skipped before and after the checkpoint; `sgd` has momentum, a cosine that has ended, and the scaling of losses
in fp16. Each is cut off after step 10, one item of that checkpoint is put back to its value before training, under
valid digests, and the run resumed.
"""

from __future__ import annotations

import copy
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import faulty_train
import pytest
from conftest import assert_same_bits, records
from small_runs import small_config, train_small

from rnnlm.checkpoint.checkpoint import load, save
from rnnlm.config import Config
from rnnlm.errors import RunError, UserError
from rnnlm.train.schedule import ValidationMemory
from rnnlm.train.state import HealthState, MemoryState, TrainerState

CUT, COMPARED = 10, (12, 14, 16)
CHECKPOINT = f"checkpoints/step-{CUT:08d}"

# of trainer.json: the value before training; what the run is compared with is refused by other tests
STATE = {
    "memory.best_loss": None, "memory.best_step": 0, "memory.evaluations_since_best": 0,
    "memory.evaluations_since_cut": 0, "memory.learning_rate_scale": 1.0, "interval": [0, 0, 0],
    "health.counts[0]": 0, "health.counts[1]": 0, "health.counts[2]": 0, "health.resets": 0,
    "health.losses": [0.0] * 128,
}  # fmt: skip
ITEMS = {
    "adam": [*STATE, "model", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq", "hidden.layer0.h",
             "hidden.layer0.c", "hidden.layer1.h", "hidden.layer1.c"],
    "sgd": ["horizon_steps", "optimizer.momentum_buffer", "scaler.scale", "scaler._growth_tracker"],
}  # fmt: skip
STATE |= {"horizon_steps": 16, "scaler.scale": 2.0**22, "scaler._growth_tracker": 0}
REFUSED = {"step": 0, "origin.step": 0, "origin.position": 0, "hidden.ended": 0}  # even before a step is taken
IDENTITY = {"vocab_size", "processes", "stream", "tokenizer", "configuration", "versions", "layouts"}


def attempts(name: str, run: Path, streams: Path) -> list[Config]:
    """The configurations of a run: up to step 4, up to 8, and to the end."""
    common: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.2},
        "run": {"allow_change": "train.seq_len", "log_every_steps": 3},
    }
    if name == "adam":
        common["optim"] = {"learning_rate": 0.3, "schedule": "plateau", "plateau_patience": 2, "clip_norm": 0.1}
        windows, train = (8, 6, 6), {"skip_spikes_sigmas": 6.0}
    else:
        common["optim"] = {"name": "sgd", "momentum": 0.9, "learning_rate": 0.5, "schedule": "cosine"}
        windows, train = (8, 8, 8), {}

    ends = zip((4, 8, 16), windows, strict=True)
    return [
        small_config(run, streams, **common, train={"max_steps": end, "seq_len": length, **train})
        for end, length in ends
    ]


def resume(name: str, configs: list[Config]) -> None:
    """Train with the faults that belong to a run: they make it remember something."""
    update = ValidationMemory.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty_train, "replace", patch.setattr)
        for fault, value in (("grad", "-9"), ("row", "4")) if name == "adam" else (("half", "0"),):
            faulty_train.inject(fault, value)
        # each evaluation is worse than the one before, whatever this machine's arithmetic
        patch.setattr(
            ValidationMemory, "update", lambda self, loss, step, optim: update(self, loss + step, step, optim)
        )
        for config in configs:
            train_small(config)


@pytest.fixture(scope="session")
def whole(streams: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both runs from beginning to end."""
    runs = {name: tmp_path_factory.mktemp(name) / "run" for name in ITEMS}
    for name, run in runs.items():
        resume(name, attempts(name, run, streams))
    return runs


def cut_off(whole: Path, run: Path) -> None:
    """A run as it is when it has just saved step 10."""
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > CUT:
            shutil.rmtree(path)


def leave_out(run: Path, item: str) -> None:
    """Put one item of the checkpoint back to what it was before training."""
    found = load(run / CHECKPOINT)
    groups = {group: found.tensors(group) for group in ("model", "optimizer", "hidden")}
    state: dict[str, Any] = copy.deepcopy(dict(found.state))

    group, _, name = item.partition(".")
    if group in groups:
        tensors = [tensor for key, tensor in groups[group].items() if key.endswith(name)]
        assert any(tensor.any() for tensor in tensors), "else nothing is left out"
        for tensor in tensors:
            tensor.zero_()

    else:
        value = {**STATE, **REFUSED}[item]
        *parents, last = item.replace("[", ".").replace("]", "").split(".")
        place: Any = state
        for key in parents:
            place = place[key]
        last = int(last) if isinstance(place, list) else last
        assert place[last] != value, "else nothing is left out"
        place[last] = value
    save(run / "checkpoints", f"step-{CUT:08d}", groups, state)


@pytest.mark.parametrize("name", ITEMS)
def test_resumed_with_everything_it_has_the_bits_of_the_whole_run(
    whole: dict[str, Path], streams: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    cut_off(whole[name], run)
    resume(name, attempts(name, run, streams)[-1:])
    assert records(run, "start")[-1]["step"] == CUT
    for step in COMPARED:
        assert_same_bits(run, whole[name], step)


@pytest.mark.parametrize(("name", "item"), [(name, item) for name, items in ITEMS.items() for item in items])
def test_resumed_without_one_item_it_does_not(
    whole: dict[str, Path], streams: Path, tmp_path: Path, name: str, item: str
) -> None:
    run = tmp_path / "run"
    cut_off(whole[name], run)
    leave_out(run, item)
    with suppress(RunError):  # it may have diverged, and say so at its end
        resume(name, attempts(name, run, streams)[-1:])

    def compare() -> None:
        for step in COMPARED:
            assert_same_bits(run, whole[name], step)

    with pytest.raises(AssertionError):
        compare()


@pytest.mark.parametrize("item", REFUSED)
def test_a_position_that_does_not_fit_the_rows_is_refused(
    whole: dict[str, Path], streams: Path, tmp_path: Path, item: str
) -> None:
    run = tmp_path / "run"
    cut_off(whole["adam"], run)
    leave_out(run, item)
    with pytest.raises(UserError, match="its rows ended at|no trainer writes"):
        resume("adam", attempts("adam", run, streams)[-1:])


def test_no_item_of_a_checkpoint_is_forgotten_here(whole: dict[str, Path]) -> None:
    items = {item for names in ITEMS.values() for item in names} | {*REFUSED}
    fields = {key for key in TrainerState.model_fields if not any(item.split(".")[0] == key for item in items)}
    assert fields == IDENTITY
    assert {f"memory.{name}" for name in MemoryState.model_fields} <= items
    assert {*HealthState.model_fields} == {item[7:].split("[")[0] for item in items if "health" in item}

    for name, run in whole.items():
        found = load(run / CHECKPOINT)
        for group in ("model", "optimizer", "hidden"):
            for tensor in found.tensors(group):
                assert any(f"{group}.{tensor}".endswith(item.partition(".")[2]) for item in items if group in item)
        assert {*found.state["scaler"]} <= {"growth_factor", "backoff_factor", "growth_interval"} | {
            item[7:] for item in ITEMS[name] if item.startswith("scaler.")
        }, "the others are constants"
