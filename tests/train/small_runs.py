"""Runs so small that a step takes milliseconds, in this process and without pictures, for tests that make many."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from rnnlm.config import Config
from rnnlm.faults import find_faults
from rnnlm.train.trainer import train


def small_config(directory: Path, streams: Path, **sections: dict[str, Any]) -> Config:
    """Two layers of 6 units and 4 substreams with windows of 8; `sections` may say otherwise."""
    defaults: dict[str, dict[str, Any]] = {
        "stream": {"directory": str(streams)},
        "model": {"embedding_size": 5, "hidden_size": 6, "layers": 2},
        "train": {"global_batch_size": 4, "seq_len": 8, "cpu_threads": 1, "prefetch_threads": 0, "device": "cpu"},
        "eval": {"batch_size": 32, "every_steps": 2},
        "run": {"directory": str(directory), "log_every_steps": 4, "save_every_steps": 2, "keep_every_steps": 1},
    }
    config = Config()
    for name in {*defaults, *sections}:
        given = {**defaults.get(name, {}), **sections.get(name, {})}
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **given)})
    assert find_faults(config) == []
    return config


def train_small(config: Config, fsync: Callable[[int], None] = lambda handle: None) -> None:
    """Train to the end, by default without waiting for the disk; raises what training raises."""
    gc.freeze()  # training collects garbage when it ends: what the other tests hold needs not be looked at
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rnnlm.train.metrics.draw_curves", lambda lines, picture: None)  # takes longer than all else
            patch.setattr(os, "fsync", fsync)
            assert train(config) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()  # closes what an error leaves open
        gc.unfreeze()
