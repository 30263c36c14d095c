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
from pathlib import Path

from files import ends_with
from preparing.coco import coco
from preparing.folder import folder
from preparing.masks import masks
from preparing.voc import voc


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
