"""The optimiser of examples/voc: who learns at which rate, what decays, and the schedules at every step."""

import dataclasses
import math

import pytest
import recipes
import torch
from deeplab import SEGMENTATION_NETWORKS, build_segmentation_network
from networks import BACKBONES, build_network
from optimization import make_optimizer, rate, set_rate
from torch import nn

TABLES = {"attention": BACKBONES, "segmentation": SEGMENTATION_NETWORKS}
BUILD = {"attention": build_network, "integral": build_network, "segmentation": build_segmentation_network}
NEW = {"attention": (4, 4), "segmentation": (2, 2)}  # weights and biases of the head


def network_on_meta(stage: str, backbone: str):
    with torch.device("meta"):
        return BUILD[stage](backbone, 20, weights="none")


def groups_of(stage: str, backbone: str, settings) -> dict[str, tuple]:
    """Name of each group: how many parameters, multiplier, rate over the base rate, decay."""
    optimizer = make_optimizer(network_on_meta(stage, backbone), settings)
    return {
        group["name"]: (len(group["params"]), group["multiplier"], group["lr"] / settings.lr, group["weight_decay"])
        for group in optimizer.param_groups
    }


def rows(table: dict[str, tuple]) -> dict[str, tuple]:
    return {
        name: (count, multiplier, pytest.approx(multiplier), decay)
        for name, (count, multiplier, decay) in table.items()
    }


# Groups


@pytest.mark.parametrize(
    ("recipe", "stage", "expected"),
    [
        (
            "paper",
            "attention",
            {
                "backbone weights": (13, 1, 2e-4),
                "backbone biases": (13, 2, 0),
                "head weights": (4, 1, 2e-4),
                "head biases": (4, 2, 0),
            },
        ),
        (
            "release",
            "integral",
            {
                "backbone weights": (13, 1, 5e-4),
                "backbone biases": (13, 2, 5e-4),
                "head weights": (4, 10, 5e-4),
                "head biases": (4, 20, 5e-4),
            },
        ),
        (
            "paper",
            "segmentation",
            {
                "backbone weights": (13, 1, 5e-4),
                "backbone biases": (13, 2, 0),
                "head weights": (2, 1, 5e-4),
                "head biases": (2, 2, 0),
                "score weights": (1, 10, 5e-4),
                "score biases": (1, 20, 0),
            },
        ),
    ],
)
def test_groups_of_vgg16(recipe, stage, expected):
    assert groups_of(stage, "vgg16", getattr(recipes.RECIPES[recipe], stage)) == rows(expected)


@pytest.mark.parametrize(("backbone", "convs"), [("resnet50", 53), ("resnet101", 104)])
def test_groups_of_resnet_hold_no_batch_norm(backbone, convs):
    recipe = recipes.for_backbone(recipes.PAPER, backbone)
    assert groups_of("attention", backbone, recipe.attention) == rows(
        {"backbone weights": (convs, 1, 2e-4), "head weights": (4, 1, 2e-4), "head biases": (4, 2, 0)}
    )
    assert groups_of("segmentation", backbone, recipe.segmentation) == rows(
        {
            "backbone weights": (convs, 1, 5e-4),
            "head weights": (2, 10, 5e-4),
            "head biases": (2, 10, 0),
            "score weights": (1, 10, 5e-4),
            "score biases": (1, 20, 0),
        }
    )


@pytest.mark.parametrize(
    ("stage", "backbone"),
    [(stage, backbone) for stage, table in TABLES.items() for backbone in sorted(table)],
)
def test_every_trained_parameter_is_in_one_group_and_no_other_in_any(stage, backbone):
    network = network_on_meta(stage, backbone)
    optimizer = make_optimizer(network, getattr(recipes.PAPER, stage))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    biases = {id(p) for name, p in network.named_parameters() if name.endswith(".bias")}
    for group in optimizer.param_groups:
        assert {id(p) in biases for p in group["params"]} == {group["name"].endswith("biases")}


def test_the_small_recipe_is_plain_adamw():
    optimizer = make_optimizer(network_on_meta("attention", "efficientnet_lite0"), recipes.SMALL.attention)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(3e-4, 1e-2)}


# Updates


class Tiny(nn.Module):
    """One weight and one bias in each part."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        for part in parts:
            self.add_module(part, nn.Linear(1, 1).double())

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


@pytest.mark.parametrize("recipe", ["paper", "release"])
@pytest.mark.parametrize("stage", ["attention", "segmentation"])
def test_sgd_does_what_the_recipe_says(recipe, stage):
    settings = dataclasses.replace(getattr(recipes.RECIPES[recipe], stage), lr=0.1, weight_decay=0.3)
    network = Tiny("backbone", "head", *["score"] * (stage == "segmentation"))
    optimizer = make_optimizer(network, settings)
    state = {name: (p.item(), 0.0) for name, p in network.named_parameters()}
    assert len(state) == 4 + 2 * (stage == "segmentation")
    for step in range(4):
        set_rate(optimizer, settings, step)
        for number, parameter in enumerate(network.parameters()):
            parameter.grad = torch.full_like(parameter, 0.7 * number - step)
        optimizer.step()
        for number, (name, parameter) in enumerate(network.named_parameters()):
            value, velocity = state[name]
            part, kind = name.split(".")
            is_bias = kind == "bias"
            decay = 0.3 if (recipe == "release" and stage == "attention") or not is_bias else 0.0
            gradient = 0.7 * number - step + decay * value
            velocity = 0.9 * velocity + gradient
            nesterov = recipe == "release" and stage == "attention"
            direction = gradient + 0.9 * velocity if nesterov else velocity
            multiplier = getattr(settings, f"{part}_lr")[is_bias]
            base = 0.1 if stage == "attention" else 0.1 * (1 - step / settings.iterations) ** 0.9
            state[name] = value - base * multiplier * direction, velocity
            assert parameter.item() == pytest.approx(state[name][0], rel=1e-12)


# Schedules, against numbers and not against the settings


def dropped(lr: float, at: int):
    return lambda step: lr if step < at else lr / 10


def poly(lr: float, iterations: int):
    return lambda step: lr * math.exp(0.9 * math.log1p(-step / iterations))


SCHEDULES = {
    ("paper", "attention"): (30_000, dropped(1e-3, 20_000)),
    ("paper", "integral"): (30_000, dropped(1e-3, 20_000)),
    ("paper", "segmentation"): (15_000, poly(1e-3, 15_000)),
    ("release", "attention"): (31_746, dropped(1e-3, 21_164)),
    ("release", "integral"): (31_746, dropped(1e-3, 21_164)),
    ("release", "segmentation"): (20_000, poly(2.5e-4, 20_000)),
    ("caffe", "attention"): (30_000, dropped(1e-3, 20_000)),
    ("caffe", "integral"): (30_000, dropped(1e-3, 20_000)),
    ("caffe", "segmentation"): (16_000, poly(1e-3, 16_000)),
    ("small", "attention"): (400, dropped(3e-4, 320)),
    ("small", "integral"): (200, dropped(3e-4, 160)),
    ("small", "segmentation"): (160, poly(3e-4, 160)),
}
MULTIPLIERS = {  # of backbone, head and score: weights, biases
    ("paper", "attention"): [1, 2, 1, 2],
    ("paper", "segmentation"): [1, 2, 1, 2, 10, 20],
    ("release", "attention"): [1, 2, 10, 20],
    ("release", "segmentation"): [1, 1, 10, 10, 10, 10],
    ("small", "attention"): [1, 1, 1, 1],
    ("small", "segmentation"): [1, 1, 1, 1, 1, 1],
}


def test_every_stage_that_trains_has_its_schedule_tested():
    assert SCHEDULES.keys() == {(recipe, stage) for recipe in recipes.RECIPES for stage in BUILD}


@pytest.mark.parametrize(("recipe", "stage"), SCHEDULES)
def test_the_rate_of_every_group_at_every_step(recipe, stage):
    iterations, expected = SCHEDULES[recipe, stage]
    settings = getattr(recipes.RECIPES[recipe], stage)
    assert settings.iterations == iterations
    parts = ("backbone", "head", "score") if stage == "segmentation" else ("backbone", "head")
    optimizer = make_optimizer(Tiny(*parts), settings)
    multipliers = MULTIPLIERS[
        "paper" if recipe == "caffe" else recipe, "segmentation" if stage == "segmentation" else "attention"
    ]
    for step in range(iterations):
        base = expected(step)
        set_rate(optimizer, settings, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert len(rates) == len(multipliers)
        assert all(abs(r - base * m) <= 1e-12 * base * m for r, m in zip(rates, multipliers, strict=True)), step
        assert abs(rate(settings, step) - base) <= 1e-12 * base, step


@pytest.mark.parametrize("stage", ["attention", "segmentation"])
def test_a_step_beyond_the_schedule_is_refused(stage):
    settings = getattr(recipes.PAPER, stage)
    for step in (-1, settings.iterations):
        with pytest.raises(ValueError, match=f"expected a step from 0 to {settings.iterations - 1}, got {step}"):
            rate(settings, step)


def test_a_resumed_optimizer_goes_on_with_its_groups():
    settings, network = recipes.RELEASE.attention, Tiny("backbone", "head")
    first, second = make_optimizer(network, settings), make_optimizer(network, settings)
    set_rate(first, settings, 25_000)
    second.load_state_dict(first.state_dict())
    set_rate(second, settings, 25_001)
    assert [g["lr"] for g in second.param_groups] == pytest.approx([1e-4, 2e-4, 1e-3, 2e-3])
