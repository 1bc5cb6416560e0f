"""Trackers get all lines, those of attempts that were killed as well; the console says how far a run is."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import FAULTY, RunHere, RunScript, TrainHere, records
from test_metrics import line

from rnnlm.config import RunConfig
from rnnlm.train.metrics import Metrics
from rnnlm.train.trackers import Tracker, read_lines


class Recorder(Tracker):
    """Keeps the kind and step of every line, and says what it was given before."""

    name = "recorder"

    def __init__(self, received: int | None):
        self.received, self.lines = received, list[tuple[str, int]]()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        self.lines.append((kind, record["step"]))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Started with every run from now on; the test sets what they have received."""
    found = [Recorder(None)]
    monkeypatch.setattr("rnnlm.train.trackers.TRACKERS", [lambda directory, config, step: found[-1]])
    return found


@pytest.mark.parametrize(
    ("received", "missed"),
    [
        (None, []),
        (-1, [("train", 3), ("valid", 5), ("train", 6)]),
        (3, [("valid", 5), ("train", 6)]),
        (6, []),
        (9, []),
    ],
)
def test_a_tracker_gets_the_lines_that_it_missed_and_those_alone(
    tmp_path: Path, recorders: list[Recorder], received: int | None, missed: list[tuple[str, int]]
) -> None:
    """The run had got to step 9 when it was killed, and goes on from 6."""
    lines = [line(0, "start"), line(3), line(5, "valid"), line(6), line(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    recorders.append(Recorder(received))
    metrics = Metrics(tmp_path, RunConfig(), 6, 20)
    assert recorders[-1].lines == missed
    metrics.write("start", {"step": 6})
    metrics.write("train", line(9))
    metrics.close()
    assert recorders[-1].lines == [*missed, ("train", 9)]


def test_a_tracker_that_fails_in_what_it_missed_is_left_out(
    tmp_path: Path, recorders: list[Recorder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Recorder, kind: str, record: object) -> None:
        self.lines.append((kind, 0))
        raise ConnectionError("down")

    monkeypatch.setattr(Recorder, "log", fail)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(3)) + "\n")
    recorders.append(Recorder(-1))
    metrics = Metrics(tmp_path, RunConfig(), 6, 20)
    metrics.write("train", line(9))
    metrics.sample(9, "text")
    metrics.close()
    assert len(recorders[-1].lines) == 1, "it is not asked again"
    assert capsys.readouterr().err.count("warning: recorder stopped (down); training continues") == 1


class Wandb(SimpleNamespace):
    """The package as far as it is used, which keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(rows=[], finished=0, options={}, Settings=SimpleNamespace)

    def init(self, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(
            id=options["id"], log=self.rows.append, finish=self.finish, define_metric=self.define_metric
        )

    def define_metric(self, name: str, step_metric: str) -> None:
        assert step_metric == "tokens"

    def finish(self) -> None:
        self.finished += 1


def test_the_lines_of_a_finished_run_can_be_sent(
    train_here: TrainHere, run_here: RunHere, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wandb = tmp_path / "run", Wandb()
    assert train_here(f"--config={experiment}", "--train.max_steps=7").returncode == 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    done = run_here("tools/send_metrics.py", run, "--project=mine")
    assert done.returncode == 0, done.stderr
    assert wandb.options["project"] == "mine" and wandb.options["mode"] == "online" and wandb.finished == 1

    logged = [each for each in read_lines(run / "metrics.jsonl") if each["kind"] != "start"]
    assert f"{len(logged)} lines sent to mine, run {wandb.options['id']}" in done.stdout
    for row, each in zip(wandb.rows, logged, strict=True):
        assert row["tokens"] == each["tokens"] and row[f"{each['kind']}/loss"] == each["loss"]
        assert row["_timestamp"] == datetime.fromisoformat(each["time"]).timestamp()

    nothing = run_here("tools/send_metrics.py", tmp_path / "no")
    assert nothing.returncode == 2 and "no: no metrics.jsonl with lines in it" in nothing.stderr
    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    failed = run_here("tools/send_metrics.py", run)
    assert failed.returncode == 2 and "not sent (division by zero); `wandb login`, or --offline" in failed.stderr


def payload(path: Path) -> bytes:
    """All records of a .wandb file: LevelDB's log, blocks of 32 KiB of records with a header of 7 bytes each."""
    data, place, found = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:  # filled up
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        found += data[place + 7 : place + 7 + length]
        place += 7 + length
    return found


@pytest.mark.slow
def test_wandb_offline_has_the_curve_of_a_life_that_was_killed(
    run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    """Read from the package's own files: each step of the run is in that of the second life."""
    options = (f"--config={experiment}", "--run.wandb=offline", "--run.log_every_steps=1")
    assert run_script(FAULTY, "kill", "13", *options).returncode == -9
    for killed in (tmp_path / "run/wandb").glob("offline-run-*/*.wandb"):
        killed.unlink()  # whatever of it has reached the disk
    done = run_script("launch/train.py", *options)
    assert done.returncode == 0 and "resuming from step 10" in done.stderr, done.stderr

    found = b"".join(payload(path) for path in (tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    steps = re.findall(rb"train/step\x82\x01.(\d+)", found, re.DOTALL)  # the name, a tag, a length, the JSON
    assert {int(step) for step in steps} == {*range(1, 21)}


def test_lines_say_when_they_were_written(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    metrics = Metrics(tmp_path, RunConfig(), 0, 10)
    for kind in ("start", "train", "valid"):
        metrics.write(kind, line(5, kind))
        (found,) = records(tmp_path, kind)
        assert found["time"].endswith("Z") and before <= datetime.fromisoformat(found["time"]) <= datetime.now(UTC)
    metrics.close()


def test_a_line_says_how_far_the_run_is_and_how_long_it_will_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, RunConfig(), 10, 1000)
    metrics.advance(19)
    assert capsys.readouterr().err == "", "in a file there are only the lines"
    for share, shown in ((0.456, "1 tok/s 46% of peak waiting"), (None, "1 tok/s waiting")):
        metrics.write("train", {**line(20), "peak_share": share})
        found = capsys.readouterr().err
        assert re.search(r"^step 20 of 1000 epoch 0 loss .* memory 2,048 MiB 1:21:40 left$", found)
        assert shown in found
    metrics.close()


def test_on_a_terminal_the_bar_moves_between_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    metrics = Metrics(tmp_path, RunConfig(), 10, 1000)
    assert metrics._bar is not None and metrics._bar.mininterval == 1.0
    now = [metrics._bar.last_print_t + 2.0]
    monkeypatch.setattr(metrics._bar, "_time", lambda: now[0])
    metrics.advance(11)
    assert "11/1000" in screen.getvalue().rpartition("\r")[2]
    now[0] += 0.9
    metrics.advance(12)
    assert "12/1000" not in screen.getvalue(), "not within the same second"
    metrics.write("train", line(12))
    metrics.close()
    assert "12/1000" in screen.getvalue() and "loss 2.0000" in screen.getvalue()
