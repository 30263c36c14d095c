"""The JSON of `python -m benchmarks` as a table."""

import json
from pathlib import Path
from typing import Any

from IPython.display import Markdown, display


def show(name: str = "benchmarks.json") -> None:
    """Display where and when it was measured, and all rows."""
    content = json.loads(Path(__file__).with_name(name).read_text())
    machine = content["machine"]
    device = machine.get("device", "cpu")
    lines = [
        ("" if device == "cpu" else f"{device}. ")
        + f"Commit `{machine['commit']}`, {machine['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} thread, {machine['system']}, Python {machine['python']}, torch {machine['torch']}, "
        f"numpy {machine['numpy']}.",
        "",
        "| row | ours | baseline | ratio | quartiles of ours | to reach | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        unit, ours = row["unit"], row["ours"]
        target = (
            ""
            if row["target"] is None
            else f"{'at most' if row['at_most'] else 'at least'} {row['target']:g}"
        )
        quartiles = (
            ""
            if ours["lower"] == ours["upper"]
            else f"{short(ours['lower'], unit)} to {short(ours['upper'], unit)}"
        )
        cells: list[Any] = [
            row["name"],
            short(ours["median"], unit),
            short(row["baseline"]["median"], unit),
            f"{row['ratio']:.3g} {row['ratio_is']}",
            quartiles,
            target,
            "" if row["verdict"] == "-" else row["verdict"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    display(Markdown("\n".join(lines)))


def short(value: float, unit: str) -> str:
    """Three digits with a unit that suits."""
    if value == 0:
        return ""
    if unit == "B":
        return f"{value:.0f}&nbsp;B" if value < 1e4 else f"{value / 1e6:.2f}&nbsp;MB"
    scale, name = next(
        (
            (scale, name)
            for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
            if value >= scale
        ),
        (1e-9, "ns"),
    )
    return f"{value / scale:.3g}&nbsp;{name}"
