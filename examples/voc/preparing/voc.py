"""PASCAL VOC 2012 with the masks of SBD."""

import argparse
import xml.etree.ElementTree as ET
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from data import VOC_CLASSES
from images import png
from lists import Images, read_names
from texts import listing, same_form

from preparing.checks import attempt, decoded, filled, in_parallel, label_ids, stop_if
from preparing.writing import LISTS, finish, list_texts, refuse_to_change

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


class Checked(NamedTuple):
    """What is known of an image.

    Attributes:
        ids: of its classes.
        problems: with its files.
        has_saliency: whether there is a saliency map, if there are to be some.
    """

    ids: list[int]
    problems: list[str]
    has_saliency: bool


def voc(arguments: argparse.Namespace) -> None:
    """Check PASCAL VOC 2012 + SBD, write {train,val,trainaug}_cls.txt and trainaug.txt to ImageSets/Segmentation.

    trainaug, to train on, is VOC train + SBD without VOC val (10,582 images); cue quality is reported on train (1,464);
    val has 1,449. Labels come from the masks (VOC's own where there are two, else SBD's) or from Annotations/*.xml;
    auto is masks if SBD is there. xml counts every object, also those marked difficult: some labels differ. An existing
    trainaug.txt keeps its order; with it, xml labels need no SBD.
    """
    root, lists = arguments.voc_root, arguments.voc_root / LISTS
    sbd, images = find_sbd(root, arguments.sbd), Images(root / "JPEGImages")
    listed = list(read_names(lists / "trainaug.txt", images)) if (lists / "trainaug.txt").exists() else []
    source = arguments.labels_from if arguments.labels_from != "auto" else "masks" if sbd else "xml"
    hint = f"; did you mean {root / 'VOC2012'}?" if (root / "VOC2012").is_dir() else ""
    stop_if(missing(arguments, sbd, listed, source), f"missing or empty{hint}")
    splits = make_splits(arguments, images, sbd, listed)
    scored = {name: png(root / "SegmentationClass", name) for name in splits["train"] + splits["val"]}
    masks = {name: path for name, path in (sbd | scored).items() if source == "masks" or name in scored}
    names = list(dict.fromkeys(name for split in splits.values() for name in split))
    check = partial(check_image, arguments=arguments, images=images, masks=masks, source=source)
    checked = dict(zip(names, in_parallel(check, names, "images and labels"), strict=True))
    stop_if([problem for image in checked.values() for problem in image.problems], "files that are not as they should")
    texts: dict[Path, str] = {}
    for split, members in splits.items():
        labels = {name: checked[name].ids for name in members}
        texts |= list_texts(root, split, labels)
        tell(split, labels, source)
    for split in ("train", "val"):  # VOC's own, read and left as they are
        del texts[lists / f"{split}.txt"]
    wanted = splits["trainaug"]
    without = [name for name in wanted if not checked[name].has_saliency]
    if without or not arguments.saliency:
        print(f"{len(without) or len(wanted)} of {len(wanted)} training images have no saliency map. {NO_SALIENCY}")
    refuse_to_change(texts, arguments.overwrite)
    finish(root, texts, "voc")


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


def missing(arguments: argparse.Namespace, sbd: dict[str, Path], listed: list[str], source: str) -> list[str]:
    """What is not there, and where to get it."""
    root = arguments.voc_root
    parts = {"JPEGImages": "photographs", "SegmentationClass": "masks of train and val"}
    parts |= {f"{LISTS}/{split}.txt": f"list of the {IMAGES[split]} {split} images" for split in ("train", "val")}
    if source == "xml":
        parts["Annotations"] = "objects of each photograph"
    told = [f"{root / part} ({what}): {VOC_SITE}" for part, what in parts.items() if not filled(root / part)]
    if not sbd and (arguments.sbd or source == "masks" or not listed):
        told.append(f"{arguments.sbd or root / 'SegmentationClassAug'} (SBD's masks): {SBD_SITE}")
    if any(path.suffix == ".mat" for path in sbd.values()) and find_spec("scipy") is None:
        told.append("SBD's .mat files are read by scipy: pip install scipy")
    if arguments.saliency and not filled(arguments.saliency):
        told.append(f"{arguments.saliency} (saliency maps). {NO_SALIENCY}")
    return told


def make_splits(
    arguments: argparse.Namespace, images: Images, sbd: dict[str, Path], listed: list[str]
) -> dict[str, list[str]]:
    """The names of each list; trainaug is VOC train + SBD - VOC val, what is listed first and in its order."""
    lists = arguments.voc_root / LISTS
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
    if not arguments.allow_other_counts:
        stop_if(counts, "the lists are not those of VOC 2012 + SBD; --allow-other-counts goes on with these")
    return splits


def check_image(
    name: str, *, arguments: argparse.Namespace, images: Images, masks: dict[str, Path], source: str
) -> Checked:
    """Decode the photograph and the mask that is needed, and find the classes."""
    root, problems, ids = arguments.voc_root, [], None
    found = images.of(name) or [root / "JPEGImages" / f"{name}.jpg"]
    if len(found) > 1:
        problems.append(f"{name}: expected one image, found {', '.join(path.name for path in found)}")
    seen = attempt(problems, decoded, found[0])
    if name in masks:
        ids = attempt(problems, label_ids, masks[name], seen, len(VOC_CLASSES))
    if source == "xml":
        ids = attempt(problems, xml_ids, root / "Annotations" / f"{name}.xml")
    return Checked(ids or [], problems, not arguments.saliency or png(arguments.saliency, name).exists())


def xml_ids(path: Path) -> list[int]:
    """0-based classes of the objects in a VOC annotation, those marked difficult too: they are in the picture."""
    names = {str(thing.findtext("name")).strip() for thing in ET.parse(path).getroot().findall("object")}
    if not names <= set(VOC_CLASSES):
        raise ValueError(f"{sorted(names - set(VOC_CLASSES))} are none of VOC's 20 classes")
    return sorted(VOC_CLASSES.index(name) for name in names)


def tell(split: str, labels: dict[str, list[int]], source: str) -> None:
    """How many images and pairs a list has, and which images show nothing."""
    pairs = sum(map(len, labels.values()))
    print(f"{split}: {len(labels)} images, {pairs} (image, class) pairs from {source}")
    if split == "trainaug" and pairs != PAIRS:
        print(f"  expected about {PAIRS}, as in the lists in use; masks and xml differ by some")
    empty = [name for name, ids in labels.items() if not ids]
    if empty:
        print(f"  {len(empty)} without any label, kept as showing no class:{listing(empty)}")
