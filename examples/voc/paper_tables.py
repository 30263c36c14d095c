"""The paper's tables: their rows, their numbers from every seed, and how they are printed."""

import argparse
import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bound import source_commit
from files import read_json
from seeds import LOSSES, Seed
from texts import read_lines


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        title: as printed.
        method: whose attention: cam, cam_flip, cam_ms, mean, max, mce, hybrid.
        paper: the paper's mean IoU in percent on VOC 2012 val, by backbone.
        proportion: share of the training images that the segmentation network sees.
    """

    title: str
    method: str
    paper: dict[str, float]
    proportion: float = 1.0


TABLES = {
    1: (
        Row("OAA", "max", {"vgg16": 61.6, "resnet101": 63.9}),
        Row("OAA+", "hybrid", {"vgg16": 63.1, "resnet101": 65.2}),
    ),
    2: (
        Row("CAM", "cam", {"vgg16": 53.9}),
        Row("CAM, flip-averaged", "cam_flip", {}),  # the control: part of what accumulation gives is averaging
        Row("CAM, 4 scales + flip", "cam_ms", {}),  # and the control that spends as much inference as the field does
        Row("OAA, mean (Eq. 10)", "mean", {"vgg16": 57.0}),
        Row("OAA, max (Eq. 5)", "max", {"vgg16": 58.6}),
        Row("OAA+, MCE (Eq. 6)", "mce", {"vgg16": 51.2}),
        Row("OAA+, hybrid (Eq. 9)", "hybrid", {"vgg16": 59.6}),
    ),
    3: (
        Row("20 %", "hybrid", {"vgg16": 54.6}, 0.2),
        Row("50 %", "hybrid", {"vgg16": 57.3}, 0.5),
        Row("80 %", "hybrid", {"vgg16": 58.9}, 0.8),
        Row("100 %", "hybrid", {"vgg16": 59.6}),
    ),
}


def chosen_rows(number: int, methods: list[str] | None) -> list[Row]:
    """The rows of a table that are of these methods, or all."""
    return [row for row in TABLES[number] if methods is None or row.method in methods]


def make_table(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """Run what a table needs; all its numbers."""
    seeds = [Seed(arguments, seed) for seed in arguments.seeds]
    chosen, rows = chosen_rows(number, arguments.rows), []
    for row in chosen:
        each = {}
        for seed in seeds:
            scores = read_json(seed.val(row.method, row.proportion) / "scores.json")
            each[seed.number] = {"val": scores, "background_level": seed.level(row.method)}
            for kind, found in (("cues", seed.cues), ("cues_with_saliency", seed.cues_with_saliency)):
                cues = found(row.method) or {}
                each[seed.number][kind] = {key: value for key, value in cues.items() if not key.startswith("curve")}
        paper = row.paper.get(arguments.backbone, row.paper.get("vgg16"))
        rows.append({"row": row.title, "paper_val": paper, "seeds": each})
    first = seeds[0]
    last = chosen[-1]
    runs = [first.attention(), first.network(last.method, last.proportion)]
    runs += [first.integral(row.method) for row in chosen if row.method in LOSSES]
    return {
        "table": number,
        "commit": source_commit(),
        "trained_at": commits(seeds, chosen),
        "recipe": arguments.recipe,
        "backbone": arguments.backbone,
        "attention_backbone": arguments.attention_backbone,
        "background": first.background,
        "refinement": arguments.refine,
        "data": {
            "root": arguments.voc_root.resolve().name,
            "training_list": first.split,
            "segmentation_list": read_json(runs[1] / "settings.json")["data"]["split"],
            "cues": rows[0]["seeds"][first.number]["cues"]["split"],
            "val": rows[0]["seeds"][first.number]["val"]["split"],
            "score_classes": rows[0]["seeds"][first.number]["cues"]["score_classes"],
        },
        "stages": {run.name: read_json(run / "settings.json") for run in dict.fromkeys(runs)},
        "evaluation": read_json(first.val(last.method, last.proportion) / "settings.json")["settings"],
        "rows": rows,
        "diagnostics": {seed.number: diagnostics(seed, chosen) for seed in seeds},
    }


def commits(seeds: list[Seed], rows: list[Row]) -> list[str]:
    """Those at which the trainings behind a table were begun."""
    runs = [seed.network(row.method, row.proportion) for seed in seeds for row in rows]
    runs += [seed.attention() for seed in seeds]
    runs += [seed.integral(row.method) for seed in seeds for row in rows if row.method in LOSSES]
    return sorted({str(read_json(run / "settings.json")["commit"]) for run in runs})


def diagnostics(seed: Seed, rows: list[Row]) -> dict[str, Any]:
    """What decides whether accumulation pays, from the logs."""

    def read(run: Path) -> list[dict[str, str]]:
        return list(csv.DictReader(read_lines(run / "log.csv")))

    def number(text: str) -> float | None:
        """To three places; None, for JSON, where a row of the log has nothing to say."""
        return None if math.isnan(float(text)) else round(float(text), 3)

    log, told = read(seed.attention()), {}
    if any(row.method == "hybrid" for row in rows):
        told["share_constrained"] = number(read(seed.integral("hybrid"))[-1]["share_constrained"])
    return told | {
        "gate_pass_rate": [number(row["gate_pass_rate"]) for row in log],
        "similarity": [number(row["similarity"]) for row in log],
        "pairs_empty": int(float(log[-1]["pairs_empty"])),
        "accumulation_share": sum(float(r["accumulation_seconds"]) for r in log)
        / sum(float(r["seconds"]) for r in log),
    }


def markdown(table: dict[str, Any]) -> str:
    """The table as people read it."""
    whose = "ResNet-101" if (table["table"], table["backbone"]) == (1, "resnet101") else "VGG-16"
    head = ["Table " + str(table["table"]), f"paper ({whose}), VOC val", "val mIoU", "spread", "per seed"]
    head += ["cues, constant background", "spread", "per seed", "precision", "recall", "labels' background"]
    if table["background"] == "saliency":
        head += ["cues with saliency", "spread", "per seed"]
    rows = [f"| {' | '.join(cells_of(row, table['background']))} |" for row in table["rows"]]
    told = [diagnosis(seed, numbers) for seed, numbers in table["diagnostics"].items()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows, "", caption(table), "", *told]
    return "\n".join(lines) + "\n"


def cells_of(row: dict[str, Any], background: str) -> list[str]:
    """The cells of a row."""

    def cells(values: list[float | None]) -> list[str]:
        percents = [100 * value for value in values if value is not None]
        if len(percents) < len(values):
            return ["-"] * 3
        spread = f"{statistics.stdev(percents):.1f}" if len(percents) > 1 else "-"
        return [f"{statistics.mean(percents):.1f}", spread, " ".join(f"{value:.1f}" for value in percents)]

    seeds = list(row["seeds"].values())
    levels = [f"{seed['background_level']:.2f}" for seed in seeds if seed["background_level"] is not None]
    paper = "-" if row["paper_val"] is None else f"{row['paper_val']:.1f}"
    val, cues = (cells([seed[kind]["mean_iou"] for seed in seeds]) for kind in ("val", "cues"))
    found = [[seed["cues"]["foreground"][share] for seed in seeds] for share in ("precision", "recall")]
    shares = ["-" if None in share else f"{statistics.mean(100 * value for value in share):.0f}" for share in found]
    told = [row["row"], paper, *val, *cues, *shares, " ".join(levels) or background]
    with_saliency = [seed["cues_with_saliency"].get("mean_iou") for seed in seeds]
    return told + (cells(with_saliency) if background == "saliency" else [])


def caption(table: dict[str, Any]) -> str:
    """What the numbers are of."""
    data, one = table["data"], next(iter(table["rows"][0]["seeds"].values()))
    chosen, names = data["score_classes"], one["cues"]["class_iou"]
    means = "all classes that occur" if len(chosen) == len(names) else ", ".join(chosen)
    return (
        f"Recipe {table['recipe']}, attention by {table['attention_backbone']}, segmentation by DeepLab-LargeFOV on "
        f"{table['backbone']}; maps {'refined by ' + table['refinement'] if table['refinement'] else 'as they are'}; "
        f"seeds {' '.join(map(str, table['diagnostics']))}; trained at commit "
        f"{', '.join(table['trained_at'])}, printed at {table['commit']}. Attention trained on "
        f"{data['training_list']} of {data['root']}, segmentation on {data['segmentation_list']}; val: "
        f"{one['val']['images']} images of {data['val']}; cues: {one['cues']['images']} images of {data['cues']}, each "
        f"half scored at the threshold that is best on the other (-: some have no saliency map); means over {means}; "
        "precision and recall in percent of the pixels of all classes. Spread: standard deviation over the seeds."
    )


def diagnosis(seed: str, told: dict[str, Any]) -> str:
    """The line of a seed's log."""

    def numbers(values: list[float | None]) -> str:
        return " ".join("-" if value is None else f"{value:.2f}" for value in values)

    share = told.get("share_constrained")
    constrained = "" if share is None else f"soft labels in N- {share:.0%}; "
    return (
        f"- seed {seed}: gate pass rate by epoch {numbers(told['gate_pass_rate'])}; "
        f"pairs never accumulated {told['pairs_empty']}; cosine similarity of a pair's latest two maps "
        f"{numbers(told['similarity'])}; {constrained}"
        f"accumulation {told['accumulation_share']:.2%} of the training time"
    )
