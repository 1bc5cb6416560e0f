"""How an attempt ends: what it says, the marker that it leaves, and whether what was trained is worth anything.

Loss and checkpoint are looked at last, when all else is on disk: whatever is wrong with them, the run can be examined
and resumed. The price: a run that diverged early has used its time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rnnlm.errors import RunError
from rnnlm.files import write_file
from rnnlm.train.schedule import ValidationMemory
from rnnlm.train.trackers import read_lines

MARKER = "preempted.json"  # in the run, while it waits to be started again
WORSE_THAN_GUESSING = 1.0  # nats per token; a model that has just been initialised is within a tenth of guessing


def print_preempted(directory: Path, signal_name: str, step: int, total_steps: int, saved_step: int) -> None:
    """A line for the person at the console, and the marker for scripts."""
    mark_preempted(directory, signal_name, step, saved_step)
    _print(
        f"{directory}: {signal_name} at step {step} of {total_steps}, saved at step {saved_step}; "
        "type the same command again to resume"
    )


def mark_preempted(directory: Path, signal_name: str, step: int, saved_step: int) -> None:
    """Leave the marker by which scripts know that the run is to be started again."""
    text = json.dumps({"signal": signal_name, "step": step, "saved_step": saved_step})
    write_file(directory / MARKER, text.encode(), alone=True)


def print_finished(
    directory: Path, step: int, total_steps: int, limits: Sequence[str], memory: ValidationMemory
) -> None:
    """One paragraph for the person at the console; `limits`: the knobs that end the run at `total_steps`."""
    best = memory.best_loss
    valid = "" if best is None else f", best validation loss {best:.4f} at step {memory.best_step}"
    made = [name for name in ("curves.png", "metrics.jsonl", "samples.md") if (directory / name).is_file()]
    early = step < total_steps
    longer = "optim.early_stop_patience" if early else " and ".join(limits)
    _print(
        f"{directory}: {'stopped early' if early else 'finished'} at step {step} of {total_steps}{valid}\n"
        f"  {', '.join(made)} and checkpoints/ are there; to train longer, raise {longer}"
    )


def _print(text: str) -> None:
    with suppress(
        BrokenPipeError
    ):  # nobody reads it: Ctrl-C also ends the `tee` behind a run, whose code is what counts
        print(text, flush=True)


def check_loss(directory: Path, vocab_size: int) -> None:
    """Check that the last losses in metrics.jsonl, in training and in validation, are those of a model.

    Raises:
        RunError: one is not finite, or far above log(vocab_size), the loss of who takes all pieces for equally likely.
    """
    last = {line["kind"]: line for line in read_lines(directory / "metrics.jsonl") if line["kind"] != "start"}
    for kind, line in last.items():
        loss, guessing = line["loss"], math.log(vocab_size)
        if loss is not None and loss <= guessing + WORSE_THAN_GUESSING:
            continue
        if kind == "train" and loss is None and last.get("valid", {}).get("step", -1) >= line["step"]:
            continue  # of one step that was skipped, perhaps: the evaluation after it tells what became of the model

        found = "not finite" if loss is None else f"{loss:.2f} nats, where guessing among all pieces has {guessing:.2f}"
        raise RunError(
            f"{directory}: the run has diverged: at step {line['step']} its {kind} loss is {found}; begin again in "
            "another run.directory with a lower optim.learning_rate or optim.clip_norm, or with optim.warmup_steps"
        )
