"""What reproduce.py is asked for, checked before anything is computed: a stage would find it hours later."""

import argparse
import sys
from typing import Any

import evaluate
import export_attention
import make_pseudo_labels
from crf import pydensecrf
from data import VOCFolder
from deeplab import SEGMENTATION_NETWORKS
from networks import BACKBONES
from options import add_options, add_training_arguments, resolve, training_split
from scores import chosen_classes
from seeds import Seed

STAGES = ("attention", "integral", "export", "labels", "segmentation", "evaluation")
OWN = {  # what a training takes beside the options that all trainings have
    "attention": ("--negatives", "--snapshots"),
    "integral": ("--negatives", "--maps"),
    "segmentation": ("--labels",),
}


def check(arguments: argparse.Namespace) -> None:
    """End with a sentence where a stage, a table or a figure would."""
    root, figures, refine = arguments.voc_root, arguments.figure, arguments.refine
    train = VOCFolder(root, Seed(arguments, 0).split, negatives=arguments.negatives)
    told = {stage: read_options(arguments, stage) for stage in STAGES}
    chosen_classes(arguments.score_classes, train.classes)
    if 5 in figures:
        from figures import with_masks

        with_masks(train)
    chooses_level = arguments.background == "threshold" or refine == "crf"
    if arguments.table or (chooses_level and {4, 5} & {*figures}):
        check_scored(VOCFolder(root, arguments.score_split), train)
    if arguments.table or 4 in figures:
        parsed, settings = told["evaluation"]
        VOCFolder(root, training_split(told["segmentation"][0]))
        check_evaluated(VOCFolder(root, parsed.split, labelled=False), drawn=4 in figures)
        chosen_classes(parsed.score_classes, train.classes)
        refine = "crf" if settings.crf_iterations else refine
    if refine == "crf":
        pydensecrf()


def check_scored(data: VOCFolder, train: VOCFolder) -> None:
    """End where the cues of these images cannot be scored."""
    strangers = sorted({*data.names} - {*train.names})
    if strangers:
        raise SystemExit(
            f"--score-split {data.split}: expected a part of {train.split}, whose images have maps; {len(strangers)} "
            f"of {len(data)} images are others, first {strangers[0]}"
        )
    for name in data.names:
        if not data.has_mask(name):
            data.mask(name)  # which ends with the sentence


def check_evaluated(data: VOCFolder, *, drawn: bool) -> None:
    """End where a segmentation network cannot be scored on these images, or figure 4 not be drawn of them."""
    without = [name for name in data.names if not data.has_mask(name)]
    if without and (drawn or len(without) == len(data)):
        needs = "figure 4 needs a mask of each" if drawn else "there is nothing to score"
        raise SystemExit(
            f"{len(without)} of the {len(data)} images of {data.split} have no mask, first {without[0]}: {needs}; "
            "choose another list with --evaluation '--split NAME'"
        )


def read_options(arguments: argparse.Namespace, stage: str) -> tuple[argparse.Namespace, Any]:
    """The further options of a stage, such as --evaluation '...', as its script reads them, and its settings."""
    words = ["--voc-root", arguments.voc_root, "--out", arguments.out, "--recipe", arguments.recipe]
    words += {  # no results are there yet: any folder stands for them
        "export": ["--run", arguments.voc_root, "--source", "cam"],
        "labels": ["--maps", arguments.voc_root, "--background", arguments.background, "--background-level", 0.5]
        + (["--saliency", arguments.saliency] if arguments.saliency else []),
        "evaluation": ["--run", arguments.voc_root],
    }.get(stage, [])
    before, sys.argv = sys.argv, [f"reproduce.py --{stage}", *map(str, words), *getattr(arguments, stage)]
    try:
        if stage == "labels":
            return make_pseudo_labels.parse_arguments()
        scripts = {"export": export_attention.parse_arguments, "evaluation": evaluate.parse_arguments}
        parsed = scripts[stage]() if stage in scripts else training_parser(stage).parse_args()
    finally:
        sys.argv = before
    is_segmentation = stage in ("segmentation", "evaluation")
    backbone = arguments.backbone if is_segmentation else arguments.attention_backbone
    return parsed, resolve(parsed, "labels" if stage == "export" else stage, backbone)


def training_parser(stage: str) -> argparse.ArgumentParser:
    """Of the options of a training's script; what reproduce.py gives it is not required."""
    parser = argparse.ArgumentParser()
    add_training_arguments(parser, SEGMENTATION_NETWORKS if stage == "segmentation" else BACKBONES)
    for option in OWN[stage]:
        parser.add_argument(option)
    add_options(parser, stage)
    return parser
