"""Rows of the table of faults that have no better place: ranks that race or differ, a slow disk, no wandb."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import FAULTY, ROOT, TRAIN, RunHere, RunScript, records, write_stream

from rnnlm.data.tokenizer import Tokenizer
from rnnlm.errors import UserError
from rnnlm.train.run import check_alike


@pytest.mark.slow
def test_fault_06_one_rank_alone_makes_renames_and_deletes(
    run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    """Two attempts on two processes, with saving, deleting old checkpoints and resuming, watched by Python's audit."""
    options = (f"--config={experiment}", "--run.save_every_steps=1", "--eval.every_steps=2")
    for end in (4, 7):
        done = run_script(FAULTY, "touches", "0", *options, f"--train.max_steps={end}", processes=2)
        assert done.returncode == 0, done.stderr
    assert [line["processes"] for line in records(tmp_path / "run", "start")] == [2, 2]

    touched = (tmp_path / "touched-0").read_text()
    for step in range(1, 8):
        assert re.search(rf"os.rename .*/checkpoints/[^/]*step-{step:08d}$", touched, re.MULTILINE), step
    assert re.search(r"os.mkdir .*/checkpoints/", touched) and re.search(r"os.rmdir .*/checkpoints/", touched)
    for line in (tmp_path / "touched-1").read_text().splitlines():
        own = r"(open|os.remove) \S*/run/hang-rank-1.txt"  # where its stacks would be
        assert re.fullmatch(own, line), "and nothing else in the run's directory either"


def test_fault_07_the_clock_of_rank_0_alone_decides_when_all_save(
    run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    """A step takes 10 seconds by one clock, and 10,000 by the other, which would save after every step."""
    options = (f"--config={experiment}", "--run.save_every_minutes=0.5", "--run.save_every_steps=1000")
    done = run_script(FAULTY, "clocks", "10", *options, "--eval.every_steps=1000", processes=2)
    assert done.returncode == 0, done.stderr

    saves = [[int(line) for line in (tmp_path / f"saves-{rank}").read_text().split()] for rank in range(2)]
    assert saves[0] == saves[1] == [4, 8, 12, 16, 20], "more than 30 seconds after the save before"
    assert "run.grace_seconds" not in done.stderr, "control of the next test: saves that are quick enough"


def test_fault_12_a_save_longer_than_the_grace_is_warned_of(faulty_here: RunHere, experiment: Path) -> None:
    options = (f"--config={experiment}", "--train.max_steps=2", "--eval.every_steps=99", "--run.grace_seconds=0.3")
    done = faulty_here("disk", 100, *options)
    assert done.returncode == 0, done.stderr
    warning = r"^warning: step-00000002 took \d+ seconds to write, more than run.grace_seconds=0.3: after a signal"
    assert re.search(warning, done.stderr, re.MULTILINE), done.stderr


@pytest.mark.parametrize(
    "key", ["", pytest.param("a" * 40, marks=pytest.mark.slow)], ids=["without a key", "server down"]
)
def test_fault_31_wandb_without_a_key_or_a_server_costs_no_line(
    run_script: RunScript, experiment: Path, tmp_path: Path, key: str
) -> None:
    """Online, at a port where nothing listens; the second waits for wandb's own timeout, a minute."""
    options = (f"--config={experiment}", "--run.wandb=online", "--train.max_steps=4", "--run.log_every_steps=1")
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key, "HOME": str(tmp_path)}  # and no key there
    done = run_script(TRAIN, *options, **server)
    assert done.returncode == 0, done.stderr
    assert "warning: run.wandb=online: " in done.stderr and "; training without it" in done.stderr
    assert [line["step"] for line in records(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_fault_32_a_process_of_other_code_configuration_or_data_is_refused(
    run_script: RunScript, experiment: Path, streams: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As on a second machine where the same names stand for other files."""
    (tmp_path / "streams").symlink_to(streams)
    (tmp_path / "other/streams").mkdir(parents=True)
    write_stream(tmp_path / "other/streams/train", tokenizer, [5, 6, 7, tokenizer.eos_id] * 1000, 4000)
    shutil.copytree(ROOT / "rnnlm", tmp_path / "other/rnnlm")
    with (tmp_path / "other/rnnlm/model/layers.py").open("a") as file:
        file.write("# newer\n")

    script = tmp_path / "train.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.chdir('other')\n"
        "    sys.path.insert(0, os.getcwd())\n"
        "    sys.argv.append('--optim.learning_rate=0.02')\n"
        f"runpy.run_path({str(ROOT / TRAIN)!r}, run_name='__main__')\n"
    )

    done = run_script(script, f"--config={experiment}", "--stream.directory=streams", processes=2)
    assert done.returncode != 0
    other = " and another ".join(["configuration", "train stream", "valid stream", "code"])
    line = f"error: process 1 has another {other} than process 0 ("
    assert [each.startswith(line) for each in done.stderr.splitlines()].count(True) == 1, done.stderr
    assert not (tmp_path / "run").exists(), "before anything is written"


@pytest.mark.parametrize("name", ["configuration", "train stream", "code", "torch"])
def test_fault_32_each_difference_is_named(name: str) -> None:
    alike = {"configuration": "c" * 64, "train stream": "s" * 64, "code": "p" * 64, "torch": "2.13.0"}
    check_alike([alike] * 3)

    message = f"^process 2 has another {name} than process 0 .changed and {alike[name][:12]}"
    with pytest.raises(UserError, match=message):
        check_alike([alike, alike, {**alike, name: "changed"}])
