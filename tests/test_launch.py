"""What starts a run, on several machines or again.

launch/many_nodes.yaml starts two "machines" that are one; launch/slurm.sbatch has stand-ins for Slurm, and
launch/kubernetes.yaml is read. These two have not met their real counterparts here; what they rely on of them stands in
their comments.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, assert_same_bits, command, environment, records

from rnnlm.config import Config

PREEMPTED = "echo {} > runs/my/preempted.json"
SAVED = "mkdir -p runs/my/checkpoints/step-00000020"
MODULES = {"accelerate": ["-m", "accelerate.commands.accelerate_cli"], "torchrun": ["-m", "torch.distributed.run"]}


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait, for 100 seconds at most, while the process is alive."""
    until = time.monotonic() + 100
    while not holds():
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=30)
        time.sleep(0.05)


def has_logged(run: Path, lines: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(records(run, "train")) >= lines


# Several machines


@contextmanager
def on_two_machines(program: str, run: Path, *options: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start what the header of many_nodes.yaml says for a program, on two "machines" with one CPU process each."""
    text = (ROOT / "launch/many_nodes.yaml").read_text().replace("#", " ").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [program])
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])  # free now, and most likely in a second

    here = {"16": "2", "8": "1", "10.0.0.1": "localhost", "29500": port, "10.0.0.1:29500": f"localhost:{port}"}
    words = [here.get(word, word) for word in shlex.split(line)]
    launcher = [sys.executable, *MODULES[program], *words[1 : words.index("--config")]]
    number = launcher.index("--machine_rank") + 1 if program == "accelerate" else None  # torchrun finds it out

    def on_machine(index: int) -> subprocess.Popen[str]:
        if number:
            launcher[number] = str(index)
        return subprocess.Popen(
            [*launcher, *options, f"--run.directory={run}"], cwd=ROOT, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    with on_machine(0) as first, on_machine(1) as second:
        try:
            yield [first, second]
        finally:
            for process in (first, second):
                process.kill()  # nothing, where it has ended


@pytest.mark.parametrize("program", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_machines_train_to_the_bits_of_two_processes_on_one(program: str, experiment: Path, tmp_path: Path) -> None:
    one, two, options = tmp_path / "one", tmp_path / "two", f"--config={experiment}"
    arguments = command("launch/train.py", options, f"--run.directory={one}", processes=2)
    subprocess.run(arguments, env=environment(), check=True, capture_output=True, timeout=100)

    with on_two_machines(program, two, options) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors

    (start,) = records(two, "start")
    assert [rank["substreams"] for rank in start["ranks"]] == [[0, 8], [8, 16]]
    assert_same_bits(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("program", MODULES)
def test_sigterm_to_the_launcher_of_one_machine_saves_the_run_and_ends_it_on_all(
    program: str, experiment: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (f"--config={experiment}", "--train.epochs=99999", "--train.max_steps=0", "--run.log_every_steps=1")
    with on_two_machines(program, run, *options) as processes:
        wait_until(lambda: has_logged(run, 3), processes[1])
        processes[1].terminate()
        for process in processes:
            process.communicate(timeout=100)
            assert process.returncode == 1, "a launcher makes 1 of 75"

    marker = json.loads((run / "preempted.json").read_text())
    assert marker["step"] == marker["saved_step"] >= 3


# Slurm


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A directory to run the script in, whose bin/ holds scontrol, which writes down what it is asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "runs/my/checkpoints/step-00000010").mkdir(parents=True)
    write_command(tmp_path, "scontrol", 'echo "$@" >> scontrol.log; if [ "$1" = show ]; then echo localhost; fi')
    return tmp_path


def write_command(cluster: Path, name: str, script: str) -> None:
    path = cluster / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def start(cluster: Path, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """The script as Slurm runs it, on one machine."""
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # Slurm sets it from the first restart on
    path = f"{cluster}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *options], cwd=cluster, env=environment(PATH=path, **slurm, **counted),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def requeued(cluster: Path) -> bool:
    return "requeue 1234567" in (cluster / "scontrol.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("attempt", "restarts", "again", "code", "message"),
    [
        (f"{SAVED}; {PREEMPTED}; exit 1", 0, True, 0, ""),
        (f"{SAVED}; {PREEMPTED}; exit 1", 49, True, 0, ""),
        (f"{SAVED}; {PREEMPTED}; exit 1", 50, False, 1, "queued again 50 times already"),
        (f"{PREEMPTED}; exit 1", 1, False, 1, "no new checkpoint in this attempt"),
        (f"{SAVED}; exit 1", 0, False, 1, ""),
        (f"{SAVED}; exit 0", 0, False, 0, ""),
    ],
    ids=["pre-empted", "the last time", "too often", "no progress", "a fault", "done"],
)
def test_fault_33_slurm_queues_again_by_the_marker_and_not_for_ever(
    cluster: Path, attempt: str, restarts: int, again: bool, code: int, message: str
) -> None:
    write_command(cluster, "srun", attempt)
    process = start(cluster, "--config=mine.yaml", "--run.directory=runs/my", restarts=restarts)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, requeued(cluster)) == (code, again), errors
    assert message in errors and bool(message) == bool(errors)


def test_slurm_wants_to_know_the_run(cluster: Path) -> None:
    process = start(cluster, "--config=mine.yaml")
    assert process.communicate(timeout=60)[1].startswith("error: --run.directory=... is not among the options")
    assert process.returncode == 2


@pytest.mark.slow
def test_fault_10_slurm_signals_its_task_and_the_run_is_saved_queued_again_and_finished(
    cluster: Path, experiment: Path
) -> None:
    """Torchrun and the trainer are real; the signal goes to torchrun alone, as with Slurm's proctrack/cgroup."""
    write_command(cluster, "srun", 'while [ "$1" != python ]; do shift; done; echo $$ > task; exec "$@"')
    long = (f"--config={experiment}", "--run.directory=run", "--train.epochs=99999", "--run.log_every_steps=1")

    first = start(cluster, *long)
    wait_until(lambda: has_logged(cluster / "run", 3), first)
    os.kill(int((cluster / "task").read_text()), signal.SIGUSR1)
    _, errors = first.communicate(timeout=100)
    assert requeued(cluster), errors
    marker = json.loads((cluster / "run/preempted.json").read_text())
    assert marker["signal"] == "SIGUSR1" and marker["step"] == marker["saved_step"]

    (cluster / "scontrol.log").unlink()
    second = start(cluster, *long, f"--train.max_steps={marker['step'] + 1}", restarts=1)
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 0 and f"resuming from step {marker['step']}" in errors
    assert not requeued(cluster)


# Kubernetes


def decide(rules: list[dict[str, Any]], code: int, disrupted: bool) -> str:
    """What the Job controller does with a pod: the first rule that fits, else it is counted."""
    for rule in rules:
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and code in codes["values"]:
            return str(rule["action"])
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
            return str(rule["action"])
    return "Count"


def test_fault_33_kubernetes_counts_faults_ignores_pre_emption_and_ends_at_mistakes() -> None:
    volume_claim, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    found = {(code, disrupted): decide(rules, code, disrupted) for code in (1, 2, 75, 137) for disrupted in (0, 1)}
    assert found == {
        (1, 0): "Count", (2, 0): "FailJob", (75, 0): "Ignore", (137, 0): "Count",
        (1, 1): "Ignore", (2, 1): "FailJob", (75, 1): "Ignore", (137, 1): "Ignore",
    }  # fmt: skip
    assert 0 < spec["backoffLimit"] < 10 and spec["activeDeadlineSeconds"] > 0
    assert pod["restartPolicy"] == "Never", "podFailurePolicy is refused otherwise"

    (container,) = pod["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}
    assert container["command"] == ["python", "launch/train.py"], "no shell before it, which would keep the signal"
    options = dict(re.fullmatch(r"--([a-z_.]+)=(.+)", argument).groups() for argument in container["args"])  # type: ignore[union-attr]
    assert int(options["run.grace_seconds"]) == pod["terminationGracePeriodSeconds"]
    for name in options.keys() - {"config"}:
        section, field = name.split(".")
        assert hasattr(getattr(Config(), section), field), name

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounted["/data"]["persistentVolumeClaim"]["claimName"] == volume_claim["metadata"]["name"]
    assert options["run.directory"].startswith("/data/"), "or nothing would outlive the pod"
