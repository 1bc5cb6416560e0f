"""Fault 30: what the trainer takes over from a checkpoint that anyone may have written."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import STATE, TrainHere

from rnnlm.checkpoint.checkpoint import load, save
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.config import Config, ModelConfig
from rnnlm.data.ring import Origin
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.guard import Guard
from rnnlm.train.load import load_model
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
