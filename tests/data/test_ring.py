"""The ring: every token is a target exactly once an epoch, for any sizes and whatever changes on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnlm.config import Config, TrainConfig
from rnnlm.data.ring import Origin, Ring
from rnnlm.data.stream import TokenStream
from rnnlm.train.inputs import open_ring


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
                assert starts.tolist() == expected.tolist(), "rows continue where they ended"

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


def test_rotation_is_an_option(train_stream: TokenStream) -> None:
    for rotate, seed in ((True, 5), (False, None)):
        config = Config(train=TrainConfig(rotate=rotate, seed=5, global_batch_size=4, seq_len=8))
        assert open_ring(config, train_stream) == Ring(len(train_stream), 4, 8, seed)
