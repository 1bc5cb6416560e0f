"""The whole path as a user types it: the README's commands, and the mistakes of a first day."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import FAULTY, ROOT, TRAIN, RunHere, RunScript, TrainHere, environment, make_text, records

SMALL = {  # options that make a command of the README small enough for a test
    "train_tokenizer.py": ["--tokenizer.vocab_size=300"],
    "build_stream.py": ["--stream.valid_fraction=0.1"],
    "train.py": [
        *("--train.max_steps=4", "--train.global_batch_size=8", "--train.seq_len=16"),
        *("--train.cpu_threads=1", "--model.hidden_size=16", "--model.embedding_size=8"),
        "--generate.prompts=a",
    ],
    "eval.py": ["--eval.batch_size=8"],
    "generate.py": ["--generate.max_tokens=5"],
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def run_as_typed(line: str, run_here: RunHere, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line with small options at its end, and one process where it names no number."""
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    small = SMALL.get(Path(script).name, [])
    if words[0] == "python":
        return run_here(*words[1:], *small)

    assert words[:2] == ["accelerate", "launch"]
    if "--num_processes" not in words:
        words[words.index(script) : words.index(script)] = ["--num_processes", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:], *small]
    return subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_every_command_of_the_readme(run_here: RunHere, tmp_path: Path) -> None:
    for folder in ("launch", "tools", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "my.txt").write_text("\n".join(make_text(300)), encoding="utf-8")
    commands = readme_commands()
    assert commands[:2] == ["make quickstart", "make test"]
    assert len(commands) == 16

    for number, line in enumerate(commands[2:]):
        if "configs/imdb.yaml" in line:  # the reviews are not here: the streams of my.txt take their place
            line += f" --stream.directory=streams/my --run.directory=runs/{number}"
        done = run_as_typed(line, run_here, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert [line["step"] for line in records(tmp_path / "runs/my", "start")] == [0]


def test_a_node_is_launched_like_the_cpus_of_a_machine_but_for_the_number_of_processes() -> None:
    """So a test with two processes on a CPU is one of launch/one_node.yaml."""
    node, cpu = (yaml.safe_load((ROOT / f"launch/{name}.yaml").read_text()) for name in ("one_node", "cpu"))
    assert node.pop("num_processes") == 8 and cpu.pop("num_processes") == 1
    assert node == cpu


def test_the_readmes_python(streams: Path, tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found
    names: dict[str, object] = {}
    exec(found[1].replace("streams/my", str(streams)), names)
    assert names["batch"].tokens.shape == (64, 33)  # type: ignore[attr-defined]


def test_the_makefile_types_the_readmes_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for script in ("make_corpus", "train_tokenizer", "build_stream", "train", "eval", "generate"):
        assert re.search(rf"^\t\$\(BIN\)/.*\b{script}\.py", makefile, flags=re.MULTILINE)


def test_one_process_is_started_by_python_alone() -> None:
    """A launcher's report of an error is thirty lines, which one process can do without."""
    for line in readme_commands():
        if line.startswith("accelerate"):
            assert "--num_processes" in line or "one_node.yaml" in line, line
    assert "accelerate" not in (ROOT / "Makefile").read_text()


def test_make_corpus_is_the_standard_library(run_here: RunHere, tmp_path: Path) -> None:
    done = run_here("tools/make_corpus.py", "corpus")
    assert done.returncode == 0, done.stderr

    files = list((tmp_path / "corpus").iterdir())
    assert len(files) > 300
    assert (tmp_path / "corpus/argparse.py").read_bytes() == Path(os.__file__).with_name("argparse.py").read_bytes()
    assert not [file.name for file in files if re.search(r"^test\.|\.tests?\.|site-packages", file.name)]
    assert "already there" in run_here("tools/make_corpus.py", "corpus").stdout


class Given(NamedTuple):
    """What a mistake can be made with: an empty folder, streams, those of another tokenizer, and an experiment."""

    tmp: Path
    streams: Path
    other_streams: Path
    experiment: Path

    def file(self, text: str) -> Path:
        (self.tmp / "text.txt").write_text(text)
        return self.tmp / "text.txt"

    def mixed_streams(self) -> Path:
        """A valid stream that was built with another tokenizer than the train stream."""
        mixed = self.tmp / "mixed"
        mixed.mkdir()
        (mixed / "train").symlink_to(self.streams / "train")
        (mixed / "valid").symlink_to(self.other_streams / "valid")
        return mixed


Mistake = Callable[[Given], tuple[str, ...]]  # a script and its options
TOKENIZER, BUILD = "tools/train_tokenizer.py", "tools/build_stream.py"
MISTAKES: dict[str, tuple[Mistake, str]] = {
    "no corpus": (
        lambda given: (TOKENIZER, "--stream.directory=s", "--corpus.train=no.txt"),
        r"corpus.train=no.txt: cannot be read \(No such file or directory\)",
    ),
    "corpus not given": (
        lambda given: (BUILD, f"--stream.directory={given.streams}"),
        r"corpus.train is not set; give text files",
    ),
    "empty corpus": (
        lambda given: (TOKENIZER, "--stream.directory=s", f"--corpus.train={given.file('')}"),
        r"corpus.train: no text in it",
    ),
    "vocabulary too large": (
        lambda given: (
            TOKENIZER,
            "--stream.directory=s",
            f"--corpus.train={given.file('a b')}",
            "--tokenizer.vocab_size=16000",
        ),
        r"tokenizer.vocab_size=16000: larger than this text allows; use at most \d+",
    ),
    "no stream": (
        lambda given: (TRAIN, "--stream.directory=no", "--run.directory=run"),
        r"stream.directory=no: is not there \(seen from .*\); give the place of the streams with --stream.directory",
    ),
    "other tokenizer": (
        lambda given: (TRAIN, f"--config={given.experiment}", f"--stream.directory={given.mixed_streams()}"),
        r"mixed/valid: built with another tokenizer than .*build both with the same",
    ),
    "misspelt key": (
        lambda given: (TRAIN, f"--config={given.experiment}", "--model.hiden_size=3"),
        r"model.hiden_size: no such key in the command line; did you mean model.hidden_size\?",
    ),
    "stream too short": (
        lambda given: (TRAIN, f"--config={given.experiment}", "--train.seq_len=5000"),
        r"train: \d+ tokens, shorter than one window of train.global_batch_size=16 substreams times train.seq_len=5000",
    ),
    "fp16 without a GPU": (
        lambda given: (TRAIN, f"--config={given.experiment}", "--train.precision=fp16"),
        r"train.precision=fp16: needs a GPU",
    ),
    "no run": (
        lambda given: ("launch/eval.py", "--run.directory=no"),
        r"run.directory=no: no run there; train one with launch/train.py",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_first_users_mistake_is_one_clear_line(
    name: str,
    run_script: RunScript,
    run_here: RunHere,
    tmp_path: Path,
    streams: Path,
    other_streams: Path,
    experiment: Path,
) -> None:
    mistake, message = MISTAKES[name]
    script, *options = mistake(Given(tmp_path, streams, other_streams, experiment))
    # of training, one process is enough to show what it prints besides: it imports PyTorch for seconds
    here = script == TRAIN and name != "stream too short"
    done = (run_here if here else run_script)(script, *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(f"^error: .*{message}", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def our_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_batch_that_the_processes_do_not_divide(run_script: RunScript, experiment: Path) -> None:
    done = run_script(TRAIN, f"--config={experiment}", "--train.global_batch_size=15", processes=2)
    assert done.returncode != 0
    assert our_lines(done) == [
        "error: train.global_batch_size=15 is not divisible by 2 processes times train.accumulation=1; use 14 or 16"
    ]
    assert re.search(r"exitcode\s*: 2", done.stderr), "the launcher reports our code"
    assert re.search(r"traceback : error: train.global_batch_size=15 is not divisible", done.stderr), "and our line"


def test_fault_20_a_run_directory_of_another_configuration(
    train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    assert train_here(f"--config={experiment}", "--train.max_steps=1").returncode == 0
    before = (tmp_path / "run/config.yaml").read_bytes()

    done = train_here(f"--config={experiment}", "--train.seq_len=40", "--model.dropout=0.1")
    assert done.returncode == 2
    assert our_lines(done) == [
        f"error: run.directory={tmp_path}/run: holds a run of another configuration (model.dropout is 0.3 there, 0.1 "
        "now; train.seq_len is 48 there, 40 now); choose another run.directory, or give these fields the values they "
        "have there (run.allow_change says which may change)"
    ]
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_launched_processes_that_are_not_seen(run_script: RunScript, experiment: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / TRAIN), f"--config={experiment}"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert our_lines(done) == [
        "error: accelerate launch was asked for several processes but started one; "
        "use --config_file launch/cpu.yaml --num_processes 2, which starts them on a CPU"
    ]

    blind = run_script(FAULTY, "blind", "0", f"--config={experiment}", processes=2)
    assert blind.returncode != 0
    assert our_lines(blind) == [
        "error: 2 processes were launched, but each sees 1; "
        "launch with a file of launch/, as in accelerate launch --config_file launch/cpu.yaml"
    ]
    assert not (tmp_path / "run").exists()
