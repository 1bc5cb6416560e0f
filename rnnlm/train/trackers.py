"""Trackers: the seam through which another place to report to enters, and Weights & Biases.

metrics.jsonl is the truth; a tracker is a view of it that may fail. Whatever goes wrong in one is a warning, it is left
out from then on, and training continues. What it has missed it is given when the run is resumed, and
tools/send_metrics.py sends the lines of a run that has ended. The price: its pages may end before the run does, and
lines that it had not confirmed may come to it twice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rnnlm.config import RunConfig
from rnnlm.files import write_file

LOGGED = ("train", "valid")  # the kinds of lines that trackers get


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a kill has cut short, or a power loss damaged, is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
            records.append(record)
    return records


class Tracker:
    """A place that a run reports to; every method may raise anything."""

    name = "tracker"
    received: int | None = None
    """The step up to which it is sure to have all lines of earlier attempts: it is given the later ones when it starts.
    None: it wants none of them."""

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, as it stands there; its kind is "train" or "valid"."""

    def picture(self, path: Path) -> None:
        """The curves, newly drawn."""

    def text(self, step: int, text: str) -> None:
        """What the model wrote at a step."""

    def close(self) -> None:
        """The run, or this attempt of it, has ended."""


TrackerStart = Callable[[Path, RunConfig, int], Tracker | None]
"""(directory of the run, its section, step that it starts from) -> a tracker; None where the run does not want it."""


class Trackers:
    """All trackers of a run; one that raises is left out from then on.

    Args:
        step: that the run starts from.
        lines: of metrics.jsonl up to there.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        step: int,
        lines: Iterable[Mapping[str, Any]],
        print_line: Callable[[str], None],
    ):
        self._print_line, lines = print_line, list(lines)
        self._active: list[Tracker] = []
        for start in TRACKERS:
            try:
                tracker = start(directory, config, step)
            except Exception as error:
                print_line(f"warning: {start.__name__}: {error}; training without it")
                continue
            if tracker is not None:
                self._active.append(tracker)
        self.each(lambda tracker: replay(tracker, lines))

    def each(self, act: Callable[[Tracker], object], verb: str = "stopped") -> None:
        """Have every tracker do something."""
        for tracker in list(self._active):
            try:
                act(tracker)
            except Exception as error:  # whatever goes wrong there is no reason to stop here
                self._print_line(f"warning: {tracker.name} {verb} ({error}); training continues")
                self._active.remove(tracker)


def replay(tracker: Tracker, lines: Iterable[Mapping[str, Any]]) -> int:
    """Give a tracker the lines that it has not confirmed; how many these are."""
    if tracker.received is None:
        return 0
    missed = [line for line in lines if line["kind"] in LOGGED and line["step"] > tracker.received]
    for line in missed:
        tracker.log(line["kind"], line)
    return len(missed)


class WandbTracker(Tracker):
    """Weights & Biases, under the id that the run keeps in `wandb-id`; `wandb-step` says how far it has confirmed."""

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
        self._confirmed, self.received = directory / "wandb-step", -1
        if self._confirmed.exists() and (text := self._confirmed.read_text().strip()).isdecimal():
            self.received = int(text)
        self._last = self.received
        self._run.define_metric("*", step_metric="tokens")  # wandb's own step may not go back, a resumed run does

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """All numbers of the line, as train/loss and so on, over tokens."""
        numbers = {f"{kind}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        if "time" in record:  # not in the lines of earlier versions
            numbers["_timestamp"] = datetime.fromisoformat(record["time"]).timestamp()
        self._run.log({**numbers, "tokens": record["tokens"]})
        self._last = record["step"]

    def close(self) -> None:
        """Send what is left, and note how far all has been sent: a kill loses what is under way."""
        self._run.finish()
        write_file(self._confirmed, str(self._last).encode(), alone=True)


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
