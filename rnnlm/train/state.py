"""What trainer.json holds, as one typed object, after its checks.

Its keys are a format on disk: what is new gets a default, so that older checkpoints can be read, and unknown keys at
the top are ignored, so that newer ones can. The price: pydantic takes 0.2 s to import, which only training and loading
a model pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from rnnlm.checkpoint.safetensors_file import CheckpointError
from rnnlm.config import Config, knobs
from rnnlm.train.guard import SPIKE_WINDOW

Count = Annotated[int, Field(ge=0, lt=2**63)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Section(BaseModel):
    """Exactly these keys, with values of exactly these types; whole numbers pass for floats."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class MemoryState(Section):
    """The fields of a ValidationMemory."""

    best_loss: float | None
    best_step: Count
    evaluations_since_best: Count
    evaluations_since_cut: Count
    learning_rate_scale: float


class OriginState(Section):
    """The fields of an Origin."""

    step: Count
    epoch: Count
    position: Count


class HealthState(Section):
    """What Guard.to_dict gives."""

    counts: Annotated[list[Count], Field(min_length=3, max_length=3)]
    resets: Count
    losses: Annotated[list[float], Field(min_length=SPIKE_WINDOW, max_length=SPIKE_WINDOW)]


class TrainerState(Section, extra="ignore"):
    """All that a checkpoint holds beside tensors."""

    step: Count  # updates done
    horizon_steps: Count  # the end of the cosine
    vocab_size: Count
    processes: Count
    stream: str  # digest
    tokenizer: str  # digest; empty: the stream has none
    memory: MemoryState
    interval: Annotated[list[Int64], Field(min_length=3, max_length=3)]  # sums of the metrics' line that has begun
    scaler: dict[str, Int64 | float | None]  # of losses in fp16; empty without it
    configuration: dict[str, dict[str, Any]]  # section -> field -> value, of those that must not change
    health: HealthState
    versions: dict[str, str]
    origin: OriginState
    layouts: dict[str, str] = {}

    @field_validator("origin")
    @classmethod
    def _is_past(cls, origin: OriginState, info: ValidationInfo) -> OriginState:
        if origin.step > info.data.get("step", 0):
            raise ValueError("the substreams cannot be counted from a later step")
        return origin


def check_state(state: Mapping[str, Any], path: Path) -> TrainerState:
    """Check that trainer.json holds what the trainer writes: keys and types; the caller decides what the values mean.

    Args:
        path: the checkpoint, for errors.

    Raises:
        CheckpointError: naming the first key that is missing or of another type.
    """
    try:
        found = TrainerState.model_validate(state)
    except ValidationError as error:
        key = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
        shown = repr(state[key])[:100] if key in state else "not there"
        raise CheckpointError(f"{path}/trainer.json: {key} is {shown}, which no trainer writes") from error

    _check_configuration(found.configuration, path)
    return found


def _check_configuration(configuration: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Check types and bounds of the recorded fields; what only another version has is no knob here, and is not read.

    Raises:
        CheckpointError: naming the first with a value that no configuration can have.
    """
    known, sections = knobs(), Config()
    for section, values in configuration.items():
        types = get_type_hints(type(getattr(sections, section, None)))
        for name, value in values.items():
            if (key := f"{section}.{name}") not in known:
                continue
            try:
                TypeAdapter(types[name]).validate_python(value, strict=True)
                fault = known[key].fault(key, value)
            except ValidationError:
                fault = f"{key}={value!r}: of another type"
            if fault:
                raise CheckpointError(f"{path}/trainer.json: configuration: {fault[:200]}; no trainer writes that")
