"""Which directories a run takes, and which streams it finds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import RunHere, TrainHere, Uninterrupted, records

from rnnlm.errors import UserError
from rnnlm.train.run import check_place
from rnnlm.yaml_file import load_yaml


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_of_streams_is_no_place_for_a_run(
    train_here: TrainHere, experiment: Path, streams: Path, tmp_path: Path
) -> None:
    """A run would put its own tokenizer.model in the place of theirs."""
    place = tmp_path / "mine"
    shutil.copytree(streams, place)
    before = contents(place)
    done = train_here(f"--config={experiment}", f"--run.directory={place}")
    assert done.returncode == 2
    assert re.search(rf"^error: run.directory={place}: holds no run, but .*tokenizer.model.*; choose", done.stderr)
    assert contents(place) == before
    with pytest.raises(UserError, match="holds no run, but documents.npy, .*"):
        check_place(place / "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("thesis.tex", "holds no run, but thesis.tex; choose a directory that is empty or not there yet"),
        ("a b c d e f g", "holds no run, but a, b, c, d, e and 2 more; choose"),
        ("config.yaml", "holds no run, but config.yaml; choose"),
        ("config.yaml stream.json", "holds no run, but config.yaml, stream.json; choose"),
        ("", None),
        (".gitkeep holder lock config.yaml.partial slurm-17.out nohup.out train.log", None),
    ],
)
def test_a_directory_of_something_else_is_refused_by_what_is_there(
    tmp_path: Path, names: str, message: str | None
) -> None:
    for name in names.split():
        (tmp_path / name).write_text("model: of a car\n")
    if message is None:
        check_place(tmp_path)
        return
    with pytest.raises(UserError, match=re.escape(f"run.directory={tmp_path}: {message}")):
        check_place(tmp_path)


def test_a_run_is_known_from_its_first_file_on(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    """Killed after any of its first steps, it must be found again; old ones may lie among other things."""
    run = uninterrupted(1)
    check_place(run)
    shutil.copy(run / "config.yaml", tmp_path)
    (tmp_path / "notes.txt").touch()
    check_place(tmp_path)
    (tmp_path / "stream.json").touch()
    with pytest.raises(UserError, match="holds no run"):
        check_place(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    check_place(tmp_path)


@pytest.mark.parametrize("below", ["", "below", "far/below"])
def test_a_file_is_no_directory(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(UserError, match=f"^run.directory={taken / below}: {taken} is a file; choose another name$"):
        check_place(taken / below)


def test_streams_that_were_moved_are_asked_for(
    uninterrupted: Uninterrupted, run_here: RunHere, train_here: TrainHere, streams: Path, tmp_path: Path
) -> None:
    """Not to be built again, which takes hours; the run was moved with them, and is resumed where it lies."""
    run = tmp_path / "moved"
    shutil.copytree(uninterrupted(1), run)
    recorded = load_yaml(run / "config.yaml")
    recorded["stream"]["directory"], recorded["run"]["directory"] = "elsewhere/streams", "elsewhere/run"
    (run / "config.yaml").write_text(json.dumps(recorded))

    expected = "error: stream.directory=elsewhere/streams: is not there (seen from "
    for done in (
        run_here("launch/eval.py", f"--run.directory={run}"),
        train_here(f"--config={run}/config.yaml"),
    ):
        assert done.returncode == 2 and expected in done.stderr, done.stderr
        assert "give the place of the streams with --stream.directory" in done.stderr

    found = train_here(f"--config={run}/config.yaml", f"--stream.directory={streams}")
    assert found.returncode == 0, found.stderr
    assert f"names run.directory=elsewhere/run, which is not there; {run} is taken" in found.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_validation_stream_is_said_once_with_what_follows(
    train_here: TrainHere, experiment: Path, streams: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/train").symlink_to(streams / "train")
    options = (f"--config={experiment}", "--stream.directory=bare", "--train.max_steps=4", "--eval.every_steps=1")
    done = train_here(*options)
    assert done.returncode == 0
    assert done.stderr.count("no stream bare/valid: nothing is evaluated") == 1
    assert not records(tmp_path / "run", "valid")
    assert not (tmp_path / "run/samples.md").exists() and "samples.md" not in done.stdout, done.stdout
    assert "curves.png, metrics.jsonl and checkpoints/ are there" in done.stdout
