"""OAA on your own pictures: a folder of images, and a CSV that says what they show.

    python examples/custom_dataset.py --images photos --csv labels.csv --out run      # rows such as a.jpg,dog;cat

Random crops and flips are undone by the accumulator, whose maps are kept by file name in run/attention.maps: after a
crash the same command goes on with the maps (the network starts anew here; see voc/train_attention.py for all of it).
Afterwards run/maps holds NAME_CLASS.png for each image and class.
"""

import argparse
import csv
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


class Pictures(torch.utils.data.Dataset[Image.Image]):
    """The images of a CSV, in its order.

    Args:
        folder: with the images.
        table: rows FILE,CLASS;CLASS;...

    Attributes:
        names: of the files.
        classes: sorted.
        labels: (N, C) 0/1.
    """

    def __init__(self, folder: Path, table: Path) -> None:
        with open(table, newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        bad = next((row for row in rows if len(row) != 2), None)
        if bad or not rows:
            raise SystemExit(f"{table}: expected rows FILE,CLASS;CLASS;..., got {bad or 'none'}")
        self.folder, self.names = folder, [name for name, _ in rows]
        missing = [name for name in self.names if not (folder / name).exists()]
        if missing:
            raise SystemExit(f"{len(missing)} images of {table} are not in {folder}, first {missing[0]}")
        shown = [set(classes.split(";")) - {""} for _, classes in rows]
        self.classes = sorted(set().union(*shown))
        self.labels = torch.tensor([[float(c in own) for c in self.classes] for own in shown])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.folder / self.names[index]).convert("RGB")


def main() -> None:
    """Train a classifier of torchvision on the pictures and keep its attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--csv", type=Path, required=True, help="rows FILE,CLASS;CLASS;...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet18", help="of torchvision.models (default: resnet18)")
    parser.add_argument("--weights", help="of torchvision, such as DEFAULT (default: none)")
    parser.add_argument("--size", type=int, default=224, help="side of a crop (default: 224)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    arguments = parser.parse_args()

    pictures = Pictures(arguments.images, arguments.csv)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.25] * 3)]
    transform = v2.Compose([v2.RandomResizedCrop(arguments.size, (0.5, 1)), v2.RandomHorizontalFlip(), *to_tensor])
    loader = DataLoader(WithViews(pictures, transform), arguments.batch_size, shuffle=True)

    model = get_model(arguments.model, weights=arguments.weights)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.weight, last.bias = torch.nn.Linear(last.in_features, len(pictures.classes)).parameters()
    network = wrap_classifier(model.train())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    arguments.out.mkdir(parents=True, exist_ok=True)
    accumulator = AttentionAccumulator(
        pictures.labels, (28, 28), keys=pictures.names, path=arguments.out / "attention.maps", resume=True
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
