"""Score maps of a vision transformer of timm, accumulated: its linear layer at each patch token.

    python examples/wrap_timm_vit.py
    python examples/wrap_timm_vit.py --model deit_small_patch16_224 --pretrained    # downloads ImageNet weights

The images are the quickstart's. A transformer that reads its class token never trains its patch tokens to answer for a
class, so a model that pools them (--pool avg, the default here) gives better maps; with --pool token you see the other.
"""

import argparse

import timm
import torch
from quickstart import CLASSES, draw_data
from torch.nn import functional as F
from tqdm import tqdm

from oaa_lib import AttentionAccumulator, wrap_classifier


def main() -> None:
    """Train, and say how the attention has grown."""
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
    network = wrap_classifier(model.train())
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)

    map_size = network(images[:2]).score_maps.shape[-2:]  # one cell for each patch
    accumulator = AttentionAccumulator(labels, map_size)
    for epoch in range(arguments.epochs):
        for indices in tqdm(torch.randperm(len(images)).split(16), desc=f"epoch {epoch + 1}", leave=False):
            logits, score_maps = network(images[indices])
            loss = F.binary_cross_entropy_with_logits(logits, labels[indices].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accumulator.update(indices, score_maps.detach(), logits.detach())
        grown = accumulator[range(len(images))].sum() / labels.sum() / map_size.numel()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, mean cumulative attention {grown:.3f}")
    print(f"done: {accumulator.accepted} of {accumulator.offered} maps of {tuple(map_size)} passed the gate")


if __name__ == "__main__":
    main()
