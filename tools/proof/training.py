"""Training that is killed, compared with a run that was left alone."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proof.processes import SIGNALS, Processes, call, choose, make_tokenizer, script
from rnnlm.errors import RunError, UserError

TIMES = {  # what may differ in metrics
    "time", "tokens_per_second", "peak_share", "seconds_left", "data_wait_share", "peak_memory_bytes", "processes",
}  # fmt: skip
PHASES = {"its start": 0.15, "a step": 0.35, "a save": 0.3, "an evaluation": 0.2}
EXPERIMENT = {
    "model": {"embedding_size": 32, "hidden_size": 48, "layers": 2, "dropout": 0.2},
    "optim": {"learning_rate": 0.01, "schedule": "plateau"},
    "train": {"global_batch_size": 16, "seq_len": 16, "epochs": 100},
    "eval": {"batch_size": 16},
}


@dataclass
class Training:
    """A run that is killed until it is done, and the run that it is compared with."""

    options: argparse.Namespace
    directory: Path
    arguments: list[str]  # of launch/train.py
    draw: random.Random
    runs: Iterator[int] = field(default_factory=itertools.count)
    run: Path = Path()

    def prepare(self) -> None:
        """Train the run that is left alone; errors as `check_reference`."""
        self.reference = self.directory / "left-alone"
        started = time.monotonic()
        call(self._command(self.reference, self.options.processes[0]), self.directory / "log.txt")
        print(f"left alone on {self.options.processes[0]} process(es): {time.monotonic() - started:.0f} s", flush=True)
        self.check_reference()
        self.begin()

    def check_reference(self) -> None:
        """Check where the run that was left alone has ended.

        Raises:
            UserError: at another step, as by early stopping: no other run would ever be done.
        """
        if not self._checkpoint(self.reference).is_dir():
            raise UserError(
                f"{self.reference}: has ended, but not at step {self.options.steps}; give its last step with --steps"
            )

    def begin(self) -> None:
        """Start the next run."""
        self.run = self.directory / f"killed-{next(self.runs)}"

    def is_done(self) -> bool:
        """Whether the run has reached its last step."""
        return (self._checkpoint(self.run) / "manifest.json").exists() and self._step() >= self.options.steps

    def finish(self) -> None:
        """Let the run go on to its end."""
        call(self._command(self.run, self.options.processes[-1]), self.directory / "log.txt")

    def attempt(self) -> tuple[str, str]:
        """Start, kill, wait; (what happened, where it was hit)."""
        count = self.draw.choice(self.options.processes)
        how, phase = choose(SIGNALS, self.draw), choose(PHASES, self.draw)
        begin = self._step()
        processes = Processes(self._command(self.run, count), self.directory / "log.txt")

        hit = self._wait_for(phase, begin, processes)
        if hit:
            processes.signal(how, self.draw)
        code = processes.wait(self.options.patience)
        if not hit:
            if code:
                raise RunError(f"{self.run}: ended with {code} before it was killed (log: {self.directory}/log.txt)")
            return f"{count} process(es), from step {begin}: ran to its end", "not killed"
        where = self._where(phase)
        return f"{count} process(es), from step {begin}: {how} in {where}, at step {self._step()}", where

    def _wait_for(self, phase: str, begin: int, processes: Processes) -> bool:
        """Return at some moment of a phase; False: the run ended before."""
        target = begin + self.draw.randint(1, max(2, self.options.steps // 5))
        until = time.monotonic() + (self.draw.uniform(0, 8) if phase == "its start" else 1e9)

        while processes.first.poll() is None:
            in_save = any((self.run / "checkpoints").glob("*.partial"))
            reached = self._step() >= target
            hit = {
                "its start": time.monotonic() > until,
                "a step": reached,
                "a save": reached and in_save,
                "an evaluation": reached and self._is_evaluating(),
            }[phase]

            if hit:
                time.sleep(self.draw.uniform(0, 0.02))
                return True
            time.sleep(0.001)
        return False

    def _where(self, phase: str) -> str:
        """Where a run was killed, by what it left."""
        if any((self.run / "checkpoints").glob("*.partial")):
            return "a save"
        if self._is_evaluating():
            return "an evaluation"
        return "its start" if phase == "its start" else "a step"

    def _is_evaluating(self) -> bool:
        lines = _metrics(self.run, last=True)
        return bool(lines) and lines[-1]["kind"] == "train" and lines[-1]["step"] % self.options.evaluate_every == 0

    def _step(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in _metrics(self.run, last=True) if line["kind"] == "train"), default=0)

    def _command(self, run: Path, processes: int) -> list[str]:
        python, path = script("launch/train.py")
        launcher = [python]
        if processes > 1:
            launcher += ["-m", "accelerate.commands.launch", "--config_file", self.options.launch_config]
            launcher += ["--num_processes", str(processes)]
        return [*launcher, path, *self.arguments, f"--run.directory={run}"]

    def _checkpoint(self, run: Path) -> Path:
        return run / f"checkpoints/step-{self.options.steps:08d}"

    def differences(self) -> list[str]:
        """What is not as in the run that was left alone."""
        found = []
        ends = [self._checkpoint(run) for run in (self.run, self.reference)]
        for part in ("model", "optimizer", "hidden"):
            found += [f"{part}: {name}" for name in differing_tensors(*(end / f"{part}.safetensors" for end in ends))]

        mine, theirs = (json.loads((end / "trainer.json").read_text()) for end in ends)
        differing = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
        found += [f"trainer.json: {key}" for key in differing if key != "processes"]

        lines, expected = (_numbers(run) for run in (self.run, self.reference))
        found += [f"metrics.jsonl: {a} instead of {b}" for a, b in zip(lines, expected, strict=False) if a != b]
        return found + ([f"{len(lines)} lines, expected {len(expected)}"] if len(lines) != len(expected) else [])

    def compared(self) -> str:
        """What was compared, in words."""
        lines = _numbers(self.reference)
        size = sum(path.stat().st_size for path in self._checkpoint(self.reference).glob("*.safetensors"))
        return (
            f"{self.options.steps} steps, {size:,} bytes of parameters, moments and hidden states, {len(lines)} lines"
        )


def _metrics(run: Path, last: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, or about the last ten of them; one that is not whole is left out."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            if last:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []

    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _numbers(run: Path) -> list[dict[str, Any]]:
    """All that was logged of steps and evaluations, without what depends on the machine's speed."""
    lines = (line for line in _metrics(run) if line["kind"] in ("train", "valid"))
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def differing_tensors(path: Path, other: Path) -> list[str]:
    """The names of tensors that are not the same bytes in two safetensors files."""
    mine, theirs = _tensors(path), _tensors(other)
    return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))


def _tensors(path: Path) -> dict[str, tuple[str, str, str]]:
    """dtype, shape and digest of each tensor."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, each in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            first, last = each["data_offsets"]
            digest = hashlib.sha256(data[begin + first : begin + last]).hexdigest()
            found[name] = each["dtype"], str(each["shape"]), digest
    return found


def training(directory: Path, options: argparse.Namespace, draw: random.Random) -> Training:
    """The training that is to be killed; what the command line sets is kept."""
    arguments = [f"--config={options.config or _small_experiment(directory)}", *options.arguments]
    defaults = {
        "train.max_steps": options.steps,
        "train.cpu_threads": 1,  # sums depend on their number
        "run.log_every_steps": 1,
        "run.save_every_steps": options.save_every,
        "eval.every_steps": options.evaluate_every,
    }
    if len(set(options.processes)) > 1:
        defaults["train.exact_slices"] = max(options.processes)

    given = {argument.split("=")[0].removeprefix("--") for argument in options.arguments}
    arguments += [f"--{name}={value}" for name, value in defaults.items() if name not in given]
    return Training(options, directory, arguments, draw)


def _small_experiment(directory: Path) -> Path:
    """The file of an experiment, with text, tokenizer and streams made as a user makes them."""
    call([*script("tools/build_stream.py"), *make_tokenizer(directory)], directory / "log.txt")
    path = directory / "experiment.yaml"
    path.write_text(json.dumps({**EXPERIMENT, "stream": {"directory": str(directory)}}))
    return path
