"""The doctor: what it says of a machine is what was found, and a check that crashes or hangs is one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, RunScript
from pytest import MonkeyPatch
from torch import Tensor

sys.path.insert(0, str(ROOT / "tools"))  # as Python does for a script there

from doctor_checks import kernels, steps
from doctor_checks.alone import MARK, records, verdicts_of
from doctor_checks.disk import launcher, nearest_directory, save_rate, time_to_save
from doctor_checks.experiment import Experiment, read_experiment
from doctor_checks.kernels import differing_masks, recurrent_kernels
from doctor_checks.machine import is_built_for, versions
from doctor_checks.memory import bytes_needed, compare
from doctor_checks.resume import verdict_of
from doctor_checks.verdict import right, untried, wrong
from step_speed.measuring import peak_memory
from step_speed.presets import Preset, make_batches

from rnnlm.config import RunConfig
from rnnlm.train.distributed import launched
from rnnlm.train.step import TrainStep


def test_a_line_is_right_wrong_or_untried_and_wrong_ones_make_the_exit_code(
    monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import doctor

    found = [right("a"), wrong("b", "broken; repair it"), untried("c", "no GPU")]
    assert [each.line() for each in found] == [
        "a: right",
        "b: wrong: broken; repair it",
        "c: not to be tried here: no GPU",
    ]
    assert doctor.summary(found) == 1 and doctor.summary([found[0], found[2]]) == 0
    assert "1 right, 1 wrong, 1 not to be tried here" in capsys.readouterr().out
    (first, *_) = records([("x", 1.23456, found[1])])
    assert first == {"check": "x", "seconds": 1.235, "subject": "b", "state": "wrong", "text": "broken; repair it"}

    options = doctor.parse(["--config", str(ROOT / "configs/imdb.yaml"), "--", "--train.precision=bf16"])
    assert options.arguments == ["--train.precision=bf16"] and options.only == list(doctor.CHECKS)
    for name, check in doctor.CHECKS.items():
        assert name == "machine" or check.module != "machine"
        assert (ROOT / f"tools/doctor_checks/{check.module}.py").is_file()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with SIGSEGV: it said nothing"),
        ("raise ValueError('no such kernel')", "ended with code 1: ValueError: no such kernel; to see all of it:"),
        ("raise SystemExit('error: model.x: no such key')", "check: wrong: model.x: no such key"),
        ("import time; time.sleep(60)", "has not ended after 0.2 s and was killed"),
        (f"print('noise'); print('{MARK}' + '[{{\"subject\": \"s\", \"state\": \"right\"}}]')", "s: right"),
    ],
)  # fmt: skip
def test_a_check_that_crashes_or_hangs_is_a_line(program: str, said: str) -> None:
    hangs = "sleep" in program
    (found,) = verdicts_of("check", [sys.executable, "-S", "-c", program], 0.2 if hangs else 60)
    assert said in found.line()
    assert (found.state == "right") == program.startswith("print")


def test_a_gpu_that_pytorch_cannot_use_is_wrong() -> None:
    found = versions(has_gpu=True, is_available=False)
    assert found.state == "wrong" and torch.__version__ in found.text and "install the build" in found.text
    assert versions(has_gpu=False, is_available=False).state == "right"

    assert is_built_for((9, 0), ["sm_80", "sm_90"]) and is_built_for((8, 6), ["sm_80"])
    assert is_built_for((12, 0), ["sm_90", "compute_90"]) and is_built_for((9, 0), ["sm_90a"])
    assert not is_built_for((12, 0), ["sm_80", "sm_90"]) and not is_built_for((7, 0), ["sm_75", "sm_80"])


@pytest.mark.parametrize(
    ("names", "whose"),
    [
        (["void cudnn::rnn::LSTM_elementWise_fp<float>", "ampere_sgemm_128x64_nn"], "cudnn"),
        (["RNN_blockPersist_fp_LSTM<__half, float, __half>"], "cudnn"),
        (["void at::native::(anonymous namespace)::kernel::lstm_cell_forward<float>", "cudnn::convert"], "stepwise"),
        (["ampere_bf16_s16816gemm"], "unknown"),
        ([], "unknown"),
    ],
)
def test_whose_kernels_ran_a_recurrence_is_told_by_their_names(names: list[str], whose: str) -> None:
    assert recurrent_kernels(names) == whose


def test_masks_are_compared_to_the_bit(monkeypatch: MonkeyPatch) -> None:
    assert differing_masks("cpu") == []
    plain = kernels.dropout

    def one_off(x: Tensor, *arguments: object) -> Tensor:
        out = plain(x, *arguments)  # type: ignore[arg-type]
        return out + (x == x.flatten()[-1]) * 1e-2 if x.dtype == torch.bfloat16 else out

    monkeypatch.setattr(kernels, "dropout", one_off)
    assert differing_masks("cpu") == ["bf16 ordinary", "bf16 locked"]


def test_a_step_that_warns_is_wrong() -> None:
    size = dataclasses.replace(steps.SIZE, vocab_size=20, embedding_size=4, hidden_size=4, batch=2, window=2)
    threads = torch.get_num_threads()
    try:
        with launched(size.config("fp32", "cpu")) as accelerator:
            step, batches = TrainStep(size.config("fp32", "cpu"), 20, accelerator, 0, 2), make_batches(size, 2)
            assert steps.without_warnings(step, batches, "fp32").state == "right"
            step.parameters[0].register_hook(lambda gradient: warnings.warn("slow here", UserWarning, stacklevel=1))
            found = steps.without_warnings(step, batches, "fp32")
            assert found.state == "wrong" and "UserWarning: slow here; try" in found.text
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)


def test_the_time_of_a_save_is_held_against_the_grace(tmp_path: Path, experiment: Path) -> None:
    assert nearest_directory(tmp_path / "not/yet") == tmp_path
    assert save_rate(tmp_path, 4096) > 0 and list(tmp_path.glob("doctor-*")) == []

    found = read_experiment(Namespace(config=[str(experiment)], arguments=["--run.grace_seconds=5"]))
    assert found.config is not None and found.config.run.grace_seconds == 5
    numbers = 300 * 12 + 64 * (12 + 16 + 2) + 64 * (16 + 16 + 2) + 300 * 17
    assert found.parameters == numbers
    size = 4 * (3 * numbers + 16 * 2 * 2 * 16)  # Adam's moments; h and c of two layers
    assert found.checkpoint_bytes == size

    run = found.config.run
    assert time_to_save("disk", found, run, size / 4.9, 10 * size).state == "right"
    slow = time_to_save("disk", found, run, size / 5.1, 10 * size)
    assert slow.state == "wrong" and "run.grace_seconds=5" in slow.text
    assert "make room" in time_to_save("disk", found, run, size, 3 * size).text
    assert "30.0 GB within" in time_to_save("disk", Experiment(), RunConfig(), 1e9, 1).text

    assert launcher(30, "2.12.0", {}).state == "right"
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90" in launcher(90, "2.12.0", {}).text
    assert "lower run.grace_seconds" in launcher(90, "2.11.0", {}).text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_formula_of_memory_is_near_what_a_step_takes(precision: str) -> None:
    """Above parameters, gradients and moments; without the libraries."""
    size = Preset(vocab_size=900, embedding_size=48, hidden_size=80, layers=3, dropout=0.3, batch=16, window=20)
    config, threads = size.config(precision, "cpu"), torch.get_num_threads()
    try:
        with launched(
            dataclasses.replace(config, train=dataclasses.replace(config.train, cpu_threads=1))
        ) as accelerator:
            step, batches = TrainStep(config, size.vocab_size, accelerator, 0, size.batch), make_batches(size, 1)
            taken = peak_memory(lambda: step.run(batches[0], True, 0.001), accelerator.device, step.parameters)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)

    parts = bytes_needed(config, size.vocab_size, 1, "cpu")
    expected = sum(parts[name] for name in ("low-precision weights", "activations", "head"))
    assert 0.8 < expected / taken < 1.25
    assert parts["parameters, gradients and moments"] == 16 * sum(each.numel() for each in step.parameters)


def test_memory_follows_processes_slices_and_micro_batches(experiment: Path) -> None:
    def needed(*options: str, processes: int = 1) -> dict[str, int]:
        found = read_experiment(Namespace(config=[str(experiment)], arguments=list(options)))
        assert found.config is not None
        return bytes_needed(found.config, found.vocab_size, processes, "cpu")

    one = needed()
    assert (
        needed(processes=2)["activations"] * 2
        == one["activations"]
        == 2 * needed("--train.accumulation=2")["activations"]
    )
    state, slices = (each["parameters, gradients and moments"] for each in (one, needed("--train.exact_slices=4")))
    assert slices == 2 * state, "a gradient as copied, and three partial sums"
    assert compare(one, sum(one.values())).state == "right"
    assert "raise train.accumulation" in compare(one, sum(one.values()) - 1).text


def test_what_a_proof_prints_becomes_a_line() -> None:
    assert verdict_of("s", 0, "1/1: killed\n  its end: equal, 24 steps\n1 of 1", "").text == "equal, 24 steps"
    assert verdict_of("s", 1, "  its end: DIFFERS: model: a\n0 of 1", "").text.startswith(
        "its end: DIFFERS: model: a; to see"
    )
    assert verdict_of("s", 2, "in /x", "error: no NCCL").state == "wrong"


@pytest.mark.slow
def test_the_whole_on_a_cpu(run_script: RunScript, experiment: Path, tmp_path: Path) -> None:
    done = run_script(
        "tools/doctor.py", "--config", experiment, "--device", "cpu", "--json", tmp_path / "found.json", "--",
        "--train.precision=bf16",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {each["state"] for each in found} == {"right", "untried"}
    tried = {each["check"] for each in found if each["state"] == "right"}
    assert tried == {"machine", "masks", "step-fp32", "step-bf16", "disk", "memory", "processes"}
    assert done.stdout.count("\n") == len(found) + 1 and "0 wrong" in done.stdout

    small = run_script("tools/doctor.py", "--config", experiment, "--only", "disk", "--", "--run.grace_seconds=0")
    assert small.returncode == 1 and "wrong: one of" in small.stdout
