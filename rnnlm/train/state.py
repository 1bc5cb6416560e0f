"""What trainer.json holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rnnlm.checkpoint.manifest import _is_count
from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.train.guard import SPIKE_WINDOW
from rnnlm.train.schedule import ValidationMemory


def check_state(state: Mapping[str, Any], path: Path) -> Any:
    """Check that trainer.json holds what the trainer writes: keys and types; what they say is the caller's to judge.

    Args:
        path: the checkpoint, for errors.

    Raises:
        CheckpointError: naming the first key that is missing or of another type.
    """
    rules: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("step", "horizon_steps", "vocab_size", "processes"), _is_count),
        **dict.fromkeys(("stream", "tokenizer"), lambda value: isinstance(value, str)),
        "memory": _is_memory,
        "interval": lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_whole, value)),
        "scaler": lambda value: _is_dict(value, _is_number),
        "configuration": lambda value: _is_dict(value, lambda part: isinstance(part, dict)),
        "health": _is_health,
        "versions": lambda value: _is_dict(value, lambda part: isinstance(part, str)),
    }
    rules["origin"] = lambda value: _is_origin(value) and value["step"] <= state["step"]
    for key, holds in rules.items():
        if key not in state or not holds(state[key]):
            shown = repr(state[key])[:100] if key in state else "not there"
            raise CheckpointError(f"{path}/trainer.json: {key} is {shown}, which no trainer writes")
    from types import SimpleNamespace

    from rnnlm.data.ring import Origin

    d = {k: v for k, v in state.items()}
    d["memory"] = ValidationMemory(**state["memory"])
    d["origin"] = Origin(**state["origin"])
    d["health"] = SimpleNamespace(**state["health"])
    d.setdefault("layouts", {})
    return SimpleNamespace(**d)


TrainerState = Any


def _is_memory(value: Any) -> bool:
    """Whether these are the fields of a ValidationMemory."""
    fields = ValidationMemory().to_dict()
    if not _is_dict(value, _is_number) or {*value} != {*fields} or value["learning_rate_scale"] is None:
        return False
    return all(_is_count(value[key]) for key, default in fields.items() if type(default) is int)


def _is_origin(value: Any) -> bool:
    """Whether these are the fields of an Origin."""
    return _is_dict(value, _is_count) and value.keys() == {"step", "epoch", "position"}


def _is_health(value: Any) -> bool:
    """Whether these are the fields of Health."""
    lists = {"counts": (3, _is_count), "losses": (SPIKE_WINDOW, lambda loss: type(loss) is float)}
    if not isinstance(value, dict) or value.keys() != {*lists, "resets"} or not _is_count(value["resets"]):
        return False
    found = ((value[key], size, holds) for key, (size, holds) in lists.items())
    return all(isinstance(each, list) and len(each) == size and all(map(holds, each)) for each, size, holds in found)


def _is_whole(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return value is None or type(value) is float or _is_whole(value)


def _is_dict(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))
