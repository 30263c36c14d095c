"""What both training stages share: arguments, optimiser, schedule, checkpoints."""

import argparse
import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from data import ShapeBatches, VOCFolder, collate
from networks import BACKBONES, AttentionNetwork, build_network
from torch import Tensor
from torch.utils.data import DataLoader

# Per backbone: the paper's settings for VGG-16 (section 4.1), and what suits a small CPU run for EfficientNet-Lite0.
DEFAULTS: dict[str, dict[str, Any]] = {
    "vgg16": {
        "short_side": 224,
        "batch_size": 5,
        "optimizer": "sgd",
        "lr": 1e-3,
        "weight_decay": 2e-4,
        "drop_at": 2 / 3,
    },
    "efficientnet_lite0": {
        "short_side": 209,
        "batch_size": 10,
        "optimizer": "adamw",
        "lr": 3e-4,
        "weight_decay": 1e-2,
        "drop_at": 0.8,
    },
}


def add_arguments(parser: argparse.ArgumentParser, *, epochs: int) -> None:
    """Options of both stages."""
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of this stage's results; resumed if it exists")
    parser.add_argument("--negatives", help="list in ImageSets/Segmentation of images that show no class, mixed in")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16")
    parser.add_argument(
        "--weights", default="default", help="'default' (ImageNet), 'none', or a file (default: default)"
    )
    parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over the data (default: {epochs})")
    for name, kind in (("short-side", int), ("batch-size", int), ("lr", float), ("weight-decay", float)):
        values = ", ".join(f"{d[name.replace('-', '_')]:g} for {b}" for b, d in DEFAULTS.items())
        parser.add_argument(f"--{name}", type=kind, help=f"default: {values}")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), help="default: sgd for vgg16, else adamw")
    parser.add_argument("--drop-at", type=float, help="share of the training after which the rate is divided by 10")
    parser.add_argument("--amp", action="store_true", help="forward pass in bfloat16: faster, other rounding")
    parser.add_argument("--seed", type=int, default=0)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every stage that reads the data set."""
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images (default: 2)")


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given with the backbone's defaults, and check."""
    for name, value in DEFAULTS[arguments.backbone].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.epochs < 1 or arguments.batch_size < 1 or arguments.short_side < 32 or arguments.lr <= 0:
        raise SystemExit("expected --epochs, --batch-size >= 1, --short-side >= 32 and --lr > 0")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is available here; use --device cpu")
    return arguments


def prepare_network(arguments: argparse.Namespace, data: VOCFolder) -> AttentionNetwork:
    """The network with its initial weights, and ``data`` made to fit it."""
    torch.manual_seed(arguments.seed)
    network = build_network(arguments.backbone, len(data.classes), arguments.weights)
    data.prepare(arguments.short_side, network.geometry, network.mean, network.std)
    return network.to(arguments.device, memory_format=torch.channels_last)  # the faster layout on CPUs and GPUs alike


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    """The context of a forward pass: bfloat16 with --amp, else as is."""
    return torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=arguments.amp)


def make_loader(data: VOCFolder, arguments: argparse.Namespace) -> DataLoader[Any]:
    """Shuffled batches; set ``loader.batch_sampler.epoch`` before each pass."""
    batches = ShapeBatches(data, arguments.batch_size, seed=arguments.seed)
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=arguments.workers)


def make_optimizer(network: AttentionNetwork, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 as in the paper, or AdamW."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(parameters, arguments.lr, momentum=0.9, weight_decay=arguments.weight_decay)
    return torch.optim.AdamW(parameters, arguments.lr, weight_decay=arguments.weight_decay)


def learning_rate(arguments: argparse.Namespace, step: int, steps: int) -> float:
    """Rate at a step: divided by 10 once, after the share ``drop_at`` of the training (paper, section 4.1)."""
    return arguments.lr * (0.1 if step >= arguments.drop_at * steps else 1.0)


class Run:
    """The folder of a stage: its settings, its log, and one checkpoint that is complete or absent.

    Args:
        arguments: all settings; ``arguments.out`` is the folder. A folder made with other settings is refused.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        free = ("out", "device", "workers", "epochs_now", "voc_root")  # may differ between start and resume
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items() if key not in free}
        self._settings_file = self.folder / "settings.json"
        if self._settings_file.exists():
            found = json.loads(self._settings_file.read_text())
            differing = sorted(k for k in found.keys() | settings.keys() if found.get(k) != settings.get(k))
            if differing:
                raise SystemExit(
                    f"{self.folder} was made with other settings ({', '.join(differing)}); "
                    "choose another --out or remove the folder"
                )
        else:
            self._settings_file.write_text(json.dumps(settings, indent=1))

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SystemExit(f"{path} cannot be read ({error}); remove it to start this stage anew") from error

    def save(self, **state: Any) -> None:
        """Replace the checkpoint, whole or not at all."""
        partial = self.folder / "checkpoint.pt.partial"
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "checkpoint.pt")

    def log(self, row: dict[str, Any], *, first: bool) -> None:
        """Append a line to ``log.csv``, which starts anew with the first."""
        with open(self.folder / "log.csv", "w" if first else "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if first:
                writer.writeheader()
            writer.writerow(row)


class Stopwatch:
    """Adds up the seconds spent within ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def mirror_back(maps: Tensor, flipped: Tensor) -> Tensor:
    """Maps (B, C, h, w) into the image's own frame: those of mirrored images are mirrored again."""
    return torch.where(flipped.to(maps.device)[:, None, None, None], maps.flip(-1), maps)
