"""The memory that a configuration needs, against what is there.

P parameters, of which the largest tensor has p; m moments of each; b substreams of a micro-batch of this process, T
window, N = b T tokens, n of a chunk of logits; E, H, V as in the model, G gates; w bytes of the precision; K slices, W
processes. In bytes:

    parameters, gradients, moments    4 P (2 + m), p more while several processes sum; with slices (log2(K/W) + 2) P
    low-precision weights             w P, if w < 4
    activations                       N (E (2 w + 20) + layers H ((2 G + 1) w + 32)): what enters and leaves a layer,
                                      its gates and cells, their slopes, masked copies; fitted to steps on a CPU
    head                              n V w, on a GPU n V (4 + w); N H (4 + w); V H w
    the library                       1 GiB on a GPU: CUDA's context, cuBLAS's and cuDNN's workspaces; 0.5 GiB on a CPU

An estimate: kernels choose their own workspaces, cuDNN's share was not measured, and PyTorch's allocator leaves gaps.
The test `test_the_formula_of_memory_is_near_what_a_step_takes` compares it with a step.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from doctor_checks.experiment import moments, read_experiment
from doctor_checks.verdict import Verdict, right, untried, wrong
from rnnlm.config import Config
from rnnlm.model.cross_entropy import chunk_tokens
from rnnlm.model.layers import GATES
from rnnlm.train.sizes import parameters_of

SUBJECT = "memory"
LIBRARY_BYTES = {"cuda": 2**30, "cpu": 2**29}
CGROUPS = Path("/sys/fs/cgroup")


def check(options: Namespace) -> Iterator[Verdict]:
    """One line."""
    found = read_experiment(options)
    if found.config is None:
        yield untried(SUBJECT, "no experiment; name one with --config")
        return
    if not found.vocab_size:
        directory = found.config.stream.directory or "stream.directory"
        yield untried(SUBJECT, f"no stream {directory}/train, which tells the vocabulary; build it first")
        return
    processes = max(1, options.gpus) if options.device == "cuda" else 1
    yield compare(bytes_needed(found.config, found.vocab_size, processes, options.device), bytes_there(options.device))


def bytes_needed(config: Config, vocab_size: int, processes: int, device: str) -> dict[str, int]:
    """Of one process, by part: the formula above."""
    model, train = config.model, config.train
    width = 4 if train.precision == "fp32" else 2
    parameters = parameters_of(model, vocab_size)
    micro_batches = train.exact_slices // processes or 1 if train.exact_slices else train.accumulation
    tokens = train.seq_len * max(1, train.global_batch_size // processes // micro_batches)

    state = parameters * (2 + moments(config))
    if train.exact_slices:
        state += parameters * (int(math.log2(micro_batches)) + 2)
    elif processes > 1:
        state += vocab_size * max(model.embedding_size, model.hidden_size)

    layer = (2 * GATES.get(model.cell, 4) + 1) * width + 32
    activations = tokens * (model.embedding_size * (2 * width + 20) + model.layers * model.hidden_size * layer)
    chunk = min(tokens, train.loss_chunk_tokens or chunk_tokens(tokens, vocab_size, 4 if device == "cuda" else width))
    logits = chunk * vocab_size * (width + (4 if device == "cuda" else 0))
    return {
        "parameters, gradients and moments": 4 * state,
        "low-precision weights": width * parameters if width < 4 else 0,
        "activations": activations,
        "head": logits + model.hidden_size * (tokens * (4 + width) + vocab_size * width),
        "libraries": LIBRARY_BYTES[device],
    }


def bytes_there(device: str) -> int:
    """Free for one process: of the GPU with least of it, or of this machine and its cgroup."""
    if device == "cuda":
        return min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return min([psutil.virtual_memory().available, *_cgroup_bytes(CGROUPS)])


def _cgroup_bytes(directory: Path) -> Iterator[int]:
    """What the limit of a container leaves, if there is one."""
    try:
        limit = (directory / "memory.max").read_text().strip()
        used = int((directory / "memory.current").read_text())
    except (OSError, ValueError):
        return
    if limit.isdecimal():
        yield int(limit) - used


def compare(needed: dict[str, int], there: int) -> Verdict:
    """Wrong where more is needed than is there."""
    total = sum(needed.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needed.items() if size)
    text = f"about {total / 1e9:.2f} GB for a process ({parts}), {there / 1e9:.2f} GB free"
    if total > there:
        return wrong(SUBJECT, f"{text}; raise train.accumulation, or lower model.hidden_size or train.seq_len")
    return right(SUBJECT, text)
