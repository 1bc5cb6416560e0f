"""launch/train.py with a loader as one might write it with Accelerate, for tests: `faulty_loader.py FAULT options...`.

Every fault is a mistake that would have hidden states meet other text than their own. Accelerate knows no Batch, so one
row is one sample, a batch is collated from as many as the process has rows, and what arrives becomes a Batch whose step
is the receiver's own count.

none: a plain DataLoader of these samples, and right.         dispatch: the loader is prepared.
shard: prepared with dispatch_batches=False.                  split: prepared with split_batches=True.
reorder: two workers, and whichever is ready first is taken.  skip: skip_first_batches, and a dataset that has skipped.
stride: the processes get rows in turn, so that another number of processes has other rows in other places.
assume: dispatch, and the receiver assumes that its rows are those that it should have got.
ring: stride, but in the ring itself, which all others ask.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import torch
import train
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rnnlm.cli import run_entry_point
from rnnlm.data.ring import Positions, Ring
from rnnlm.data.substreams import Batch, SubstreamDataset
from rnnlm.train import trainer

PREPARED = {"dispatch": {}, "assume": {}, "shard": {"dispatch_batches": False}, "split": {"split_batches": True}}
Sample = dict[str, torch.Tensor]
place = Ring.place


class Rows(IterableDataset[Sample]):
    """The process's rows one by one, step after step."""

    def __init__(self, dataset: SubstreamDataset, fault: str):
        self.dataset, self.fault = dataset, fault

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        for batch in self.dataset:
            if self.fault == "reorder" and worker and worker.id == 0:
                time.sleep(2)
            for row in range(len(batch.tokens)):
                tokens = batch.tokens[row].to(torch.int64)
                yield {"tokens": tokens, "length": batch.lengths[row], "position": batch.positions[row]}


def strided(ring: Ring, step: int, first: int, last: int) -> tuple[Positions, Positions]:
    """Every W-th of all rows, in place of the W-th part of them."""
    starts, lengths = place(ring, step, 0, ring.substreams)
    processes = ring.substreams // (last - first)
    return starts[first // (last - first) :: processes], lengths[first // (last - first) :: processes]


class Strided(Ring):
    """A ring of a dataset's own."""

    place = strided


def loader(fault: str, dataset: SubstreamDataset) -> Iterator[Batch]:
    """In place of rnnlm.data.substreams.loader."""
    ring, rows = dataset.ring, dataset.last - dataset.first
    if fault == "stride":
        dataset.ring = Strided(**ring.__dict__)

    reorder = fault == "reorder"
    made = DataLoader(Rows(dataset, fault), batch_size=rows, num_workers=2 if reorder else 0, in_order=not reorder)
    if fault in PREPARED:
        made = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**PREPARED[fault])).prepare(made)
    if fault == "skip":
        made = skip_first_batches(made, dataset.first_step)

    for step, sample in enumerate(made, dataset.first_step):
        positions, lengths = sample["position"], sample["length"]
        if fault == "assume":
            positions, lengths = map(torch.from_numpy, ring.place(step, dataset.first, dataset.last))
        yield Batch(step, sample["tokens"], lengths, positions)


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault == "ring":
        Ring.place = strided  # type: ignore[method-assign]
    trainer.loader = lambda dataset, *_: loader(fault, dataset)  # type: ignore[assignment]
    run_entry_point(train.main)
