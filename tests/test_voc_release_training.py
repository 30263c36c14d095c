"""Six optimiser steps of stages 1 and 2 with recipe `release`, against the authors' own training loops.

tests/golden/README.md says what was run. Everything is in float64; where the release differs it is said.
"""

from pathlib import Path

import numpy as np
import pytest
import recipes
import torch
import train_attention
import train_integral
from diagnosis import Diagnosis
from networks import build_network
from optimization import make_optimizer
from options import replace_checked
from processes import Process
from stream import Part
from test_voc_steps import NOTHING, GivenRun

from oaa_lib import AttentionAccumulator, View

pytestmark = pytest.mark.slow
STEPS, IMAGES, BATCH = 6, 10, 5
PROCESS = Process(torch.device("cpu"), 0, 1)
SHORT = {"iterations": STEPS, "drop_at": 4}  # three epochs of two steps; the rate falls before the last one


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "training_release.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def attention(golden, tmp_path_factory):
    """What stage 1 did: its network, its maps, and what was seen after each step."""
    settings = replace_checked(recipes.RELEASE.attention, {**SHORT, "lr": golden["lr"][0], "warm_up": 2})
    network = started_as(golden)
    optimizer = make_optimizer(network, settings)
    sizes = [[side // 8 for side in golden[f"image_{i}"].shape[1:]] for i in range(IMAGES)]
    accumulators = {
        fusion: AttentionAccumulator(golden["labels"], sizes, fusion=fusion, gate=settings.gate, keys=names())
        for fusion in ("max", "latest")
    }

    run = SeeingRun(tmp_path_factory.mktemp("run"), golden, network, settings)
    train_attention.learn(run, None, network, optimizer, accumulators, NOTHING, Diagnosis(accumulators))
    return network, accumulators["max"], run.seen


@pytest.fixture(scope="module")
def integral(golden, attention, tmp_path_factory):
    """The same of stage 2, on the maps of the release."""
    settings = replace_checked(recipes.RELEASE.integral, {**SHORT, "lr": golden["lr"][1]})
    network = started_as(golden)
    optimizer = make_optimizer(network, settings)
    _, accumulator, _ = attention

    run = SeeingRun(tmp_path_factory.mktemp("run"), golden, network, settings)
    train_integral.learn(run, None, network, optimizer, accumulator)
    return network, run.seen


class SeeingRun(GivenRun):
    """Notes rates, loss and parameters after each step."""

    def __init__(self, path, golden, network, settings) -> None:
        batches = [batch(golden, number) for number in range(STEPS)]
        super().__init__(path, batches, network, settings, process=PROCESS, images=IMAGES)
        self.seen: list = []

    def step(self, optimizer, **noted):
        super().step(optimizer, **noted)
        self.seen.append(seen(self.log.noted[-1]["loss"], self.network, optimizer))


def names() -> list[str]:
    return [f"image {i}" for i in range(IMAGES)]


def batch(golden, step: int) -> list[Part]:
    """Five images, each by itself, in the order of the list."""
    chosen = [(step * BATCH + i) % IMAGES for i in range(BATCH)]
    return [
        Part(
            [names()[i]],
            [View()],
            torch.from_numpy(golden[f"image_{i}"])[None].double(),
            torch.from_numpy(golden["labels"][i])[None].double(),
        )
        for i in chosen
    ]


def started_as(golden):
    """VGG-16 with the golden initial parameters, in float64."""
    network = build_network("vgg16", 20, "none").double().train()
    for j, parameter in enumerate(network.parameters()):
        values = np.random.RandomState(1000 * int(golden["seed"]) + j).standard_normal(parameter.numel())
        scale = 0.1 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5
        parameter.data = torch.from_numpy(values * scale).view(parameter.shape)
    np.testing.assert_allclose(probe(network), golden["probe_init"], rtol=1e-12, atol=1e-12)
    return network


def probe(network) -> np.ndarray:
    """Norm, sum and five entries of every parameter."""
    rows = []
    for parameter in network.parameters():
        flat = parameter.detach().flatten()
        entries = np.linspace(0, len(flat) - 1, 5).astype(int)
        rows.append([flat.norm().item(), flat.sum().item(), *flat[entries].tolist()])
    return np.array(rows)


def seen(loss, network, optimizer):
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    order = ("backbone weights", "backbone biases", "head weights", "head biases")
    return [rates[name] for name in order], loss.item(), probe(network)


def check(golden, stage: str, steps, tolerance: float) -> None:
    """Rates exactly, losses and parameters to a share of what there is and of the distance trained."""
    for number, (rates, loss, found) in enumerate(steps):
        np.testing.assert_allclose(rates, golden[f"{stage}_rates"][number], rtol=1e-12)
        losses = golden[f"{stage}_losses"][number * BATCH : (number + 1) * BATCH]
        assert loss == pytest.approx(losses.sum(), rel=tolerance)
        expected = golden[f"probe_{stage}_{number}"]
        distance = np.abs(expected - golden["probe_init"]).max(0)
        assert (distance > 0).all()
        assert (np.abs(found - expected).max(0) <= tolerance * distance).all(), number


def test_stage_1_learns_as_the_release(golden, attention):
    network, _, steps = attention
    check(
        golden, "attention", steps, 1e-6
    )  # the script takes the loss in float32  # a loss is already divided by the five images
    for i in range(IMAGES):
        check_scores(golden, network, "attention", i, 1e-6)


def test_stage_1_accumulates_as_the_release(golden, attention):
    _, accumulator, _ = attention
    for i in range(IMAGES):
        for c, kept in zip(accumulator.classes(i).tolist(), accumulator.attention(i), strict=True):
            assert np.array_equal((kept * 255).round().numpy(), golden[f"cumulative_{i}_{c}"])


def test_stage_2_learns_as_the_release(golden, integral):
    """To about 3e-5 of the distance trained: the release adds 1e-8 inside a logarithm."""
    network, steps = integral
    check(golden, "integral", steps, 1e-4)  # the gradients of the five images are summed
    for i in range(IMAGES):
        check_scores(golden, network, "integral", i, 1e-4)


@torch.no_grad()
def check_scores(golden, network, stage: str, image: int, tolerance: float) -> None:
    scores = network(torch.from_numpy(golden[f"image_{image}"])[None].double()).score_maps[0].numpy()
    expected = golden[f"{stage}_scores_{image}"]
    assert np.abs(scores - expected).max() <= tolerance * np.abs(expected).max()
