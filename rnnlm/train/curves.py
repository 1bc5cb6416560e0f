"""The curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from rnnlm.model.evaluate import exp
from rnnlm.train.trackers import read_lines

COLOURS = ("#2a78d6", "#eb6834")  # training, validation
INK, MUTED, GRID, SURFACE = "#0b0b0b", "#52514e", "#e1e0d9", "#fcfcfb"


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

    # who looks at the picture during the run sees a whole one
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(picture)
