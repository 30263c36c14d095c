"""OAA in a training run of Lightning: what wrap_torchvision.py does in a plain loop, by a callback.

    python examples/with_lightning.py --epochs 3

The three lines that OAA adds are marked. Lightning's checkpoints hold the maps, so that `fit(..., ckpt_path=)` goes on
with them.
"""

import argparse

import lightning.pytorch as lightning
import torch
from quickstart import CLASSES, draw_data
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from oaa_lib import AttentionAccumulator, wrap_classifier
from oaa_lib.lightning import AttentionCallback


class Classifier(lightning.LightningModule):
    """Multi-label classification, as anybody's."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.network = wrap_classifier(get_model(model, num_classes=len(CLASSES)))  # 1: returns score maps too

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss of a batch."""
        images, labels, _ = batch
        loss = F.binary_cross_entropy_with_logits(self.network(images).logits, labels.float())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="of torchvision.models (default: resnet18)")
    parser.add_argument("--images", type=int, default=100, help="default: 100")
    parser.add_argument("--size", type=int, default=128, help="side that images are resized to (default: 128)")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--out", default="runs/lightning", help="for Lightning's checkpoints (default: runs/lightning)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    lightning.seed_everything(arguments.seed)
    images, labels, _ = draw_data(arguments.images, arguments.seed)
    images = F.interpolate(images, (arguments.size, arguments.size), mode="bilinear")
    loader = DataLoader(TensorDataset(images, labels, torch.arange(len(images))), batch_size=16, shuffle=True)
    model = Classifier(arguments.model)

    accumulator = AttentionAccumulator(labels, map_size=(arguments.size // 32, arguments.size // 32))  # 2
    callback = AttentionCallback(accumulator, model.network, indices=lambda batch: batch[-1])  # 3
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, callbacks=[callback], default_root_dir=arguments.out, logger=False
    )
    trainer.fit(model, loader)
    print(f"done: {accumulator.accepted} of {accumulator.offered} maps passed the gate")


if __name__ == "__main__":
    main()
