"""The paper's tables and figures: runs every stage for every seed, skips what is done, puts the paper's numbers beside.

    python examples/voc/reproduce.py --voc-root VOCdevkit/VOC2012 --saliency SALIENCY --out runs/voc --table 2
    python examples/voc/reproduce.py --voc-root VOCdevkit/VOC2012 --saliency SALIENCY --out runs/voc --figure 5

Table 1: OAA and OAA+ with a backbone. Table 2: how attention is accumulated and what OAA+ is trained with. Table 3:
OAA+ for a share of the training images. Each row has the mean IoU on val of a segmentation network trained on the row's
proxy labels, and that of the cues themselves on the training images, each half of these scored at the threshold that is
best on the other. A constant background (--background threshold) is, for each row, the threshold that is best on the
even half. --score-classes chooses the classes of every mean, and --score-split the list with masks that cues are scored
on (a part of the training list); that of the segmentation network is chosen by --evaluation '--split NAME'. With
--refine the maps follow the photograph's edges (refine_cues.py) before they are scored and made into labels; then
everything after has a folder of its own beside the others (tableN_crf.md, labels/max_crf).

Writes tableN.md, tableN.json and figureN.jpg. Stopped at any moment, the same command goes on. Seeds can run side by
side: start `--seeds 0` and `--seeds 1` in two shells, then `--seeds 0 1` to print both.
"""

import argparse
import csv
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crf import pydensecrf
from data import VOCFolder, write_text
from evaluate_cues import add_score_classes, chosen_classes, evaluate_maps, names_of
from lists import read_lines
from networks import BACKBONES
from recipes import RECIPES
from training import read_json, source_commit, training_split

HERE = Path(__file__).parent


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
LOSSES = {"mce": ["--loss", "mce", "--threshold", "0"], "hybrid": []}  # the paper's cross entropy has no threshold


class Seed:
    """Everything of one seed. Each method makes what it needs first, and returns the folder, or scores, that it makes.

    Args:
        arguments: of this script.
        seed: its number.
    """

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.number = arguments, seed
        self.folder: Path = arguments.out / f"seed{seed}"
        self.background: str = arguments.background
        # Of the folders of all that is made from refined maps.
        self.suffix = f"_{arguments.refine}" if arguments.refine else ""

    def attention(self) -> Path:
        """Stage 1, the classifier and its accumulated attention."""
        options = self._training(self.arguments.attention_backbone) + self._negatives()
        return self._stage("train_attention.py", "attention", [*options, *self.arguments.attention])

    def integral(self, loss: str) -> Path:
        """Stage 2, an integral attention model."""
        maps = self.attention() / "max.safetensors"
        options = self._training(self.arguments.attention_backbone) + self._negatives()
        options += ["--maps", maps, *LOSSES[loss], *self.arguments.integral]
        return self._stage("train_integral.py", loss, options)

    def exported(self, method: str) -> Path:
        """Attention of the training images at their size."""
        run, source = (self.integral(method), "integral") if method in LOSSES else (self.attention(), method)
        options = ["--run", run, "--source", source, "--split", self.split, *self._recipe(), *self.arguments.export]
        return self._stage("export_attention.py", f"maps/{method}", options, data=True)

    def maps(self, method: str) -> Path:
        """The maps that become labels: attention as it is exported, or refined."""
        exported, refine = self.exported(method), self.arguments.refine
        if not refine:
            return exported
        options = ["--maps", exported, "--split", self.split, "--method", refine]
        if refine == "crf":  # its background: the threshold that is best for the unrefined maps, above 0 as it asks
            options += ["--background-level", self.scores(exported)["thresholds"][1] or 1 / 255]
        else:
            options += ["--device", self.arguments.device]
        return self._stage("refine_cues.py", f"maps/{method}{self.suffix}", options)

    def scores(self, maps: Path) -> dict[str, Any]:
        """Scores of a folder of maps on the images of VOC's train split, which have masks of VOC's quality."""
        record, data = maps / "scores.json", VOCFolder(self.arguments.voc_root, self.arguments.score_split)
        scored = chosen_classes(self.arguments.score_classes, data.classes)
        asked = {"split": data.split, "score_classes": names_of(scored, data.classes)}
        found = read_json(record) if record.exists() else {}
        if any(found.get(key) != value for key, value in asked.items()):
            write_text(record, json.dumps(evaluate_maps(data, maps, scored=scored)))
        return read_json(record)

    def cues(self, method: str) -> dict[str, Any]:
        """Scores of the maps that become labels."""
        return self.scores(self.maps(method))

    def level(self, method: str) -> float | None:
        """The constant background: that which is best on the even half of the train split; None with another cue."""
        return self.cues(method)["thresholds"][1] if self.background == "threshold" else None

    def labels(self, method: str) -> Path:
        """Stage 3, proxy labels."""
        options = ["--maps", self.maps(method), "--split", self.split, "--background", self.background, *self._recipe()]
        if self.background == "saliency":
            options += ["--saliency", self.arguments.saliency]
        elif self.background == "threshold":
            options += ["--background-level", self.level(method), "--foreground-threshold", 0]  # the level decides
        return self._stage("make_pseudo_labels.py", f"labels/{method}{self.suffix}", [*options, *self.arguments.labels])

    def network(self, method: str, proportion: float = 1.0) -> Path:
        """Stage 4, a segmentation network on a share of the images."""
        options = [*self._training(self.arguments.backbone), "--labels", self.labels(method)]
        options += ["--split", self.split, "--proportion", proportion, *self.arguments.segmentation]
        name = f"{method}{self.suffix}_{proportion:.0%}".rstrip("%")
        return self._stage("train_segmentation.py", f"networks/{name}", options)

    def val(self, method: str, proportion: float = 1.0) -> Path:
        """Stage 5, the network's label images of val, and scores.json."""
        run = self.network(method, proportion)
        options = ["--run", run, *self._recipe(), *self.arguments.evaluation]
        if self.arguments.score_classes is not None:
            options += ["--score-classes", self.arguments.score_classes]
        return self._stage("evaluate.py", f"val/{run.name}", options, data=True)

    @property
    def split(self) -> str:
        """The list of the training images."""
        return training_split(argparse.Namespace(voc_root=self.arguments.voc_root, split=None))

    def _recipe(self) -> list[Any]:
        return ["--recipe", self.arguments.recipe]

    def _training(self, backbone: str) -> list[Any]:
        options = ["--backbone", backbone, "--weights", self.arguments.weights, "--seed", self.number]
        return [*options, *self._recipe(), *(["--amp"] if self.arguments.amp else [])]

    def _negatives(self) -> list[Any]:
        return ["--negatives", self.arguments.negatives] if self.arguments.negatives else []

    def _stage(self, script: str, name: str, options: Sequence[Any], *, data: bool | None = None) -> Path:
        """Run a script into a folder of this seed, unless it ran to its end with these options before."""
        out = self.folder / name
        options, done = [str(option) for option in options], out / "done.txt"
        told = " ".join([script, *options])
        if done.is_file() and done.read_bytes() == told.encode():
            return out
        trains = script.startswith("train_")
        free: list[Any] = ["--voc-root", self.arguments.voc_root, "--out", out]
        if trains or data:
            free += ["--device", self.arguments.device, "--workers", self.arguments.workers]
        launch(script, [*options, *map(str, free)], self.arguments.processes if trains else 1)
        write_text(done, told)
        return out


def launch(script: str, options: list[str], processes: int) -> None:
    """Run one script; stop everything if it fails."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print("$", " ".join(["python", *start[1:], f"examples/voc/{script}", *options]), flush=True)
    with subprocess.Popen([*start, str(HERE / script), *options]) as stage:
        before = signal.signal(signal.SIGTERM, lambda *_: stage.terminate())  # nothing outlives this script
        stage.wait()
        signal.signal(signal.SIGTERM, before)
    if stage.returncode:
        raise SystemExit(f"{script} stopped; when the cause is mended this same command goes on from there")


def make_table(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """Run what a table needs; all its numbers."""
    seeds = [Seed(arguments, seed) for seed in arguments.seeds]
    rows = []
    for row in TABLES[number]:
        each = {}
        for seed in seeds:
            scores = read_json(seed.val(row.method, row.proportion) / "scores.json")
            cues = {key: value for key, value in seed.cues(row.method).items() if not key.startswith("curve")}
            each[seed.number] = {"val": scores, "cues": cues, "background_level": seed.level(row.method)}
        paper = row.paper.get(arguments.backbone, row.paper.get("vgg16"))
        rows.append({"row": row.title, "paper_val": paper, "seeds": each})
    first = seeds[0]
    runs = [first.attention(), first.network(TABLES[number][-1].method)]
    runs += [first.integral(row.method) for row in TABLES[number] if row.method in LOSSES]
    return {
        "table": number,
        "commit": source_commit(),
        "recipe": arguments.recipe,
        "backbone": arguments.backbone,
        "attention_backbone": arguments.attention_backbone,
        "background": first.background,
        "refinement": arguments.refine,
        "data": {
            "root": arguments.voc_root.resolve().name,
            "training_list": first.split,
            "cues": rows[0]["seeds"][first.number]["cues"]["split"],
            "val": rows[0]["seeds"][first.number]["val"]["split"],
            "score_classes": rows[0]["seeds"][first.number]["cues"]["score_classes"],
        },
        "stages": {run.name: read_json(run / "settings.json") for run in dict.fromkeys(runs)},
        "evaluation": read_json(first.val(TABLES[number][-1].method) / "settings.json")["settings"],
        "rows": rows,
        "diagnostics": {seed.number: diagnostics(seed) for seed in seeds},
    }


def diagnostics(seed: Seed) -> dict[str, Any]:
    """What decides whether accumulation pays, from the logs."""

    def read(run: Path) -> list[dict[str, str]]:
        return list(csv.DictReader(read_lines(run / "log.csv")))

    log, integral = read(seed.attention()), read(seed.integral("hybrid"))
    return {
        "gate_pass_rate": [round(float(row["gate_pass_rate"]), 3) for row in log],
        "similarity": [round(float(row["similarity"]), 3) for row in log],
        "pairs_empty": int(float(log[-1]["pairs_empty"])),
        "share_constrained": round(float(integral[-1]["share_constrained"]), 3),
        "accumulation_share": sum(float(r["accumulation_seconds"]) for r in log)
        / sum(float(r["seconds"]) for r in log),
    }


def markdown(table: dict[str, Any]) -> str:
    """The table as people read it."""

    def cells(values: list[float]) -> list[str]:
        spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "-"
        return [f"{statistics.mean(values):.1f}", spread, " ".join(f"{value:.1f}" for value in values)]

    head = ["Table " + str(table["table"]), "paper, VOC val", "val mIoU", "spread", "per seed"]
    head += ["cues, train mIoU", "spread", "per seed", "precision", "recall", "background"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table["rows"]:
        seeds = list(row["seeds"].values())
        levels = [f"{seed['background_level']:.2f}" for seed in seeds if seed["background_level"] is not None]
        paper = "-" if row["paper_val"] is None else f"{row['paper_val']:.1f}"
        val = cells([100 * seed["val"]["mean_iou"] for seed in seeds])
        cues = cells([100 * seed["cues"]["mean_iou"] for seed in seeds])
        found = [[seed["cues"]["foreground"][share] for seed in seeds] for share in ("precision", "recall")]
        shares = ["-" if None in share else f"{statistics.mean(100 * value for value in share):.0f}" for share in found]
        cells_of_row = [row["row"], paper, *val, *cues, *shares, " ".join(levels) or table["background"]]
        lines.append(f"| {' | '.join(cells_of_row)} |")
    one = next(iter(table["rows"][0]["seeds"].values()))
    chosen, names = table["data"]["score_classes"], one["cues"]["class_iou"]
    means = "all classes that occur" if len(chosen) == len(names) else ", ".join(chosen)
    lines += [
        "",
        f"Recipe {table['recipe']}, attention by {table['attention_backbone']}, segmentation by DeepLab-LargeFOV on "
        f"{table['backbone']}; maps {'refined by ' + table['refinement'] if table['refinement'] else 'as they are'}; "
        f"seeds {' '.join(map(str, table['diagnostics']))}; commit {table['commit']}. Trained on "
        f"{table['data']['training_list']} of {table['data']['root']}; val: {one['val']['images']} images of "
        f"{table['data']['val']}; cues: {one['cues']['images']} images of {table['data']['cues']}, each half scored at "
        f"the threshold that is best on the other; means over {means}; "
        "precision and recall in percent of the pixels of all classes. Spread: standard deviation over the seeds.",
        "",
    ]
    for seed, told in table["diagnostics"].items():
        lines.append(
            f"- seed {seed}: gate pass rate by epoch {' '.join(f'{rate:.2f}' for rate in told['gate_pass_rate'])}; "
            f"pairs never accumulated {told['pairs_empty']}; cosine similarity of a pair's latest two maps "
            f"{' '.join(f'{value:.2f}' for value in told['similarity'])}; soft labels in N- "
            f"{told['share_constrained']:.0%}; accumulation {told['accumulation_share']:.2%} of the training time"
        )
    return "\n".join(lines) + "\n"


def make_figure(arguments: argparse.Namespace, number: int) -> None:
    """Run what a figure needs with the first seed, and draw it."""
    import figures

    seed = Seed(arguments, arguments.seeds[0])
    out = arguments.out / f"figure{number}{seed.suffix}.jpg"
    train = VOCFolder(arguments.voc_root, seed.split)
    if number == 1:
        figures.wandering(train, seed.attention(), out)
    elif number == 4:
        val = VOCFolder(arguments.voc_root, "val")
        figures.segmentations(val, {"OAA": seed.val("max"), "OAA+": seed.val("hybrid")}, out)
    else:
        titles = {"CAM": "cam", "OAA": "max", "OAA+": "hybrid", "OAA+-MCE": "mce"}
        maps = {title: seed.maps(method) for title, method in titles.items()}
        figures.comparison(train, seed.attention(), maps, seed.labels("hybrid"), out)
    print(f"done: figure {number} of seed {seed.number} -> {out}")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder of all results; what is done there is skipped")
    parser.add_argument("--table", type=int, choices=TABLES, nargs="+", default=[])
    parser.add_argument("--figure", type=int, choices=(1, 4, 5), nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help="default: paper")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16", help="of the segmentation network")
    parser.add_argument(
        "--attention-backbone", choices=BACKBONES, help="of the classifier (default: vgg16 for a ResNet, else the same)"
    )
    parser.add_argument("--weights", choices=("default", "none"), default="default", help="default: ImageNet's")
    parser.add_argument("--negatives", help="list of images that show no class, mixed into stages 1 and 2")
    parser.add_argument("--background", choices=("saliency", "threshold", "power"), help="default: the recipe's")
    parser.add_argument("--saliency", type=Path, help="folder of 8-bit saliency maps NAME.png")
    parser.add_argument(
        "--refine",
        choices=("pamr", "crf"),
        help="let the maps follow the photograph's edges first (default: as they are)",
    )
    for stage in ("attention", "integral", "export", "labels", "segmentation", "evaluation"):
        parser.add_argument(
            f"--{stage}", type=str.split, default=[], help="further options of this stage, in one string: '--lr 1e-4'"
        )
    add_score_classes(parser)
    parser.add_argument("--score-split", default="train", help="list of the images that cues are scored on")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--processes", type=int, default=1, help="GPUs that a training runs on (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images (default: 2)")
    arguments = parser.parse_args()
    if not arguments.table and not arguments.figure:
        parser.error("say what to make: --table 1 2 3, --figure 1 4 5")
    arguments.background = arguments.background or RECIPES[arguments.recipe].labels.background
    if (arguments.background == "saliency") != (arguments.saliency is not None):
        parser.error(
            "the background cue is --background saliency with --saliency FOLDER, or --background threshold|power; got "
            f"{arguments.background}"
            + (f" and --saliency {arguments.saliency}" if arguments.saliency else " without --saliency")
        )
    if arguments.attention_backbone is None:
        arguments.attention_backbone = "vgg16" if arguments.backbone.startswith("resnet") else arguments.backbone
    if arguments.refine == "crf":
        pydensecrf()  # now, rather than after the trainings

    for number in arguments.table:
        table = make_table(arguments, number)
        text = markdown(table)
        out = arguments.out / f"table{number}{Seed(arguments, 0).suffix}.md"
        write_text(out.with_suffix(".json"), json.dumps(table, indent=1))
        write_text(out, text)
        print(f"\n{text}\ndone: {out}")
    for number in arguments.figure:
        make_figure(arguments, number)


if __name__ == "__main__":
    main()
