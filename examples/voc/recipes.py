"""Every setting of the paper and of its two releases, each with its source, and one recipe for small CPU runs.

Sources, beside each value: [paper] the ICCV 2019 text, section 4.1 where nothing else is said; [release] the authors'
PyTorch program; [caffe] their first program; [TPAMI] their journal extension of 2021; [DeepLab] the papers that section
4.1 points to, as the caffe program sets it; [here] nobody says it, or the photographs need it. Lengths are iterations
(optimiser steps), the paper's unit.
"""

import argparse
import dataclasses
import typing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Training:
    """What stages 1 and 2, the classifier and the integral attention model, have in common."""

    iterations: int  # optimiser steps
    drop_at: int  # the step from which the rate is divided by 10
    batch_size: int  # images, over all processes
    short_side: int  # pixels; the aspect is kept up to one cell of the score map
    optimizer: str  # sgd | adamw
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_biases: bool  # whether biases decay too
    backbone_lr: tuple[float, float]  # multipliers of lr for (weights, biases) of the pretrained layers
    head_lr: tuple[float, float]  # and of the new ones
    flip: float  # probability of a horizontal flip
    color_jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue


@dataclass(frozen=True)
class Attention(Training):
    """Stage 1: the classifier, whose attention is accumulated (OAA)."""

    gate: str  # score | topk | none
    warm_up: int  # iterations whose attention is not accumulated
    fill_empty: str  # what a pair gets that no map was accepted for: no | last-epoch | final-model
    normalization: str  # of a score map: max (Eq. 2) | minmax
    drop: float  # share of the images whose strongly attended pixels are hidden (the attention drop of TPAMI 2021)
    drop_above: float  # attention, the latest that passed the gate, above which a pixel is hidden


@dataclass(frozen=True)
class Integral(Training):
    """Stage 2: the integral attention model (OAA+)."""

    loss: str  # hybrid (Eq. 9) | mce (Eq. 6)
    loss_normalization: str  # of the hybrid loss: class | pooled
    threshold: float  # soft labels up to this are N-
    gradient: str  # of the images of a step: mean | sum
    read_out: str  # attention of the trained model: relu (ReLU, then / max, Eq. 2) | sigmoid


@dataclass(frozen=True)
class Labels:
    """Stage 3: attention maps at image size, and proxy labels from them and a background cue."""

    scales: tuple[float, ...]  # of the input, averaged
    flip_views: bool  # whether the mirrored view is averaged in
    stretch: bool  # whether each map is min-maxed over its image
    background: str  # saliency: 1 - saliency | threshold: a constant | power: (1 - max)^alpha
    background_level: float  # the constant of threshold, the alpha of power
    foreground_threshold: float
    conflict_threshold: float
    uncertain_saliency: float
    strong_attention: float
    min_foreground: float


@dataclass(frozen=True)
class Segmentation:
    """Stage 4: DeepLab-LargeFOV on the proxy labels."""

    iterations: int
    batch_size: int
    optimizer: str
    lr: float
    power: float  # of the poly schedule: rate = lr * (1 - step / iterations) ** power
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_biases: bool
    backbone_lr: tuple[float, float]
    head_lr: tuple[float, float]  # fc6, fc7 or what takes their place
    score_lr: tuple[float, float]  # the last layer
    crop: int  # pixels, square
    scales: tuple[float, ...]  # one is drawn for each image
    flip: float
    proportion: float  # share of the training images that is used (Table 3)


@dataclass(frozen=True)
class Evaluation:
    """Stage 5: inference of the segmentation network."""

    test_scales: tuple[float, ...]
    test_flip: bool
    window: int  # side of the sliding window in pixels; 0: the whole image at once
    overlap: float  # share of a window that the next one covers again
    crf_iterations: int  # of the dense CRF; 0: none
    crf_gaussian: tuple[float, float]  # width in pixels (sxy), weight (compat)
    crf_bilateral: tuple[float, float, float]  # width in pixels (sxy), in grey levels (srgb), weight (compat)


@dataclass(frozen=True)
class Recipe:
    """All stages."""

    attention: Attention
    integral: Integral
    labels: Labels
    segmentation: Segmentation
    evaluation: Evaluation


PAPER_TRAINING = Training(
    iterations=30_000,  # [paper]
    drop_at=20_000,  # [paper]
    batch_size=5,  # [paper]
    short_side=224,  # [release], [caffe]
    optimizer="sgd",  # [release], [caffe]
    lr=1e-3,  # [paper]
    momentum=0.9,  # [paper]
    nesterov=False,  # [caffe]
    weight_decay=2e-4,  # [paper]
    decay_biases=False,  # [caffe]
    backbone_lr=(1, 2),  # [caffe]
    head_lr=(1, 2),  # [caffe]
    flip=0.5,  # [caffe]
    color_jitter=(0, 0, 0, 0),  # [caffe]
)
PAPER = Recipe(
    attention=Attention(
        **vars(PAPER_TRAINING),
        gate="score",  # [paper] section 3.2: above every class that is not shown
        warm_up=0,  # [paper] section 3.2: M1 = A1
        fill_empty="no",  # [here] the paper does not say; such pairs are counted and told
        normalization="max",  # [paper] Eq. 2
        drop=0.0,  # [paper] has none; [TPAMI] 0.5
        drop_above=0.6,  # [TPAMI]
    ),
    integral=Integral(
        **vars(PAPER_TRAINING),  # [paper] "the same as that of the classification network"
        loss="hybrid",  # [paper] Eq. 9
        loss_normalization="class",  # [paper] Eq. 7 and 8
        threshold=0.0,  # [paper] Eq. 7: p > 0
        gradient="mean",  # [caffe]
        read_out="relu",  # [release]
    ),
    labels=Labels(
        scales=(1.0,),  # [release]
        flip_views=False,  # [release]
        stretch=True,  # [release]
        background="saliency",  # [paper] section 4
        background_level=0.0,  # not used with saliency
        foreground_threshold=0.3,  # [release]
        conflict_threshold=0.9,  # [release]
        uncertain_saliency=32 / 255,  # [release]
        strong_attention=0.8,  # [release]
        min_foreground=0.01,  # [release]
    ),
    segmentation=Segmentation(
        iterations=15_000,  # [paper]
        batch_size=10,  # [paper]
        optimizer="sgd",  # [DeepLab]
        lr=1e-3,  # [DeepLab]
        power=0.9,  # [DeepLab]
        momentum=0.9,  # [DeepLab]
        nesterov=False,  # [DeepLab]
        weight_decay=5e-4,  # [DeepLab]
        decay_biases=False,  # [DeepLab]
        backbone_lr=(1, 2),  # [DeepLab]
        head_lr=(1, 2),  # [DeepLab] for VGG-16; ResNet-101 has (10, 10): see `for_backbone`
        score_lr=(10, 20),  # [DeepLab]
        crop=321,  # [DeepLab]
        scales=(0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3),  # [DeepLab]
        flip=0.5,  # [DeepLab]
        proportion=1.0,  # [paper] Table 3 has 0.2, 0.5, 0.8 and 1
    ),
    evaluation=Evaluation(
        test_scales=(1.0,),  # [DeepLab] for VGG-16; ResNet-101 has five: see `for_backbone`
        test_flip=False,  # [here]
        window=0,  # [here] for VGG-16: the whole image; ResNet-101 has 401: see `for_backbone`
        overlap=1 / 3,  # [caffe] windows advance by 2/3 of their side
        crf_iterations=10,  # [here] the common setting of the field (PSA): 10 iterations, 3/3, 80/13/10
        crf_gaussian=(3, 3),  # [here]
        crf_bilateral=(80, 13, 10),  # [here]
    ),
)

RELEASE_TRAINING = dataclasses.replace(
    PAPER_TRAINING,
    iterations=31_746,  # [release] 15 epochs of 10,582 images in steps of 1 x 5
    drop_at=21_164,  # [release] from epoch 10 on
    nesterov=True,  # [release]
    weight_decay=5e-4,  # [release]
    decay_biases=True,  # [release]
    head_lr=(10, 20),  # [release]
    flip=0.0,  # [release]
    color_jitter=(0.3, 0.3, 0.3, 0.1),  # [release]
)
RELEASE = Recipe(
    attention=Attention(
        **vars(RELEASE_TRAINING),
        gate="topk",  # [release]
        warm_up=2_117,  # [release] the first epoch
        fill_empty="last-epoch",  # [release]
        normalization="max",  # [release]
        drop=0.0,  # [release]
        drop_above=0.6,  # [TPAMI]
    ),
    integral=dataclasses.replace(
        PAPER.integral,
        **vars(RELEASE_TRAINING),
        loss_normalization="pooled",  # [release]
        threshold=0.001,  # [release]
        gradient="sum",  # [release] of 1 x 5 accumulated images
    ),
    labels=PAPER.labels,
    segmentation=dataclasses.replace(
        PAPER.segmentation,
        iterations=20_000,  # [release]
        lr=2.5e-4,  # [release]
        backbone_lr=(1, 1),  # [release] DeepLab-v2
        head_lr=(10, 10),  # [release] DeepLab-v2
        score_lr=(10, 10),  # [release] DeepLab-v2
        scales=(0.5, 0.75, 1.0, 1.25, 1.5),  # [release] between 0.5 and 1.5
    ),
    evaluation=dataclasses.replace(
        PAPER.evaluation,
        crf_iterations=10,  # [release]
        crf_gaussian=(1, 3),  # [release]
        crf_bilateral=(67, 3, 4),  # [release]
    ),
)

CAFFE = dataclasses.replace(
    PAPER,
    attention=dataclasses.replace(
        PAPER.attention,
        gate="topk",  # [caffe]
        warm_up=2_116,  # [caffe] the first 10,582 images
        fill_empty="final-model",  # [caffe]
        normalization="minmax",  # [caffe]
    ),
    integral=dataclasses.replace(
        PAPER.integral,
        loss_normalization="pooled",  # [caffe]
    ),
    segmentation=dataclasses.replace(
        PAPER.segmentation,
        iterations=16_000,  # [caffe]
    ),
    evaluation=dataclasses.replace(
        PAPER.evaluation,
        crf_iterations=1,  # [caffe]
        crf_gaussian=(3, 1),  # [caffe]
        crf_bilateral=(67, 4, 3),  # [caffe]
    ),
)

SMALL_TRAINING = dataclasses.replace(
    PAPER_TRAINING,
    iterations=400,  # [here] 8 epochs of 493 photographs
    drop_at=320,  # [here] at 80 %
    batch_size=10,  # [here]
    short_side=209,  # [here] 14 cells at stride 16
    optimizer="adamw",  # [here]
    lr=3e-4,  # [here]
    weight_decay=1e-2,  # [here]
    decay_biases=True,  # [here]
    backbone_lr=(1, 1),  # [here]
    head_lr=(1, 1),  # [here]
)
SMALL = Recipe(
    attention=dataclasses.replace(PAPER.attention, **vars(SMALL_TRAINING)),
    integral=dataclasses.replace(
        PAPER.integral,
        **(vars(SMALL_TRAINING) | {"iterations": 200, "drop_at": 160}),  # [here] 4 epochs
        threshold=0.75,  # [here] at stride 16 hardly any soft label is 0, see examples/README.md
    ),
    labels=dataclasses.replace(
        PAPER.labels,
        stretch=False,  # [here] maps stay as Eq. 2 leaves them
        background="threshold",  # [here] no saliency maps for the photographs
        background_level=0.5,  # [here] reproduce.py chooses it for each method on half of the training images
        foreground_threshold=0.0,  # [here] the level is the threshold
        min_foreground=0.0,  # [here]
    ),
    segmentation=dataclasses.replace(
        PAPER.segmentation,
        iterations=160,  # [here] 4 epochs
        optimizer="adamw",  # [here]
        lr=3e-4,  # [here]
        weight_decay=1e-2,  # [here]
        decay_biases=True,  # [here]
        backbone_lr=(1, 1),  # [here]
        head_lr=(1, 1),  # [here]
        score_lr=(1, 1),  # [here]
        crop=209,  # [here]
    ),
    evaluation=dataclasses.replace(
        PAPER.evaluation,
        crf_iterations=0,  # [here] a rehearsal: the network is scored as it is
    ),
)

RECIPES = {"paper": PAPER, "release": RELEASE, "caffe": CAFFE, "small": SMALL}


def for_backbone(recipe: Recipe, backbone: str) -> Recipe:
    """The recipe with what the caffe program and DeepLab set otherwise for a ResNet."""
    if not backbone.startswith("resnet"):
        return recipe
    return dataclasses.replace(
        recipe,
        segmentation=dataclasses.replace(
            recipe.segmentation,
            backbone_lr=(1, 1),  # [DeepLab] batch norm is frozen and no convolution has a bias
            head_lr=(10, 10),  # [DeepLab]
        ),
        evaluation=dataclasses.replace(
            recipe.evaluation,
            test_scales=(0.5, 0.75, 1.0, 1.25, 1.5),  # [caffe]
            window=401,  # [caffe]
        ),
    )


def add_options(parser: argparse.ArgumentParser, stage: str) -> None:
    """``--recipe`` and one option for every setting of a stage; what is not given is the recipe's."""
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help="settings to start from (default: paper)")
    group = parser.add_argument_group("settings of the recipe", "each replaces the recipe's value; see recipes.py")
    kind = typing.get_type_hints(Recipe)[stage]
    for name, annotation in typing.get_type_hints(kind).items():
        option, told = (
            f"--{name.replace('_', '-')}",
            ", ".join(f"{recipe} {_show(getattr(getattr(values, stage), name))}" for recipe, values in RECIPES.items()),
        )
        if annotation is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=told)
        elif typing.get_origin(annotation) is tuple:
            length = typing.get_args(annotation)
            count: Any = "+" if Ellipsis in length else len(length)
            group.add_argument(option, type=float, nargs=count, help=told)
        else:
            group.add_argument(option, type=annotation, choices=CHOICES.get(name), help=told)


def resolve(arguments: argparse.Namespace, stage: str, backbone: str) -> Any:
    """The settings of one stage: the recipe's, with what was given on the command line."""
    settings = getattr(for_backbone(RECIPES[arguments.recipe], backbone), stage)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(settings)}
    return replace_checked(settings, {name: value for name, value in given.items() if value is not None})


CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "gate": ("score", "topk", "none"),
    "fill_empty": ("no", "last-epoch", "final-model"),
    "normalization": ("max", "minmax"),
    "loss": ("hybrid", "mce"),
    "loss_normalization": ("class", "pooled"),
    "gradient": ("mean", "sum"),
    "read_out": ("relu", "sigmoid"),
    "background": ("saliency", "threshold", "power"),
}
AT_LEAST_ONE = ("iterations", "batch_size", "short_side", "crop")
SHARES = (
    "flip",
    "drop",
    "drop_above",
    "threshold",
    "foreground_threshold",
    "conflict_threshold",
    "strong_attention",
    "min_foreground",
)


def replace_checked(settings: Any, changes: dict[str, Any]) -> Any:
    """A copy of a stage's settings with changes; what cannot work stops the program with a sentence."""
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    unknown = changes.keys() - {field.name for field in dataclasses.fields(settings)}
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(settings))
        raise SystemExit(f"no setting is called {', '.join(sorted(unknown))}; there are {known}")
    settings = dataclasses.replace(settings, **changes)
    for name, value in vars(settings).items():
        option = f"--{name.replace('_', '-')}"
        if name in CHOICES and value not in CHOICES[name]:
            raise SystemExit(f"{option}: expected one of {', '.join(CHOICES[name])}, got {value}")
        if name in AT_LEAST_ONE and value < 1:
            raise SystemExit(f"{option}: expected at least 1, got {value}")
        if name == "lr" and value <= 0:
            raise SystemExit(f"{option}: expected a rate above 0, got {value}")
        if name in SHARES and not 0 <= value <= 1:
            raise SystemExit(f"{option}: expected a value in [0, 1], got {value}")
        if name == "proportion" and not 0 < value <= 1:
            raise SystemExit(f"{option}: expected a share above 0 and up to 1, got {value}")
        if name in ("scales", "test_scales") and (not value or min(value) <= 0):
            raise SystemExit(f"{option}: expected factors above 0, got {_show(value)}")
        if name == "overlap" and not 0 <= value < 1:
            raise SystemExit(f"{option}: expected a share in [0, 1), got {value}")
        if name == "crf_iterations" and value < 0:
            raise SystemExit(f"{option}: expected at least 0, got {value}")
        if name in ("crf_gaussian", "crf_bilateral") and not (min(value[:-1]) > 0 and value[-1] >= 0):
            raise SystemExit(f"{option}: expected widths above 0 and, last, a weight of at least 0, got {_show(value)}")
    return settings


def _show(value: Any) -> str:
    return (
        " ".join(f"{v:g}" for v in value)
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
