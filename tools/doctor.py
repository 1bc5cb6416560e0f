"""Examine a machine: what a new one is asked first, and anyone with a first GPU.

    python tools/doctor.py
    python tools/doctor.py --config configs/imdb.yaml
    python tools/doctor.py --device cuda --config configs/imdb.yaml --json doctor.json -- --train.precision=bf16
    python tools/doctor.py --only machine disk

One line for each thing: right; wrong, with the way out; or not to be tried here, and why. With --config, and options
of the experiment behind --, also whether its memory and the time of its checkpoints fit. The exit code is 0 where
nothing is wrong, else 1. Each check runs in a process of its own, so that one that crashes or hangs is a line as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

try:
    from doctor_checks.alone import arguments_of, count_gpus, print_verdicts, records, timed
    from doctor_checks.verdict import Verdict, untried

    from rnnlm import files
    from rnnlm.cli import run_entry_point
    from rnnlm.errors import UserError
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; type this first: . .venv/bin/activate (make quickstart makes it)") from None


class Check(NamedTuple):
    """Where a check is, and after how many seconds it counts as hanging; `gpu` is what it checks on GPUs alone."""

    module: str
    function: str
    arguments: tuple[str, ...] = ()
    seconds: float = 120
    gpu: str = ""


CHECKS = {
    "machine": Check("machine", "check"),
    "recurrence": Check("kernels", "check_recurrence", gpu="recurrence in cuDNN"),
    "masks": Check("kernels", "check_masks"),
    "step-fp32": Check("steps", "check", ("fp32",)),
    "step-bf16": Check("steps", "check", ("bf16",)),
    "step-fp16": Check("steps", "check", ("fp16",), gpu="a step in fp16"),
    "disk": Check("disk", "check", seconds=600),
    "memory": Check("memory", "check"),
    "resume": Check("resume", "check_alone", seconds=600),
    "processes": Check("resume", "check_moved", seconds=900),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of this script; `arguments` are those behind `--`.

    Raises:
        UserError: a file of --config is not there.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], help="an experiment; may be given several times")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--json", type=Path, help="a file for all lines: a list of objects")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="these checks; all")
    parser.add_argument("--alone", choices=list(CHECKS), help=argparse.SUPPRESS)  # run one, in this process
    parser.add_argument("--gpus", type=int, default=-1, help=argparse.SUPPRESS)  # which the first process has counted

    at = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:at])
    options.arguments = list(argv[at + 1 :])
    for path in options.config:
        if not Path(path).is_file():
            raise UserError(f"--config={path}: no such file; give the file of an experiment, as configs/imdb.yaml")
    return options


def main() -> int:
    """Check everything, one line each; 0 if nothing is wrong."""
    options = parse(sys.argv[1:])
    if options.gpus < 0:
        options.gpus = count_gpus()
    if options.device == "auto":
        options.device = "cuda" if options.gpus else "cpu"
    if options.alone:
        print_verdicts(found_by(options.alone, options))
        return 0

    found: list[tuple[str, float, Verdict]] = []
    for name in options.only:
        lines = examine(name, options)
        print("\n".join(verdict.line() for _, _, verdict in lines), flush=True)
        found += lines
    if options.json:
        files.write(options.json, Path.write_text, json.dumps(records(found), indent=1))
    return summary([verdict for _, _, verdict in found])


def examine(name: str, options: argparse.Namespace) -> list[tuple[str, float, Verdict]]:
    """(check, seconds, verdict) for each line; nothing is started for what needs a GPU and has none."""
    check = CHECKS[name]
    if check.gpu and not options.gpus:
        return [(name, 0.0, untried(check.gpu, "no GPU"))]
    if (
        not options.gpus and name != "machine"
    ):  # which says that it is wrong to ask for one; the others try what they can
        options = argparse.Namespace(**{**vars(options), "device": "cpu"})
    return timed(name, check.seconds, arguments_of(options))


def found_by(name: str, options: Any) -> list[Verdict]:
    """The verdicts of a check, in this process."""
    check = CHECKS[name]
    function = getattr(import_module(f"doctor_checks.{check.module}"), check.function)
    lines: Iterable[Verdict] = partial(function, options)(*check.arguments)
    return list(lines)


def summary(found: Sequence[Verdict]) -> int:
    """Print how many lines say what; the exit code."""
    counts = {state: sum(each.state == state for each in found) for state in ("right", "wrong", "untried")}
    print(f"{counts['right']} right, {counts['wrong']} wrong, {counts['untried']} not to be tried here")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    run_entry_point(main)
