"""Windows of many rows at once: each as if read alone, whatever the order of rows and the ends of shards."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunHere, write_stream

from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.substreams import SubstreamDataset, loader
from rnnlm.data.tokenizer import Tokenizer


@pytest.fixture
def many_shards(tokenizer: Tokenizer, tmp_path: Path) -> TokenStream:
    """101 tokens in 15 shards, the last one of 3."""
    write_stream(tmp_path / "s", tokenizer, [*range(100, 200), 1], shard_tokens=7)
    return TokenStream(tmp_path / "s")


@pytest.mark.parametrize("length", [1, 2, 7, 8, 30, 250])
def test_windows_of_all_places_in_any_order(many_shards: TokenStream, length: int) -> None:
    """Substreams in order, turned around, mixed so that each is in another shard than the one before, and none."""
    ring = np.array([*range(100, 200), 1])
    for starts in (np.arange(101), np.arange(101)[::-1], np.arange(101) * 38 % 101, np.array([5]), np.array([], int)):
        expected = ring[(starts[:, None] + np.arange(length)) % 101]
        found = many_shards.windows(starts, length)
        assert np.array_equal(found, expected)
        found[:] = 0  # it is a copy: what is mapped cannot be written


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 9])
def test_every_batch_comes_once_however_they_are_grouped(many_shards: TokenStream, threads: int, steps: int) -> None:
    dataset = SubstreamDataset(many_shards, Ring(101, 3, 4), 0, 3, 2, 2 + steps)
    found = list(loader(dataset, threads, pin_memory=False))
    assert [each.step for each in found] == list(range(2, 2 + steps))
    assert all(torch.equal(each.tokens, dataset.batch(each.step).tokens) for each in found)


def test_the_benchmark_reads_whole_epochs(run_here: RunHere, tmp_path: Path) -> None:
    done = run_here(
        "tools/benchmark_loader.py", "--tokens=3e3", "--shapes", "4x9", "--rounds=1", f"--directory={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert "3,000 tokens" in done.stdout
    rows = re.findall(
        r"^\| 4 x 9 \| ([01]) \| (cold|warm) \| [\d,]+ \| [\d,]+ \| [\d,]+ \|$", done.stdout, re.MULTILINE
    )
    assert rows == [("0", "cold"), ("0", "warm"), ("1", "cold"), ("1", "warm")]
    assert list(tmp_path.iterdir()) == [], "the stream is removed"
