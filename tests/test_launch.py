"""What starts a run again, and how often: launch/slurm.sbatch with stand-ins for Slurm, launch/kubernetes.yaml as read.

Neither has met its real counterpart here; what they rely on of it stands in their comments.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, environment, records

from rnnlm.config import Config

PREEMPTED = "echo {} > runs/my/preempted.json"
SAVED = "mkdir -p runs/my/checkpoints/step-00000020"


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
    counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # Slurm sets it from the second life on
    path = f"{cluster}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *options], cwd=cluster, env=environment(PATH=path, **slurm, **counted),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def requeued(cluster: Path) -> bool:
    return "requeue 1234567" in (cluster / "scontrol.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("life", "restarts", "again", "code", "said"),
    [
        (f"{SAVED}; {PREEMPTED}; exit 1", 0, True, 0, ""),
        (f"{SAVED}; {PREEMPTED}; exit 1", 49, True, 0, ""),
        (f"{SAVED}; {PREEMPTED}; exit 1", 50, False, 1, "queued again 50 times already"),
        (f"{PREEMPTED}; exit 1", 1, False, 1, "no new checkpoint in this life"),
        (f"{SAVED}; exit 1", 0, False, 1, ""),
        (f"{SAVED}; exit 0", 0, False, 0, ""),
    ],
    ids=["pre-empted", "the last time", "too often", "no progress", "a fault", "done"],
)
def test_fault_33_slurm_queues_again_by_the_marker_and_not_for_ever(
    cluster: Path, life: str, restarts: int, again: bool, code: int, said: str
) -> None:
    write_command(cluster, "srun", life)
    process = start(cluster, "--config=mine.yaml", "--run.directory=runs/my", restarts=restarts)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, requeued(cluster)) == (code, again), errors
    assert said in errors and bool(said) == bool(errors)


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
    until = time.monotonic() + 100
    while not (cluster / "run/metrics.jsonl").exists() or len(records(cluster / "run", "train")) < 3:
        assert first.poll() is None and time.monotonic() < until, first.communicate()
        time.sleep(0.05)
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
    claim, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
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
    assert mounted["/data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert options["run.directory"].startswith("/data/"), "or nothing would outlive the pod"
