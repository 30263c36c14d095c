"""Steps of stage 4 (DeepLab-LargeFOV) with recipe `paper`, against the same written out naively in float64.

What DeepLab's training does, as the authors' first program sets it: rate 1e-3 times (1 - step / iterations)^0.9, times
1 and 2 for weights and biases, 10 and 20 for those of the last layer; momentum 0.9; decay 5e-4 of weights alone; one
image at a time, the gradients of ten averaged; scores brought to the size of the crop bilinearly, a cross entropy
there, and its mean over the pixels that are not 255.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import recipes
import torch
from deeplab import SegmentationNetwork
from networks import Geometry
from optimization import make_optimizer
from options import replace_checked
from processes import Process
from stream import Part
from test_voc_steps import GivenRun
from torch import nn
from torch.nn import functional as F
from train_segmentation import learn

from oaa_lib import View

STEPS, IMAGES, CROP, CLASSES, STRIDE = 4, 10, 25, 5, 8
PROCESS = Process(torch.device("cpu"), 0, 1)
MULTIPLIERS = {"backbone": (1, 2), "head": (1, 2), "score": (10, 20)}  # of weights, of biases


class Small(SegmentationNetwork):
    """LargeFOV with padded pools like the paper's VGG-16, on a trunk of three convolutions."""

    geometry = Geometry(STRIDE, centred=True)

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, 6), (6, 8), (8, 8)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        super().__init__(nn.Sequential(*layers), 8, 12, 2, CLASSES)
        for parameter in self.parameters():  # larger than N(0, 0.01), so that every layer learns within a few steps
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="module")
def network() -> Small:
    torch.manual_seed(0)
    network = Small().train()
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            assert layer.p == 0.5
            layer.p = 0  # what it draws is its own
    return network


def batch(step: int) -> Part:
    """Ten crops, some with a margin that is ignored, one of them altogether."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES, 3, CROP, CROP, generator=generator)
    coarse = torch.randint(CLASSES, (IMAGES, 1, 5, 5), generator=generator)
    labels = F.interpolate(coarse.double(), (CROP, CROP), mode="nearest")[:, 0].long()
    for image in range(IMAGES):
        labels[image, : 2 * image] = 255
    labels[-1] = 255
    names = [f"image {image}" for image in range(IMAGES)]
    return Part(names, [View()] * IMAGES, images, labels)


def upsampling() -> torch.Tensor:
    """(CROP, cells): bilinear weights of each pixel; cell i lies on pixel 8 i."""
    weights = torch.zeros(CROP, (CROP - 1) // STRIDE + 1, dtype=torch.float64)
    for pixel in range(CROP):
        cell, rest = divmod(pixel, STRIDE)
        weights[pixel, cell] += 1 - rest / STRIDE
        if rest:
            weights[pixel, cell + 1] += rest / STRIDE
    return weights


def naive_loss(network: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of one image."""
    grown = torch.einsum("yi,xj,cij->cyx", upsampling(), upsampling(), network(image[None])[0])
    terms = [grown[:, y, x].exp().sum().log() - grown[label[y, x], y, x] for y, x in (label != 255).nonzero().tolist()]
    return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)


def naive_steps(start: Small) -> list[tuple[float, dict[str, np.ndarray]]]:
    """The loss of each step, and the parameters after it."""
    network = copy.deepcopy(start).double()
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    seen = []
    for step in range(STEPS):
        part = batch(step)
        gradient = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
        loss = 0.0
        for image, label in zip(part.images.double(), part.targets, strict=True):
            one = naive_loss(network, image, label)
            loss += one.item() / IMAGES
            if one.requires_grad:
                found = torch.autograd.grad(one, list(network.parameters()))
                for total, new in zip(gradient.values(), found, strict=True):
                    total += new / IMAGES
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                kind = int(name.endswith("bias"))
                rate = 1e-3 * (1 - step / STEPS) ** 0.9 * MULTIPLIERS[name.split(".")[0]][kind]
                decayed = gradient[name] + (0 if kind else 5e-4) * parameter
                velocity[name] = 0.9 * velocity[name] + decayed
                parameter -= rate * velocity[name]
        seen.append((loss, {name: p.detach().numpy().copy() for name, p in network.named_parameters()}))
    return seen


@pytest.fixture(scope="module")
def expected(network):
    return naive_steps(network)


class SeeingRun(GivenRun):
    """Notes the loss of each step, and the parameters after it."""

    def step(self, optimizer, **noted):
        super().step(optimizer, **noted)
        parameters = {name: p.detach().double().numpy().copy() for name, p in self.network.named_parameters()}
        self.seen.append((self.log.noted[-1]["loss"].item(), parameters))


def scripts_steps(start: Small, dtype: torch.dtype, folder: Path):
    """The same by the script's own loop."""
    network = copy.deepcopy(start).to(dtype)
    settings = replace_checked(recipes.PAPER.segmentation, {"iterations": STEPS})
    assert settings.batch_size == IMAGES
    batches = [[part._replace(images=part.images.to(dtype))] for part in map(batch, range(STEPS))]
    run = SeeingRun(folder, batches, network, settings, process=PROCESS, images=IMAGES)
    run.seen = []
    learn(run, None, network, make_optimizer(network, settings), align_corners=network.geometry.centred)
    return run.seen


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_deeplab_learns_as_written_out(network, expected, tmp_path, dtype, share):
    """To a share of the distance trained, and the rounding of the parameters; the script's loss is always float32."""
    start = {name: p.detach().double().numpy().copy() for name, p in network.named_parameters()}
    found = scripts_steps(network, dtype, tmp_path / "run")
    for (loss, parameters), (naive, naive_parameters) in zip(found, expected, strict=True):
        assert loss == pytest.approx(naive, rel=1e-6)
        for name, values in naive_parameters.items():
            distance = np.abs(values - start[name]).max()
            rounding = STEPS * torch.finfo(dtype).eps * np.abs(values).max()
            assert distance > 100 * rounding, name
            assert np.abs(parameters[name] - values).max() <= share * distance + rounding, name
