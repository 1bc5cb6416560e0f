"""Every knob's bounds, and whether it may change on resume, against tables that were written by hand.

tests/test_config.py asks that what a knob declares is kept to; here stands what it must declare.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from rnnlm.config import Config, knobs
from rnnlm.faults import find_faults
from rnnlm.train.identity import differing, identity

SEED = 2**63
BOUNDS = {  # (first value that is allowed, first or last one above it: "<" or "<=") -> knobs
    (None, "", math.inf): "model.forget_bias",
    (-1, "<", SEED): "corpus.shuffle_seed",
    (-1, "", math.inf): "eval.every_steps",
    (0, "<=", 2**24): "tokenizer.vocab_size",
    (0, "<", SEED): "tokenizer.seed stream.split_seed train.seed generate.seed",
    (0, "<", 1): "stream.valid_fraction model.dropout optim.momentum optim.beta1 optim.beta2",
    (0, "<=", 1): "optim.final_ratio optim.plateau_factor generate.top_p",
    (0.98, "<=", 1): "tokenizer.character_coverage",
    (0, "", math.inf): """
        build.workers stream.valid_max_tokens model.embedding_size model.hidden_size train.epochs
        model.init_range optim.learning_rate optim.eps optim.weight_decay optim.clip_norm
        optim.warmup_steps optim.horizon_steps optim.plateau_patience optim.early_stop_patience train.max_steps
        train.exact_slices train.loss_chunk_tokens train.cpu_threads train.prefetch_threads train.skip_spikes_sigmas
        train.stop_after_skipped generate.temperature generate.top_k run.save_every_minutes run.keep_every_steps
        run.grace_seconds run.timeout_minutes""",
    (1, "", math.inf): """
        corpus.max_document_bytes corpus.max_whole_bytes corpus.unit_bytes tokenizer.sample_bytes tokenizer.min_count
        stream.shard_tokens model.layers train.global_batch_size
        train.seq_len train.accumulation model.adaptive_factor eval.batch_size generate.samples generate.max_tokens
        run.log_every_steps run.save_every_steps""",
    (2, "", math.inf): "run.keep_last",
}
TABLE = {key: bounds for bounds, keys in BOUNDS.items() for key in keys.split()}

NAMES_OF_FIXED = {
    "model": """cell head adaptive_cutoffs adaptive_factor embedding_size hidden_size layers dropout dropout_kind tied
                init init_range forget_bias""",
    "optim": """name learning_rate momentum beta1 beta2 eps weight_decay clip_norm schedule warmup_steps horizon_steps
                final_ratio plateau_factor plateau_patience""",
    "train": "seed global_batch_size seq_len exact_slices rotate precision tf32 skip_spikes_sigmas",
}
FIXED = {f"{section}.{name}" for section, names in NAMES_OF_FIXED.items() for name in names.split()}


def configuration(key: str, value: Any) -> Config:
    """The default one with another value."""
    section, name = key.split(".")
    changed = dataclasses.replace(getattr(Config(), section), **{name: value})
    return dataclasses.replace(Config(), **{section: changed})


def is_out_of_bounds(key: str, value: float) -> bool:
    """Whether a value is refused for itself, and not for what it means beside others."""
    return any(
        fault.startswith(f"{key}=") and ": must be " in fault for fault in find_faults(configuration(key, value))
    )


def neighbour(key: str, value: float, direction: int) -> float:
    """The next number above or below, of the knob's type."""
    if isinstance(Config().flat()[key], int):
        return int(value) + direction
    return math.nextafter(value, direction * math.inf)


def test_the_table_names_every_number() -> None:
    numbers = [key for key, value in Config().flat().items() if type(value) in (int, float)]
    assert sorted(TABLE) == sorted(numbers)


@pytest.mark.parametrize("key", TABLE)
def test_each_number_is_refused_just_outside_its_bounds_and_taken_just_inside(key: str) -> None:
    lowest, kind, highest = TABLE[key]
    if lowest is None:
        assert not is_out_of_bounds(key, -1e30)
    else:
        assert not is_out_of_bounds(key, lowest)
        assert is_out_of_bounds(key, neighbour(key, lowest, -1)) and is_out_of_bounds(key, -(2**62))

    if not kind:
        assert not is_out_of_bounds(key, 2**62)
    else:
        assert is_out_of_bounds(key, highest) == (kind == "<")
        assert is_out_of_bounds(key, neighbour(key, highest, 1))
        assert not is_out_of_bounds(key, neighbour(key, highest, -1))

    if isinstance(Config().flat()[key], float):
        for value in (math.nan, math.inf, -math.inf):
            assert is_out_of_bounds(key, value)


def other_value(key: str) -> Any:
    """Another value of a knob than its default."""
    section, name = key.split(".")
    kind, default = get_type_hints(type(getattr(Config(), section)))[name], Config().flat()[key]
    choices = get_args(kind) if get_origin(kind) is Literal else knobs()[key].choices
    if choices and len(choices) > 1:
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else f"{default}x"


@pytest.mark.parametrize("key", Config().flat())
def test_a_resumed_run_may_differ_in_all_but_what_makes_it_this_run(key: str) -> None:
    """Of corpus, tokenizer and stream the digest of the stream decides, whatever was asked of the builder."""
    refused = differing(configuration(key, other_value(key)), identity(Config()))
    expected = [f"{key} is {Config().flat()[key]} there, {other_value(key)} now"] if key in FIXED else []
    assert refused == expected
