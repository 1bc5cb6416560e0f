"""Training as a whole: against a slow loop, 1 process against 2, longer training, and what is refused at the start."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAULTY, RunHere, RunScript, TrainHere, Uninterrupted, final_state, records

from rnnlm.config import ModelConfig
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.model.language_model import RecurrentLM


class SlowLoop:
    """nn.LSTM, F.cross_entropy, Adam and a for loop, with every rule of the design written out once more.

    B rows, T tokens in a window, H hidden units.
    """

    rows, window, width, hidden_size = 4, 100, 12, 16

    def __init__(self, stream: TokenStream) -> None:
        self.tokens = torch.from_numpy(stream.windows(np.array([0]), len(stream))[0].astype(np.int64))
        config = ModelConfig(embedding_size=self.width, hidden_size=self.hidden_size, layers=1)
        self.model = RecurrentLM(config, 300, seed=3)

        self.lstm = torch.nn.LSTM(self.width, self.hidden_size)
        for name, weight in self.model.layers[0].named_parameters():
            getattr(self.lstm, f"{name}_l0").data.copy_(weight)
        self.model.layers = torch.nn.ModuleList([self.lstm])

        self.adam = torch.optim.Adam(self.model.parameters(), lr=0.0)
        longest = -(-len(stream) // self.rows)
        self.windows_per_epoch = -(-longest // self.window)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets), each (B, T) int64; a target is -1 where the row's substream has ended."""
        epoch, place = divmod(step, self.windows_per_epoch)
        size = len(self.tokens)
        offset = Ring(size, self.rows, self.window, 3).offset(epoch)

        inputs = torch.zeros(self.rows, self.window, dtype=torch.int64)
        targets = torch.full((self.rows, self.window), -1)
        for row in range(self.rows):
            begin, end = row * size // self.rows, (row + 1) * size // self.rows
            for t in range(self.window):
                position = begin + place * self.window + t
                inputs[row, t] = self.tokens[(position + offset) % size]
                if position < end:
                    targets[row, t] = self.tokens[(position + offset + 1) % size]
        return inputs, targets

    def rate(self, step: int) -> float:
        """Five steps of warm-up to 0.01, then a cosine to a tenth of it at step 50."""
        if step < 5:
            return 0.01 * (step + 1) / 5
        progress = min(1.0, (step - 5) / 45)
        return 0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)

    def take_step(self, step: int) -> tuple[float, float]:
        """(mean loss of the targets, norm of the gradient before it is clipped to 0.1)."""
        if step % self.windows_per_epoch == 0:
            self.state = (torch.zeros(1, self.rows, self.hidden_size), torch.zeros(1, self.rows, self.hidden_size))
        inputs, targets = self.batch(step)
        h, c = self.state  # (1, B, H) each
        out, self.state = self.lstm(self.model.embedding(inputs.t()), (h.detach(), c.detach()))  # (T, B, H)
        logits = self.model.head.logits(out).transpose(0, 1)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")

        self.adam.zero_grad()
        (loss / (self.rows * self.window)).backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(self.model.parameters()))
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        for gradient in gradients:
            gradient *= min(1.0, 0.1 / norm)

        self.adam.param_groups[0]["lr"] = self.rate(step)
        self.adam.step()
        return loss.item() / int((targets >= 0).sum()), norm


def test_training_is_that_of_a_slow_obvious_loop(train_here: TrainHere, streams: Path, tmp_path: Path) -> None:
    loop, steps = SlowLoop(TokenStream(streams / "train")), 60
    assert steps > 2 * loop.windows_per_epoch, "two epochs end on the way"
    done = train_here(
        f"--stream.directory={streams}", f"--run.directory={tmp_path}/run", "--run.log_every_steps=1",
        f"--train.global_batch_size={loop.rows}", f"--train.seq_len={loop.window}", f"--train.max_steps={steps}",
        "--train.epochs=9", "--train.cpu_threads=1", "--train.seed=3", f"--run.save_every_steps={steps}",
        f"--model.embedding_size={loop.width}", f"--model.hidden_size={loop.hidden_size}", "--model.layers=1",
        "--optim.learning_rate=0.01", "--optim.schedule=cosine", "--optim.warmup_steps=5", "--optim.horizon_steps=50",
        "--optim.clip_norm=0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    clipped = 0
    for step, line in zip(range(steps), records(tmp_path / "run", "train"), strict=True):
        loss, norm = loop.take_step(step)
        clipped += int(norm > 0.1)
        assert line["loss"] == pytest.approx(loss, rel=1e-4), step
        assert line["gradient_norm"] == pytest.approx(norm, rel=1e-2)
        assert line["learning_rate"] == pytest.approx(loop.rate(step))
    assert clipped > 10

    trained, _ = final_state(tmp_path / "run", steps)
    expected = {"embedding.weight": loop.model.embedding.weight, "layers.0.weight_hh": loop.lstm.weight_hh_l0}
    for name, weight in expected.items():
        torch.testing.assert_close(trained[f"model.{name}"], weight.detach(), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_one_process_equals_two_and_masks_keyed_by_rank_do_not(
    uninterrupted: Uninterrupted, run_script: RunScript, experiment: Path, tmp_path: Path
) -> None:
    one, two = uninterrupted(1), uninterrupted(2)
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
    uninterrupted: Uninterrupted, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    one = uninterrupted(1)
    options = (f"--config={experiment}", "--train.accumulation=4", "--train.prefetch_threads=0")
    # what Accelerate would make of its own variable is a second division of the gradient
    done = train_here(*options, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.returncode == 0, done.stderr

    for mine, theirs in zip(records(tmp_path / "run", "train"), records(one, "train"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


def test_a_finished_run_is_left_alone_and_longer_training_continues_it(
    uninterrupted: Uninterrupted, run_here: RunHere, train_here: TrainHere, experiment: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(1), run)
    before = (run / "metrics.jsonl").read_bytes()
    again = train_here(f"--config={experiment}")
    assert again.returncode == 0
    assert "finished at step 20 of 20" in again.stdout and "raise train.max_steps" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == before

    longer = train_here(f"--config={run}/config.yaml", "--train.max_steps=23", "--train.epochs=3")
    assert longer.returncode == 0, longer.stderr
    trained = records(run, "train")
    assert [line["step"] for line in trained[-3:]] == [20, 21, 23]
    assert trained[-1]["learning_rate"] == pytest.approx(0.001), "the cosine's horizon stays where it was"

    for checkpoint in ("best", "last"):  # and evaluation reads it
        scored = run_here("launch/eval.py", f"--run.directory={run}", f"--run.checkpoint={checkpoint}")
        assert scored.returncode == 0, scored.stderr
        assert json.loads(scored.stdout)["scored_tokens"] > 0


def test_fault_20_another_stream_is_refused_before_anything_is_written(
    uninterrupted: Uninterrupted, train_here: TrainHere, experiment: Path, tmp_path: Path, other_streams: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(1), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    done = train_here(f"--config={experiment}", f"--stream.directory={other_streams}")
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


def test_fault_21_a_shard_of_the_same_size_is_refused_on_request_alone(
    train_here: TrainHere, experiment: Path, streams: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(streams, broken)
    shard = broken / "train/shard-00001.npy"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    TokenStream(broken / "train")  # what a start without stream.verify sees: manifest and sizes

    options = (f"--config={experiment}", f"--stream.directory={broken}", "--stream.verify=true")
    done = train_here(*options)
    assert done.returncode == 2
    assert "shard-00001.npy: its contents differ" in done.stderr
