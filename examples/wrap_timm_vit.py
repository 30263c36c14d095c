"""Score maps of a vision transformer of timm, accumulated: its linear layer at each patch token.

    python examples/wrap_timm_vit.py
    python examples/wrap_timm_vit.py --model deit_small_patch16_224 --pretrained    # downloads ImageNet weights

The images are the quickstart's. A transformer that reads its class token never trains its patch tokens to answer for a
class; one that averages them (--pool avg, the default here) does.
"""

import argparse

import timm
from quickstart import CLASSES
from wrap_torchvision import accumulate, draw

from oaa_lib import wrap_classifier


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of timm (default: vit_tiny_patch16_224)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--pool", choices=("avg", "token"), default="avg", help="default: avg")
    arguments, images, labels = draw(parser)
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
