"""What processes send each other in a step: counted from sizes, measured at their sockets, and its time on links."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

from rnnlm.config import TrainConfig
from rnnlm.data.substreams import Batch
from rnnlm.model.language_model import RecurrentLM
from rnnlm.train.communication import ID_BYTES, number_bytes, sends_rows
from rnnlm.train.distributed import launched
from rnnlm.train.step import TrainStep
from step_speed.measuring import in_turn
from step_speed.presets import Preset, make_batches

TCP_INFO_BYTES, ACKED_AT = 232, 120  # struct tcp_info of Linux, and where it counts the bytes that have arrived


@dataclass(frozen=True)
class Links:
    """How fast processes send, in bytes a second each way, and how many share a machine.

    Args:
        inside: of each GPU to the others of its machine.
        between: of each machine to the others, all its adapters together.
    """

    inside: float
    between: float
    per_machine: int

    def slowest(self, processes: int) -> float:
        """Of a ring over so many: machines stripe it over all their adapters."""
        return self.inside if processes <= self.per_machine else min(self.inside, self.between)


def bytes_sent(model: RecurrentLM, train: TrainConfig, processes: int) -> float:
    """What each of the processes sends in a step.

    2 (W - 1) / W of all that a ring sums (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters
    of workstations", which no algorithm sends less than); of the token vectors' gradient, where
    rnnlm/train/communication.py says so, W - 1 times the rows of its own tokens.
    """
    numbers = sum(each.numel() for each in model.parameters())
    rows = 0.0
    if sends_rows(model, train, processes):
        vectors = model.embedding.weight
        numbers -= vectors.numel()
        own = train.global_batch_size * train.seq_len / processes
        rows = (processes - 1) * own * (vectors.shape[1] * number_bytes(train) + ID_BYTES)
    return 2 * (processes - 1) / processes * numbers * number_bytes(train) + rows


def predict(step_seconds: float, sent: float, processes: int, links: Links) -> tuple[float, float]:
    """Seconds of a step of several processes, each with the batch that one has in `step_seconds`.

    (at best, all is sent while the backward pass goes on, which is 2/3 of the step; at worst, after it). Latencies are
    left out, as are stragglers.
    """
    sending = sent / links.slowest(processes)
    return step_seconds + max(0.0, sending - 2 / 3 * step_seconds), step_seconds + sending


def measure(size: Preset, precision: str, device: str, processes: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step, and bytes that process 0 sent in one, of processes on this machine that share a batch.

    Returns:
        {"seconds", "sent", "computed"}; `sent` is -1 where sockets cannot be asked, as of NCCL's.
    """
    context = get_context("spawn")
    results: Queue[dict[str, float]] = context.Queue()
    arguments = (size, precision, device, processes, repeats, free_port(), results)
    started = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(processes)]
    for each in started:
        each.start()
    for each in started:
        each.join()

    if any(each.exitcode for each in started):
        raise RuntimeError(f"a process of {processes} failed; what it printed stands above")
    return results.get()


def _worker(
    rank: int, size: Preset, precision: str, device: str, processes: int, repeats: int, port: int, results: Any
) -> None:
    """One of the processes, as a launcher starts them."""
    if processes > 1:
        count = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in count.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # until it is set

    config = size.config(precision, device)
    with launched(config) as accelerator:
        first, last = (size.batch * each // processes for each in (rank, rank + 1))
        step = TrainStep(config, size.vocab_size, accelerator, first, last)
        batches = [_rows(each, first, last) for each in make_batches(size, 4)]

        def run() -> None:
            for batch in batches:
                step.run(batch, False, config.optim.learning_rate)

        run()
        before = sent_by_sockets()
        seconds = in_turn({"step": run}, accelerator.device, repeats)["step"] / len(batches)
        after, steps = sent_by_sockets(), repeats * len(batches)
        found = {"seconds": seconds, "sent": (after - before) / steps if after >= 0 and device == "cpu" else -1.0}
        if rank == 0:
            results.put({**found, "computed": bytes_sent(step.raw, config.train, processes)})
        if dist.is_initialized():
            dist.barrier()


def _rows(batch: Batch, first: int, last: int) -> Batch:
    """Those of one process."""
    return Batch(batch.step, *(each[first:last] for each in (batch.tokens, batch.lengths, batch.positions)))


def sent_by_sockets() -> int:
    """Bytes that the TCP connections of this process have delivered; -1 where that is not to be had."""
    total, asked = 0, False
    for name in os.listdir("/proc/self/fd") if hasattr(socket, "TCP_INFO") else ():  # noqa: PTH208 - names are numbers
        with suppress(OSError), closing(socket.socket(fileno=os.dup(int(name)))) as each:
            if each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM:
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                if len(info) >= ACKED_AT + 8:
                    total, asked = total + struct.unpack_from("Q", info, ACKED_AT)[0], True
    return total if asked else -1


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def scaled(size: Preset, processes: int) -> tuple[RecurrentLM, TrainConfig]:
    """The model, without memory, and the training of a run in which each process has the preset's batch."""
    config = replace(size, batch=size.batch * processes).config("fp32", "cpu")
    with torch.device("meta"):
        model = RecurrentLM(config.model, size.vocab_size, 0, initialise=False)
    return model, config.train
