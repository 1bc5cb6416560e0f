"""Substreams: the worked example, and that every token is a target exactly once, through real loaders and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlm import substreams
from rnnlm.config import Config, TrainConfig
from rnnlm.stream import TokenStream
from rnnlm.substreams import Ring, SubstreamDataset, loader


class Counting(TokenStream):
    """A stream whose token at position p is p + 1, held in memory."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __reduce__(self) -> tuple[type[Counting], tuple[int]]:
        return Counting, (self.tokens,)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return ((starts[:, None] + np.arange(length)) % self.tokens + 1).astype(np.uint16)


def test_the_drawing_in_the_docstring_is_what_the_rows_read() -> None:
    ring = Ring(tokens=60, substreams=3, seq_len=6)
    assert ring.windows_per_epoch == 4
    dataset = SubstreamDataset(Counting(60), ring, 0, 3, 0, 4)
    for row in range(3):
        lines = (substreams.__doc__ or "").splitlines()
        drawn = next(line for line in lines if line.strip().startswith(f"row {row} |"))
        cells = [cell.split() for cell in drawn.split("|")[1:5]]
        for step, cell in enumerate(cells):
            batch = dataset.batch(step)
            inputs, targets = batch.to(torch.device("cpu"))
            shown = [int(place) for place in cell if place != "."]
            assert inputs[row, : len(shown)].tolist() == shown
            assert targets[row].tolist() == [token % 60 + 1 for token in shown] + [-1] * (6 - len(shown))
    inputs, targets = dataset.batch(3).to(torch.device("cpu"))
    assert inputs[:, :2].tolist() == [[19, 20], [39, 40], [59, 60]]
    assert targets[:, :2].tolist() == [[20, 21], [40, 41], [60, 1]]


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(1, 400),
    share=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 3, 4]),
    seq_len=st.integers(1, 50),
    epoch=st.integers(0, 3),
    seed=st.none() | st.integers(0, 2**63),
)
def test_every_position_is_a_target_once_an_epoch(
    tokens: int, share: int, processes: int, seq_len: int, epoch: int, seed: int | None
) -> None:
    rows = share * processes
    ring = Ring(tokens, rows, seq_len, seed)
    first = epoch * ring.windows_per_epoch
    steps = range(first, first + ring.windows_per_epoch)
    seen: list[int] = []
    ends: dict[int, int] = {}
    for process in range(processes):
        own = range(process * share, (process + 1) * share)
        dataset = SubstreamDataset(Counting(tokens), ring, own.start, own.stop, steps.start, steps.stop)
        for batch in dataset:
            _, targets = batch.to(torch.device("cpu"))
            assert int((targets >= 0).sum()) == int(batch.lengths.sum())
            seen += targets[targets >= 0].tolist()
            for row, start, length in zip(own, batch.positions.tolist(), batch.lengths.tolist(), strict=True):
                assert ends.get(row, start) == start, "a row goes on where it ended"
                ends[row] = (start + length) % tokens
    assert sorted(seen) == list(range(1, tokens + 1))
    counts = [ring.targets_before(step) for step in (steps.start, steps.stop)]
    assert counts == [epoch * tokens, (epoch + 1) * tokens]


def test_targets_before_counts_what_was_masked_in() -> None:
    ring = Ring(103, 4, 7)
    total = 0
    for step in range(2 * ring.windows_per_epoch):
        assert ring.targets_before(step) == total
        total += int(ring.place(step, 0, 4)[1].sum())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_workers_cannot_change_the_order(train_stream: TokenStream, workers: int) -> None:
    ring = Ring(len(train_stream), 8, 32, rotate_seed=3)
    dataset = SubstreamDataset(train_stream, ring, 2, 6, first_step=5, last_step=5 + 2 * ring.windows_per_epoch)
    steps = []
    for batch in loader(dataset, workers, pin_memory=False):
        expected = dataset.batch(batch.step)
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.positions, expected.positions)
        steps.append(batch.step)
    assert steps == list(range(dataset.first_step, dataset.last_step))


def test_later_epochs_start_elsewhere_and_the_same_everywhere() -> None:
    ring = Ring(10_007, 4, 8, rotate_seed=1)
    offsets = [ring.offset(epoch) for epoch in range(6)]
    assert offsets[0] == 0
    assert len(set(offsets)) == 6
    assert offsets == [Ring(10_007, 16, 5, rotate_seed=1).offset(epoch) for epoch in range(6)]
    assert [Ring(10_007, 4, 8).offset(epoch) for epoch in range(3)] == [0, 0, 0]


def test_positions_of_a_stream_beyond_64_bit_products() -> None:
    ring = Ring(tokens=10**12, substreams=10**7, seq_len=32)
    starts, lengths = ring.place(3 * ring.windows_per_epoch - 1, 10**7 - 2, 10**7)
    assert starts.tolist() == [(10**7 - 2) * 10**5 + 99_968, (10**7 - 1) * 10**5 + 99_968]
    assert lengths.tolist() == [32, 32]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_union_over_real_ranks(run_door, streams: Path, tmp_path: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    """Two processes: what their loaders really gave them, written down by themselves."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\n"
        "from accelerate import Accelerator\n"
        "from rnnlm.stream import TokenStream\n"
        "from rnnlm.substreams import Ring, SubstreamDataset, loader\n"
        "if __name__ == '__main__':\n"
        "    accelerator = Accelerator(cpu=True)\n"
        "    rank, ranks = accelerator.process_index, accelerator.num_processes\n"
        f"    stream = TokenStream({str(streams / 'train')!r})\n"
        "    ring = Ring(len(stream), 8, 32)\n"
        "    rows = (rank * 8 // ranks, (rank + 1) * 8 // ranks)\n"
        "    found = []\n"
        "    for batch in loader(SubstreamDataset(stream, ring, *rows, 0, ring.windows_per_epoch), "
        f"{workers}, False):\n"
        "        _, targets = batch.to(accelerator.device)\n"
        "        for start, length, row in zip(batch.positions.tolist(), batch.lengths.tolist(), targets.tolist()):\n"
        "            found += [[(start + 1 + i) % len(stream), row[i]] for i in range(length)]\n"
        f"    open({str(tmp_path)!r} + f'/rank{{rank}}of{{ranks}}.json', 'w').write(json.dumps(found))\n"
    )
    done = run_door(script, processes=2)
    assert done.returncode == 0, done.stderr
    shares = [json.loads((tmp_path / f"rank{rank}of2.json").read_text()) for rank in range(2)]
    stream = TokenStream(streams / "train")
    assert len(shares[0]) + len(shares[1]) == len(stream)
    tokens = stream.windows(np.array([0]), len(stream))[0]
    assert sorted(shares[0] + shares[1]) == [[position, int(token)] for position, token in enumerate(tokens)]


def test_rotation_is_an_option(train_stream: TokenStream) -> None:
    for rotate, seed in ((True, 5), (False, None)):
        config = Config(train=TrainConfig(rotate=rotate, seed=5, global_batch_size=4, seq_len=8))
        assert substreams.open_ring(config, train_stream) == Ring(len(train_stream), 4, 8, seed)
