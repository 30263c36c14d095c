"""What reproduce.py is asked for, checked before anything is computed: a stage would find it hours later."""

import argparse
from typing import Any

import evaluate
import export_attention
import make_pseudo_labels
import train_attention
import train_integral
import train_segmentation
from crf import pydensecrf
from data import VOCFolder
from options import resolve, training_split
from scores import chosen_classes
from seeds import Seed

STAGES = {
    "attention": train_attention,
    "integral": train_integral,
    "export": export_attention,
    "labels": make_pseudo_labels,
    "segmentation": train_segmentation,
    "evaluation": evaluate,
}
OWN = {  # what reproduce.py chooses for every stage; another choice would contradict the table or a later stage
    *("--voc-root", "--out", "--recipe", "--device", "--workers", "--seed", "--backbone", "--negatives", "--split"),
    *("--maps", "--run", "--source", "--labels", "--saliency", "--background", "--proportion", "--part"),
}
ELSEWHERE = {"segmentation": {"--split"}, "evaluation": {"--split"}}  # their lists may be others
NEEDED = {  # what a stage is given that its options do not say; no results are there yet: any folder stands for them
    "integral": ["--maps", "."],
    "export": ["--run", ".", "--source", "cam"],
    "labels": ["--maps", ".", "--background-level", "0.5"],
    "segmentation": ["--labels", "."],
    "evaluation": ["--run", "."],
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
        train_segmentation.check_crop(arguments.backbone, told["segmentation"][1].crop)
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
    data.check_masks()


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
    words = ["--voc-root", str(arguments.voc_root), "--out", str(arguments.out), "--recipe", arguments.recipe]
    words += NEEDED.get(stage, [])
    if stage == "labels":
        words += ["--background", arguments.background]
        words += ["--saliency", str(arguments.saliency)] if arguments.saliency else []
    given = getattr(arguments, stage)
    own = {*OWN, *(["--background-level"] if arguments.background == "threshold" else [])}
    taken = sorted({word.split("=")[0] for word in given} & (own - ELSEWHERE.get(stage, set())))
    if taken:
        raise SystemExit(f"--{stage} '{' '.join(given)}': reproduce.py chooses {taken[0]} itself (see its --help)")
    try:
        parsed = STAGES[stage].parse_arguments(words + given)
    except SystemExit as stop:
        if stop.code != 2:  # of argparse, which has printed what is wrong
            raise
        raise SystemExit(f"--{stage} '{' '.join(given)}': these options cannot be used, see above") from None
    if stage == "labels":
        return parsed
    is_segmentation = stage in ("segmentation", "evaluation")
    backbone = arguments.backbone if is_segmentation else arguments.attention_backbone
    return parsed, resolve(parsed, "labels" if stage == "export" else stage, backbone)
