"""Substreams: the worked example, and every token a target exactly once, through real loaders and ranks."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlm.data import ring as ring_module
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import HEADER_BYTES
from rnnlm.data.substreams import SubstreamDataset, loader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import benchmark_resume


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
        lines = (ring_module.__doc__ or "").splitlines()
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
                assert ends.get(row, start) == start, "a row continues where it ended"
                ends[row] = (start + length) % tokens

    assert sorted(seen) == list(range(1, tokens + 1))
    counts = [ring.targets_before(step) for step in (steps.start, steps.stop)]
    assert counts == [epoch * tokens, (epoch + 1) * tokens]


@pytest.mark.parametrize(("substreams", "workers"), [(1024, 0), (1024, 1), (2**17, 0)])
def test_the_first_batch_at_step_a_million_of_a_trillion_tokens(tmp_path: Path, substreams: int, workers: int) -> None:
    """2 TB of holes in five shards, and tokens written where, by another formula, these rows are.

    With 1,024 substreams the step is in the first epoch, with 2**17 in the ninth, and so rotated.
    """
    tokens, step, seq_len, shard_tokens = 10**12, 10**6, 64, 2 * 10**11
    try:
        directory = benchmark_resume.sparse_stream(tmp_path / "stream", tokens, shard_tokens)
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.ENOSPC, errno.EINVAL):
            pytest.skip(f"this file system has no sparse files of {2 * shard_tokens} bytes: {error}")
        raise
    stream = TokenStream(directory)
    assert len(stream) == tokens and len(stream.manifest.shards) == 5

    ring = Ring(tokens, substreams, seq_len, rotate_seed=1)
    longest = -(-tokens // substreams)
    epoch, window = divmod(step, -(-longest // seq_len))
    assert (epoch > 0) == (substreams > 1024)

    rows = range(substreams // 5 - 2, substreams // 5 + 2)  # on both sides of the first shard's end, before rotation
    positions = [(r * tokens // substreams + window * seq_len + ring.offset(epoch)) % tokens for r in rows]
    for number, position in enumerate(positions):
        for place, token in ((0, 1000), (1, 2000), (seq_len, 3000)):
            shard, within = divmod((position + place) % tokens, shard_tokens)
            handle = os.open(directory / f"shard-{shard:05d}.npy", os.O_WRONLY)
            os.pwrite(handle, np.array([token + number], "<u2").tobytes(), HEADER_BYTES + 2 * within)
            os.close(handle)

    dataset = SubstreamDataset(stream, ring, rows.start, rows.stop, step, step + 10)
    first = next(iter(loader(dataset, workers, pin_memory=False)))
    assert first.step == step
    assert first.positions.tolist() == positions
    assert first.lengths.tolist() == [seq_len] * 4

    expected = np.zeros((4, seq_len + 1), int)
    for place, token in ((0, 1000), (1, 2000), (seq_len, 3000)):
        expected[:, place] = token + np.arange(4)
    assert first.tokens.tolist() == expected.tolist()
    assert sum(path.stat().st_blocks for path in directory.iterdir()) * 512 < 2**20, "holes take no room"


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


@pytest.mark.parametrize("workers", [0, 2])
def test_the_union_over_real_ranks(run_script, streams: Path, tmp_path: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    """Two processes: what their loaders really gave them, written down by themselves."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\n"
        "from accelerate import Accelerator\n"
        "from rnnlm.data.stream import TokenStream\n"
        "from rnnlm.data.ring import Ring\nfrom rnnlm.data.substreams import SubstreamDataset, loader\n"
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

    done = run_script(script, processes=2)
    assert done.returncode == 0, done.stderr
    shares = [json.loads((tmp_path / f"rank{rank}of2.json").read_text()) for rank in range(2)]

    stream = TokenStream(streams / "train")
    assert len(shares[0]) + len(shares[1]) == len(stream)
    tokens = stream.windows(np.array([0]), len(stream))[0]
    assert sorted(shares[0] + shares[1]) == [[position, int(token)] for position, token in enumerate(tokens)]
