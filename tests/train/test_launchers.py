"""What a launcher does to its processes: who is one, when it kills, what it says in the environment."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TrainHere, environment, records

from rnnlm.config import Config, TrainConfig
from rnnlm.errors import UserError
from rnnlm.files import locked
from rnnlm.train.distributed import _check_launcher, set_arithmetic
from rnnlm.train.signals import SHUTDOWN_TIMEOUT, is_launcher, short_shutdown


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/venv/bin/python /venv/bin/torchrun --nproc-per-node 2 train.py", True),
        ("python3.12 /venv/bin/accelerate launch train.py", True),
        ("/venv/bin/accelerate-launch train.py", True),
        ("python -m torch.distributed.run --standalone train.py", True),
        ("python -X dev -W error -u -m accelerate.commands.launch train.py", True),
        ("python -maccelerate.commands.accelerate_cli launch train.py", True),
        ("python -m torch.distributed.launch train.py", True),
        ("python /home/me/pytorch/start_all.py", False),
        ("bash -c torchrun train.py", False),
        ("python start.py torchrun", False),
        ("python -m pytest torch.distributed.run", False),
        ("python -c accelerate", False),
        ("vim accelerate torchrun", False),
        ("python", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_program_not_by_its_arguments(command: str, expected: bool) -> None:
    assert is_launcher(command.split(" ")) == expected


@pytest.mark.parametrize(
    ("name", "step", "number"),
    [
        ("torch_experiments/start.py", "die_with_launcher(15)", 0),
        ("bin/torchrun", "die_with_launcher(15)", signal.SIGTERM),
        ("bin/torchrun", "Interrupts().__enter__()", signal.SIGKILL),
    ],
)
def test_only_a_launcher_takes_its_child_with_it(tmp_path: Path, name: str, step: str, number: int) -> None:
    """Asked of the kernel, by the child itself: the signal that it is sent when its parent ends."""
    child = (
        f"import ctypes\nfrom rnnlm.train.signals import Interrupts, die_with_launcher\n{step}\n"
        "found = ctypes.c_int()\nctypes.CDLL(None).prctl(2, ctypes.byref(found), 0, 0, 0)\nprint(found.value)\n"
    )
    script = tmp_path / name
    script.parent.mkdir()
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)\n")
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) == number


@pytest.mark.parametrize(
    ("told", "version", "launcher", "kills_after"),
    [
        ({}, "2.13.0", "torchrun train.py", 30),
        ({SHUTDOWN_TIMEOUT: "60"}, "2.12.1+cu130", "torchrun train.py", 60),
        ({SHUTDOWN_TIMEOUT: "120"}, "2.12.0", "torchrun train.py", 0),
        ({"PET_SHUTDOWN_TIMEOUT": "90"}, "2.12.0", "torchrun train.py", 90),
        ({}, "2.13.0", "torchrun --shutdown-timeout=110 train.py", 110),
        ({}, "2.13.0", "torchrun --shutdown_timeout 300 train.py", 0),
        ({SHUTDOWN_TIMEOUT: "120"}, "2.11.0", "torchrun train.py", 30),
    ],
)
def test_fault_12_a_launcher_that_kills_before_the_grace_is_over_is_named(
    told: dict[str, str], version: str, launcher: str, kills_after: int
) -> None:
    started = {"TORCHELASTIC_RUN_ID": "none", **told}
    warning = short_shutdown(120.0, version, started, launcher.split())
    if not kills_after:
        assert not warning
        return
    assert f"kills {kills_after} seconds after SIGTERM, before run.grace_seconds=120 are over" in warning
    way_out = f"set {SHUTDOWN_TIMEOUT}=120" if version >= "2.12" else f"PyTorch {version} does not read"
    assert way_out in warning
    assert not short_shutdown(30.0, version, started, launcher.split()), "which all of these allow"
    assert not short_shutdown(120.0, version, told, ["bash"]), "no launcher, no kill"


def test_fault_12_scheduler_files_give_the_launcher_the_time_that_they_have() -> None:
    _, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    grace = pod["terminationGracePeriodSeconds"]
    assert 30 < int(variables[SHUTDOWN_TIMEOUT]) <= grace
    assert not short_shutdown(grace, torch.__version__, {"TORCHELASTIC_RUN_ID": "none", **variables}, [""])

    slurm = (ROOT / "launch/slurm.sbatch").read_text()
    (signalled,) = re.findall(r"--signal=USR1@(\d+)", slurm)
    (told,) = re.findall(rf"^export {SHUTDOWN_TIMEOUT}=(\d+)$", slurm, re.M)
    assert 30 < int(told) < int(signalled)


@pytest.fixture
def launched_alone() -> dict[str, str]:
    """The environment of one process under a launcher: a process group of one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])  # free now, and most likely in a moment
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}


def test_fault_29_one_process_under_a_launcher_is_refused_in_one_line(
    train_here: TrainHere, experiment: Path, tmp_path: Path, launched_alone: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("rnnlm.train.run.LOCK_PATIENCE_SECONDS", 0.0)
    run = tmp_path / "run"
    with locked(run / "lock", "run"):
        done = train_here(f"--config={experiment}", **launched_alone)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "another run is working there" in done.stderr, done.stderr
    assert not torch.distributed.is_initialized(), "it left the group that it was alone in"


def test_what_accelerate_says_in_the_environment_is_not_obeyed_silently(
    train_here: TrainHere, experiment: Path, tmp_path: Path, launched_alone: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`accelerate launch` sets these by its configuration file. Compiled, the model would have crashed."""
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: (compiled.append(options), model)[1])
    options = (f"--config={experiment}", "--train.max_steps=2", "--run.grace_seconds=60")
    done = train_here(*options, ACCELERATE_DYNAMO_BACKEND="INDUCTOR", **launched_alone)
    assert done.returncode == 0, done.stderr
    assert not compiled
    assert done.stderr.count("warning: ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not used: nothing is compiled here") == 1
    assert "warning: the launcher kills 30 seconds after SIGTERM" in done.stderr, "and that is said of the launcher"
    assert records(tmp_path / "run", "start")[0]["versions"]["gradient_sums"] == "one process"


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_another_engine_than_ddp_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"ACCELERATE_USE_{engine}=true: .*another engine than DDP.*one_node.yaml"):
        _check_launcher()


def test_deterministic_does_not_fill_memory_that_is_about_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # which it would set, and leave
    threads, filled = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        set_arithmetic(Config(train=TrainConfig(deterministic=True)), cuda=False)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.set_num_threads(threads)


def test_a_process_whose_launcher_died_before_it_could_look_says_so(
    train_here: TrainHere, experiment: Path, launched_alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent is the first process of all; without the launcher it would look for the others for minutes."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr("rnnlm.train.signals.command_of", lambda process: ["/sbin/init"])
    done = train_here(f"--config={experiment}", **launched_alone)
    assert done.returncode == 1 and "the launcher has ended" in done.stderr, done.stderr
    monkeypatch.setattr("rnnlm.train.signals.command_of", lambda process: ["torchrun", "train.py"])
    done = train_here(f"--config={experiment}", "--train.max_steps=1", **launched_alone)
    assert done.returncode == 0, "a container may begin with torchrun"
