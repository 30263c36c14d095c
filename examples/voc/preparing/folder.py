"""Any folder of images with a table of labels."""

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from images import Look, png
from label_tables import Labelled, read_folder
from texts import listing, same_form

from preparing.checks import attempt, decoded, filled, in_parallel, label_ids, stop_if
from preparing.writing import LISTS, finish, list_texts, place, place_mask, refuse_to_change


def folder(arguments: argparse.Namespace) -> None:
    """Any folder of images and a CSV to a folder in VOC layout.

    The CSV has a header image,labels, or rows FILE,LABELS without one. image is a file below --images (its ending may
    be left out), labels are class names separated by ';', a JSON list, or one row for each class; without ';' several
    words are several classes only if each is known from other rows or --classes. Rows without labels become
    background.txt, negatives for --negatives background; images without a row are passed over, images that cannot be
    read are listed in skipped.txt. JPEGs are linked or copied, other formats converted, and turned upright. Class ids
    follow --classes (one name a line), else the alphabet; masks (indexed PNG, class c is c + 1) need it.
    """
    check_arguments(arguments)
    classes, labelled, unused = read_folder(arguments.images, arguments.csv, arguments.classes)
    images = by_name(arguments, labelled)
    unreadable: dict[str, list[str]] = {name: [] for name in sorted(images)}
    masks = Masks(arguments, classes)

    def check(name: str) -> None:
        seen = attempt(unreadable[name], decoded, images[name].path)
        if seen:
            masks.check(name, images[name], seen)

    in_parallel(check, list(unreadable), "images")
    masks.stop_if_bad(images)
    good = [name for name, problems in unreadable.items() if not problems]
    labels = {name: images[name].ids for name in good if images[name].ids}
    splits = divide(list(labels), arguments)
    negatives = [name for name in good if name not in labels]
    skipped = [problem for problems in unreadable.values() for problem in problems]
    out = arguments.out
    texts = {out / "classes.txt": "".join(f"{c}\n" for c in classes)}
    for split, names in splits.items():
        texts |= list_texts(out, split, {name: labels[name] for name in names})
    texts[out / LISTS / "background.txt"] = "".join(f"{name}\n" for name in negatives)
    texts[out / "skipped.txt"] = "".join(f"{line}\n" for line in skipped)
    refuse_to_change(texts, arguments.overwrite)
    bring(out, {name: images[name].path for name in good}, masks.of)
    if unused:
        print(f"{len(unused)} images have no row in the table and are passed over:{listing(map(str, unused))}")
    if skipped:
        print(f"{len(skipped)} images cannot be read and are passed over, see skipped.txt:{listing(skipped)}")
    masks.tell(labels)
    train, val = (len(splits[split]) for split in ("train", "val"))
    print(f"{len(classes)} classes: {', '.join(classes)}")
    print(f"{train} train, {val} val, {len(negatives)} negatives, seed {arguments.seed}")
    finish(out, texts, out.resolve().name, negatives=bool(negatives))


def check_arguments(arguments: argparse.Namespace) -> None:
    """End where options do not fit each other, or files are missing."""
    if not 0 <= arguments.val_share < 1:
        raise SystemExit(f"--val-share: expected a share in [0, 1), got {arguments.val_share}")
    if arguments.masks and not arguments.classes:
        raise SystemExit("--masks needs --classes: a file with a class name a line, in the order of the masks' values")
    for path in (arguments.classes, arguments.masks):
        if path is not None and not filled(path):
            raise SystemExit(f"{path} is missing or empty")


def by_name(arguments: argparse.Namespace, labelled: Sequence[Labelled]) -> dict[str, Labelled]:
    """The images by the names that they get: without sub-folder, ending and spaces, so each must be the only one."""
    members: dict[str, list[Labelled]] = defaultdict(list)
    for image in labelled:
        members[re.sub(r"\s+", "_", same_form(image.path.stem))].append(image)
    problems = [
        f"{name}: {len(found)} rows or files of this name: {', '.join(str(image.path) for image in found)}"
        for name, found in members.items()
        if len(found) > 1
    ]
    stop_if(problems, f"{arguments.csv} and {arguments.images} do not fit")
    return {name: found[0] for name, found in members.items()}


class Masks:
    """The label images that belong to the photographs, if any are given, and what is wrong with them.

    Attributes:
        of: of each image its mask, and what its photograph looks like.
    """

    def __init__(self, arguments: argparse.Namespace, classes: list[str]) -> None:
        self.folder, self.classes = arguments.masks, classes
        self.of: dict[str, tuple[Path, Look]] = {}
        self.bad: list[str] = []
        self.other_classes: list[str] = []
        self.shown: set[int] = set()

    def check(self, name: str, image: Labelled, seen: Look) -> None:
        """Decode the mask of an image, if it has one."""
        mask = png(self.folder, image.path.stem) if self.folder else None
        if mask is None or not mask.exists():
            return
        self.of[name] = mask, seen
        shown = attempt(self.bad, label_ids, mask, seen, len(self.classes)) or []
        self.shown.update(shown)
        if not set(shown) <= set(image.ids):
            in_mask, in_table = ([self.classes[c] for c in ids] for ids in (shown, image.ids))
            self.other_classes.append(f"{mask}: {in_mask}, table: {in_table}")

    def stop_if_bad(self, images: dict[str, Labelled]) -> None:
        """End where some cannot be used, or all are of 0 and 255."""
        stop_if(sorted(self.bad), "masks that are not as they should")
        if self.of and not self.shown and any(images[name].ids for name in self.of):
            raise SystemExit(
                f"{self.folder}: the {len(self.of)} masks show none of the {len(self.classes)} classes, only 0 "
                "(background) and 255 (ignored); expected class c as the value c + 1: a mask of 0 and 255 needs 1 in "
                "place of 255"
            )

    def tell(self, labels: dict[str, list[int]]) -> None:
        """Where masks and table differ, and what has no mask."""
        if self.other_classes:
            others = listing(sorted(self.other_classes))
            print(f"{len(self.other_classes)} masks show classes that the table does not name:{others}")
        if self.folder:
            named = {c for ids in labels.values() for c in ids}
            absent = [self.classes[c] for c in sorted(named - self.shown)]
            if absent:
                print(f"{len(absent)} of {len(self.classes)} classes are in none of the masks:{listing(absent)}")
            print(f"{len(labels.keys() - self.of.keys())} of {len(labels)} labelled images have no mask, for scoring")


def divide(names: list[str], arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The images of train and val, drawn by the seed."""
    random.Random(arguments.seed).shuffle(names)
    held_out = max(1, round(arguments.val_share * len(names))) if arguments.val_share else 0
    if len(names) <= held_out:
        raise SystemExit(f"{len(names)} readable labelled images are too few for --val-share {arguments.val_share}")
    return {"train": sorted(names[held_out:]), "val": sorted(names[:held_out])}


def bring(out: Path, photographs: dict[str, Path], masks: dict[str, tuple[Path, Look]]) -> None:
    """Photographs and masks into the folder, those that are not there."""
    for part in ("JPEGImages", "SegmentationClass"):
        (out / part).mkdir(parents=True, exist_ok=True)

    def bring_one(name: str) -> None:
        if not (out / "JPEGImages" / f"{name}.jpg").exists():
            place(photographs[name], out / "JPEGImages" / f"{name}.jpg")
        if name in masks and not (out / "SegmentationClass" / f"{name}.png").exists():
            place_mask(masks[name][0], out / "SegmentationClass" / f"{name}.png", masks[name][1])

    in_parallel(bring_one, list(photographs), "writing")
