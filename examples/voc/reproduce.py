"""The paper's tables and figures: runs every stage for every seed, skips what is done, puts the paper's numbers beside.

    python examples/voc/reproduce.py --voc-root VOCdevkit/VOC2012 --saliency SALIENCY --out runs/voc --table 2
    python examples/voc/reproduce.py --voc-root VOCdevkit/VOC2012 --saliency SALIENCY --out runs/voc --figure 5

Table 1: OAA and OAA+ with a backbone. Table 2: how attention is accumulated and what OAA+ is trained with. Table 3:
OAA+ for a share of the training images. Each row has the mean IoU on val of a segmentation network trained on the row's
proxy labels, and that of the cues themselves on the training images, each half of these scored at the threshold that is
best on the other: with a constant background, and with saliency where the labels have it. A constant (--background
threshold) is, for each row, the threshold that is best on the even half. --score-classes chooses the classes of every
mean, and --score-split the list with masks that cues are scored on (a part of the training list); that of the
segmentation network is chosen by --evaluation '--split NAME'. With --refine the maps follow the photograph's edges
(refine_cues.py) before they are scored and made into labels; then everything after has a folder of its own beside the
others (tableN_crf.md, labels/max_crf). --rows leaves out what need not be trained: `--rows cam max` is a table of two
rows.

Writes tableN.md, tableN.json and figureN.jpg, in place of those of an earlier command: a table has the rows and seeds
of the last one, and a command that names more makes it again from the results that are kept. Stopped at any moment, the
same command goes on, with --out in the same words. Seeds can run side by side: start `--seeds 0` and `--seeds 1` in two
shells and, when both are done, `--seeds 0 1` to print both.
"""

import argparse
import json
from pathlib import Path

import torch
from beforehand import STAGES, check, read_options
from data import VOCFolder
from deeplab import SEGMENTATION_NETWORKS
from files import write_text
from networks import BACKBONES
from options import seed_number
from paper_tables import TABLES, chosen_rows, make_table, markdown
from recipes import RECIPES
from scores import add_score_classes
from seeds import Seed


def main() -> None:
    """Run what is asked for."""
    arguments = parse_arguments()
    for number in arguments.seeds if arguments.table else arguments.seeds[:1]:  # a figure is of the first
        Seed(arguments, number).bind()
    for number in arguments.table:
        table = make_table(arguments, number)
        text = markdown(table)
        out = arguments.out / f"table{number}{Seed(arguments, 0).suffix}.md"
        write_text(out.with_suffix(".json"), json.dumps(table, indent=1, allow_nan=False))
        write_text(out, text)
        print(f"\n{text}\ndone: {out}")
    for number in arguments.figure:
        make_figure(arguments, number)


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder of all results; what is done there is skipped")
    parser.add_argument("--table", type=int, choices=TABLES, nargs="+", default=[])
    parser.add_argument(
        "--rows",
        choices=dict.fromkeys(row.method for rows in TABLES.values() for row in rows),
        nargs="+",
        help="rows of the tables, by the maps that they are of (default: all)",
    )
    parser.add_argument("--figure", type=int, choices=(1, 4, 5), nargs="+", default=[])
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help="default: paper")
    parser.add_argument(
        "--backbone", choices=[*SEGMENTATION_NETWORKS], default="vgg16", help="of the segmentation network"
    )
    parser.add_argument(
        "--attention-backbone",
        choices=[*BACKBONES],
        help="of the classifier (default: vgg16 for a ResNet, else the same)",
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
    for stage in STAGES:
        parser.add_argument(
            f"--{stage}",
            type=str.split,
            default=[],
            help="further options of this stage, in one string: '--lr 1e-4'"
            + " (MCE keeps the paper's loss, threshold and N-)" * (stage == "integral"),
        )
    add_score_classes(parser)
    parser.add_argument("--score-split", default="train", help="list of the images that cues are scored on")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, if any"
    )
    parser.add_argument("--processes", type=int, default=1, help="GPUs that a training runs on (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images (default: 2)")
    arguments = parser.parse_args()
    if not arguments.table and not arguments.figure:
        parser.error("say what to make: --table 1 2 3, --figure 1 4 5")
    for method in arguments.rows or ():
        if not any(chosen_rows(number, [method]) for number in arguments.table):
            parser.error(f"--rows {method}: none of the tables asked for (--table) has that row")
    for number in arguments.table:
        if not chosen_rows(number, arguments.rows):
            parser.error(f"table {number} has no row of {' or '.join(arguments.rows)} (--rows)")
    arguments.background = arguments.background or RECIPES[arguments.recipe].labels.background
    if (arguments.background == "saliency") != (arguments.saliency is not None):
        parser.error(
            "the background cue is --background saliency with --saliency FOLDER, or --background threshold|power; got "
            f"{arguments.background}"
            + (f" and --saliency {arguments.saliency}" if arguments.saliency else " without --saliency")
        )
    if arguments.saliency and not arguments.saliency.is_dir():
        raise SystemExit(f"{arguments.saliency} is missing: expected a folder of saliency maps (--saliency)")
    if arguments.attention_backbone is None:
        arguments.attention_backbone = "vgg16" if arguments.backbone.startswith("resnet") else arguments.backbone
    check(arguments)  # now, rather than after the trainings
    return arguments


def make_figure(arguments: argparse.Namespace, number: int) -> None:
    """Run what a figure needs with the first seed, and draw it."""
    import figures  # and matplotlib, which tables do without

    seed = Seed(arguments, arguments.seeds[0])
    out = arguments.out / f"figure{number}{seed.suffix}.jpg"
    train = VOCFolder(arguments.voc_root, seed.split)
    if number == 1:
        figures.wandering(train, seed.attention(), out)
    elif number == 4:
        val = VOCFolder(arguments.voc_root, read_options(arguments, "evaluation")[0].split)
        figures.segmentations(val, {"OAA": seed.val("max"), "OAA+": seed.val("hybrid")}, out)
    else:
        titles = {"CAM": "cam", "OAA": "max", "OAA+": "hybrid", "OAA+-MCE": "mce"}
        maps = {title: seed.maps(method) for title, method in titles.items()}
        figures.comparison(train, seed.attention(), maps, seed.labels("hybrid"), out)
    print(f"done: figure {number} of seed {seed.number} -> {out}")


if __name__ == "__main__":
    main()
