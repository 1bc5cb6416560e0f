"""Measure a training step: the usual loop, ours, and the floor, in turn, with the same model and data.

    python tools/benchmark_step.py
    python tools/benchmark_step.py --presets imdb notebook --precisions bf16 --repeats 9 --json step.json
    python tools/benchmark_step.py --device cuda
    python tools/benchmark_step.py --presets notebook --warm-up 300 -- --train.loss_chunk_tokens=1024

The usual loop is what everyone writes (tools/step_speed/usual_loop.py). Ours is the step of a run: TrainStep, with
Accelerate. The floor is the indispensable work at its best: the head's matrix products in the fastest of several
layouts and chunkings, the vendor's recurrent kernel forward and backward, one softmax pass, looking up and summing
token vectors, and PyTorch's fused Adam; what it is not stands in tools/step_speed/floor.py. All three take turns in one
process; medians of --repeats steps, each from host to finished device, on CUDA ten steps at a time.

- of the peak: operations of all matrix products (two for a multiplication and an addition, backward twice forward) a
  second, over the best rate of large square products in this precision, measured here.
- memory: the most in a step besides parameters, gradients and moments; allocations of PyTorch, not of the libraries
  beneath it.
- operations: calls below autograd that are not views; kernels that bypass PyTorch's dispatcher are not among them.
- host: a step of the same graph with 2 rows, windows of 2, widths of 8 and 32 pieces, by one thread: next to nothing is
  left to calculate.
- losses: the largest difference in nats over --loss-steps steps from the same weights without dropout; on a CPU with
  at most 16 rows, widths of 128 and 2,000 pieces.

Behind -- stand options of our side that change no sizes. --warm-up steps are made by both sides before the first that
is measured, where it matters that a model has learnt something.

Then the time of each part, forward and backward together, by the profiler: a single step, whose sum may differ from
the median. Each preset in each precision has a process of its own. Prints tables for the README.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from step_speed import table
from step_speed.comparison import DTYPES, compare
from step_speed.presets import PRESETS

from rnnlm import files
from rnnlm.cli import run_entry_point
from rnnlm.errors import UserError


def main() -> None:
    """Measure what is asked for, and print it line by line."""
    options = parse()
    rows: list[dict[str, Any]] = []
    print(table.header(), flush=True)
    for name in options.presets:
        for precision in options.precisions:
            given = (options.repeats, options.loss_steps, options.warm_up, options.ours)
            rows.append(alone(name, precision, options.device, *given))
            print(table.line(rows[-1]), flush=True)
            if options.json:
                text = json.dumps(rows, indent=1)
                files.write(Path(options.json), Path.write_text, text)
    print("\n" + table.split_tables(rows))


def alone(*arguments: Any) -> dict[str, Any]:
    """`compare` in a process of its own: nothing that it leaves in memory or in Accelerate meets the next."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(compare, *arguments).result()


def parse() -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: fewer repeats than a median is worth.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="all")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="all")
    parser.add_argument("--repeats", type=int, default=7, help="steps whose median is taken: 7, at least 5")
    parser.add_argument("--loss-steps", type=int, default=50, help="over which losses are compared: 50; 0: not")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first that is measured: 2")
    parser.add_argument("ours", nargs="*", metavar="-- --section.key=value", help="options of our side")
    parser.add_argument("--json", help="a file for all that was measured: a list of objects")
    options = parser.parse_args()
    if options.repeats < 5:
        raise UserError(f"--repeats={options.repeats}: a median of so few says little; use 5 or more")
    return options


if __name__ == "__main__":
    run_entry_point(main)
