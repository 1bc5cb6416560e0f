"""Substreams: the worked example, and that every token is a target exactly once, through real loaders and ranks."""

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

from rnnlm.config import Config, TrainConfig
from rnnlm.data import ring as ring_module
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.stream_format import HEADER_BYTES
from rnnlm.data.substreams import SubstreamDataset, loader
from rnnlm.train.run import open_ring

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


@given(
    tokens=st.integers(1, 200),
    seed=st.none() | st.integers(0, 2**63),
    begins=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=4, max_size=4),
    changes=st.dictionaries(st.integers(0, 40), st.integers(1, 60), max_size=5),
)
def test_every_token_is_a_target_once_whatever_is_changed_on_the_way(
    tokens: int, seed: int | None, begins: list[tuple[int, int]], changes: dict[int, int]
) -> None:
    """Substreams change where epochs begin, seq_len there and at any step: three epochs, one origin after another."""
    ring, step, trained, rows = Ring(tokens, *begins[0], seed), 0, 0, 0
    expected = np.empty(0, np.int64)
    for epoch, (rows, seq_len) in enumerate(begins[:3]):
        assert ring.steps_before(epoch) == step and ring.is_epoch_start(step)
        ring = Ring(tokens, rows, seq_len, seed, ring.origin_at(step))
        seen: list[int] = []
        while ring.locate(step)[0] == epoch:
            if step in changes:
                before = ring.locate(step)
                ring = Ring(tokens, rows, changes[step], seed, ring.origin_at(step))
                assert ring.origin.step == step and ring.locate(step) == before
            starts, lengths = ring.place(step, 0, rows)
            assert ring.targets_before(step) == trained
            if ring.is_epoch_start(step):
                assert starts.tolist() == [(r * tokens // rows + ring.offset(epoch)) % tokens for r in range(rows)]
            else:
                assert starts.tolist() == expected.tolist(), "rows go on where they ended"
            expected = (starts + lengths) % tokens
            trained += int(lengths.sum())
            seen += [(start + i) % tokens for start, n in zip(starts, lengths, strict=True) for i in range(n)]
            step += 1
            assert ring.locate(step)[0] == epoch or ring.steps_before(epoch + 1) == step
        assert sorted(seen) == list(range(tokens)), epoch
    assert ring.targets_before(step) == trained == 3 * tokens
    assert ring.locate(step) == (3, 0)


def test_a_change_in_mid_epoch_drawn_by_hand() -> None:
    """The worked example, read in windows of 4 from step 2 on: 12 of 20 tokens are consumed, 8 are left."""
    ring = Ring(60, 3, 6)
    changed = Ring(60, 3, 4, origin=ring.origin_at(2))
    assert changed.origin == Origin(step=2, epoch=0, position=12)
    assert [changed.locate(step) for step in range(2, 6)] == [(0, 12), (0, 16), (1, 0), (1, 4)]
    assert changed.place(2, 0, 3)[0].tolist() == [12, 32, 52]
    assert [changed.steps_before(epoch) for epoch in range(4)] == [2, 4, 9, 14]
    assert [changed.targets_before(step) for step in (2, 3, 4)] == [36, 48, 60]
    again = Ring(60, 3, 5, origin=changed.origin_at(3))
    assert [again.locate(step) for step in (3, 4, 5)] == [(0, 16), (1, 0), (1, 5)]
    for step in (1, -1):
        with pytest.raises(AssertionError, match="before the origin"):
            changed.locate(step)


@pytest.mark.parametrize("position", [20, 21, 60])
def test_an_origin_at_the_end_of_an_epoch_is_the_next_ones_beginning(position: int) -> None:
    ring = Ring(60, 3, 6, rotate_seed=1, origin=Origin(7, 2, position))
    assert ring.locate(7) == (3, 0) and ring.is_epoch_start(7)
    assert ring.origin_at(7) == Origin(7, 3, 0)
    assert ring.steps_before(3) == 7 and ring.steps_before(4) == 11
    assert ring.targets_before(7) == 180


@pytest.mark.parametrize("tokens", [10**12, 10**12 + 7, 2**40 - 1])
@pytest.mark.parametrize("substreams", [2**10, 2**20, 1024 * 9973])
def test_the_partition_over_1024_ranks_of_a_huge_stream(tokens: int, substreams: int) -> None:
    """Ranks meet, rows meet, and a row's windows meet: so every token has one owner and one step."""
    ring, ranks = Ring(tokens, substreams, 64), 1024
    end = 0
    for rank in range(ranks):
        first, last = rank * substreams // ranks, (rank + 1) * substreams // ranks
        edges = ring.edges(first, last)
        assert edges[0] == end, "where the rank before ended"
        assert set(np.diff(edges).tolist()) <= {tokens // substreams, tokens // substreams + 1}
        for row in (first, (first + last) // 2, last - 1):
            assert edges[row - first] == row * tokens // substreams
        end = int(edges[-1])
    assert end == tokens
    final = ring.steps_before(1) - 1
    starts, lengths = ring.place(final, substreams - 1, substreams)
    assert int(starts[0] + lengths[0]) == tokens, "the last window ends where its row does"
    assert ring.targets_before(final + 1) == tokens


@pytest.mark.parametrize(("tokens", "substreams"), [(20_011, 2048), (5_000, 1024), (1_000, 1024)])
def test_1024_ranks_read_every_token_of_a_small_stream_once(tokens: int, substreams: int) -> None:
    ring, ranks = Ring(tokens, substreams, 3, rotate_seed=5), 1024
    for epoch in range(2):
        targets = np.zeros(tokens, int)
        for rank in range(ranks):
            rows = (rank * substreams // ranks, (rank + 1) * substreams // ranks)
            for step in range(ring.steps_before(epoch), ring.steps_before(epoch + 1)):
                for start, length in zip(*ring.place(step, *rows), strict=True):
                    targets[(start + np.arange(length)) % tokens] += 1
        assert (targets == 1).all()


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


def test_rotation_is_an_option(train_stream: TokenStream) -> None:
    for rotate, seed in ((True, 5), (False, None)):
        config = Config(train=TrainConfig(rotate=rotate, seed=5, global_batch_size=4, seq_len=8))
        assert open_ring(config, train_stream) == Ring(len(train_stream), 4, 8, seed)
