"""Stage 0: check a data set and bring it into the layout that the other stages read.

  prepare.py voc     PASCAL VOC 2012 with the SBD masks: checks all of it, writes the lists and the image-level labels
  prepare.py folder  any folder of images and a CSV table of labels
  prepare.py coco    COCO 2014, through pycocotools
  prepare.py masks   masks painted in VOC's colours (RGB) into label images

Every image is decoded whole: a truncated file is found here, not in the third epoch. What is wrong is listed, all at
once. Lists are written last; one that is there and differs is replaced only with --overwrite.
"""

import argparse
import inspect
import io
import os
import random
import re
import shutil
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from data import VOC_CLASSES, write_label
from files import ends_with, whole_file, write_text
from images import DRAWN, Look, load, look, photograph, png, turned
from label_tables import Labelled, read_folder
from lists import Images, check_classes, listing, read_names, same_form
from tqdm import tqdm

from oaa_lib.plotting import voc_palette

LISTS = Path("ImageSets/Segmentation")
IMAGES = {"train": 1464, "val": 1449, "trainaug": 10582}  # trainaug = VOC train + all of SBD - VOC val
PAIRS = 15555  # (image, class) pairs of trainaug
VOC_SITE = "VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
SBD_SITE = (
    "SBD, 11,355 further masks: benchmark.tgz (benchmark_RELEASE/dataset/cls/*.mat, needs scipy) from "
    "http://home.bharathh.info/pubs/codes/SBD/download.html, or the same as PNG in a folder SegmentationClassAug, as "
    "many segmentation projects pass on; unpacked into the VOC folder or named by --sbd"
)
NO_SALIENCY = (
    "Saliency maps are no part of VOC: run a salient object detector (e.g. https://github.com/backseason/PoolNet; for "
    "the paper's maps see https://github.com/PengtaoJiang/OAA) and save 8-bit NAME.png. Without, make_pseudo_labels.py "
    "takes another background cue, chosen explicitly: --background saliency|threshold|power."
)


def stop_if(problems: Sequence[str], what: str) -> None:
    """End with all problems in one message, if there are any."""
    if problems:
        raise SystemExit(f"{what} ({len(problems)}; no list was changed):{listing(problems)}")


def in_parallel(work: Callable[[Any], Any], jobs: Sequence[Any], description: str) -> list[Any]:
    """``work`` of every job, in order, on all cores; threads, since Pillow and numpy work outside Python's lock."""
    with ThreadPool(os.cpu_count()) as pool:
        return list(tqdm(pool.imap(work, jobs), total=len(jobs), desc=description))


def filled(path: Path) -> bool:
    """Whether ``path`` is a file or a folder, and not empty; hidden files do not count."""
    if path.is_dir():
        return any(not entry.name.startswith(".") for entry in path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def refuse_to_change(texts: dict[Path, str], overwrite: bool) -> None:
    """End if a file is there with another text."""
    differing = [
        f"{path}: {len(path.read_bytes().splitlines())} lines, would become {len(text.splitlines())}"
        for path, text in texts.items()
        if path.exists() and path.read_bytes() != text.encode()
    ]
    if not overwrite:
        stop_if(differing, "these files are there and differ; --overwrite replaces them")


def write_texts(texts: dict[Path, str]) -> int:
    """Write the files that are not there as they should be, each whole or not at all; returns how many."""
    changed = {path: text for path, text in texts.items() if not path.exists() or path.read_bytes() != text.encode()}
    for path, text in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return len(changed)


def list_texts(root: Path, split: str, labels: dict[str, list[int]]) -> dict[Path, str]:
    """``SPLIT.txt`` and ``SPLIT_cls.txt``; a line without id is an image that shows none of the classes."""
    names = "".join(f"{name}\n" for name in labels)
    with_ids = "".join(
        f"{name}\t{' '.join(map(str, ids))}\n" if len(name.split()) > 1 else " ".join(map(str, [name, *ids])) + "\n"
        for name, ids in labels.items()
    )
    return {root / LISTS / f"{split}.txt": names, root / LISTS / f"{split}_cls.txt": with_ids}


def decoded(path: Path) -> Look:
    """Size and orientation of a photograph that was decoded whole."""
    photograph(path)
    return look(path)


def label_ids(path: Path, seen: Look | None, num_classes: int) -> list[int]:
    """0-based classes in a label image (indexed PNG, or SBD's .mat), which is checked on the way."""
    if path.suffix == ".mat":
        from scipy.io import loadmat

        label = loadmat(path)["GTcls"][0, 0]["Segmentation"]
    else:
        image = load(path, DRAWN)
        if image.mode not in ("P", "L"):
            raise ValueError(f"mode {image.mode}; expected class indices (prepare.py masks converts VOC's colours)")
        label = np.asarray(image)
    if seen is not None:
        turned(label, seen)  # raises where it does not fit
    values = np.flatnonzero(np.bincount(label.ravel(), minlength=256)).tolist()
    wrong = [value for value in values if num_classes < value != 255]
    if wrong:
        raise ValueError(f"values {wrong[:5]}; expected 0..{num_classes} and 255 (are these grey levels of colours?)")
    return [value - 1 for value in values if 0 < value < 255]


def xml_ids(path: Path) -> list[int]:
    """0-based classes of the objects in a VOC annotation, those marked difficult too: they are in the picture."""
    names = {str(thing.findtext("name")).strip() for thing in ET.parse(path).getroot().findall("object")}
    if not names <= set(VOC_CLASSES):
        raise ValueError(f"{sorted(names - set(VOC_CLASSES))} are none of VOC's 20 classes")
    return sorted(VOC_CLASSES.index(name) for name in names)


def attempt(problems: list[str], function: Callable[..., Any], path: Path, *arguments: Any) -> Any:
    """``function(path, ...)``, or None with what is wrong with the file added to the problems."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise ValueError("it is no regular file")
        return function(path, *arguments)
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except Exception as error:  # Pillow, scipy and the XML parser raise all kinds at a broken file
        problems.append(f"{path}: {error}")
    return None


def find_sbd(root: Path, given: Path | None) -> dict[str, Path]:
    """SBD's masks by image name, from the first place in ``given``, else in the VOC folder, that has some."""
    places = ["SegmentationClassAug", "benchmark_RELEASE/dataset/cls", "dataset/cls", "cls", "."]
    for place in [given / part for part in places] if given else [root / part for part in places[:2]]:
        files = [*place.glob("*.png"), *place.glob("*.mat")]
        files = [path for path in files if not path.name.startswith(".")]  # "._NAME.png": left by macOS
        masks = {same_form(path.stem): path for path in files}
        if masks:
            return masks
    return {}


def voc(arguments: argparse.Namespace) -> None:
    """Check PASCAL VOC 2012 + SBD, write {train,val,trainaug}_cls.txt and trainaug.txt to ImageSets/Segmentation.

    trainaug, to train on, is VOC train + SBD without VOC val (10,582 images); cue quality is reported on train (1,464);
    val has 1,449. Labels come from the masks (VOC's own where there are two, else SBD's) or from Annotations/*.xml;
    auto is masks if SBD is there. xml counts every object, also those marked difficult: some labels differ. An existing
    trainaug.txt keeps its order; with it, xml labels need no SBD.
    """
    root, lists = arguments.voc_root, arguments.voc_root / LISTS
    sbd = find_sbd(root, arguments.sbd)
    images = Images(root / "JPEGImages")
    listed = list(read_names(lists / "trainaug.txt", images)) if (lists / "trainaug.txt").exists() else []
    source = arguments.labels_from if arguments.labels_from != "auto" else "masks" if sbd else "xml"
    parts = {"JPEGImages": "photographs", "SegmentationClass": "masks of train and val"}
    parts |= {f"{LISTS}/{split}.txt": f"list of the {IMAGES[split]} {split} images" for split in ("train", "val")}
    if source == "xml":
        parts["Annotations"] = "objects of each photograph"
    missing = [f"{root / part} ({what}): {VOC_SITE}" for part, what in parts.items() if not filled(root / part)]
    if not sbd and (arguments.sbd or source == "masks" or not listed):
        missing.append(f"{arguments.sbd or root / 'SegmentationClassAug'} (SBD's masks): {SBD_SITE}")
    if any(path.suffix == ".mat" for path in sbd.values()) and find_spec("scipy") is None:
        missing.append("SBD's .mat files are read by scipy: pip install scipy")
    if arguments.saliency and not filled(arguments.saliency):
        missing.append(f"{arguments.saliency} (saliency maps). {NO_SALIENCY}")
    hint = f"; did you mean {root / 'VOC2012'}?" if (root / "VOC2012").is_dir() else ""
    stop_if(missing, f"missing or empty{hint}")

    splits = {split: list(read_names(lists / f"{split}.txt", images)) for split in ("train", "val")}
    val = set(splits["val"])
    wanted = ({*splits["train"], *sbd} if sbd else set(listed)) - val
    if listed and set(listed) != wanted and not arguments.overwrite:
        raise SystemExit(
            f"{lists / 'trainaug.txt'} lists {len(set(listed))} images, {len(val & set(listed))} of them in val; "
            f"expected VOC train + SBD - VOC val, {len(wanted)} images; --overwrite replaces it"
        )
    splits["trainaug"] = [name for name in listed if name in wanted] + sorted(wanted - set(listed))
    counts = [
        f"{split}: {len(names)} images, VOC has {IMAGES[split]}"
        for split, names in splits.items()
        if len(set(names)) != IMAGES[split]
    ]
    if counts and not arguments.allow_other_counts:
        stop_if(counts, "the lists are not those of VOC 2012 + SBD; --allow-other-counts goes on with these")

    scored = {name: png(root / "SegmentationClass", name) for name in splits["train"] + splits["val"]}
    mask_of = sbd | scored

    def check(name: str) -> tuple[list[int], list[str], bool]:
        problems: list[str] = []
        found = images.of(name) or [root / "JPEGImages" / f"{name}.jpg"]
        if len(found) > 1:
            problems.append(f"{name}: expected one image, found {', '.join(path.name for path in found)}")
        seen = attempt(problems, decoded, found[0])
        if source == "masks" or name in scored:
            ids = attempt(problems, label_ids, mask_of[name], seen, len(VOC_CLASSES))
        if source == "xml":
            ids = attempt(problems, xml_ids, root / "Annotations" / f"{name}.xml")
        salient = not arguments.saliency or png(arguments.saliency, name).exists()
        return ids or [], problems, salient

    names = list(dict.fromkeys(name for split in splits.values() for name in split))
    checked = dict(zip(names, in_parallel(check, names, "images and labels"), strict=True))
    stop_if([problem for _, found, _ in checked.values() for problem in found], "files that are not as they should")
    texts: dict[Path, str] = {}
    for split, members in splits.items():
        labels = {name: checked[name][0] for name in members}
        texts |= list_texts(root, split, labels)
        pairs = sum(map(len, labels.values()))
        print(f"{split}: {len(labels)} images, {pairs} (image, class) pairs from {source}")
        if split == "trainaug" and pairs != PAIRS:
            print(f"  expected about {PAIRS}, as in the lists in use; masks and xml differ by some")
        empty = [name for name, ids in labels.items() if not ids]
        if empty:
            print(f"  {len(empty)} without any label, kept as showing no class:{listing(empty)}")
    for split in ("train", "val"):  # VOC's own, read and left as they are
        del texts[lists / f"{split}.txt"]
    without = [name for name in splits["trainaug"] if not checked[name][2]]
    if without or not arguments.saliency:
        print(f"{len(without) or len(wanted)} of {len(wanted)} training images have no saliency map. {NO_SALIENCY}")
    refuse_to_change(texts, arguments.overwrite)
    finish(root, texts, "voc")


def finish(root: Path, texts: dict[Path, str], name: str, negatives: bool = False) -> None:
    """Write the lists and say what comes next."""
    written = write_texts(texts)
    print(f"done: {written} files written, {len(texts) - written} were there -> {root / LISTS}")
    options = " --negatives background" if negatives else ""
    print(f"next: python examples/voc/train_attention.py --voc-root {root} --out runs/{name}/attention{options}")


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where links cannot be made; the file appears whole or not at all."""
    with whole_file(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), partial)
        except OSError:
            shutil.copyfile(source, partial)


def place(source: Path, target: Path) -> None:
    """The photograph as JPEG: linked, or converted where it is of another format or turned by its EXIF entry."""
    seen = look(source)
    if seen.format in ("JPEG", "MPO") and seen.orientation == 1:
        return link(source, target)
    with whole_file(target) as partial:
        photograph(source).save(partial, format="JPEG", quality=95)


def place_mask(source: Path, target: Path, seen: Look) -> None:
    """The label image beside the upright photograph: linked, or turned as the photograph was."""
    label = np.asarray(load(source, DRAWN))
    upright = turned(label, seen)
    if upright is label:
        return link(source, target)
    write_label(target, upright)


def folder(arguments: argparse.Namespace) -> None:
    """Any folder of images and a CSV to a folder in VOC layout.

    The CSV has a header image,labels, or rows FILE,LABELS without one. image is a file below --images (its ending may
    be left out), labels are class names separated by ';', a JSON list, or one row for each class; without ';' several
    words are several classes only if each is known from other rows or --classes. Rows without labels become
    background.txt, negatives for --negatives background; images without a row are passed over, images that cannot be
    read are listed in skipped.txt. JPEGs are linked or copied, other formats converted, and turned upright. Class ids
    follow --classes (one name a line), else the alphabet; masks (indexed PNG, class c is c + 1) need it.
    """
    if not 0 <= arguments.val_share < 1:
        raise SystemExit(f"--val-share: expected a share in [0, 1), got {arguments.val_share}")
    if arguments.masks and not arguments.classes:
        raise SystemExit("--masks needs --classes: a file with a class name a line, in the order of the masks' values")
    for path in (arguments.classes, arguments.masks):
        if path is not None and not filled(path):
            raise SystemExit(f"{path} is missing or empty")
    classes, labelled, unused = read_folder(arguments.images, arguments.csv, arguments.classes)
    members: dict[str, list[Labelled]] = defaultdict(list)
    for image in labelled:
        members[re.sub(r"\s+", "_", same_form(image.path.stem))].append(image)
    problems = [
        f"{name}: {len(found)} rows or files of this name: {', '.join(str(image.path) for image in found)}"
        for name, found in members.items()
        if len(found) > 1
    ]
    stop_if(problems, f"{arguments.csv} and {arguments.images} do not fit")

    unreadable: dict[str, list[str]] = {name: [] for name in sorted(members)}
    bad_masks, other_classes, mask_of, in_masks = [], [], {}, set()

    def check(name: str) -> None:
        path, _, ids = members[name][0]
        seen = attempt(unreadable[name], decoded, path)
        mask = png(arguments.masks, path.stem) if arguments.masks else None
        if seen and mask and mask.exists():
            mask_of[name] = mask, seen
            shown = attempt(bad_masks, label_ids, mask, seen, len(classes)) or []
            in_masks.update(shown)
            if not set(shown) <= set(ids):
                other_classes.append(f"{mask}: {[classes[c] for c in shown]}, table: {[classes[c] for c in ids]}")

    in_parallel(check, list(unreadable), "images")
    stop_if(sorted(bad_masks), "masks that are not as they should")
    if mask_of and not in_masks and any(members[name][0].ids for name in mask_of):
        raise SystemExit(
            f"{arguments.masks}: the {len(mask_of)} masks show none of the {len(classes)} classes, only 0 (background) "
            "and 255 (ignored); expected class c as the value c + 1: a mask of 0 and 255 needs 1 in place of 255"
        )
    good = [name for name, problems in unreadable.items() if not problems]
    labels = {name: members[name][0].ids for name in good if members[name][0].ids}
    shuffled = list(labels)
    random.Random(arguments.seed).shuffle(shuffled)
    held_out = max(1, round(arguments.val_share * len(shuffled))) if arguments.val_share else 0
    if len(shuffled) <= held_out:
        raise SystemExit(f"{len(shuffled)} readable labelled images are too few for --val-share {arguments.val_share}")
    out, negatives = arguments.out, [name for name in good if name not in labels]
    skipped = [problem for problems in unreadable.values() for problem in problems]
    texts = {out / "classes.txt": "".join(f"{c}\n" for c in classes)}
    for split, chosen in (("train", shuffled[held_out:]), ("val", shuffled[:held_out])):
        texts |= list_texts(out, split, {name: labels[name] for name in sorted(chosen)})
    texts[out / LISTS / "background.txt"] = "".join(f"{name}\n" for name in negatives)
    texts[out / "skipped.txt"] = "".join(f"{line}\n" for line in skipped)
    refuse_to_change(texts, arguments.overwrite)

    for part in ("JPEGImages", "SegmentationClass"):
        (out / part).mkdir(parents=True, exist_ok=True)

    def bring(name: str) -> None:
        if not (out / "JPEGImages" / f"{name}.jpg").exists():
            place(members[name][0].path, out / "JPEGImages" / f"{name}.jpg")
        if name in mask_of and not (out / "SegmentationClass" / f"{name}.png").exists():
            place_mask(mask_of[name][0], out / "SegmentationClass" / f"{name}.png", mask_of[name][1])

    in_parallel(bring, good, "writing")
    if unused:
        print(f"{len(unused)} images have no row in the table and are passed over:{listing(map(str, unused))}")
    if skipped:
        print(f"{len(skipped)} images cannot be read and are passed over, see skipped.txt:{listing(skipped)}")
    if other_classes:
        print(f"{len(other_classes)} masks show classes that the table does not name:{listing(sorted(other_classes))}")
    if arguments.masks:
        absent = [classes[c] for c in sorted({c for ids in labels.values() for c in ids} - in_masks)]
        if absent:
            print(f"{len(absent)} of {len(classes)} classes are in none of the masks:{listing(absent)}")
        print(f"{len(labels.keys() - mask_of.keys())} of {len(labels)} labelled images have no mask, for scoring")
    print(f"{len(classes)} classes: {', '.join(classes)}")
    print(f"{len(shuffled) - held_out} train, {held_out} val, {len(negatives)} negatives, seed {arguments.seed}")
    finish(out, texts, out.resolve().name, negatives=bool(negatives))


def coco(arguments: argparse.Namespace) -> None:
    """COCO 2014 to a folder in VOC layout: 80 classes, images hard-linked, label images painted from the instances.

    Reads annotations/instances_{train,val}2014.json, train2014 and val2014. Class ids are COCO's categories in order, 0
    to 79. In label images smaller instances lie on top of larger ones; crowds, below all others, are 255. Crowds count
    for the image-level labels too. Training images without objects become background.txt; val keeps all its images.
    Can be stopped and started again.
    """
    root, out = arguments.coco_root, arguments.out
    parts = [part for s in ("train", "val") for part in (f"annotations/instances_{s}2014.json", f"{s}2014")]
    where = "COCO 2014 images and train/val annotations from https://cocodataset.org/#download"
    missing = [f"{root / part}: {where}" for part in parts if not filled(root / part)]
    if find_spec("pycocotools") is None:
        missing.append("the annotations are read by pycocotools: pip install pycocotools")
    stop_if(missing, "missing or empty")
    indices = {split: read_annotations(root / f"annotations/instances_{split}2014.json") for split in ("train", "val")}
    names = {split: {c["id"]: c["name"] for c in index.cats.values()} for split, index in indices.items()}
    if names["train"] != names["val"]:
        raise SystemExit(f"the train and val annotations of {root} have different categories")
    ids = {category: c for c, category in enumerate(sorted(names["train"]))}
    classes = [names["train"][category].replace(" ", "_") for category in ids]
    check_classes([(f"category {category}", name) for category, name in zip(ids, classes, strict=True)])
    texts = {out / "classes.txt": "".join(f"{name}\n" for name in classes)}
    jobs: dict[str, tuple[Path, str, dict[str, Any]]] = {}
    twice = []
    for split, index in indices.items():
        labels = {}
        for record in sorted(index.imgs.values(), key=lambda record: record["file_name"]):
            source = root / f"{split}2014" / record["file_name"]
            name = re.sub(r"\s+", "_", same_form(source.stem))
            if name in jobs:
                twice.append(f"{name}: {jobs[name][0]} and {source}")
            jobs[name] = source, split, record
            labels[name] = sorted({ids[a["category_id"]] for a in index.imgToAnns[record["id"]]})
        if split == "train":
            negatives = [name for name, found in labels.items() if not found]
            texts[out / LISTS / "background.txt"] = "".join(f"{name}\n" for name in negatives)
            labels = {name: found for name, found in labels.items() if found}
        texts |= list_texts(out, split, labels)
        print(f"{split}: {len(labels)} images, {sum(map(len, labels.values()))} (image, class) pairs")
    stop_if(twice, "images of one name")
    refuse_to_change(texts, arguments.overwrite)
    for part in ("JPEGImages", "SegmentationClass"):
        (out / part).mkdir(parents=True, exist_ok=True)

    def bring(source: Path, name: str, split: str, record: dict[str, Any]) -> None:
        seen, shape = decoded(source), (record["height"], record["width"])
        if shape not in (seen.size, seen.stored):
            raise ValueError(f"{seen.size[1]} x {seen.size[0]} pixels, the annotations say {shape[1]} x {shape[0]}")
        instances = [(a, indices[split].annToMask(a) > 0) for a in indices[split].imgToAnns[record["id"]]]
        label = np.zeros(shape, dtype=np.uint8)
        for a, pixels in sorted(instances, key=lambda each: (not is_crowd(each[0]), -area_of(*each))):
            label[pixels] = 255 if is_crowd(a) else ids[a["category_id"]] + 1
        label = turned(label, seen)
        place(source, out / "JPEGImages" / f"{name}.jpg")
        write_label(out / "SegmentationClass" / f"{name}.png", label)  # last: its presence means both are there

    problems: list[str] = []
    new = [name for name in jobs if not (out / "SegmentationClass" / f"{name}.png").exists()]
    in_parallel(lambda name: attempt(problems, bring, jobs[name][0], name, *jobs[name][1:]), new, "images and masks")
    stop_if(sorted(problems), "images that cannot be used; the others are there, the next run does only these")
    print(f"{len(negatives)} training images without objects in background.txt")
    finish(out, texts, out.resolve().name, negatives=bool(negatives))


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


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether it is of a group; not where it does not say so."""
    return bool(annotation.get("iscrowd", 0))


def area_of(annotation: dict[str, Any], pixels: np.ndarray) -> float:
    """What it says, or else the pixels that it covers."""
    area = annotation.get("area")
    return float(pixels.sum() if area is None else area)


def masks(arguments: argparse.Namespace) -> None:
    """Masks painted in VOC's colours (RGB PNG) to indexed label images in another folder; existing ones are kept."""
    files = Images(arguments.masks, endings=(".png",)).paths
    if not files or arguments.masks.resolve() == arguments.out.resolve():
        raise SystemExit(f"--masks {arguments.masks}: expected a folder with *.png, other than --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = np.array([1 << 16, 1 << 8, 1])
    codes = voc_palette().astype(int) @ weights
    order = np.argsort(codes)

    def convert(path: Path) -> None:
        pixels = np.asarray(load(path, DRAWN).convert("RGB")) @ weights
        label = order[np.searchsorted(codes, pixels, sorter=order).clip(max=255)]
        foreign = pixels[codes[label] != pixels]
        if foreign.size:
            raise ValueError(
                f"{foreign.size} pixels have none of VOC's colours, e.g. #{foreign[0]:06x}; was it resized?"
            )
        write_label(arguments.out / path.name, label)

    problems: list[str] = []
    new = [path for path in files if not (arguments.out / path.name).exists()]
    in_parallel(lambda path: attempt(problems, convert, path), new, "masks")
    stop_if(sorted(problems), "masks that cannot be converted; the others are")
    print(f"done: {len(new)} label images written, {len(files) - len(new)} were there -> {arguments.out}")


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="voc | folder | coco | masks")
    of: dict[str, argparse.ArgumentParser] = {}
    for command in (voc, folder, coco, masks):
        of[command.__name__] = commands.add_parser(
            command.__name__, description=inspect.getdoc(command), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        of[command.__name__].set_defaults(run=command)
        if command is not masks:
            of[command.__name__].add_argument("--overwrite", action="store_true", help="replace lists that differ")
    of["voc"].add_argument("--voc-root", type=Path, required=True, help="VOCdevkit/VOC2012")
    of["voc"].add_argument("--sbd", type=Path, help="SegmentationClassAug or benchmark_RELEASE (default: VOC_ROOT)")
    of["voc"].add_argument("--labels-from", choices=("auto", "masks", "xml"), default="auto")
    of["voc"].add_argument("--saliency", type=Path, help="folder of saliency maps NAME.png, to see which are missing")
    of["voc"].add_argument("--allow-other-counts", action="store_true", help="go on with lists of other lengths")
    of["folder"].add_argument("--images", type=Path, required=True, help="folder of images, sub-folders too")
    of["folder"].add_argument("--csv", type=Path, required=True, help="table: image,labels")
    of["folder"].add_argument("--classes", type=Path, help="file of class names, one a line, in the order of their ids")
    of["folder"].add_argument("--masks", type=Path, help="folder of label images NAME.png, for scoring")
    of["folder"].add_argument("--val-share", type=float, default=0.2, help="share held out as val (default: 0.2)")
    of["folder"].add_argument("--seed", type=int, default=0, help="decides which are held out (default: 0)")
    of["coco"].add_argument("--coco-root", type=Path, required=True, help="folder of annotations, train2014, val2014")
    of["masks"].add_argument("--masks", type=Path, required=True, help="folder of colour masks NAME.png")
    for name in ("folder", "coco", "masks"):
        of[name].add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    with ends_with(
        f"prepare.py {arguments.run.__name__}", "what is written stays; the same command goes on from there"
    ):
        arguments.run(arguments)


if __name__ == "__main__":
    main()
