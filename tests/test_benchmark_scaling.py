"""Bytes that processes send are counted rightly, and predictions follow from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, RunScript

sys.path.insert(0, str(ROOT / "tools"))  # as Python does for a script there

from step_speed.communication import Links, bytes_sent, measure, predict, scaled
from step_speed.presets import PRESETS, Preset

SIZE = Preset(vocab_size=500, embedding_size=64, hidden_size=128, layers=1, dropout=0.0, batch=4, window=5)
PARAMETERS = 500 * 64 + 4 * 128 * (64 + 128 + 2) + 500 * 129


def test_a_ring_sends_each_byte_nearly_twice_and_of_token_vectors_the_rows() -> None:
    dense, rows = PARAMETERS - 500 * 64, 20 * (64 * 4 + 8)
    for processes in (2, 8):  # 8 * 20 tokens of 264 bytes are less than 2 * 500 * 256
        expected = 2 * (processes - 1) / processes * dense * 4 + (processes - 1) * rows
        assert bytes_sent(*scaled(SIZE, processes), processes) == pytest.approx(expected)
    assert bytes_sent(*scaled(SIZE, 64), 64) == pytest.approx(2 * 63 / 64 * PARAMETERS * 4), "more than all rows"
    assert bytes_sent(*scaled(SIZE, 1), 1) == 0


def test_compression_halves_what_is_sent() -> None:
    compressed = Preset(**{**vars(SIZE), "options": ("--train.gradient_compression=bf16",)})
    plain, half = (bytes_sent(*scaled(size, 64), 64) for size in (SIZE, compressed))
    assert half * 2 == plain


def test_a_prediction_lies_between_hidden_and_exposed_communication() -> None:
    links = Links(inside=450e9, between=100e9, per_machine=8)
    assert predict(0.01, 4.5e9, 8, links) == pytest.approx((0.01 + 0.01 - 0.02 / 3, 0.02))
    assert predict(0.01, 1e6, 8, links)[0] == 0.01, "hidden behind the backward pass"
    assert predict(0.01, 1e9, 64, links)[1] == pytest.approx(0.02), "the slowest link decides"
    assert predict(0.01, 0, 64, links) == (0.01, 0.01)


def test_a_model_of_any_preset_takes_no_memory() -> None:
    model, train = scaled(PRESETS["big-vocabulary"], 64)
    assert model.embedding.weight.is_meta and train.global_batch_size == 64 * 128


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--train.gradient_compression=bf16",)])
def test_what_two_processes_send_is_what_is_computed(options: tuple[str, ...]) -> None:
    found = measure(Preset(**{**vars(SIZE), "options": options}), "fp32", "cpu", 2, 5)
    assert found["seconds"] > 0
    if found["sent"] >= 0:
        assert found["computed"] <= found["sent"] < 1.05 * found["computed"] + 20_000


@pytest.mark.slow
def test_the_whole_without_running_anything(run_script: RunScript, tmp_path: Path) -> None:
    done = run_script("tools/benchmark_scaling.py", "--step-ms", "10", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    eight, many = json.loads((tmp_path / "found.json").read_text())
    assert (eight["processes"], many["processes"]) == (8, 64)
    assert 10 <= eight["step_ms"][0] <= eight["step_ms"][1] <= many["step_ms"][1]
    assert done.stdout.count("|") == 4 * 7
