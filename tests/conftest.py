"""What the tests share: a small corpus, a 300-piece tokenizer, a two-shard stream, and scripts run as processes."""

from __future__ import annotations

import gc
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from safetensors.torch import load_file

from rnnlm.config import Config, CorpusConfig, StreamConfig, TokenizerConfig
from rnnlm.data.build.build import Build
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import Manifest
from rnnlm.data.stream_writer import commit, write_array, write_shard
from rnnlm.data.tokenizer import Tokenizer
from rnnlm.data.tokenizer_training import train
from rnnlm.train.guard import Guard

# machines are noisy, and a slow one is not wrong; a red run can be repeated
settings.register_profile("fixed", deadline=None, derandomize=True)
# pytest -m hypothesis --hypothesis-profile=random; a failure prints what repeats it
settings.register_profile("random", deadline=None, print_blob=True)
settings.register_profile("long", deadline=None, print_blob=True, max_examples=5000)
settings.load_profile("fixed")
torch.set_num_threads(1)  # as many pytest processes run as there are cores: more threads would wait for each other

ROOT = Path(__file__).resolve().parent.parent
TRAIN, FAULTY = "launch/train.py", "tests/train/faulty_train.py"

STATE: dict[str, Any] = {  # a trainer.json
    "step": 7, "horizon_steps": 20, "interval": [1, 2, 0], "scaler": {}, "stream": "ab", "tokenizer": "",
    "processes": 1, "vocab_size": 300, "configuration": {"model": {"layers": 2}}, "versions": {"torch": "2"},
    "origin": {"step": 0, "epoch": 0, "position": 0}, "health": Guard(torch.device("cpu")).to_dict(0),
    "memory": {"best_loss": None, "best_step": 0, "evaluations_since_best": 0, "evaluations_since_cut": 0,
               "learning_rate_scale": 1.0},
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-baselines", action="store_true", help="write tests/train/baselines.json anew")


def make_text(documents: int, seed: int = 0) -> list[str]:
    """Sentences of a small vocabulary with some structure, the same for the same seed."""
    draw = random.Random(seed)
    names, verbs = ("anna", "bob", "carol", "dan"), ("sees", "likes", "finds")
    things = ("the cat", "a dog", "Zoë", "漢字")
    return [
        ". ".join(f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}" for _ in range(draw.randint(1, 6)))
        for _ in range(documents)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 400 documents, one a line."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(make_text(400)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """300 pieces, 256 of them bytes."""
    return train(make_text(400), TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Tokenizer) -> Path:
    """A directory with a train stream of two shards and a valid stream."""
    directory = tmp_path_factory.mktemp("streams")
    built = build_streams(directory, corpus, tokenizer)
    assert len(built["train"].shards) == 2, built["train"].tokens
    return directory


@pytest.fixture(scope="session")
def other_streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another text, and with its own tokenizer, also of 300 pieces."""
    directory, text = tmp_path_factory.mktemp("other-streams"), make_text(500, seed=3)
    (directory / "text.txt").write_text("\n".join(text), encoding="utf-8")
    build_streams(directory, directory / "text.txt", train(text, TokenizerConfig(vocab_size=300)))
    return directory


def build_streams(directory: Path, corpus: Path, tokenizer: Tokenizer) -> dict[str, Manifest]:
    """Encode a corpus of one document a line into a train and a valid stream; their manifests by name."""
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    config = Config(
        corpus=CorpusConfig(train=str(corpus)),
        stream=StreamConfig(directory=str(directory), valid_fraction=0.1, shard_tokens=6000),
    )
    return Build(config, tokenizer).run(lambda size: None)


@pytest.fixture
def train_stream(streams: Path) -> TokenStream:
    """The two-shard stream."""
    return TokenStream(streams / "train")


@pytest.fixture
def experiment(streams: Path, tmp_path: Path) -> Path:
    """A small experiment with dropout on, prefetch on, and an epoch's end inside its 20 steps."""
    sections = {
        "stream": {"directory": str(streams)},
        "model": {"embedding_size": 12, "hidden_size": 16, "layers": 2, "dropout": 0.3},
        "optim": {"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 4},
        "train": {"global_batch_size": 16, "seq_len": 48, "epochs": 2, "max_steps": 20, "cpu_threads": 1},
        "generate": {"prompts": ["anna sees"], "max_tokens": 8},
        "eval": {"batch_size": 8, "every_steps": 0},
        "run": {"directory": str(tmp_path / "run"), "log_every_steps": 3, "save_every_steps": 10},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(sections))
    return path


def write_stream(directory: Path, tokenizer: Tokenizer, tokens: list[int], shard_tokens: int) -> None:
    """A stream of one document with these tokens, 5 bytes and 2 words, written by the functions that a build uses."""
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir()
    (partial / "tokenizer.model").write_bytes(tokenizer.model)
    blocks = [np.array(tokens[start : start + shard_tokens]) for start in range(0, len(tokens), shard_tokens)]
    shards = [write_shard(partial / f"shard-{k:05d}.npy", [block], tokenizer) for k, block in enumerate(blocks)]
    manifest = Manifest(
        dtype="<u2", vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, tokenizer=tokenizer.digest,
        tokens=len(tokens), documents=1, text_bytes=5, words=2, records={"read": 1, "kept": 1}, mended=0, source={},
        unknown_tokens=sum(shard.pop("unknown") for shard in shards), shards=shards, rejected_sha256="",
        documents_sha256=write_array(partial / "documents.npy", [np.array([[len(tokens), 5, 2]])], "<i8", (3,))[1],
    )  # fmt: skip
    commit(partial, directory, manifest)


RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a script: no launcher around it, and no GPU."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("ACCELERATE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **extra}


def command(script: str | Path, *arguments: str | Path, processes: int = 0) -> list[str]:
    """The command of a script; under `accelerate launch` where processes are given."""
    script = ROOT / script
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml")]
        launcher += ["--num_processes", str(processes)]
    return [*launcher, str(script), *map(str, arguments)]


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run a script to its end in a directory of its own; returns code, stdout and stderr."""

    def run(
        script: str | Path, *arguments: str | Path, processes: int = 0, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(script, *arguments, processes=processes),
            cwd=tmp_path,
            env=environment(**extra),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=240,
            check=False,
        )

    return run


RunHere = Callable[..., "subprocess.CompletedProcess[str]"]
TrainHere = Callable[..., "subprocess.CompletedProcess[str]"]
Uninterrupted = Callable[[int], Path]


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunHere:
    """As run_script, but in this process, for tests whose subject is no process: PyTorch is imported once for all."""
    threads = torch.get_num_threads()

    def run(script: str, *options: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        # CUDA_VISIBLE_DEVICES may come too late here
        device = ["--train.device=cpu"] if script.startswith("launch/") else []
        command = [script, *map(str, options), *device]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command)
        out, errors, code = StringIO(), StringIO(), 0

        try:
            with (
                patch.dict(os.environ, environment(**extra), clear=True),
                redirect_stdout(out),
                redirect_stderr(errors),
            ):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:  # a process would end like this
            traceback.print_exc(file=errors)
            code = 1
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(threads)
            if code:
                gc.collect()  # closes what an error leaves open, as the end of a process does

        return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())

    return run


@pytest.fixture
def train_here(run_here: RunHere) -> TrainHere:
    """launch/train.py in this process."""
    return lambda *options, **extra: run_here(TRAIN, *options, **extra)


@pytest.fixture
def faulty_here(train_here: TrainHere, monkeypatch: pytest.MonkeyPatch) -> RunHere:
    """launch/train.py in this process with a fault of faulty_train.py, which ends with the call."""
    import faulty_train  # lies beside the tests that ask for this

    def run(fault: str, value: int, *options: str | Path) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patched:
            patched.setattr(faulty_train, "replace", patched.setattr)
            faulty_train.inject(fault, str(value))
            return train_here(*options)

    return run


@pytest.fixture(scope="session")
def whole_runs() -> dict[int, Path]:
    """Runs of the experiment from beginning to end by number of processes, made when first wanted."""
    return {}


@pytest.fixture
def uninterrupted(
    whole_runs: dict[int, Path],
    run_script: RunScript,
    train_here: TrainHere,
    experiment: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Uninterrupted:
    """The directory of such a run, to be read or copied."""

    def run(processes: int) -> Path:
        if processes not in whole_runs:
            option = f"--config={experiment}"
            done = train_here(option) if processes == 1 else run_script(TRAIN, option, processes=processes)
            assert done.returncode == 0, done.stderr
            kept = tmp_path_factory.mktemp("whole") / "run"
            shutil.move(tmp_path / "run", kept)
            whole_runs[processes] = kept
        return whole_runs[processes]

    return run


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def results(run: Path) -> list[tuple[Any, ...]]:
    """Everything logged that must not depend on how often a run was killed: losses, rates, norms, validation."""
    keys = ("step", "tokens", "epoch", "loss", "learning_rate", "gradient_norm", "best", "nats")
    return [tuple(line.get(key) for key in keys) for kind in ("train", "valid") for line in records(run, kind)]


def final_state(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything in the checkpoint of a step: all tensors, and trainer.json."""
    path = run / f"checkpoints/step-{step:08d}"
    tensors = {}
    for file in ("model", "optimizer", "hidden"):
        tensors.update({f"{file}.{name}": value for name, value in load_file(path / f"{file}.safetensors").items()})
    return tensors, json.loads((path / "trainer.json").read_text())


def assert_same_bits(run: Path, other: Path, step: int = 20) -> None:
    """Tensors, state and all results of two runs at a step."""
    (mine, my_state), (theirs, their_state) = final_state(run, step), final_state(other, step)
    assert mine.keys() == theirs.keys()
    assert {name.split(".")[0] for name in mine} == {"model", "optimizer", "hidden"}
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert my_state == their_state
    assert results(run) == results(other)
