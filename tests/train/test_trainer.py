"""Training as a whole, in real processes: resume to the bit, 1 process against 2, and what a finished run says."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RunScript, TrainHere, assert_same_bits, final_state, make_text, records

from rnnlm.config import ModelConfig
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.model.language_model import RecurrentLM

TRAIN, FAULTY = "launch/train.py", "tests/train/faulty_train.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs by number of processes, made when first wanted."""
    return {}


@pytest.fixture
def uninterrupted(
    whole: dict[int, Path], run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> Callable[[int], Path]:
    """The directory of such a run."""

    def run(processes: int) -> Path:
        if processes not in whole:
            option = f"--config={experiment}"
            done = train_here(option) if processes == 1 else run_script(TRAIN, option, processes=processes)
            assert done.returncode == 0, done.stderr
            kept = tmp_path.parent / f"whole-{processes}"
            shutil.copytree(tmp_path / "run", kept)
            shutil.rmtree(tmp_path / "run")
            whole[processes] = kept
        return whole[processes]

    return run


Uninterrupted = Callable[[int], Path]


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_fault_01_killed_after_step_10_of_20_goes_on_bit_for_bit(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path, streams: Path, processes: int
) -> None:
    if processes == 3:  # from three on, the order in which DDP sums gradients shows
        experiment.write_text(experiment.read_text().replace('"global_batch_size": 16', '"global_batch_size": 15'))
    expected = uninterrupted(processes)
    windows = Ring(len(TokenStream(streams / "train")), 15 if processes == 3 else 16, 48).windows_per_epoch
    assert 10 < windows < 20, "an epoch ends between the checkpoint and the end"
    launched = 0 if processes == 1 else processes
    killed = run_script(FAULTY, "kill", "13", f"--config={experiment}", processes=launched)
    assert killed.returncode != 0
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000010"]
    assert records(run, "train")[-1]["step"] == 12, "it had gone further than its checkpoint"
    resumed = run_script(TRAIN, f"--config={experiment}", processes=launched)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 10 of 20" in resumed.stderr
    assert_same_bits(run, expected)
    starts = records(run, "start")
    assert [start["step"] for start in starts] == [0, 10]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (run / "samples.md").read_text()
    assert samples == (expected / "samples.md").read_text()
    assert samples.count("## step") == 2 and "anna sees" in samples


@pytest.mark.slow
def test_one_process_equals_two_and_masks_keyed_by_rank_do_not(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    one = uninterrupted(1)
    two = uninterrupted(2)
    start = records(two, "start")[0]
    assert start["processes"] == 2
    assert [rank["substreams"] for rank in start["ranks"]] == [[0, 8], [8, 16]]
    assert len({rank["pid"] for rank in start["ranks"]}) == 2
    assert all(line["processes"] == 2 for line in records(two, "train"))
    done = run_script(FAULTY, "masks", "0", f"--config={experiment}", processes=2)
    assert done.returncode == 0, done.stderr

    def distance(run: Path) -> float:
        losses = [[line["loss"] for line in records(each, "train")] for each in (one, run)]
        assert len(losses[0]) == len(losses[1]) == 7
        return max(abs(b / a - 1) for a, b in zip(*losses, strict=True))

    assert distance(two) < 1e-5
    assert distance(tmp_path / "run") > 1e-4, "control: the comparison sees masks that belong to ranks"
    evaluations = [records(run, "valid") for run in (one, two)]
    assert [line["scored_tokens"] for line in evaluations[0]] == [line["scored_tokens"] for line in evaluations[1]]


def test_accumulation_over_substreams_is_the_same_training(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    one = uninterrupted(1)
    options = ("--train.accumulation=4", "--train.prefetch_threads=0")
    # what Accelerate would make of its own variable is a second division of the gradient
    done = run_script(TRAIN, f"--config={experiment}", *options, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(records(tmp_path / "run", "train"), records(one, "train"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


def test_a_loader_that_skips_a_window_is_caught(run_script: RunScript, experiment: Path) -> None:
    done = run_script(FAULTY, "skip", "4", f"--config={experiment}")
    assert done.returncode == 1
    assert "RuntimeError: step 4: the loader gave step 4 at positions" in done.stderr


def test_a_finished_run_says_so_and_longer_training_goes_on(
    uninterrupted: Uninterrupted, run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = train_here(f"--config={experiment}")
    assert again.returncode == 0
    assert "finished at step 20 of 20" in again.stdout and "raise train.epochs" in again.stdout
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    longer = train_here(f"--config={tmp_path}/run/config.yaml", "--train.max_steps=23", "--train.epochs=3")
    assert longer.returncode == 0, longer.stderr
    trained = records(tmp_path / "run", "train")
    assert [line["step"] for line in trained[-3:]] == [20, 21, 23]
    assert trained[-1]["learning_rate"] == pytest.approx(0.001), "the cosine's horizon stays where it was"
    for process in range(2):  # and evaluation and generation read it
        checkpoint = ("best", "last")[process]
        done = run_script("launch/eval.py", f"--run.directory={tmp_path}/run", f"--run.checkpoint={checkpoint}")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["scored_tokens"] > 0


def test_evaluation_by_two_processes_is_the_same_to_the_bit(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    run = uninterrupted(1)
    options = (f"--run.directory={run}", "--eval.batch_size=40", "--eval.split=train", "--train.seq_len=7")
    found = [run_script("launch/eval.py", *options, processes=processes) for processes in (0, 2)]
    assert [done.returncode for done in found] == [0, 0], found[1].stderr
    assert json.loads(found[0].stdout) == json.loads(found[1].stdout)


def test_generation_from_the_door(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    run = uninterrupted(1)
    options = (f"--run.directory={run}", "--generate.samples=2", "--generate.prompts=[anna, bob sees]")
    done = run_script("launch/generate.py", *options)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.rstrip("\n").split("\n---\n")
    assert [part.split()[0] for part in parts] == ["anna", "anna", "bob", "bob"]
    assert run_script("launch/generate.py", *options).stdout == done.stdout
    interactive = run_script("launch/generate.py", f"--run.directory={run}")  # stdin is empty: it asks, and ends
    assert interactive.returncode == 0
    assert interactive.stdout.startswith("prompt (empty to end)>")


def test_a_damaged_checkpoint_costs_one_interval(
    uninterrupted: Uninterrupted, run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    expected = uninterrupted(1)
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    hidden = run / "checkpoints/step-00000020/hidden.safetensors"
    data = bytearray(hidden.read_bytes())
    data[-1] ^= 1
    hidden.write_bytes(data)
    for best in (run / "checkpoints").glob("best-*"):
        (best / "model.safetensors").unlink()
    scored = run_script("launch/eval.py", f"--run.directory={run}", processes=2)
    assert scored.returncode == 0, scored.stderr
    assert "every checkpoint is damaged" in scored.stderr, "of the best one there is only this"
    assert (run / "checkpoints/step-00000020").is_dir(), "who only reads renames nothing"
    done = train_here(f"--config={experiment}")
    assert done.returncode == 0, done.stderr
    assert "hidden.safetensors: its contents differ" in done.stderr and "resuming from step 10" in done.stderr
    assert (run / "checkpoints/damaged-step-00000020").is_dir()
    assert_same_bits(run, expected)


@pytest.mark.parametrize(
    "option",
    [
        pytest.param("--optim.schedule=plateau", marks=pytest.mark.slow),
        pytest.param("--model.cell=gru", marks=pytest.mark.slow),
        pytest.param("--train.precision=bf16", marks=pytest.mark.slow),
    ],
)
def test_plateau_early_stopping_cells_and_bf16_resume_to_the_bit(
    run_script: RunScript, experiment: Path, tmp_path: Path, option: str
) -> None:
    """Evaluated every 2 steps with a learning rate that cannot help, so that plateaus happen."""
    options = [f"--config={experiment}", option, "--eval.every_steps=2", "--optim.clip_norm=0", "--run.keep_last=9"]
    options += [
        "--optim.plateau_factor=0.9",
        "--optim.name=sgd",
        "--optim.momentum=0.9",
        "--optim.learning_rate=40",
        "--optim.early_stop_patience=7",
    ]
    first = run_script(TRAIN, *options, f"--run.directory={tmp_path}/first")
    assert first.returncode == 0, first.stderr
    killed = run_script(FAULTY, "kill", "11", *options)
    assert killed.returncode == -9
    resumed = run_script(TRAIN, *options)
    assert resumed.returncode == 0, resumed.stderr
    run = tmp_path / "run"
    last = records(run, "train")[-1]
    ended = records(run, "valid")[-1]["step"]
    assert ended < 20
    assert f"stopped early at step {ended} of 20" in resumed.stdout
    assert_same_bits(run, tmp_path / "first", ended)
    best = [line["step"] for line in records(run, "valid") if line["best"]]
    assert best[-1] < ended
    assert [path.name for path in (run / "checkpoints").glob("best-*")] == [f"best-{best[-1]:08d}"]
    if "plateau" in option:
        assert last["learning_rate"] < 40
    expected = "bfloat16" if "bf16" in option else "float32"
    assert last["ran_in"] == {"layer0": expected, "layer1": expected, "head": expected}


def test_fault_20_another_stream_is_refused_before_anything_is_written(
    uninterrupted: Uninterrupted, run_script: RunScript, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(1), run)
    text = tmp_path / "other.txt"
    text.write_text("\n".join(make_text(500, seed=3)), encoding="utf-8")
    for script in ("tools/train_tokenizer.py", "tools/build_stream.py"):
        options = (f"--corpus.train={text}", "--stream.directory=other", "--tokenizer.vocab_size=300")
        assert run_script(script, *options).returncode == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = train_here(f"--config={experiment}", "--stream.directory=other")
    assert done.returncode == 2
    assert re.search(
        r"^error: run.directory=.*: trained on another stream \([0-9a-f]{12}, now [0-9a-f]{12}\)", done.stderr
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_plateau_without_a_validation_stream_is_refused(
    train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    streams = Path(json.loads(experiment.read_text())["stream"]["directory"])
    (tmp_path / "bare/train").symlink_to(streams / "train")
    options = (f"--config={experiment}", "--stream.directory=bare", "--train.max_steps=1")
    refused = train_here(*options, "--optim.schedule=plateau")
    assert refused.returncode == 2
    assert "bare/valid: no stream there, but plateau" in refused.stderr
    assert train_here(*options).returncode == 0, "nothing else needs it"


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    one = uninterrupted(1)
    run = tmp_path / "run"
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


def test_streams_are_verified_before_training_on_request(
    train_here: TrainHere, experiment: Path, streams: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(streams, broken)
    shard = broken / "train/shard-00001.npy"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    options = (f"--config={experiment}", f"--stream.directory={broken}", "--stream.verify=true")
    done = train_here(*options)
    assert done.returncode == 2
    assert "shard-00001.npy: its contents differ" in done.stderr


def test_training_is_that_of_a_slow_obvious_loop(train_here: TrainHere, streams: Path, tmp_path: Path) -> None:
    """nn.LSTM, F.cross_entropy, Adam and a for loop, with every rule of the design written out once more."""
    rows, window, steps, width, hidden_size = 4, 100, 60, 12, 16
    done = train_here(
        f"--stream.directory={streams}", f"--run.directory={tmp_path}/run", "--run.log_every_steps=1",
        f"--train.global_batch_size={rows}", f"--train.seq_len={window}", f"--train.max_steps={steps}",
        "--train.epochs=9", "--train.cpu_threads=1", f"--model.embedding_size={width}", "--optim.learning_rate=0.01",
        f"--model.hidden_size={hidden_size}", "--model.layers=1", "--optim.schedule=cosine", "--optim.warmup_steps=5",
        "--optim.horizon_steps=50", "--optim.clip_norm=0.1", f"--run.save_every_steps={steps}", "--train.seed=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stream = TokenStream(streams / "train")
    tokens = torch.from_numpy(stream.windows(np.array([0]), len(stream))[0].astype(np.int64))
    model = RecurrentLM(ModelConfig(embedding_size=width, hidden_size=hidden_size, layers=1), 300, seed=3)
    lstm = torch.nn.LSTM(width, hidden_size)
    for name, weight in model.layers[0].named_parameters():
        getattr(lstm, f"{name}_l0").data.copy_(weight)
    model.layers = torch.nn.ModuleList([lstm])
    adam = torch.optim.Adam(model.parameters(), lr=0.0)
    longest = -(-len(stream) // rows)
    per_epoch = -(-longest // window)
    assert steps > 2 * per_epoch, "two epochs end on the way"
    clipped = 0
    for step, line in zip(range(steps), records(tmp_path / "run", "train"), strict=True):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            state = (torch.zeros(1, rows, hidden_size), torch.zeros(1, rows, hidden_size))
        inputs, targets = torch.zeros(rows, window, dtype=torch.int64), torch.full((rows, window), -1)
        for row in range(rows):
            begin, end = row * len(stream) // rows, (row + 1) * len(stream) // rows
            for t in range(window):
                position = begin + place * window + t + Ring(len(stream), rows, window, 3).offset(epoch)
                inputs[row, t] = tokens[position % len(stream)]
                if begin + place * window + t < end:
                    targets[row, t] = tokens[(position + 1) % len(stream)]
        out, state = lstm(model.embedding(inputs.t()), (state[0].detach(), state[1].detach()))
        logits = model.head.logits(out).transpose(0, 1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        adam.zero_grad()
        (loss / (rows * window)).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()  # type: ignore[union-attr]
        clipped += int(norm > 0.1)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.1 / float(norm))
        progress = min(1.0, (step - 5) / 45)
        rate = 0.01 * (step + 1) / 5 if step < 5 else 0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        assert line["loss"] == pytest.approx(loss.item() / int((targets >= 0).sum()), rel=1e-4), step
        assert line["gradient_norm"] == pytest.approx(float(norm), rel=1e-2)
        assert line["learning_rate"] == pytest.approx(rate)
    assert clipped > 10
    trained, _ = final_state(tmp_path / "run", steps)
    torch.testing.assert_close(trained["model.embedding.weight"], model.embedding.weight.detach(), rtol=0, atol=1e-3)
    torch.testing.assert_close(trained["model.layers.0.weight_hh"], lstm.weight_hh_l0.detach(), rtol=0, atol=1e-3)
