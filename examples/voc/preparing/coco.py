"""COCO 2014."""

import argparse
import io
import re
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from class_names import check_classes
from data import write_label
from images import turned
from texts import same_form

from preparing.checks import attempt, decoded, filled, in_parallel, stop_if
from preparing.writing import LISTS, finish, list_texts, place, refuse_to_change


class Job(NamedTuple):
    """An image of COCO.

    Attributes:
        source: the photograph.
        index: of the annotations that it is in.
        record: what they say of the image.
    """

    source: Path
    index: Any
    record: dict[str, Any]


def coco(arguments: argparse.Namespace) -> None:
    """COCO 2014 to a folder in VOC layout: 80 classes, images hard-linked, label images painted from the instances.

    Reads annotations/instances_{train,val}2014.json, train2014 and val2014. Class ids are COCO's categories in order, 0
    to 79. In label images smaller instances lie on top of larger ones; crowds, below all others, are 255. Crowds count
    for the image-level labels too. Training images without objects become background.txt; val keeps all its images.
    Can be stopped and started again.
    """
    root, out = arguments.coco_root, arguments.out
    indices = annotations_of(root)
    ids, classes = classes_of(root, indices)
    texts = {out / "classes.txt": "".join(f"{name}\n" for name in classes)}
    jobs: dict[str, Job] = {}
    negatives: list[str] = []
    twice: list[str] = []
    for split, index in indices.items():
        labels = {}
        for record in sorted(index.imgs.values(), key=lambda record: record["file_name"]):
            source = root / f"{split}2014" / record["file_name"]
            name = re.sub(r"\s+", "_", same_form(source.stem))
            if name in jobs:
                twice.append(f"{name}: {jobs[name].source} and {source}")
            jobs[name] = Job(source, index, record)
            labels[name] = sorted({ids[a["category_id"]] for a in index.imgToAnns[record["id"]]})
        if split == "train":
            negatives = [name for name, found in labels.items() if not found]
            texts[out / LISTS / "background.txt"] = "".join(f"{name}\n" for name in negatives)
            labels = {name: found for name, found in labels.items() if found}
        texts |= list_texts(out, split, labels)
        print(f"{split}: {len(labels)} images, {sum(map(len, labels.values()))} (image, class) pairs")
    stop_if(twice, "images of one name")
    refuse_to_change(texts, arguments.overwrite)
    bring(out, jobs, ids)
    print(f"{len(negatives)} training images without objects in background.txt")
    finish(out, texts, out.resolve().name, negatives=bool(negatives))


def annotations_of(root: Path) -> dict[str, Any]:
    """The index of each split's annotations, if all of COCO is there."""
    parts = [part for s in ("train", "val") for part in (f"annotations/instances_{s}2014.json", f"{s}2014")]
    where = "COCO 2014 images and train/val annotations from https://cocodataset.org/#download"
    missing = [f"{root / part}: {where}" for part in parts if not filled(root / part)]
    if find_spec("pycocotools") is None:
        missing.append("the annotations are read by pycocotools: pip install pycocotools")
    stop_if(missing, "missing or empty")
    return {split: read_annotations(root / f"annotations/instances_{split}2014.json") for split in ("train", "val")}


def read_annotations(path: Path) -> Any:
    """The index of pycocotools, of annotations that have all that is needed; iscrowd and area may be left out."""
    from pycocotools.coco import COCO

    try:
        with redirect_stdout(io.StringIO()):
            index = COCO(path)
        images, annotations = index.dataset["images"], index.dataset["annotations"]
        problems = [
            f"image {i['id']}: no {key}" for i in images for key in ("file_name", "height", "width") if key not in i
        ]
        problems += [f"category {c['id']}: no name" for c in index.cats.values() if not c.get("name")]
        problems += [
            f"image {i['id']}: the file {i['file_name']!r} is not below the images' folder"
            for i in images
            if "file_name" in i and (Path(i["file_name"]).is_absolute() or ".." in Path(i["file_name"]).parts)
        ]
        for a in annotations:
            place = f"annotation {a['id']} of image {a['image_id']}"
            if a["image_id"] not in index.imgs:
                problems.append(f"{place}: there is no such image")
            if a["category_id"] not in index.cats:
                problems.append(f"{place}: there is no category {a['category_id']}")
            if not a.get("segmentation"):
                problems.append(f"{place}: no segmentation to paint")
        if len(images) != len(index.imgs):
            problems.append(f"{len(images)} images have {len(index.imgs)} different ids")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read as COCO annotations ({type(error).__name__}: {error})") from error
    stop_if(problems, f"{path}: annotations that cannot be used")
    return index


def classes_of(root: Path, indices: dict[str, Any]) -> tuple[dict[int, int], list[str]]:
    """The class id of each category, and the names of the classes."""
    names = {split: {c["id"]: c["name"] for c in index.cats.values()} for split, index in indices.items()}
    if names["train"] != names["val"]:
        raise SystemExit(f"the train and val annotations of {root} have different categories")
    ids = {category: c for c, category in enumerate(sorted(names["train"]))}
    classes = [names["train"][category].replace(" ", "_") for category in ids]
    check_classes([(f"category {category}", name) for category, name in zip(ids, classes, strict=True)])
    return ids, classes


def bring(out: Path, jobs: dict[str, Job], ids: dict[int, int]) -> None:
    """Photographs and painted label images into the folder, those that are not there."""
    for part in ("JPEGImages", "SegmentationClass"):
        (out / part).mkdir(parents=True, exist_ok=True)

    def bring_one(source: Path, name: str) -> None:
        label = paint(jobs[name], ids)
        place(source, out / "JPEGImages" / f"{name}.jpg")
        write_label(out / "SegmentationClass" / f"{name}.png", label)  # last: its presence means both are there

    problems: list[str] = []
    new = [name for name in jobs if not (out / "SegmentationClass" / f"{name}.png").exists()]
    in_parallel(lambda name: attempt(problems, bring_one, jobs[name].source, name), new, "images and masks")
    stop_if(sorted(problems), "images that cannot be used; the others are there, the next run does only these")


def paint(job: Job, ids: dict[int, int]) -> np.ndarray:
    """The label image (H, W) of an image's instances, upright: small ones on large ones, crowds below all as 255."""
    seen, shape = decoded(job.source), (job.record["height"], job.record["width"])
    if shape not in (seen.size, seen.stored):
        raise ValueError(f"{seen.size[1]} x {seen.size[0]} pixels, the annotations say {shape[1]} x {shape[0]}")
    instances = [(a, job.index.annToMask(a) > 0) for a in job.index.imgToAnns[job.record["id"]]]
    label = np.zeros(shape, dtype=np.uint8)
    for a, pixels in sorted(instances, key=lambda each: (not is_crowd(each[0]), -area_of(*each))):
        label[pixels] = 255 if is_crowd(a) else ids[a["category_id"]] + 1
    return turned(label, seen)


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether it is of a group; not where it does not say so."""
    return bool(annotation.get("iscrowd", 0))


def area_of(annotation: dict[str, Any], pixels: np.ndarray) -> float:
    """What it says, or else the pixels that it covers."""
    area = annotation.get("area")
    return float(pixels.sum() if area is None else area)
