"""OAA with a classifier of torchvision that is left as it is: wrap it, train it, accumulate its attention.

    python examples/wrap_torchvision.py --model resnet18 --epochs 3
    python examples/wrap_torchvision.py --model convnext_tiny --weights DEFAULT     # downloads ImageNet weights

The images are the quickstart's. See `help(oaa_lib.wrap_classifier)` for the models that will do.
"""

import argparse

import torch
from quickstart import CLASSES, draw_data
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import get_model
from tqdm import tqdm

from oaa_lib import AttentionAccumulator, WrappedClassifier, wrap_classifier


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="of torchvision.models (default: resnet18)")
    parser.add_argument("--weights", help="of torchvision, such as DEFAULT (default: none)")
    arguments, images, labels = draw(parser)
    model = get_model(arguments.model, weights=arguments.weights)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.weight, last.bias = torch.nn.Linear(last.in_features, len(CLASSES)).parameters()  # a head for our classes
    accumulate(wrap_classifier(model.train()), images, labels, arguments.epochs)


def draw(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Tensor, Tensor]:
    """All arguments, those of drawn images among them; the images (N, 3, S, S) and their labels (N, C)."""
    parser.add_argument("--images", type=int, default=100, help="default: 100")
    parser.add_argument("--size", type=int, default=128, help="side that images are resized to (default: 128)")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images, labels, _ = draw_data(arguments.images, arguments.seed)
    return arguments, F.interpolate(images, (arguments.size, arguments.size), mode="bilinear"), labels


def accumulate(network: WrappedClassifier, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train the classifier on labels (N, C), and say how its attention grows."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)

    map_size = network(images[:2]).score_maps.shape[-2:]
    accumulator = AttentionAccumulator(labels, map_size)
    for epoch in range(epochs):
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
