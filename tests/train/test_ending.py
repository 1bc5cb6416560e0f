"""How runs end: what is said, with which code, and what must not be taken for success."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TrainHere, records

from rnnlm import files
from rnnlm.checkpoint.saver import Saver
from rnnlm.data.substreams import Batch
from rnnlm.errors import RunError
from rnnlm.train.ending import check_loss, print_finished, print_preempted
from rnnlm.train.schedule import ValidationMemory
from rnnlm.train.trainer import Trainer


@pytest.fixture
def signal_in_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A signal that arrives in a step, as the thread that listens notes it."""

    def arrange(step: int) -> None:
        original = Trainer.take_step

        def take_step(self: Trainer, batch: Batch) -> None:
            if self.step == step:
                self.interrupts.first_signal = "SIGTERM"
            original(self, batch)

        monkeypatch.setattr(Trainer, "take_step", take_step)

    return arrange


def test_a_run_that_has_finished_names_what_ended_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, limits, longer in (
        (9, ["train.epochs"], "train.epochs"),
        (9, ["train.epochs", "train.max_steps"], "train.epochs and train.max_steps"),
        (8, ["train.epochs"], "optim.early_stop_patience"),
    ):
        print_finished(tmp_path, step, 9, limits, ValidationMemory())
        assert capsys.readouterr().out.endswith(f"to train longer, raise {longer}\n")


def test_a_signal_in_the_last_step_ends_a_finished_run(
    train_here: TrainHere, experiment: Path, tmp_path: Path, signal_in_step: Any
) -> None:
    signal_in_step(3)
    done = train_here(f"--config={experiment}", "--train.max_steps=4")
    assert done.returncode == 0, done.stderr
    assert "finished at step 4 of 4" in done.stdout
    assert not (tmp_path / "run/preempted.json").exists()

    signal_in_step(4)  # control
    done = train_here(f"--config={experiment}", "--train.max_steps=6")
    assert done.returncode == 75
    assert json.loads((tmp_path / "run/preempted.json").read_text())["saved_step"] == 5


def test_fault_02_a_signal_whose_checkpoint_cannot_be_written_is_a_fault(
    train_here: TrainHere, experiment: Path, tmp_path: Path, signal_in_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"--config={experiment}", "--eval.every_steps=99")
    assert train_here(*options, "--train.max_steps=2", "--optim.horizon_steps=20").returncode == 0

    honest = files.write

    def full(path: Path, *arguments: Any) -> None:
        if "checkpoints" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        honest(path, *arguments)

    monkeypatch.setattr(files, "write", full)
    signal_in_step(5)
    done = train_here(*options, "--optim.horizon_steps=20")
    assert done.returncode == 1, "not 75, which says that it was saved"
    assert "error: " in done.stderr and "the last checkpoint is of step 2, not 6 " in done.stderr, done.stderr
    assert "training continues" not in done.stderr
    marker = json.loads((tmp_path / "run/preempted.json").read_text())
    assert marker == {"signal": "SIGTERM", "step": 6, "saved_step": 2}, "whoever restarts runs knows what is there"


def test_fault_02_a_disk_that_is_full_at_the_start_is_no_mistake_in_what_was_asked(
    train_here: TrainHere, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 would tell a scheduler not to try again."""

    def full(path: Path, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "write", full)
    done = train_here(f"--config={experiment}", "--train.max_steps=2")
    assert done.returncode == 1 and "config.yaml.partial" in done.stderr, done.stderr
    assert done.stderr.endswith("; make room on the disk and type the same command again\n")


def test_an_output_that_nobody_reads_changes_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the `tee` that a run prints into as well; the run's code and marker are what counts then."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        print_finished(tmp_path, 9, 9, ["train.epochs"], ValidationMemory())
        print_preempted(tmp_path, "SIGINT", 3, 9, 3)
    assert json.loads((tmp_path / "preempted.json").read_text())["saved_step"] == 3


def test_a_normal_end_waits_for_its_last_checkpoint_without_a_warning(
    train_here: TrainHere, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes a second longer for the first checkpoint, and for the last one."""
    honest, waited = Saver.busy, list[object]()

    def busy(self: Saver, patience_seconds: float | None = 0.0) -> bool:
        if patience_seconds == 0.0:  # the disk is never done by itself
            return self._thread is not None
        if patience_seconds == 1.0 and self._thread and self._thread not in waited:
            waited.append(self._thread)
            return True
        return honest(self, patience_seconds)

    monkeypatch.setattr(Saver, "busy", busy)
    options = ("--train.max_steps=3", "--run.save_every_steps=1", "--eval.every_steps=99")
    done = train_here(f"--config={experiment}", *options)
    assert done.returncode == 0, done.stderr
    waits = [line for line in done.stderr.splitlines() if "waiting until" in line]
    before = "waiting until the checkpoint before is written"
    advice = f"warning: {before}; save less often, or on a faster disk"
    assert waits == [advice, before, "waiting until the last checkpoint is written"]


def write_lines(run: Path, *lines: tuple[str, float | None]) -> None:
    records = [{"kind": kind, "step": step, "loss": loss} for step, (kind, loss) in enumerate(lines)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("train", 5.0), ("valid", 5.0)], None),
        ([("train", 40.0), ("valid", None), ("train", 5.0), ("valid", 5.0)], None),
        ([("train", math.log(300) + 0.9)], None),
        ([], None),
        ([("train", math.log(300) + 1.1)], r"at step 0 its train loss is 6.80 nats, where guessing .* has 5.70"),
        ([("train", 5.0), ("valid", 30.0)], "at step 1 its valid loss is 30.00 nats, .*"),
        ([("train", 5.0), ("train", None)], "at step 1 its train loss is not finite"),
        ([("valid", None), ("train", 5.0)], "at step 0 its valid loss is not finite"),
    ],
)
def test_a_loss_that_says_that_nothing_was_learnt(
    tmp_path: Path, lines: list[tuple[str, float | None]], message: str | None
) -> None:
    write_lines(tmp_path, *lines)
    if message is None:
        check_loss(tmp_path, 300)
        return
    with pytest.raises(RunError, match=f"the run has diverged: {message}; begin again"):
        check_loss(tmp_path, 300)


def test_a_run_that_diverged_says_so_and_is_no_success(train_here: TrainHere, experiment: Path, tmp_path: Path) -> None:
    options = (f"--config={experiment}", "--train.max_steps=6", "--optim.name=sgd", "--optim.learning_rate=1e4")
    done = train_here(*options, "--optim.clip_norm=0", "--optim.schedule=constant", "--optim.warmup_steps=0")
    assert done.returncode == 1
    assert "error: " in done.stderr and "the run has diverged: at step 6 its" in done.stderr, done.stderr
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir(), "it can be looked at"
    loss = records(tmp_path / "run", "train")[-1]["loss"]
    assert loss is None or loss > math.log(300)

    again = train_here(*options, "--optim.clip_norm=0", "--optim.schedule=constant", "--optim.warmup_steps=0")
    assert again.returncode == 1 and "has diverged" in again.stderr, "nor is a second look at it"


def test_of_several_bests_the_last_one_is_kept(train_here: TrainHere, experiment: Path, tmp_path: Path) -> None:
    """Alone and together with a checkpoint to resume from, with which it then shares the file of the model."""
    options = ("--run.save_every_steps=4", "--eval.every_steps=2", "--train.max_steps=8", "--optim.schedule=constant")
    done = train_here(f"--config={experiment}", *options, "--generate.max_tokens=1")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    best = [line["step"] for line in records(run, "valid") if line["best"]]
    assert len(best) >= 3 and best[-1] == 8, best
    assert [path.name for path in (run / "checkpoints").glob("best-*")] == ["best-00000008"]
    same = [run / f"checkpoints/{name}-00000008/model.safetensors" for name in ("best", "step")]
    assert same[0].samefile(same[1])
