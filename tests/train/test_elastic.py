"""The same run on other numbers of processes, windows and substreams."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, RunScript, TrainHere, Uninterrupted, final_state, records, results

from rnnlm.config import Config, TrainConfig
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.errors import UserError
from rnnlm.files import locked
from rnnlm.train.inputs import substreams_of
from rnnlm.train.tree_sum import TreeSum


def test_a_tree_sum_has_one_order() -> None:
    torch.manual_seed(0)
    slices = [[torch.randn(3, 5), torch.randn(7)] for _ in range(8)]
    tree, total = TreeSum(), [torch.empty(3, 5), torch.empty(7)]
    for each in slices:
        tree.add(each)
    tree.finish(total)

    for place in range(2):
        a, b, c, d, e, f, g, h = (each[place] for each in slices)
        assert torch.equal(total[place], ((a + b) + (c + d)) + ((e + f) + (g + h)))


@pytest.mark.parametrize(
    ("moves", "head"),
    [
        pytest.param((1, 2), "softmax", id="1-2"),
        pytest.param((1, 2, 4, 1), "softmax", marks=pytest.mark.slow, id="1-2-4-1"),
        pytest.param((1, 2, 4, 1), "adaptive", marks=pytest.mark.slow, id="1-2-4-1-adaptive"),
    ],
)
def test_fault_19_with_exact_slices_a_run_that_moves_has_the_bits_of_one_that_stays(
    run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path, moves: tuple[int, ...], head: str
) -> None:
    fixed = (f"--config={experiment}", "--train.exact_slices=4", "--optim.horizon_steps=20")
    options = (*fixed, f"--model.head={head}")
    run, stays = tmp_path / "run", tmp_path / "stays"
    ends = [20 * (index + 1) // len(moves) for index in range(len(moves))]
    for directory, attempts in ((stays, (1,) * len(moves)), (run, moves)):
        for processes, end in zip(attempts, ends, strict=True):
            more = (*options, f"--train.max_steps={end}", f"--run.directory={directory}")
            done = train_here(*more) if processes == 1 else run_script(TRAIN, *more, processes=processes)
            assert done.returncode == 0, done.stderr
        assert [start["processes"] for start in records(directory, "start")] == list(attempts)

    assert results(run) == results(stays)
    (mine, my_state), (theirs, their_state) = final_state(run, 20), final_state(stays, 20)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {**my_state, "processes": 0} == {**their_state, "processes": 0}


@pytest.mark.slow
def test_fault_19_without_slices_losses_stay_within_rounding(
    run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    options = (f"--config={experiment}", "--train.epochs=9", "--run.log_every_steps=1", "--optim.clip_norm=0.25")
    stays, run = tmp_path / "stays", tmp_path / "run"
    assert run_script(TRAIN, *options, "--train.max_steps=100", f"--run.directory={stays}").returncode == 0
    for processes, end in ((0, 25), (2, 50), (4, 75), (0, 100)):
        done = run_script(TRAIN, *options, f"--train.max_steps={end}", "--optim.horizon_steps=100", processes=processes)
        assert done.returncode == 0, done.stderr

    worst = max(
        abs(mine["loss"] / theirs["loss"] - 1)
        for mine, theirs in zip(records(run, "train"), records(stays, "train"), strict=True)
    )
    print(f"largest relative difference of 100 losses: {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    one, run = uninterrupted(1), tmp_path / "run"
    shutil.copytree(one, run)
    shutil.rmtree(run / "checkpoints/step-00000020")
    done = run_script(TRAIN, f"--config={experiment}", processes=2)
    assert done.returncode == 0, done.stderr
    assert [start["processes"] for start in records(run, "start")] == [1, 2]

    for mine, theirs in zip(records(run, "train"), records(one, "train"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    (mine, _), (theirs, _) = final_state(run, 20), final_state(one, 20)
    for name in ("hidden.layer0.h", "hidden.layer0.c", "hidden.layer1.h", "hidden.layer1.c"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({"global_batch_size": 15}, 2, r"=15 is not divisible by 2 processes .*=1; use 14 or 16"),
        ({"global_batch_size": 12, "accumulation": 3}, 8, r"=12 is not divisible by 8 processes .*=3; use 24"),
        ({"exact_slices": 4}, 3, r"train.exact_slices=4 is not divisible by 3 processes; launch 1, 2, 4"),
    ],
)
def test_fault_19_processes_that_do_not_fit_are_refused(options: dict[str, int], processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        substreams_of(Config(train=TrainConfig(**options)), 0, processes)  # type: ignore[arg-type]


def test_every_substream_has_one_process() -> None:
    for processes in (1, 2, 4, 16):
        shares = [
            substreams_of(Config(train=TrainConfig(global_batch_size=48)), each, processes) for each in range(processes)
        ]
        assert [row for first, last in shares for row in range(first, last)] == list(range(48))


def test_windows_and_substreams_change_only_on_request_and_every_token_is_used_once(
    train_here: TrainHere, experiment: Path, tmp_path: Path, streams: Path
) -> None:
    run, tokens = tmp_path / "run", len(TokenStream(streams / "train"))
    options = (f"--config={experiment}", "--run.log_every_steps=1", "--train.epochs=3")
    first = train_here(*options, "--train.max_steps=7")
    assert first.returncode == 0, first.stderr

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = train_here(*options, "--train.max_steps=12", "--train.seq_len=20")
    assert refused.returncode == 2
    assert "train.seq_len is 48 there, 20 now" in refused.stderr and "run.allow_change" in refused.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    allowed = ("--train.seq_len=20", "--run.allow_change=[train.seq_len]")
    changed = train_here(*options, *allowed, "--train.max_steps=12")
    assert changed.returncode == 0, changed.stderr
    assert final_state(run, 12)[1]["origin"] == {"step": 7, "epoch": 0, "position": 7 * 48}
    assert records(run, "train")[-1]["tokens"] == 16 * (7 * 48 + 5 * 20)

    wider = ("--train.global_batch_size=32", "--run.allow_change=train.global_batch_size")
    early = train_here(*options, "--train.seq_len=20", *wider)
    assert early.returncode == 2 and "is within epoch 0" in early.stderr
    end = int(early.stderr.rpartition("train.max_steps=")[2])
    ring = Ring(tokens, 16, 20)
    assert end == 12 + -(-(ring.longest - 7 * 48 - 5 * 20) // 20)
    assert train_here(*options, "--train.seq_len=20", f"--train.max_steps={end}").returncode == 0
    assert records(run, "train")[-1]["tokens"] == tokens, "every token of the epoch once"

    done = train_here(*options, "--train.seq_len=20", *wider, "--train.epochs=2", "--train.max_steps=0")
    assert done.returncode == 0, done.stderr
    assert records(run, "train")[-1]["tokens"] == 2 * tokens
    assert final_state(run, records(run, "train")[-1]["step"])[0]["hidden.layer0.h"].shape == (32, 16)


def test_fault_29_two_runs_in_one_directory_are_refused_and_the_holder_is_named(
    train_here: TrainHere, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnnlm.train.run.LOCK_PATIENCE_SECONDS", 0.1)
    run = tmp_path / "run"
    with locked(run / "lock", "run"):
        assert f"{socket.gethostname()}, process {os.getpid()}, " in (run / "lock").read_text()

        (run / "lock").write_text("elsewhere, process 1, long ago")
        done = train_here(f"--config={experiment}")
        assert done.returncode == 1
        assert "another run is working there (elsewhere, process 1, long ago)" in done.stderr
    assert list(run.iterdir()) == [run / "lock"]
