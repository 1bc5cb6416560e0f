"""Metrics: exact interval sums, lines of an attempt that ended are dropped, curves are drawn, wandb may fail."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from rnnlm.config import RunConfig
from rnnlm.train.curves import draw_curves, read_lines
from rnnlm.train.interval_loss import IntervalLoss
from rnnlm.train.metrics import Metrics, keep_lines, keep_samples
from rnnlm.train.trackers import WandbTracker


def line(step: int, kind: str = "train", loss: float = 2.0) -> dict[str, object]:
    return {
        "kind": kind, "step": step, "tokens": step * 10, "epoch": 0, "loss": loss, "ppl": 7.4, "learning_rate": 0.1,
        "gradient_norm": 0.2, "tokens_per_second": 1.0, "peak_share": 0.5, "seconds_left": 4900.0,
        "data_wait_share": 0.0, "peak_memory_bytes": 2**31, "token_perplexity": 7.4, "bits_per_byte": 1.0,
        "best": False,
    }  # fmt: skip


def test_interval_sums_do_not_depend_on_order_or_grouping() -> None:
    draw = random.Random(0)
    losses = [(draw.uniform(0, 1e5), draw.randint(1, 9000)) for _ in range(500)]

    def sums(groups: list[list[tuple[float, int]]]) -> list[int]:
        total = torch.zeros(3, dtype=torch.int64)
        for group in groups:
            interval = IntervalLoss(torch.device("cpu"))
            for loss, count in group:
                interval.add(torch.tensor([loss]), torch.tensor([count]))
            total += interval.sums
        return total.tolist()

    whole = sums([losses])
    assert whole == sums([losses[:123][::-1], losses[123:]]) == sums([[each] for each in losses])
    exact = sum(float(torch.tensor(loss)) for loss, _ in losses) / sum(count for _, count in losses)
    assert IntervalLoss.mean(whole) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_loss_that_is_not_finite_is_never_a_number(bad: float) -> None:
    interval = IntervalLoss(torch.device("cpu"))
    interval.add(torch.tensor([bad]), torch.tensor([3]))
    interval.add(torch.tensor([1.0]), torch.tensor([3]))
    assert IntervalLoss.mean(interval.sums.tolist()) is None


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line(0, "start"), line(5), line(10, "valid"), line(12), line(12, "start"), line(15)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"kind": "train", "st')
    keep_lines(path, 10)
    assert [(each["kind"], each["step"]) for each in read_lines(path)] == [
        ("start", 0), ("train", 5), ("valid", 10), ("start", 12),
    ]  # fmt: skip

    samples = tmp_path / "samples.md"
    samples.write_text("## step 5\n\none\n\n## step 10\n\ntwo\n\n## step 15\n\nthree\n\n")
    with samples.open("ab") as file:
        file.write("é".encode()[:1])  # killed inside a character
    keep_samples(samples, 10)
    assert samples.read_text() == "## step 5\n\none\n\n## step 10\n\ntwo\n\n"


def test_lines_that_a_power_loss_damaged_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 3}\n'
    path.write_bytes(good + b"\0\0\n\xff{}\n[1]\n3\nnull\n" + b'{"kind": "train"}\n{"step": 1}\n' + good[:-9])
    assert keep_lines(path, 3) == [{"kind": "train", "step": 3}]
    assert path.read_bytes() == good


def test_curves_are_a_picture_even_of_little(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for lines in ([], [line(5)], [line(5), line(5, "valid"), line(9, loss=1.0), line(9, "valid", loss=1.0)]):
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        draw_curves(path, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_fault_31_wandb_missing_or_failing_never_touches_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does for a package that is not installed
    Metrics(tmp_path, RunConfig(wandb="online"), 0, 10).close()
    assert "training without it" in capsys.readouterr().err

    class Broken(WandbTracker):
        def __init__(self) -> None:
            self.calls = 0

        def log(self, kind: str, record: object) -> None:
            self.calls += 1
            raise ConnectionError("down")

    broken = Broken()
    monkeypatch.setattr("rnnlm.train.trackers.TRACKERS", [lambda directory, config, step: broken])
    metrics = Metrics(tmp_path, RunConfig(), 0, 10)
    metrics.write("train", line(5))
    metrics.write("train", line(10))
    metrics.close()

    assert "wandb stopped (down)" in capsys.readouterr().err
    assert broken.calls == 1, "it is left out from then on"
    assert [each["step"] for each in read_lines(tmp_path / "metrics.jsonl")] == [5, 10]


@pytest.mark.filterwarnings("default")  # the package's own
def test_wandb_offline_keeps_one_run_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (0, 5):
        metrics = Metrics(tmp_path, RunConfig(wandb="offline"), step, 10)
        metrics.write("train", line(step + 5))
        (tracker,) = metrics._trackers._active
        assert isinstance(tracker, WandbTracker)
        assert tracker.received == (step or -1), "what the attempt before has closed with"
        ids.append(tracker._run.id)
        metrics.close()
        assert (tmp_path / "wandb-step").read_text() == str(step + 5)

    assert ids == [(tmp_path / "wandb-id").read_text()] * 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_lines_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, RunConfig(), 0, 10)
    metrics.write("valid", {**line(5, "valid"), "loss": float("inf"), "token_perplexity": float("inf")})
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert found["loss"] is None
