"""The curves of a run as SVG, drawn by matplotlib and coloured by the page's style sheet."""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from finished_run import FinishedRun
from matplotlib.figure import Figure

# Drawn in these colours, which the page's style sheet then replaces with its own, light or dark.
TEXT, RULE = "#0000b0", "#0000b1"
LINES = tuple((f"#0000a{k}", dashes) for k, dashes in enumerate(("-", "--", ":", "-.", (0, (4, 4)), (0, (10, 3)))))
VARIABLES = {TEXT: "soft", RULE: "rule", **{colour: f"k{k}" for k, (colour, _) in enumerate(LINES)}}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.labelcolor": TEXT,
    "legend.frameon": False,
    "grid.color": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: in the legend.
        x: where.
        y: what; None and NaN are gaps.
        marks: values of x that are marked with a dot.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    marks: Sequence[float] = ()

    def points(self) -> list[tuple[float, float]]:
        """Those that are numbers."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if x is not None and y is not None and not math.isnan(x + y)]


def chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    """Lines over axes as an HTML figure; "" where there is nothing to draw."""
    curves = [curve for curve in curves if len(curve.points()) > 1]
    if not curves:
        return ""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # which keeps the ids of two charts apart
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for curve, (colour, dashes) in zip(curves, LINES, strict=False):
            known = dict(curve.points())
            axes.plot(list(known), list(known.values()), color=colour, linestyle=dashes, label=curve.name)
            near = [min(known, key=lambda x, mark=mark: abs(x - mark)) for mark in curve.marks]
            axes.plot(near, [known[x] for x in near], "o", color=colour, markersize=6)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=min(0.0, *(y for curve in curves for _, y in curve.points())))
        if len(curves) > 1:
            axes.legend(fontsize="small")
        drawn = svg(figure, f"{title}. {y_label} over {x_label}. {'; '.join(map(in_words, curves))}")
    return f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>{drawn}</figure>'


def svg(figure: Figure, text: str) -> str:
    """A figure as an SVG element for a page, with a text for those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    drawn = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawn, count=1, flags=re.S)  # it would style the page
    drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1)
    return re.sub(r'<g id="[^"]*">', "<g>", drawn)  # the next chart has the same ids


def in_words(curve: Curve) -> str:
    """Where a curve begins and ends, and its extremes."""
    (x, first), *_, (end, last) = curve.points()
    heights = [y for _, y in curve.points()]
    extremes = f"lowest {min(heights):.3g}, highest {max(heights):.3g}"
    return f"{curve.name}: {first:.3g} at {x:.3g}, {last:.3g} at {end:.3g}, {extremes}"


def curves(run: FinishedRun) -> str:
    """Everything that was logged, and cue quality over the threshold."""
    log, scores = run.log("attention"), {m.title: m.scores for m in run.methods.values() if m.scores}
    stage_2 = {run.methods[name].title: run.log(name) for name in ("hybrid", "mce")}
    networks = {method.title: run.log(f"networks/{name}_100") for name, method in run.methods.items()}

    def logged(column: str, names: dict[str, dict[str, list[float]]]) -> list[Curve]:
        return [Curve(name, log["epoch"], log[column]) for name, log in names.items() if column in log]

    shares = {
        "gate_pass_rate": "maps that pass the gate",
        "similarity": "cosine similarity of a pair's latest two maps",
    }
    charts = [
        chart("Classifier: loss", "epoch", "loss", logged("loss", {"binary cross entropy": log})),
        chart(
            "Does attention still move?",
            *("epoch", "share, similarity"),
            [Curve(name, log["epoch"], log[column]) for column, name in shares.items() if column in log],
        ),
        chart("Pairs that hold nothing", "epoch", "pairs", logged("pairs_empty", {"pairs": log})),
        chart("Integral attention models: loss", "epoch", "loss", logged("loss", stage_2)),
        chart("Segmentation networks: loss", "epoch", "loss", logged("loss", networks)),
    ]
    over, against = [], []
    for title, score in scores.items():
        if "curve" in score:
            levels = [level / (len(score["curve"]) - 1) for level in range(len(score["curve"]))]
            over.append(Curve(title, levels, in_percent(score["curve"]), score.get("thresholds", ())))
        if {"curve_precision", "curve_recall"} <= score.keys():
            recall = [math.nan if value is None else 100 * value for value in score["curve_recall"]]
            against.append(Curve(title, recall, in_percent(score["curve_precision"])))
    charts.append(chart("Cues over the threshold (dots: as chosen)", "threshold", "mIoU in %", over))
    charts.append(chart("Cues: precision over recall", "recall in %", "precision in %", against))
    return "".join(charts) or "<p>This run has no logs and no scores to draw.</p>"


def in_percent(values: Iterable[float | None]) -> list[float | None]:
    """Shares, some of which may be None."""
    return [None if value is None else 100 * value for value in values]
