"""Measure what a second process costs, and predict what 8 and 64 GPUs give.

    python tools/benchmark_scaling.py
    python tools/benchmark_scaling.py --presets small imdb --json scaling.json -- --train.gradient_compression=bf16
    python tools/benchmark_scaling.py --device cuda --presets large-batch
    python tools/benchmark_scaling.py --step-ms 12.5 --presets large-batch --nvlink 450 --infiniband 400

Measured: the steps of one process, and of two that share its batch on this machine (on a CPU by gloo, also its cores;
on CUDA by NCCL, on two GPUs where there are two). Bytes are those that a process sends in a step: computed from the
sizes of the model, and on a CPU also read from the sockets of process 0, which carry a little more than gradients.

Predicted, with the measured step of one process or --step-ms: every GPU has the preset's batch, so the whole grows
(weak scaling). A ring all-reduce sends 2 (W - 1) / W of the bytes that are summed over every link, the least possible
(Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"), at the speed of the
slowest link of the ring:

    at worst   step + bytes / speed                    all is sent after the backward pass
    at best    step + max(0, bytes / speed - 2/3 step) while it goes on, as DDP does with all but the last bucket

Speeds are GB/s each way: --nvlink of a GPU (450: NVLink 4 of an H100 or H200), --infiniband of a machine (400: eight
adapters of 400 Gbit/s). It is arithmetic, not a measurement: latencies, slow processes and what links do not reach of
their nominal speed are left out. Efficiency is the step of one process over that of several.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from step_speed.communication import Links, bytes_sent, measure, predict, scaled
from step_speed.presets import PRESETS, Preset, preset

from rnnlm import files
from rnnlm.cli import run_entry_point
from rnnlm.errors import UserError

GPUS = (8, 64)
HEADER = (
    "| preset | processes | step ms | MB sent, computed | MB sent, measured | efficiency |\n|---|---|---|---|---|---|"
)


def main() -> None:
    """Measure and predict for each preset, a table line for each number of processes."""
    options = parse()
    links = Links(options.nvlink * 1e9, options.infiniband * 1e9, options.gpus_per_machine)
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for name in options.presets:
        size = replace(preset(name, options.device), options=tuple(options.ours))
        for row in rows_of(size, options, links):
            rows.append({"preset": name, **row})
            print(line(rows[-1]), flush=True)
    if options.json:
        files.write(options.json, Path.write_text, json.dumps(rows, indent=1))


def rows_of(size: Preset, options: argparse.Namespace, links: Links) -> Iterator[dict[str, Any]]:
    """What is measured on this machine, then what is predicted."""
    seconds = options.step_ms / 1e3
    if not seconds:
        for processes in (1, 2):
            found = measure(size, options.precision, options.device, processes, options.repeats)
            seconds = seconds or found["seconds"]
            sent = {"computed_mb": found["computed"] / 1e6, "sent_mb": found["sent"] / 1e6 if processes > 1 else 0.0}
            times = {"step_ms": [1e3 * found["seconds"]], "efficiency": [seconds / found["seconds"]]}
            yield {"processes": processes, "kind": "measured, one batch", **sent, **times}

    for processes in GPUS:
        sent_bytes = bytes_sent(*scaled(size, processes), processes)
        both = predict(seconds, sent_bytes, processes, links)
        times = {"step_ms": [1e3 * each for each in both], "efficiency": [seconds / each for each in both]}
        yield {"processes": processes, "kind": "predicted, a batch each", "computed_mb": sent_bytes / 1e6, **times}


def line(row: dict[str, Any]) -> str:
    """A line of the table; of what is predicted, at best and at worst."""
    steps = " to ".join(f"{each:.1f}" for each in row["step_ms"])
    shares = " to ".join(f"{each:.0%}" for each in row["efficiency"])
    measured = row.get("sent_mb", -1)

    sent = f"{measured:.2f}" if measured >= 0 else ""
    where = f"| {row['preset']} | {row['processes']}, {row['kind']} "
    return f"{where}| {steps} | {row['computed_mb']:.2f} | {sent} | {shares} |"


def parse() -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: no links, or nothing to repeat.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small"], help="small")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="times four steps whose median is taken: 5")
    parser.add_argument("--step-ms", type=float, default=0.0, help="of one GPU, measured before; nothing is run then")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s of a GPU inside of a machine: 450")
    parser.add_argument("--infiniband", type=float, default=400.0, help="GB/s of a machine to others: 400")
    parser.add_argument("--gpus-per-machine", type=int, default=8, help="8")
    parser.add_argument("ours", nargs="*", metavar="-- --section.key=value", help="options of the training")
    parser.add_argument("--json", type=Path, help="a file for all lines: a list of objects")
    options = parser.parse_args()

    if min(options.nvlink, options.infiniband, options.gpus_per_machine, options.repeats) <= 0 or options.step_ms < 0:
        raise UserError("--nvlink, --infiniband, --gpus-per-machine, --repeats: must be above 0; --step-ms: not below")
    return options


if __name__ == "__main__":
    run_entry_point(main)
