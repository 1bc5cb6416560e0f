"""Fault 30: what the trainer takes over from a checkpoint that anyone may have written."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STATE, TrainHere, Uninterrupted

from rnnlm.checkpoint.checkpoint import load, save
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.config import Config, ModelConfig, OptimConfig, TrainConfig
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.guard import Guard
from rnnlm.train.identity import identity
from rnnlm.train.load import load_model
from rnnlm.train.run import _origin
from rnnlm.train.schedule import ValidationMemory
from rnnlm.train.state import HealthState, MemoryState, OriginState, check_state


def test_fault_30_the_types_in_trainer_json(tmp_path: Path) -> None:
    state = check_state(STATE, tmp_path)
    assert {key: value for key, value in state.model_dump().items() if key != "layouts"} == STATE
    assert state.layouts == {}, "older checkpoints have none"
    assert check_state({**STATE, "more": [1]}, tmp_path) == state
    assert check_state({**STATE, "layouts": {"layer0.h": "rows"}}, tmp_path).layouts == {"layer0.h": "rows"}

    wrong = {
        "step": (-1, 1.5, True, 2**63, "7", None), "horizon_steps": ("",),
        "interval": ([1, 2], [1, 2, "3"], {}, 10**30),
        "memory": ({}, None, {**STATE["memory"], "x": 1}, {**STATE["memory"], "best_step": None}), "tokenizer": (None,),
        "scaler": ([], {"a": []}), "stream": (1,), "vocab_size": (10**30,), "processes": ([],), "versions": ({"a": 1},),
        "origin": ({}, {"step": -1, "epoch": 0, "position": 0}, {"step": 8, "epoch": 0, "position": 0}),
        "health": ({}, {"counts": [], "resets": 0, "losses": []}),
        "configuration": ([], {"model": 1}),
    }  # fmt: skip
    assert {*wrong} == {*STATE}
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(CheckpointError, match=f"trainer.json: {key} is .*, which no trainer writes"):
                check_state({**STATE, key: value}, tmp_path)
        with pytest.raises(CheckpointError, match=f"{key} is not there"):
            check_state({name: value for name, value in STATE.items() if name != key}, tmp_path)

    for key in STATE:  # whatever it says, the error is short
        with pytest.raises(CheckpointError, match=f"{key} is") as caught:
            check_state({**STATE, key: {f"{number}": ["a" * 999] for number in range(99)} | {"b": 1}}, tmp_path)
        assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_its_fields_are_those_of_the_objects_that_are_saved() -> None:
    assert [*MemoryState.model_fields] == [field.name for field in fields(ValidationMemory)]
    assert [*OriginState.model_fields] == [field.name for field in fields(Origin)]
    assert {*HealthState.model_fields} == {*Guard(torch.device("cpu")).to_dict(0)}


def test_fault_30_a_vocabulary_that_the_model_cannot_have_takes_no_memory(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(embedding_size=2, hidden_size=3, layers=1))
    for size, message in ((300, None), (2**40, "a vocabulary of 1099511627776 in a smaller model"), (301, "expected")):
        model = RecurrentLM(config.model, 300, config.train.seed)
        path = save(tmp_path, "step-00000007", {"model": dict(model.named_parameters())}, {**STATE, "vocab_size": size})
        if message is None:
            assert load_model(config, path, torch.device("cpu"))[0].vocab_size == 300
            continue
        with pytest.raises(CheckpointError, match=message):
            load_model(config, path, torch.device("cpu"))


def test_fault_30_a_width_that_the_checkpoint_has_not_takes_no_memory(tmp_path: Path) -> None:
    """config.yaml says it: a model of that width would take terabytes."""
    config = Config(model=ModelConfig(embedding_size=2, hidden_size=3, layers=1))
    model = RecurrentLM(config.model, 300, config.train.seed)
    path = save(tmp_path, "step-00000007", {"model": dict(model.named_parameters())}, {**STATE, "vocab_size": 300})
    forged = replace(config, model=replace(config.model, hidden_size=10**6))
    with pytest.raises(CheckpointError, match=r"tensor head.weight is \(300, 3\) .* expected \(300, 1000000\)"):
        load_model(forged, path, torch.device("cpu"))


def test_fault_30_tensors_of_other_shapes_are_refused_before_they_are_used(
    train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    """PyTorch's fused kernels do not look at shapes: a smaller moment would be written beyond its end."""
    options = (f"--config={experiment}", "--train.max_steps=2")
    assert train_here(*options).returncode == 0
    root = tmp_path / "run/checkpoints"
    found = load(root / "step-00000002")
    tensors = {group: found.tensors(group) for group in ("model", "optimizer", "hidden")}

    moment = next(name for name in tensors["optimizer"] if name.endswith("exp_avg"))
    elsewhere = tensors["hidden"]["ended"] + 10**15
    for group, name, other in (
        ("optimizer", moment, torch.zeros(1)),
        ("optimizer", moment, None),
        ("hidden", "layer0.h", torch.zeros(17, 16)),
        ("hidden", "ended", None),
        ("hidden", "ended", elsewhere),
    ):
        changed = {key: value for key, value in tensors[group].items() if key != name}
        changed |= {} if other is None else {name: other}
        save(root, "step-00000002", {**tensors, group: changed}, found.state)
        done = train_here(f"--config={experiment}", "--train.max_steps=3")
        assert done.returncode == 2, done.stderr
        assert name in done.stderr


def test_fault_30_a_forged_step_of_0_does_not_pass_over_the_shapes(
    uninterrupted: Uninterrupted, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    """A run that has not begun has no state to compare, but a checkpoint of step 0 has."""
    root = tmp_path / "run/checkpoints"
    shutil.copytree(uninterrupted(1), root.parent)
    found = load(root / "step-00000020")
    tensors = {group: found.tensors(group) for group in ("model", "optimizer", "hidden")}
    shutil.rmtree(root)

    moment = next(name for name in tensors["optimizer"] if name.endswith("exp_avg"))
    save(root, "step-00000000", {**tensors, "optimizer": {**tensors["optimizer"], moment: torch.zeros(1)}},
         {**found.state, "step": 0})  # fmt: skip
    done = train_here(f"--config={experiment}")
    assert done.returncode == 2 and f"tensor {moment} is (1,)" in done.stderr, done.stderr


ODD: list[tuple[dict[str, Any], str]] = [
    ({"train": {"global_batch_size": 0}}, "train.global_batch_size=0: must be at least 1"),
    ({"train": {"seq_len": -3}}, "train.seq_len=-3: must be at least 1"),
    ({"train": {"seq_len": "48"}}, "train.seq_len='48': of another type"),
    ({"train": {"seq_len": None}}, "train.seq_len=None: of another type"),
    ({"train": {"seed": 1.5}}, "train.seed=1.5: of another type"),
    ({"train": {"seed": True}}, "train.seed=True: of another type"),
    ({"train": {"rotate": []}}, "train.rotate=.*: of another type"),
    ({"train": {"precision": "fp8"}}, "train.precision='fp8': of another type"),
    ({"model": {"cell": ["lstm"]}}, "model.cell=.*: of another type"),
    ({"model": {"cell": "perceptron"}}, "model.cell=perceptron: not one of lstm"),
    ({"model": {"dropout": float("inf")}}, "model.dropout=inf: must be a finite number"),
    ({"optim": {"learning_rate": {"a": 1}}}, "optim.learning_rate=.*: of another type"),
    ({"train": {"seq_len": ["a" * 10_000]}}, "train.seq_len=.*"),
]


@pytest.mark.parametrize(("odd", "message"), ODD, ids=lambda value: str(value)[:40])
def test_fault_30_a_recorded_configuration_that_no_knob_allows(
    tmp_path: Path, odd: dict[str, Any], message: str
) -> None:
    recorded = identity(Config())
    assert check_state({**STATE, "configuration": recorded}, tmp_path).configuration == recorded
    forged = {section: {**fields, **odd.get(section, {})} for section, fields in recorded.items()}
    with pytest.raises(CheckpointError, match=f"trainer.json: configuration: {message}") as caught:
        check_state({**STATE, "configuration": forged}, tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_recorded_configuration_of_another_version_is_read(tmp_path: Path, train_stream: TokenStream) -> None:
    """Fields that it does not have yet are as now, those that only it has are not looked at."""
    config = Config(optim=OptimConfig(), train=TrainConfig(global_batch_size=16, seq_len=20))
    other = {"model": {"colour": "red"}, "train": {"seq_len": 48, "later": None}, "weather": {"rain": 1}}
    state = check_state({**STATE, "configuration": other}, tmp_path)
    found = _origin(config, state, train_stream, ("train.seq_len",))
    assert found == Ring(len(train_stream), 16, 48, config.train.seed).origin_at(state.step)
    assert _origin(replace(config), state, train_stream, ()) == Origin()
