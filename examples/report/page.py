"""The page: tables and texts as HTML, and the file that holds everything."""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from charts import curves
from choose import choose
from finished_run import FinishedRun
from pictures import pictures

TEMPLATE = Path(__file__).resolve().with_suffix(".html")


def escape(text: object) -> str:
    """Text as HTML, quotes included."""
    return html.escape(str(text), quote=True)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls within itself where the screen is narrow; the first cell of a row names it."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def percent(value: float | None) -> str:
    """A share, to a tenth of a percent."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def summary(run: FinishedRun) -> str:
    """Scores of each method, and of each class."""
    val, rows = run.val(), []
    scores = {method.title: method.scores or {} for method in run.methods.values()}
    for title in dict.fromkeys([*scores, *val]):
        cues, shares = scores.get(title, {}), scores.get(title, {}).get("foreground", {})
        levels = " / ".join(f"{level:.2f}" for level in cues.get("thresholds", [])) or "-"
        values = [cues.get("mean_iou"), shares.get("precision"), shares.get("recall"), cues.get("oracle_mean_iou")]
        if cues or title in val:
            rows.append([title, *map(percent, values), levels, percent(val.get(title, {}).get("mean_iou"))])
    if not rows:
        return "<p>Nothing has been scored in this run.</p>"
    head = ["", "cues, mIoU", "precision", "recall", "best mIoU", "thresholds", "val mIoU"]
    parts = [table("Scores in percent", head, rows)]
    for caption, found in (
        ("IoU of each class in percent: cues", {title: s for title, s in scores.items() if s}),
        ("IoU of each class in percent: segmentation networks on val", val),
    ):
        by_class = {title: score["class_iou"] for title, score in found.items() if "class_iou" in score}
        if by_class:
            names = ["background", *run.data.classes]
            body = [[name, *(percent(values.get(name)) for values in by_class.values())] for name in names]
            inner = table(caption, ["", *by_class], body)
            parts.append(f"<details><summary>{escape(caption)}</summary>{inner}</details>")
    return "".join(parts)


def facts(run: FinishedRun, voc_root: Path) -> str:
    """What the run is."""
    arguments, recipe, data = run.settings["arguments"], run.settings["recipe"], run.settings["data"]
    lists = " and ".join(name for name in (data["split"], arguments.get("negatives")) if name)
    known = {
        "data": f"{voc_root.resolve().name}, {lists}: {data['images']} images, {len(data['classes'])} classes",
        "classifier": f"{arguments['backbone']}, {recipe['iterations']} iterations of {recipe['batch_size']} images",
        "recipe": arguments["recipe"],
        "seed": arguments["seed"],
        "commit": run.settings.get("commit") or "not known",
    }
    if run.final is not None:
        total = run.final.statistics()
        known["pairs"] = (
            f"{run.final.pairs.num_pairs}, of which {int(total.never_accumulated.sum())} hold nothing; "
            f"{run.final.accepted / max(run.final.offered, 1):.0%} of the maps passed the gate"
        )
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in known.items())


def definitions(run: FinishedRun, failure: float, most: int) -> str:
    """How gain and failure are meant."""
    ours = escape(run.methods[run.best].title)
    return f"""<p><b>IoU</b> of a pair, an image and one of its classes: at the threshold of the method's own
scores.json, each half of the images at the one that is best on the other half. A pixel takes the class of its strongest
map, or background below the threshold. <b>Gain</b>: the pair's IoU with {ours} minus that with the CAM, in points.
<b>Failure</b>: its IoU with {ours} is below {100 * failure:g} %. (The paper's figure 4 has &ldquo;failure cases&rdquo;
of its segmentation networks; it does not say what makes one.) Shown are all watched images, and of the scored training
images the {most} largest gains and the {most} worst failures. In labels white is ignored.</p>"""


def make_page(run: FinishedRun, voc_root: Path, *, most: int, failure: float) -> str:
    """The whole file."""
    pairs = choose(run, most=most, failure=failure)
    shown = pictures(run, pairs, failure)
    missing = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.missing())
    parts = {
        "title": escape(f"Attention accumulation: {run.path.resolve().name} on {voc_root.resolve().name}"),
        "facts": facts(run, voc_root),
        "missing": f"<aside><h2>Not in this run</h2><ul>{missing}</ul></aside>" if missing else "",
        "summary": summary(run),
        "curves": curves(run),
        "definitions": definitions(run, failure, most),
        # "<" would let a name end the script element
        "data": json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
