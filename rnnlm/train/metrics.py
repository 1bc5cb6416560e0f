"""What a run reports: metrics.jsonl is the truth; console, curves and trackers are views of it.

One JSON object a line, each with its `time` and a `kind`: "start" (every start of the run: processes, substreams of
each, devices, precisions, versions), "train" (one per interval) and "valid" (one per evaluation). When a run goes back
to an older checkpoint, the lines of the steps that it will repeat are dropped first. The price: the file is read once
at each start.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rnnlm import files
from rnnlm.config import RunConfig
from rnnlm.files import write_file
from rnnlm.train.curves import draw_curves
from rnnlm.train.trackers import LOGGED, Trackers, read_lines


class SilentMetrics:
    """What all processes but the main one report: nothing."""

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and of the console."""

    def advance(self, step: int) -> None:
        """Move the progress bar, where there is a terminal, to so many steps done."""

    def print_line(self, text: str) -> None:
        """A line for the person at the console."""

    def sample(self, step: int, text: str) -> None:
        """Append generated text to samples.md."""

    def draw(self, every_seconds: float = 0) -> None:
        """Draw the curves as they stand, unless that was done less than so many seconds ago."""

    def sync(self) -> None:
        """Wait until every line is on disk: a checkpoint must not outlive the lines before it."""

    def close(self) -> None:
        """Finish the bar, the curves and the trackers."""


class Metrics(SilentMetrics):
    """Writes one run's reports; made in the main process alone.

    Args:
        directory: the run.
        step: where training starts; later lines and samples are of an attempt that ended, and are dropped.
        total_steps: at the end of the run.
    """

    def __init__(self, directory: Path, config: RunConfig, step: int, total_steps: int):
        self.path, self.samples = directory / "metrics.jsonl", directory / "samples.md"
        self.directory, self.total_steps = directory, total_steps
        lines = keep_lines(self.path, step)
        keep_samples(self.samples, step)
        files.sync(directory)  # else a power loss could bring the file of before back, without this attempt's lines

        self._file = self.path.open("a", encoding="utf-8")
        self._drawn = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._trackers = Trackers(directory, config, step, lines, self.print_line)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """A number that is not finite is written as null."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        line = {"kind": kind, "time": now, **finite}
        with self._warned("metrics.jsonl"):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

        self._show(kind, record)
        if kind in LOGGED:
            self._trackers.each(lambda tracker: tracker.log(kind, line))

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """A report that cannot be written is a warning, and costs nothing else."""
        try:
            yield
        except OSError as error:
            self.print_line(f"warning: {name} could not be written ({error}); training continues")

    def sync(self) -> None:
        """A failing disk is a warning."""
        with self._warned("metrics.jsonl"):
            os.fsync(self._file.fileno())

    def draw(self, every_seconds: float = 0) -> None:
        """A failing disk is a warning."""
        if time.monotonic() - self._drawn < every_seconds:
            return
        picture = self.directory / "curves.png"
        with self._warned("curves.png"):
            draw_curves(self.path, picture)
            self._trackers.each(lambda tracker: tracker.picture(picture))
        self._drawn = time.monotonic()

    def advance(self, step: int) -> None:
        """The bar is drawn once a second at most."""
        if self._bar:
            self._bar.update(step - self._bar.n)

    def print_line(self, text: str) -> None:
        """Beside the progress bar, if there is one."""
        with suppress(BrokenPipeError):  # nobody reads it any more
            tqdm.write(text, file=sys.stderr) if self._bar else print(text, file=sys.stderr, flush=True)

    def _show(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "train":
            self._show_training(record)
        elif kind == "valid":
            bits = record["bits_per_byte"]  # None where the stream does not know its text
            self.print_line(
                f"step {record['step']} valid loss {record['loss']:.4f} ppl {record['token_perplexity']:.2f}"
                f"{'' if bits is None else f' bits/byte {bits:.4f}'}{' (best so far)' if record['best'] else ''}"
            )

    def _show_training(self, record: Mapping[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f} ppl {record['ppl']:.1f}"
        share = record["peak_share"]  # None where it was not measured
        speed = f"{record['tokens_per_second']:,.0f} tok/s" + ("" if share is None else f" {share:.0%} of peak")
        if self._bar:
            self._bar.set_postfix_str(f"loss {loss}, {speed}", refresh=False)
            return

        left = timedelta(seconds=round(record["seconds_left"]))  # as 1:02:03
        self.print_line(
            f"step {record['step']} of {self.total_steps} epoch {record['epoch']} loss {loss} "
            f"lr {record['learning_rate']:.2e} grad {record['gradient_norm']:.3f} {speed} "
            f"waiting {record['data_wait_share']:.1%} memory {record['peak_memory_bytes'] / 2**20:,.0f} MiB {left} left"
        )

    def sample(self, step: int, text: str) -> None:
        """A failing disk is a warning."""
        with self._warned("samples.md"), self.samples.open("a", encoding="utf-8") as file:
            file.write(f"## step {step}\n\n{text}\n\n")
        self._trackers.each(lambda tracker: tracker.text(step, text))

    def close(self) -> None:
        """The curves are drawn once more."""
        with self._warned("metrics.jsonl"):
            self._file.close()
        if self._bar:
            self._bar.close()
        self.draw()
        self._trackers.each(lambda tracker: tracker.close(), "did not finish")


def keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records of steps after `step`; start records stay, they tell the run's history. Returns what is left."""
    kept = [r for r in read_lines(path) if r["kind"] == "start" or r["step"] <= step]
    write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode(), alone=True)
    return kept


def keep_samples(path: Path, step: int) -> None:
    """Drop the samples of steps after `step`."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")  # a kill may have cut a character
        parts = re.split(r"(?m)^(?=## step \d+$)", text)
        kept = [part for part in parts if not (found := re.match(r"## step (\d+)", part)) or int(found[1]) <= step]
        write_file(path, "".join(kept).encode(), alone=True)
