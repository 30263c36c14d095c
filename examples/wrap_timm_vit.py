"""Score maps of a vision transformer of timm, accumulated: its linear layer at each patch token.

    python examples/wrap_timm_vit.py
    python examples/wrap_timm_vit.py --model deit_small_patch16_224 --pretrained    # downloads ImageNet weights

The images are the quickstart's. A transformer that reads its class token never trains its patch tokens to answer for a
class; one that averages them (--pool avg, the default here) does.
"""

import argparse

import timm
import torch
from quickstart import CLASSES, draw_data
from torch.nn import functional as F
from wrap_torchvision import accumulate

from oaa_lib import wrap_classifier


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of timm (default: vit_tiny_patch16_224)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--pool", choices=("avg", "token"), default="avg", help="default: avg")
    parser.add_argument("--images", type=int, default=100, help="default: 100")
    parser.add_argument("--size", type=int, default=128, help="side that images are resized to (default: 128)")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    images, labels, _ = draw_data(arguments.images, arguments.seed)
    images = F.interpolate(images, (arguments.size, arguments.size), mode="bilinear")
    model = timm.create_model(
        arguments.model,
        pretrained=arguments.pretrained,
        img_size=arguments.size,
        global_pool=arguments.pool,
        num_classes=len(CLASSES),
    )
    accumulate(wrap_classifier(model.train()), images, labels, arguments.epochs)  # a cell of the maps for each patch


if __name__ == "__main__":
    main()
