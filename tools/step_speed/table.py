"""The measurements as Markdown, for the README."""

from __future__ import annotations

from typing import Any

from step_speed.parts import PARTS

COLUMNS = (
    "preset", "precision", "usual loop, ms", "step, ms", "tokens/s", "against the loop", "of the floor",
    "of the peak", "memory, MB (loop)", "operations (loop)", "host, ms (loop)", "losses differ by",
)  # fmt: skip


def header(columns: tuple[str, ...] = COLUMNS) -> str:
    """The first two lines of a table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def line(row: dict[str, Any]) -> str:
    """A row's line; empty but for its name where the preset cannot be measured yet."""
    name = row["preset"] + (f" ({row['scaled']})" if row["scaled"] else "")
    if "missing" in row:
        return _join([name, row["precision"], row["missing"], *[""] * (len(COLUMNS) - 3)])

    return _join(
        [
            name,
            row["precision"],
            f"{row['loop_ms']:,.0f}",
            f"{row['step_ms']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio_to_loop']:.2f} ×",
            _optional(row["ratio_to_floor"], "{:.2f} ×"),
            _optional(row["share_of_peak"], "{:.0%}"),
            f"{row['step_peak_mb']:,.0f} ({row['loop_peak_mb']:,.0f})",
            f"{row['operations']} ({row['loop_operations']})",
            f"{row['host_ms']:.2f} ({row['loop_host_ms']:.2f})",
            _optional(row.get("loss_difference"), "{:.1g}"),
        ]
    )


def split_tables(rows: list[dict[str, Any]]) -> str:
    """Where the time of a step goes, of both sides, and the pieces of the floor."""
    measured = [row for row in rows if "missing" not in row]
    lines = [header(("ms", "side", *PARTS, "rest", "of all, backward"))]
    for row in measured:
        for side, key in (("step", "split_ms"), ("loop", "loop_split_ms")):
            numbers = [f"{row[key][part]:,.1f}" for part in (*PARTS, "rest", "backward")]
            lines.append(_join([f"{row['preset']} {row['precision']}", side, *numbers]))

    with_floor = [row for row in measured if row["floor_parts_ms"]]
    if with_floor:
        pieces = list(with_floor[0]["floor_parts_ms"])
        lines += ["", header(("floor, ms", "all", *pieces))]
        for row in with_floor:
            numbers = [f"{row['floor_parts_ms'][piece]:,.1f}" for piece in pieces]
            lines.append(_join([f"{row['preset']} {row['precision']}", f"{row['floor_ms']:,.1f}", *numbers]))
    return "\n".join(lines)


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
