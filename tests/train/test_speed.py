"""What a line says about speed: the share of the peak, time left, and a warning where training waits for data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import records
from small_runs import small_config, train_small
from torch.utils.flop_counter import FlopCounterMode

from rnnlm.config import ModelConfig
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.speed import Peak, Stopwatch, WaitCheck, flops_per_token, measured_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_operations_of_a_token_are_those_of_its_products(tied: bool) -> None:
    """By hand for an LSTM, and as PyTorch counts them in a step of the head alone."""
    model = RecurrentLM(ModelConfig(embedding_size=6, hidden_size=10, layers=2, tied=tied), 50, seed=1)
    recurrent = 4 * 10 * (6 + 10) + 4 * 10 * (10 + 10)
    head = 10 * 6 + 6 * 50 if tied else 10 * 50
    assert flops_per_token(model) == 6 * (recurrent + head)

    x = torch.randn(7, 3, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.head.loss(x, torch.zeros(7, 3, dtype=torch.int64)).backward()
    assert counter.get_total_flops() == 7 * 3 * 6 * head


def test_what_values_ask_for_has_no_number_of_operations() -> None:
    sizes = ModelConfig(embedding_size=6, hidden_size=10, layers=1)
    filtered = RecurrentLM(sizes, 50, seed=1, gradient_filter=True)
    assert flops_per_token(filtered) is None
    assert Peak(filtered, CPU, "fp32", 1).share(1e6, 1e9) is None


def test_the_share_of_the_peak_is_of_all_processes_and_of_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RecurrentLM(ModelConfig(embedding_size=6, hidden_size=10, layers=1), 50, seed=1)
    measured = list[torch.dtype]()
    monkeypatch.setattr("rnnlm.train.speed.measured_peak", lambda dtype, device: (measured.append(dtype), 1e6)[1])
    peak = Peak(model, CPU, "bf16", 4)
    assert peak.share(100.0, 119.0) is None and measured == []
    assert peak.share(100.0, 121.0) == 100 * 6 * (4 * 10 * 16 + 10 * 50) / 4e6
    peak.share(100.0, 121.0)
    assert measured == [torch.bfloat16], "once"


def test_no_product_that_was_timed_is_faster_than_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is a number however little time there is."""
    monkeypatch.setattr("rnnlm.train.speed.PEAK_SECONDS", 0.0)
    rates = list[float]()

    def seconds_of(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, times: int) -> float:
        assert torch.equal(out, left @ right)
        rates.append(2 * left.shape[0] ** 3 * times / 0.25)
        return 0.25

    monkeypatch.setattr("rnnlm.train.speed._seconds_of", seconds_of)
    assert measured_peak(torch.float32, CPU) == max(rates) == 2 * 256**3 / 0.25


def test_time_left_is_at_the_pace_of_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rnnlm.train.speed.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Stopwatch()
    now[0] += 40.0
    clock.reset(300)
    with clock.pause():
        now[0] += 8.0
    now[0] += 2.0
    assert clock.seconds == 2.0
    assert clock.seconds_for(980, done=10) == 4900, "ten steps took 50 seconds, pauses included"


def test_waiting_for_data_is_said_once_with_the_way_out() -> None:
    check = WaitCheck(3)
    assert check.warning(10.0, 9.0) == "", "nothing is read ahead yet"
    assert check.warning(10.0, 0.09) == "", "nine in a thousand"
    assert check.warning(0.6, 0.3) == "", "too short to judge"
    assert check.warning(0.6, 0.3) == (
        "warning: training waited for data in 50.0% of the time, expected is 1% at most; "
        "raise train.prefetch_threads, which is 3, or put the stream on a faster disk"
    )
    assert check.warning(10.0, 9.0) == ""


def test_a_run_logs_its_speed_and_warns_of_a_slow_disk(
    streams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if a second were long, and a run of seconds too."""
    monkeypatch.setattr("rnnlm.train.speed.JUDGED_SECONDS", 0.0)
    monkeypatch.setattr("rnnlm.train.speed.WAITING_SHARE", -1.0)
    monkeypatch.setattr("rnnlm.train.speed.LONG_RUN_SECONDS", 0.0)
    monkeypatch.setattr("rnnlm.train.speed.PEAK_SECONDS", 0.0)
    train_small(small_config(tmp_path / "run", streams, train={"max_steps": 4}, run={"log_every_steps": 1}))

    lines = records(tmp_path / "run", "train")
    assert all(each["peak_share"] > 0 for each in lines)
    assert lines[0]["seconds_left"] > 0 == lines[-1]["seconds_left"]
    assert capsys.readouterr().err.count("warning: training waited for data") == 1
