"""What a run reports: metrics.jsonl is the truth; console, curves and wandb are views of it.

One JSON object a line, each with `kind`: "start" (every start of the run: processes, substreams of each, devices,
precisions, versions), "train" (one per interval) and "valid" (one per evaluation). When a run goes back to an older
checkpoint, the lines of the steps it will do again are dropped first. The price: the file is read once at each start.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rnnlm.config import RunConfig
from rnnlm.evaluate import exp
from rnnlm.stream import write_whole

FIXED_POINT = 2**20  # losses are summed as integers of this many parts per nat, since integer sums have no order
LARGEST = 2.0**32  # nats of a micro-batch; above it training has diverged and the integers would overflow
COLOURS = ("#2a78d6", "#eb6834")  # training, validation
INK, MUTED, GRID, SURFACE = "#0b0b0b", "#52514e", "#e1e0d9", "#fcfcfb"


class IntervalLoss:
    """The mean loss since the last line, on the device and without waiting for it.

    The sums are integers, so that they come out the same in whatever order micro-batches, ranks and lives of the run
    are added: a resumed run logs the bits of an uninterrupted one. Resolution: 1e-6 nats of a micro-batch's loss.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)  # loss * FIXED_POINT, targets, non-finite losses

    def add(self, loss: torch.Tensor, count: torch.Tensor) -> None:
        """Take in one micro-batch: () summed loss in nats, () number of targets."""
        finite = loss.abs() < LARGEST  # false for NaN
        fixed = (torch.where(finite, loss, 0.0).double() * FIXED_POINT).round().long()
        self.sums += torch.stack([fixed, count, (~finite).long()])

    def restore(self, sums: list[int]) -> None:
        """Start from sums that a checkpoint holds."""
        self.sums.copy_(torch.tensor(sums))

    @staticmethod
    def tensor_mean(sums: torch.Tensor) -> torch.Tensor:
        """() fp64: as `mean`, on the device; NaN where a loss was not finite."""
        mean = sums[0].double() / FIXED_POINT / sums[1].clamp(min=1)
        return torch.where(sums[2] > 0, torch.nan, mean)

    @staticmethod
    def mean(sums: list[int]) -> float | None:
        """Nats per token of reduced sums; None where a loss was not finite, or beyond all use."""
        loss, count, bad = sums
        return None if bad else loss / FIXED_POINT / max(1, count)


class Metrics:
    """Writes one run's reports; made in the main process alone.

    Args:
        directory: the run.
        step: where training starts; later lines and samples are of a life that ended, and are dropped.
        total_steps: for the progress bar.
    """

    def __init__(self, directory: Path, config: RunConfig, step: int, total_steps: int):
        self.path, self.samples = directory / "metrics.jsonl", directory / "samples.md"
        self.directory = directory
        keep_lines(self.path, step)
        keep_samples(self.samples, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._drawn = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None
        self._wandb = _start_wandb(directory, config)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and of the console."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        with self.forgiven("metrics.jsonl"):
            self._file.write(json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        self._show(kind, record)
        if self._wandb is not None and kind != "start":
            numbers = {f"{kind}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
            try:
                self._wandb.log({**numbers, "tokens": record["tokens"]})
            except Exception as error:  # whatever goes wrong there is no reason to stop here
                self.say(f"warning: wandb stopped ({error}); training goes on")
                self._wandb = None

    @contextmanager
    def forgiven(self, name: str) -> Iterator[None]:
        """A report that cannot be written is told, and costs nothing else."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: {name} could not be written ({error}); training goes on")

    def sync(self) -> None:
        """Wait until every line is on disk: a checkpoint must not outlive the lines before it."""
        with self.forgiven("metrics.jsonl"):
            os.fsync(self._file.fileno())

    def draw(self, every_seconds: float = 0) -> None:
        """Draw the curves as they stand, unless that was done less than so many seconds ago."""
        if time.monotonic() - self._drawn >= every_seconds:
            with self.forgiven("curves.png"):
                draw_curves(self.path, self.directory / "curves.png")
            self._drawn = time.monotonic()

    def say(self, text: str) -> None:
        """A line for the person at the console."""
        with suppress(BrokenPipeError):  # nobody reads it any more
            tqdm.write(text, file=sys.stderr) if self._bar else print(text, file=sys.stderr, flush=True)

    def _show(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "train":
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f} ppl {record['ppl']:.1f}"
            if self._bar:
                self._bar.set_postfix_str(f"loss {loss}, {record['tokens_per_second']:,.0f} tok/s", refresh=False)
                self._bar.update(record["step"] - self._bar.n)
            else:
                self.say(
                    f"step {record['step']} epoch {record['epoch']} loss {loss} lr {record['learning_rate']:.2e} "
                    f"grad {record['gradient_norm']:.3f} {record['tokens_per_second']:,.0f} tok/s "
                    f"waiting {record['data_wait_share']:.1%}"
                )
        elif kind == "valid":
            bits = record["bits_per_byte"]  # None where the stream does not know its text
            self.say(
                f"step {record['step']} valid loss {record['loss']:.4f} ppl {record['token_perplexity']:.2f}"
                f"{'' if bits is None else f' bits/byte {bits:.4f}'}{' (best so far)' if record['best'] else ''}"
            )

    def sample(self, step: int, text: str) -> None:
        """Append generated text to samples.md."""
        with self.forgiven("samples.md"), self.samples.open("a", encoding="utf-8") as file:
            file.write(f"## step {step}\n\n{text}\n\n")

    def close(self) -> None:
        """Finish the bar, the curves and wandb."""
        with self.forgiven("metrics.jsonl"):
            self._file.close()
        if self._bar:
            self._bar.close()
        self.draw()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self.say(f"warning: wandb did not finish ({error})")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def keep_lines(path: Path, step: int) -> None:
    """Drop the records of steps after `step`; start records stay, they tell the run's history."""
    kept = [r for r in read_lines(path) if r["kind"] == "start" or r["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode(), alone=True)


def keep_samples(path: Path, step: int) -> None:
    """Drop the samples of steps after `step`."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")  # a kill may have cut a character
        parts = re.split(r"(?m)^(?=## step \d+$)", text)
        kept = [part for part in parts if not (found := re.match(r"## step (\d+)", part)) or int(found[1]) <= step]
        write_whole(path, "".join(kept).encode(), alone=True)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process ever held: on the GPU where it uses one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Seconds of training, and of waiting for data, since the last line; pauses (evaluation, saving) left out."""

    def __init__(self) -> None:
        self.reset(0)

    def reset(self, tokens: int) -> None:
        """Start an interval, after this many tokens of training."""
        self._start, self.waited, self._paused, self.tokens = time.perf_counter(), 0.0, 0.0, tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens here does not count."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Seconds of the interval so far."""
        return max(1e-9, time.perf_counter() - self._start - self._paused)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Training loss, validation perplexity and learning rate over tokens, as a PNG."""
    from matplotlib.figure import Figure  # half a second, and only drawing needs it
    from matplotlib.ticker import EngFormatter

    records = read_lines(metrics)
    train = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
    valid = [r for r in records if r["kind"] == "valid" and r["loss"] is not None]
    figure = Figure(figsize=(8, 8), layout="constrained", facecolor=SURFACE)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.4])
    panels[0].plot([r["tokens"] for r in train], [r["loss"] for r in train], color=COLOURS[0], lw=1.5)
    panels[1].plot([r["tokens"] for r in valid], [exp(r["loss"]) for r in valid], color=COLOURS[1], lw=1.5, marker="o")
    panels[2].plot([r["tokens"] for r in train], [r["learning_rate"] for r in train], color=INK, lw=1.5)
    if valid:
        last = valid[-1]
        panels[1].annotate(
            f"{exp(last['loss']):.1f}", (last["tokens"], exp(last["loss"])), (0, 8),
            textcoords="offset points", ha="right", color=INK,
        )  # fmt: skip
    if len({r["loss"] for r in valid}) > 1:
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_formatter("{x:.0f}")
        panels[1].yaxis.set_minor_formatter("{x:.0f}")
    titles = ("training loss (nats per token)", "validation perplexity (per token)", "learning rate")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=10, color=INK)
        panel.set_facecolor(SURFACE)
        panel.grid(color=GRID, lw=0.8)
        panel.tick_params(which="both", colors=MUTED, labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[2].set_xlabel("tokens trained on", color=MUTED)
    panels[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(picture)


def _start_wandb(directory: Path, config: RunConfig) -> Any:
    """A wandb run that goes on where an earlier life of this run left it; None when off or not to be had."""
    if config.wandb == "off":
        return None
    id_file = directory / "wandb-id"
    try:
        import wandb

        if not id_file.exists():
            id_file.write_text(os.urandom(8).hex())
        run = wandb.init(
            project=config.wandb_project,
            id=id_file.read_text(),
            resume="allow",
            mode=config.wandb,
            dir=str(directory),
            name=directory.name,
            settings=wandb.Settings(init_timeout=60, login_timeout=30),  # seconds, after which training starts without
        )
        run.define_metric("*", step_metric="tokens")  # wandb's own step may not go back, a resumed run does
        return run
    except Exception as error:  # a missing package, key or network is no reason not to train
        print(f"warning: run.wandb={config.wandb}: {error}; training without it", file=sys.stderr, flush=True)
        return None
