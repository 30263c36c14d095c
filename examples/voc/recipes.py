"""Every setting of the paper and of its two releases, each with its source, and one recipe for small CPU runs.

The defaults of the dataclasses are the paper's recipe. Sources, in brackets beside each value: [paper] the ICCV 2019
text, section 4.1 where nothing else is said; [release] the authors' PyTorch program; [caffe] their first program;
[TPAMI] their journal extension of 2021; [DeepLab] the papers that section 4.1 points to, as the caffe program sets it;
[here] nobody says it, or the photographs need it. Lengths are iterations. What a type expects, options.py checks.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

Count = Annotated[int, "at least 1"]
Rate = Annotated[float, "a rate above 0"]
Share = Annotated[float, "a value in [0, 1]"]
AtLeast0 = Annotated[float, "at least 0"]
Factors = Annotated[tuple[float, ...], "factors above 0"]
Multipliers = Annotated[tuple[float, float], "factors of at least 0"]  # of lr, for weights and for biases
Jitter = Annotated[tuple[float, float, float, float], "factors of at least 0 and, last, a hue of at most 0.5"]
WIDTHS = "widths above 0 and, last, a weight of at least 0"


@dataclass(frozen=True)
class Training:
    """What stages 1 and 2, the classifier and the integral attention model, have in common."""

    iterations: Count = 30_000  # [paper] optimiser steps
    drop_at: int = 20_000  # [paper] the step from which the rate is divided by 10
    batch_size: Count = 5  # [paper] images, over all processes
    short_side: Count = 224  # [release], [caffe] pixels; the aspect is kept up to one cell of the score map
    optimizer: Literal["sgd", "adamw"] = "sgd"  # [release], [caffe]
    lr: Rate = 1e-3  # [paper]
    momentum: Share = 0.9  # [paper]
    nesterov: bool = False  # [caffe]
    weight_decay: AtLeast0 = 2e-4  # [paper]
    decay_biases: bool = False  # [caffe] whether biases decay too
    backbone_lr: Multipliers = (1, 2)  # [caffe] of the pretrained layers
    head_lr: Multipliers = (1, 2)  # [caffe] of the new layers
    flip: Share = 0.5  # [caffe] probability of a horizontal flip
    color_jitter: Jitter = (0, 0, 0, 0)  # [caffe] brightness, contrast, saturation, hue


@dataclass(frozen=True)
class Attention(Training):
    """Stage 1: the classifier, whose attention is accumulated (OAA)."""

    gate: Literal["score", "topk", "none"] = "score"  # [paper] section 3.2: above every class that is not shown
    warm_up: int = 0  # [paper] section 3.2, M1 = A1: iterations whose attention is not accumulated
    # [here] what a pair gets that no map was accepted for; the paper does not say, so such pairs are counted and shown
    fill_empty: Literal["no", "last-epoch", "final-model"] = "no"
    normalization: Literal["max", "minmax"] = "max"  # [paper] Eq. 2, of a score map
    pooling: Literal["average", "max", "lse", "topk"] = "average"  # [paper] Eq. 1; for the others see `pooled`
    drop: Share = 0.0  # [paper] has none, [TPAMI] 0.5: share of images whose strongly attended pixels are hidden
    drop_above: Share = 0.6  # [TPAMI] attention, the latest that passed the gate, above which a pixel is hidden


@dataclass(frozen=True)
class Integral(Training):  # [paper] "the same as that of the classification network"
    """Stage 2: the integral attention model (OAA+)."""

    loss: Literal["hybrid", "mce"] = "hybrid"  # [paper] Eq. 9; mce is Eq. 6
    loss_normalization: Literal["class", "pooled"] = "class"  # [paper] Eq. 7 and 8
    threshold: Share = 0.0  # [paper] Eq. 7, p > 0: soft labels up to this are N-
    constrain_below: Literal["threshold", "mean"] = "threshold"  # [here] mean: N- has all up to their map's mean, too
    gradient: Literal["mean", "sum"] = "mean"  # [caffe] of the images of a step
    read_out: Literal["relu", "sigmoid"] = "relu"  # [release] attention of the trained model: ReLU, then / max (Eq. 2)


@dataclass(frozen=True)
class Labels:
    """Stage 3: attention maps at image size, and proxy labels from them and a background cue."""

    scales: Factors = (1.0,)  # [release] of the input, averaged
    flip_views: bool = False  # [release] whether the mirrored view is averaged in
    stretch: bool = True  # [release] whether each map is min-maxed over its image
    # [paper] section 4: 1 - saliency; or a constant; or (1 - max)^alpha
    background: Literal["saliency", "threshold", "power"] = "saliency"
    background_level: float = 0.0  # the constant of threshold, the alpha of power; not used with saliency
    foreground_threshold: Share = 0.3  # [release]
    conflict_threshold: Share = 0.9  # [release]
    uncertain_saliency: Share = 32 / 255  # [release]
    strong_attention: Share = 0.8  # [release]
    min_foreground: Share = 0.01  # [release]


@dataclass(frozen=True)
class Segmentation:
    """Stage 4: DeepLab-LargeFOV on the proxy labels."""

    iterations: Count = 15_000  # [paper]
    batch_size: Count = 10  # [paper]
    optimizer: Literal["sgd", "adamw"] = "sgd"  # [DeepLab]
    lr: Rate = 1e-3  # [DeepLab]
    power: AtLeast0 = 0.9  # [DeepLab] of the poly schedule: rate = lr * (1 - step / iterations) ** power
    momentum: Share = 0.9  # [DeepLab]
    nesterov: bool = False  # [DeepLab]
    weight_decay: AtLeast0 = 5e-4  # [DeepLab]
    decay_biases: bool = False  # [DeepLab]
    backbone_lr: Multipliers = (1, 2)  # [DeepLab]
    head_lr: Multipliers = (1, 2)  # [DeepLab] fc6, fc7 of VGG-16; ResNet-101 has (10, 10): see `for_backbone`
    score_lr: Multipliers = (10, 20)  # [DeepLab] the last layer
    crop: Count = 321  # [DeepLab] pixels, square
    scales: Factors = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # [DeepLab] one is drawn for each image
    flip: Share = 0.5  # [DeepLab]
    # [paper] share of the training images that is used; Table 3 has 0.2, 0.5, 0.8 and 1
    proportion: Annotated[float, "a share above 0 and up to 1"] = 1.0


@dataclass(frozen=True)
class Evaluation:
    """Stage 5: inference of the segmentation network."""

    test_scales: Factors = (1.0,)  # [DeepLab] for VGG-16; ResNet-101 has five: see `for_backbone`
    test_flip: bool = False  # [here]
    window: int = 0  # [here] side of the sliding window in pixels; 0, for VGG-16: the whole image; see `for_backbone`
    # [caffe] share of a window that the next one covers again: windows advance by 2/3 of their side
    overlap: Annotated[float, "a share in [0, 1)"] = 1 / 3
    # [here] the dense CRF's common setting in the field (PSA): 10 iterations, 3/3, 80/13/10; 0 iterations: no CRF
    crf_iterations: Annotated[int, "at least 0"] = 10
    crf_gaussian: Annotated[tuple[float, float], WIDTHS] = (3, 3)  # width in pixels (sxy), weight (compat)
    crf_bilateral: Annotated[tuple[float, float, float], WIDTHS] = (80, 13, 10)  # sxy, width in grey levels, compat


@dataclass(frozen=True)
class Recipe:
    """All stages; what is not given is the paper's."""

    attention: Attention = Attention()
    integral: Integral = Integral()
    labels: Labels = Labels()
    segmentation: Segmentation = Segmentation()
    evaluation: Evaluation = Evaluation()


PAPER = Recipe()

RELEASE_TRAINING: dict[str, Any] = {
    "iterations": 31_746,  # [release] 15 epochs of 10,582 images in steps of 1 x 5
    "drop_at": 21_164,  # [release] from epoch 10 on
    "nesterov": True,  # [release]
    "weight_decay": 5e-4,  # [release]
    "decay_biases": True,  # [release]
    "head_lr": (10, 20),  # [release]
    "flip": 0.0,  # [release]
    "color_jitter": (0.3, 0.3, 0.3, 0.1),  # [release]
}
RELEASE = Recipe(
    attention=Attention(
        **RELEASE_TRAINING,
        gate="topk",  # [release]
        warm_up=2_117,  # [release] the first epoch
        fill_empty="last-epoch",  # [release]
    ),
    integral=Integral(
        **RELEASE_TRAINING,
        loss_normalization="pooled",  # [release]
        threshold=0.001,  # [release]
        gradient="sum",  # [release] of 1 x 5 accumulated images
    ),
    segmentation=Segmentation(
        iterations=20_000,  # [release]
        lr=2.5e-4,  # [release]
        backbone_lr=(1, 1),  # [release] DeepLab-v2
        head_lr=(10, 10),  # [release] DeepLab-v2
        score_lr=(10, 10),  # [release] DeepLab-v2
        scales=(0.5, 0.75, 1.0, 1.25, 1.5),  # [release] between 0.5 and 1.5
    ),
    evaluation=Evaluation(crf_gaussian=(1, 3), crf_bilateral=(67, 3, 4)),  # [release]
)

CAFFE = Recipe(
    attention=Attention(
        gate="topk",  # [caffe]
        warm_up=2_116,  # [caffe] the first 10,582 images
        fill_empty="final-model",  # [caffe]
        normalization="minmax",  # [caffe]
    ),
    integral=Integral(loss_normalization="pooled"),  # [caffe]
    segmentation=Segmentation(iterations=16_000),  # [caffe]
    evaluation=Evaluation(crf_iterations=1, crf_gaussian=(3, 1), crf_bilateral=(67, 4, 3)),  # [caffe]
)

SMALL_OPTIMIZER: dict[str, Any] = {  # [here]
    "optimizer": "adamw",
    "lr": 3e-4,
    "weight_decay": 1e-2,
    "decay_biases": True,
    "backbone_lr": (1, 1),
    "head_lr": (1, 1),
}
SMALL_TRAINING = SMALL_OPTIMIZER | {"batch_size": 10, "short_side": 209}  # [here] 14 cells at stride 16
SMALL = Recipe(
    attention=Attention(**SMALL_TRAINING, iterations=400, drop_at=320),  # [here] 8 epochs of 493 photographs
    integral=Integral(
        **SMALL_TRAINING,
        iterations=200,  # [here] 4 epochs
        drop_at=160,  # [here]
        constrain_below="mean",  # [here] at stride 16 hardly any soft label is 0, see docs/photographs.md
    ),
    labels=Labels(
        stretch=False,  # [here] maps stay as Eq. 2 leaves them
        background="threshold",  # [here] no saliency maps for the photographs
        background_level=0.5,  # [here] reproduce.py chooses it for each method on half of the training images
        foreground_threshold=0.0,  # [here] the level is the threshold
        min_foreground=0.0,  # [here]
    ),
    segmentation=Segmentation(**SMALL_OPTIMIZER, score_lr=(1, 1), iterations=160, crop=209),  # [here] 4 epochs
    evaluation=Evaluation(crf_iterations=0),  # [here] a rehearsal: the network is scored as it is
)

RECIPES = {"paper": PAPER, "release": RELEASE, "caffe": CAFFE, "small": SMALL}


def for_backbone(recipe: Recipe, backbone: str) -> Recipe:
    """The recipe with what the caffe program and DeepLab set otherwise for a ResNet."""
    if not backbone.startswith("resnet"):
        return recipe
    # [DeepLab] batch norm is frozen and no convolution has a bias, so one multiplier would be enough
    segmentation = replace(recipe.segmentation, backbone_lr=(1, 1), head_lr=(10, 10))
    views: dict[str, Any] = {"test_scales": (0.5, 0.75, 1.0, 1.25, 1.5), "window": 401}  # [caffe]
    return replace(recipe, segmentation=segmentation, evaluation=replace(recipe.evaluation, **views))
