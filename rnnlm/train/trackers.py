"""Trackers: the seam through which another place to report to enters, and Weights & Biases.

metrics.jsonl is the truth; a tracker is a view of it that may fail. Whatever goes wrong in one is a warning, it is left
out from then on, and training continues. The price: its pages may end before the run does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rnnlm.config import RunConfig


class Tracker:
    """A place that a run reports to; every method may raise anything."""

    name = "tracker"

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl but those of the kind `start`: "train" or "valid"."""

    def picture(self, path: Path) -> None:
        """The curves, newly drawn."""

    def text(self, step: int, text: str) -> None:
        """What the model wrote at a step."""

    def close(self) -> None:
        """The run, or this attempt of it, has ended."""


TrackerStart = Callable[[Path, RunConfig, int], Tracker | None]
"""(directory of the run, its section, step that it starts from) -> a tracker; None where the run does not want it."""


class Trackers:
    """All trackers of a run; one that raises is left out from then on."""

    def __init__(self, directory: Path, config: RunConfig, step: int, print_line: Callable[[str], None]):
        self._print_line = print_line
        self._active: list[Tracker] = []
        for start in TRACKERS:
            try:
                tracker = start(directory, config, step)
            except Exception as error:
                print_line(f"warning: {start.__name__}: {error}; training without it")
                continue
            if tracker is not None:
                self._active.append(tracker)

    def each(self, act: Callable[[Tracker], None], verb: str = "stopped") -> None:
        """Have every tracker do something."""
        for tracker in list(self._active):
            try:
                act(tracker)
            except Exception as error:  # whatever goes wrong there is no reason to stop here
                self._print_line(f"warning: {tracker.name} {verb} ({error}); training continues")
                self._active.remove(tracker)


class WandbTracker(Tracker):
    """Weights & Biases, under the id that the run keeps in `wandb-id`."""

    name = "wandb"

    def __init__(self, directory: Path, config: RunConfig):
        import wandb  # half a second, and most runs do without

        id_file = directory / "wandb-id"
        if not id_file.exists():
            id_file.write_text(os.urandom(8).hex())
        self._run = wandb.init(
            project=config.wandb_project,
            id=id_file.read_text(),
            resume="allow",
            mode="online" if config.wandb == "online" else "offline",
            dir=str(directory),
            name=directory.name,
            settings=wandb.Settings(init_timeout=60, login_timeout=30),  # seconds, after which training starts without
        )
        self._run.define_metric("*", step_metric="tokens")  # wandb's own step may not go back, a resumed run does

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """All numbers of the line, as train/loss and so on, over tokens."""
        numbers = {f"{kind}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        self._run.log({**numbers, "tokens": record["tokens"]})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def start_wandb(directory: Path, config: RunConfig, step: int) -> Tracker | None:
    """A wandb run that continues where an earlier attempt left it; None when off or not to be had."""
    if config.wandb == "off":
        return None
    try:
        return WandbTracker(directory, config)
    except Exception as error:  # a missing key or network is no reason not to train
        print(f"warning: run.wandb={config.wandb}: {error}; training without it", file=sys.stderr, flush=True)
        return None


TRACKERS: list[TrackerStart] = [start_wandb]
"""What every run starts; other code appends its own."""
