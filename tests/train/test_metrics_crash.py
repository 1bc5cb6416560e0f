"""A power loss at any moment of a run: what metrics.jsonl has lost, the checkpoint that a run resumes from repeats."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import records
from crash_model import FileSystem, Operation, watch
from small_runs import small_config, train_small

from rnnlm.train.metrics import Metrics


def operations(run: Path, streams: Path) -> list[Operation]:
    """What a run of two attempts, to step 4 and to step 6, does to its metrics and its checkpoints, in order."""
    log: list[Operation] = []
    honest = Metrics.write

    def write(self: Metrics, *line: Any) -> None:
        size = self.path.stat().st_size
        honest(self, *line)
        log.append(("append", self.path, self.path.read_bytes()[size:]))

    run.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, log)
        patch.setattr(Metrics, "write", write)
        often = {"log_every_steps": 1, "save_every_steps": 2}
        for end in (4, 6):
            train_small(small_config(run, streams, train={"max_steps": end}, run=often), os.fsync)

    places = re.compile(rf"{re.escape(str(run))}(/metrics\.jsonl.*|/checkpoints.*)?")
    return [operation for operation in log if places.fullmatch(str(operation[1]))]


def test_fault_01_no_line_before_a_checkpoint_is_lost_with_the_power(streams: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    log, system = operations(run, streams), FileSystem(run)
    written = [line for kind in ("train", "valid") for line in records(run, kind)]
    assert len(written) == 6 + 3

    found = set()
    for place, operation in enumerate(log):
        system.do(operation)
        for state in system.losses(place, mixtures=3):
            step = max((int(name[17:25]) for name in state if re.fullmatch(r"checkpoints/step-\d{8}", name)), default=0)
            lines = (state.get("metrics.jsonl") or b"").decode().splitlines()
            whole = [json.loads(line) for line in lines if line.endswith("}")]
            kept = {(line["kind"], line["step"]) for line in whole}
            assert {(line["kind"], line["step"]) for line in written if line["step"] <= step} <= kept, (place, step)
            found.add((step, len(kept)))
    assert {step for step, _ in found} == {0, 2, 4, 6}
    assert len(found) > 10, "lines behind the checkpoint come and go"
