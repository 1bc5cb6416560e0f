"""Prove on this machine, disk and launcher that what is killed goes on as if it had not been: training, or a build.

    python tools/prove_resume.py                                        # a small run of its own, 1 and 2 processes
    python tools/prove_resume.py --attempts 300 --processes 1 2 4 --directory /scratch/proof
    python tools/prove_resume.py --config configs/mine.yaml --steps 200 -- --train.precision=bf16
    python tools/prove_resume.py --build --attempts 300

A run is trained once and left alone. Then the same run is started again and again, each time on one of the numbers of
processes, and killed: SIGKILL to all processes, to one of them, to the launcher, or SIGTERM; while it starts, in a
step, in a save, in an evaluation. When it has reached its end, its parameters, moments, hidden states, counters and all
logged numbers are compared with those of the run that was left alone, and the next run begins. With --build it is
builds, whose streams are compared byte by byte. It prints a line for each attempt, and the verdict; the exit code is 0
if nothing differs. What does not end within --patience seconds of a signal is a fault, too.

With --config it is your model, data and options, of which this changes run.directory, train.max_steps, how often is
logged, saved and evaluated, train.cpu_threads=1 and, on several numbers of processes, train.exact_slices.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from rnnlm.cli import run_entry_point
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None

if TYPE_CHECKING:
    from proof.building import Building
    from proof.training import Training

ROOT = Path(__file__).resolve().parent.parent


def prove(subject: Training | Building, attempts: int) -> bool:
    """Kill and compare; whether nothing differed."""
    subject.prepare()
    hits: Counter[str] = Counter()
    good = ended = 0
    for number in range(attempts):
        what, where = subject.attempt()
        hits[where] += 1
        print(f"{number + 1}/{attempts}: {what}", flush=True)

        last = number == attempts - 1
        if last and not subject.is_done():
            subject.finish()
        if last or subject.is_done():
            found = subject.differences()
            ended, good = ended + 1, good + (not found)
            print(f"  its end: {'DIFFERS: ' + '; '.join(found[:5]) if found else 'equal, ' + subject.compared()}")
            subject.begin()

    where = ", ".join(
        f"{count} in {name}" if name != "not killed" else f"{count} {name}" for name, count in hits.items()
    )
    print(f"{attempts} attempts ({where}): {good} of {ended} ended with the same bits as what was left alone")
    return good == ended


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of this script; `arguments` are those behind `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="builds instead of training")
    parser.add_argument("--config", help="your experiment; its tokenizer, and for training its streams, must be there")
    parser.add_argument("--attempts", type=int, default=20, help="how often to start and kill; 20")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to move between")
    parser.add_argument("--launch-config", default=str(ROOT / "launch/cpu.yaml"), help="of accelerate launch")
    parser.add_argument("--steps", type=int, default=120, help="of each run; 120")
    parser.add_argument("--save-every", type=int, default=7, help="steps; 7")
    parser.add_argument("--evaluate-every", type=int, default=20, help="steps; 20")
    parser.add_argument("--patience", type=float, default=120, help="seconds in which all must end after a signal; 120")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument(
        "--directory", type=Path, help="on the disk to try; default: a temporary one, removed if all is well"
    )

    at = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:at])
    options.arguments = list(argv[at + 1 :])
    if min(*options.processes, options.attempts) < 1:
        raise UserError("--processes and --attempts: expected numbers of at least 1")
    return options


def main() -> int:
    """Prove it, print the verdict; 0 if nothing differs."""
    options = parse(sys.argv[1:])
    from proof.building import building
    from proof.training import training

    if options.directory:
        options.directory.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="proof-", dir=options.directory)).resolve()
    print(f"in {directory}; what the processes print is in its log.txt", flush=True)

    make: Callable[..., Training | Building] = building if options.build else training
    good = prove(make(directory, options, random.Random(options.seed)), options.attempts)
    if good:
        shutil.rmtree(directory)
    return 0 if good else 1


if __name__ == "__main__":
    run_entry_point(main)
