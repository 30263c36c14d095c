"""OAA on your own pictures: a folder of images, and a CSV that says what they show.

    python examples/custom_dataset.py --images photos --csv labels.csv --out run      # rows such as a.jpg,dog;cat

The CSV is read like that of voc/prepare.py folder, to the same classes, and photographs are upright as there.
Random crops and flips are undone by the accumulator, whose maps are kept by file name in run/attention.maps: after a
crash the same command with --resume goes on with the maps (the network starts anew here; see voc/train_attention.py for
all of it). Afterwards run/maps holds NAME_CLASS.png for each image and class.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import get_model
from torchvision.transforms import v2
from tqdm import tqdm

from oaa_lib import AttentionAccumulator, interop, wrap_classifier
from oaa_lib.augmentation import WithViews

sys.path.append(str(Path(__file__).resolve().parent / "voc"))

from bound import Bound
from files import ends_with
from images import photograph
from label_tables import read_folder
from options import seed_number
from texts import listing


class Pictures(torch.utils.data.Dataset[Image.Image]):
    """The images of a CSV, in its order.

    Args:
        folder: with the images, in sub-folders too.
        table: rows FILE,CLASS;CLASS;..., with or without a header image,labels.
        class_file: class names, one a line, in the order of their ids; None: those of the table, sorted.

    Attributes:
        names: of the files; one in a sub-folder is FOLDER_FILE.
        classes: of the ids from 0.
        labels: (N, C) 0/1.
    """

    def __init__(self, folder: Path, table: Path, class_file: Path | None = None) -> None:
        self.classes, images, _ = read_folder(folder, table, class_file)
        self.paths = [image.path for image in images]
        self.names = [image.name.replace("/", "_") for image in images]  # maps are files of these names
        twice = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if twice:
            raise SystemExit(f"{table}: images whose maps would have one name ({len(twice)}):{listing(twice)}")
        if not self.classes:
            raise SystemExit(f"{table} names no class")
        self.labels = torch.zeros(len(images), len(self.classes))
        for row, image in enumerate(images):
            self.labels[row, image.ids] = 1

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return photograph(self.paths[index])
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"{self.paths[index]} cannot be read ({error}); replace it, or take its row away"
            ) from error


def main() -> None:
    """Train a classifier of torchvision on the pictures and keep its attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--csv", type=Path, required=True, help="rows FILE,CLASS;CLASS;...")
    parser.add_argument("--classes", type=Path, help="file of class names, one a line, in the order of their ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet18", help="of torchvision.models (default: resnet18)")
    parser.add_argument("--weights", help="of torchvision, such as DEFAULT (default: none)")
    parser.add_argument("--size", type=int, default=224, help="side of a crop (default: 224)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=seed_number, default=0, help="of weights, order and crops (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the maps in --out, if there are any")
    arguments = parser.parse_args()
    for name, least in (("size", 64), ("batch_size", 1), ("epochs", 1)):  # size: batch norm needs more than one cell
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(arguments, name)}")
    file = arguments.out / "attention.maps"
    if file.exists() and not arguments.resume:
        parser.error(f"--out: {file} is there; pass --resume to go on with these maps, or take another folder")

    pictures = Pictures(arguments.images, arguments.csv, arguments.classes)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.25] * 3)]
    transform = v2.Compose([v2.RandomResizedCrop(arguments.size, (0.5, 1)), v2.RandomHorizontalFlip(), *to_tensor])
    loader = DataLoader(WithViews(pictures, transform), arguments.batch_size, shuffle=True)

    torch.manual_seed(arguments.seed)
    try:
        model = get_model(arguments.model, weights=arguments.weights)
    except (ValueError, KeyError) as error:
        parser.error(f"torchvision has no --model {arguments.model} with --weights {arguments.weights}: {error}")
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if not linear:
        parser.error(f"--model {arguments.model}: expected one with a linear last layer, which is replaced")
    last = linear[-1]
    last.weight, last.bias = torch.nn.Linear(last.in_features, len(pictures.classes)).parameters()
    network = wrap_classifier(model.train())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    settings = {name: getattr(arguments, name) for name in ("model", "weights", "size", "batch_size", "epochs", "seed")}
    Bound(arguments.out, settings).make()  # refuses a folder of other settings
    with ends_with(f"--out {arguments.out}", "take another folder", ValueError):
        accumulator = AttentionAccumulator(
            pictures.labels, (28, 28), keys=pictures.names, path=file, resume=arguments.resume
        )
    for epoch in range(arguments.epochs):
        last_epoch = epoch == arguments.epochs - 1
        for indices, views, images in tqdm(loader, desc=f"epoch {epoch + 1}", leave=False):
            logits, score_maps = network(images)
            loss = F.binary_cross_entropy_with_logits(logits, pictures.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accumulator.update(indices, score_maps.detach(), logits.detach(), views, fill_empty=last_epoch)
        filled = int(accumulator.accumulated.sum())
        print(f"epoch {epoch + 1}: loss {loss:.3f}, maps of {filled} pairs of {accumulator.pairs.num_pairs}")
    interop.write_maps(accumulator, arguments.out / "maps")
    print(f"done: classes {', '.join(pictures.classes)} are 0 to {len(pictures.classes) - 1} -> {arguments.out}/maps")


if __name__ == "__main__":
    main()
