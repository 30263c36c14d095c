"""Which architectures `wrap_classifier` understands: real models with random weights; writes docs/architectures.md.

    OMP_NUM_THREADS=1 python -m benchmarks.architectures                 # all, some ten minutes on one core
    OMP_NUM_THREADS=1 python -m benchmarks.architectures --only swin     # those with this in their name, printed

Each model sees images of two shapes, in eval and in train mode. What the wrapper returns is compared with what this
script works out by itself:

- *left alone*: logits, batch norm statistics and random numbers are those of an unwrapped copy, and no hook is left.
- *the average of each map is its logit*, or else each cell is what the model's own head makes of that position (of the
  features or tokens that the model's own `forward_features` or base model returns).
- *places*: noise is added to nine boxes of an image, one at a time; what changes in the maps has to move with the box.
"""

import argparse
import copy
import re
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn

from oaa_lib import wrap_classifier

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
CLASSES = 7
SHAPES = [
    ((96, 128), (128, 96)),
    ((112, 168), (168, 112)),
    ((128, 192), (192, 128)),
    ((192, 256), (256, 192)),
    ((224, 224), (256, 256)),
    ((224, 224), (224, 224)),
    ((240, 240), (240, 240)),
]


class Verdict(NamedTuple):
    """What came of one shape and mode."""

    understood: bool
    says: str


class Row(NamedTuple):
    """One architecture: its name, and the verdict on each shape and mode."""

    name: str
    verdicts: dict[tuple[tuple[int, int], str], Verdict]


def build(name: str, shape: tuple[int, int]) -> nn.Module:
    """A model for images of a shape, with random weights in its norms and in a head that starts at zero, too."""
    torch.manual_seed(0)
    library, _, model_name = name.partition(" ")
    if library == "timm":
        try:
            model = timm.create_model(model_name, num_classes=CLASSES, img_size=shape)
        except (TypeError, RuntimeError):
            model = timm.create_model(model_name, num_classes=CLASSES)
    elif library == "torchvision":
        options = {"image_size": shape[0]} if model_name.startswith("vit") else {}
        if model_name == "maxvit_t":
            options = {"input_size": shape}
        if model_name in ("googlenet", "inception_v3"):
            options = {"init_weights": False}
        model = torchvision.models.get_model(model_name, weights=None, num_classes=CLASSES, **options)
    else:
        model = hugging_face(model_name, shape)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 or not parameter.any():
            shift = 1 if "weight" in key or "gamma" in key or "scale" in key else 0
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + shift
    return calibrated(model, shape)


def calibrated(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Batch norm statistics that fit the weights, so that a signal reaches the last map in eval mode too."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    logits_of(model.train(), torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 4}
HUGGING_FACE = {  # settings that make the library's own classes small
    "Beit": TRANSFORMER | {"patch_size": 16},
    "Bit": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "CLIP": {"vision_config": TRANSFORMER | {"patch_size": 16}},
    "ConvNext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "ConvNextV2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "Cvt": {},
    "Data2VecVision": TRANSFORMER | {"patch_size": 16},
    "DeiT": TRANSFORMER | {"patch_size": 16},
    "Dinov2": TRANSFORMER | {"patch_size": 14},
    "Dinov2WithRegisters": TRANSFORMER | {"patch_size": 14},
    "DonutSwin": SWIN,
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "FocalNet": {"embed_dim": 16, "depths": [1, 1, 1], "hidden_sizes": [16, 32, 64], "focal_levels": [1, 1, 1],
                 "focal_windows": [3, 3, 3]},
    "HGNetV2": {},
    "Hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    "IJepa": TRANSFORMER | {"patch_size": 16},
    "Levit": {"depths": [1] * 3, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2] * 3, "key_dim": [8] * 3},
    "MetaClip2": {"vision_config": TRANSFORMER | {"patch_size": 16}},
    "MobileNetV1": {"depth_multiplier": 0.5},
    "MobileNetV2": {"depth_multiplier": 0.5},
    "MobileViT": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
    "MobileViTV2": {},
    "PPLCNet": {},
    "PoolFormer": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "Pvt": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    "PvtV2": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    "Segformer": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    "Siglip": {"vision_config": TRANSFORMER | {"patch_size": 16}},
    "SwiftFormer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 64]},
    "Swin": SWIN,
    "Swinv2": SWIN,
    "TextNet": {},
    "ViT": TRANSFORMER | {"patch_size": 16},
    "ViTMSN": TRANSFORMER | {"patch_size": 16},
}  # fmt: skip


def hugging_face(name: str, shape: tuple[int, int]) -> nn.Module:
    """A small model of Hugging Face."""
    settings = dict(HUGGING_FACE[name])
    sized = getattr(transformers, f"{name}Config")().to_dict()
    if "vision_config" in settings:
        settings["vision_config"] = settings["vision_config"] | {"image_size": shape[0]}
    elif "image_size" in sized and name not in ("Dinov2", "Dinov2WithRegisters"):
        settings["image_size"] = shape if name in ("Beit", "Data2VecVision", "Hiera") else shape[0]
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **settings)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def tried(name: str) -> Row:
    """One architecture, with the first shapes that the model itself takes."""
    verdicts: dict[tuple[tuple[int, int], str], Verdict] = {}
    for shapes in SHAPES:
        try:
            models = built(name, shapes)
        except Exception as error:  # the model's own, whatever it says of these shapes
            reason = f"{type(error).__name__}: {error}"
            continue
        verdicts = {}
        for mode in ("eval", "train"):
            for shape, (model, wrapped) in zip(shapes, models, strict=True):
                images = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(1))
                verdicts[shape, mode] = judged(model.train(mode == "train"), wrapped, images)
        if "other places" not in str(verdicts.values()):  # few cells may not show a place: then with larger images
            break
    return Row(name, verdicts or {((0, 0), "eval"): Verdict(False, f"not run: {reason[:200]}")})


def built(name: str, shapes: Sequence[tuple[int, int]]) -> list[tuple[nn.Module, nn.Module]]:
    """A model and its wrapper for each shape: one for all where the model takes them."""
    model = build(name, shapes[0]).eval()
    try:
        for shape in shapes:
            logits_of(model, torch.randn(1, 3, *shape))
        return [(model, wrap_classifier(model))] * len(shapes)
    except Exception:  # made for one shape
        models = [build(name, shape).eval() for shape in shapes]
        for model, shape in zip(models, shapes, strict=True):
            logits_of(model, torch.randn(1, 3, *shape))
        return [(model, wrap_classifier(model)) for model in models]


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a model returns, without gradient."""
    with torch.no_grad():
        output = model(images)
    output = getattr(output, "logits", output)
    logits: Tensor = output[0] if isinstance(output, tuple) else output
    return logits


def judged(model: nn.Module, wrapped: nn.Module, images: Tensor) -> Verdict:
    """One call, compared with an unwrapped copy of the model and with what its own parts make of each position."""
    copied = copy.deepcopy(model)
    torch.manual_seed(2)
    expected, random = logits_of(copied, images), torch.get_rng_state()
    torch.manual_seed(2)
    try:
        with torch.no_grad():
            output = wrapped(images)
    except ValueError as error:
        if trace := traces(model, copied):
            return Verdict(True, f"WRONG: refused, and leaves {trace}")
        return Verdict(False, str(error))
    if not torch.equal(output.logits, expected):
        return Verdict(True, "WRONG: other logits")
    if not torch.equal(torch.get_rng_state(), random):
        return Verdict(True, "WRONG: other random numbers")
    if trace := traces(model, copied):
        return Verdict(True, f"WRONG: leaves {trace}")
    quiet = without_dropout(copy.deepcopy(copied))
    return Verdict(True, relation(quiet, images))


def traces(model: nn.Module, copied: nn.Module) -> str:
    """What a wrapper has left in a model, compared with a copy that has made the same call."""
    state, parts = copied.state_dict(), dict(copied.named_modules())
    for key, value in model.state_dict().items():
        if not torch.equal(value, state[key]):
            return f"another {key}"
    for key, module in model.named_modules():
        if module.training != parts[key].training or module._forward_hooks or module._forward_pre_hooks:
            return f"a mode or hook of {key}"
    return ""


def without_dropout(model: nn.Module) -> nn.Module:
    """In train mode only dropout may come between the average of a map and its logit."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    return model


def relation(model: nn.Module, images: Tensor) -> str:
    """How the maps explain the logits, and whether they are in their places."""
    logits, maps = wrapped_call(model, images)
    cells = f"{maps.shape[-2]} x {maps.shape[-1]}"
    average = close(maps.mean((-2, -1)), logits)
    for module in model.modules() if not average else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # of one position in train mode it would make something else
    if not average:
        _, maps = wrapped_call(model, images)
    torch.manual_seed(2)
    try:
        with torch.no_grad():
            own = at_each_position(copy.deepcopy(model), images, maps.shape[-2] * maps.shape[-1])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # a head that takes no single position
        own = None
    alike = own is not None and close(maps.flatten(2), own[1])
    if not average and own is None:
        return f"{cells}, WRONG: no average, and this script knows no other relation"
    if not average and not alike:
        return f"{cells}, WRONG: other maps than its {own[0]} gives"
    return f"{cells}, {'average' if average else own[0]}{'' if alike else places(model, images)}"


def wrapped_call(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and score maps of a copy, from the same random numbers each time."""
    torch.manual_seed(2)
    with torch.no_grad():
        return tuple(wrap_classifier(copy.deepcopy(model))(images))


def close(found: Tensor, expected: Tensor) -> bool:
    """Equality up to rounding."""
    return found.shape == expected.shape and bool((found - expected).abs().amax() <= 1e-3 * expected.abs().amax())


def at_each_position(model: Any, images: Tensor, cells: int) -> tuple[str, Tensor] | None:
    """What the model's own head makes of each position or patch token of its own features, (B, C, cells)."""
    if isinstance(model, PoolingVisionTransformer):  # whose `forward_features` returns the class token alone
        maps = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        maps, _ = model.transformers((maps, model.cls_token.expand(len(images), -1, -1)))
        return "class token", model.head(model.norm(maps.flatten(2).transpose(1, 2))).transpose(1, 2)
    if hasattr(model, "forward_head"):  # timm
        features = model.forward_features(images)
        if not isinstance(features, Tensor):
            return None
        if features.ndim == 3:  # the token that the head reads, alone or with a twin for the second of two heads
            tokens = features[:, -cells:]
            each = [model.forward_head(tokens[:, place, None].expand(-1, 2, -1)) for place in range(cells)]
            each = [logits[0] + logits[1] if isinstance(logits, tuple) else logits for logits in each]
            return "class token", torch.stack(each, 2)
        if features.shape[1] == model.num_features:
            positions = [each[..., None, None] for each in features.flatten(2).unbind(2)]
        else:
            positions = [each[:, None, None] for each in features.flatten(1, 2).unbind(1)]
        return "hidden layers", torch.stack([model.forward_head(each) for each in positions], 2)
    if isinstance(model, transformers.CvtForImageClassification):  # whose norm sees the class token alone
        tokens = model.layernorm(model.cvt(images).last_hidden_state.flatten(2).transpose(1, 2))
        return "class token", model.classifier(tokens).transpose(1, 2)
    if hasattr(model, "base_model_prefix"):  # Hugging Face
        features = getattr(model, model.base_model_prefix)(images).last_hidden_state
        if features.ndim != 3 or not isinstance(getattr(model, "classifier", None), nn.Linear):
            return None
        tokens = features[:, -cells:]
        return "class token", model.classifier(tokens).transpose(1, 2)
    if isinstance(model, torchvision.models.VisionTransformer):
        tokens = model._process_input(images)
        tokens = model.encoder(torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], 1))[:, 1:]
        return "class token", model.heads(tokens).transpose(1, 2)
    if isinstance(model, torchvision.models.MobileNetV3):
        positions = model.features(images).flatten(2).unbind(2)
        return "hidden layers", torch.stack([model.classifier(each) for each in positions], 2)
    if isinstance(model, torchvision.models.MaxVit):
        features = model.stem(images)
        for block in model.blocks:
            features = block(features)
        return "hidden layers", torch.stack([model.classifier[2:](each) for each in features.flatten(2).unbind(2)], 2)
    return None


def places(model: nn.Module, images: Tensor) -> str:
    """Nothing, if what changes in the maps moves with a box of noise in the image; else what is wrong.

    With random weights a deep stack of convolutions mixes all places, so kernels are made to look at their centre.
    Nine boxes and all cells make a table of changes, whose logarithms are centred both ways: what reaches every cell,
    as global attention does, falls out. What is left has to go with rows times rows, and columns times columns.
    """
    height, width = images.shape[-2:]
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] % 2 and module.kernel_size[0] > 1:
            rows, columns = module.kernel_size
            weight = module.weight.data
            centre = weight[..., rows // 2, columns // 2].clone()
            weight *= 0.02
            weight[..., rows // 2, columns // 2] = centre
    for key, parameter in model.named_parameters():
        if key.endswith("attention_biases"):  # LeViT hands on nothing but what attention brings: let it bring the place
            parameter.data[:, 1:] = -1000.0
    model = calibrated(model, images.shape[-2:])
    boxes = [(row, column) for row in range(3) for column in range(3)]
    generator = torch.Generator().manual_seed(3)
    series = [images[:1].clone() for _ in range(len(boxes) + 1)]
    for (row, column), image in zip(boxes, series[1:], strict=True):
        part = image[..., row * height // 3 : (row + 1) * height // 3, column * width // 3 : (column + 1) * width // 3]
        part += 0.02 * torch.randn(part.shape, generator=generator)
    wrapped = wrap_classifier(model.eval())  # batch norm would carry the change to other images
    with torch.no_grad():
        maps = wrapped(torch.cat(series)).score_maps
    change = (maps[1:] - maps[:1]).abs().sum(1)
    table = change.clamp(min=1e-6 * float(change.max())).log().flatten(1)
    table = table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()
    found = []
    for axis, side in enumerate(maps.shape[-2:]):
        cell = torch.arange(side) - (side - 1) / 2
        cell = (cell[:, None] if axis == 0 else cell).expand(*maps.shape[-2:]).flatten()
        moved = torch.tensor([box[axis] - 1.0 for box in boxes])[:, None] * cell
        found.append(float((table * moved).sum() / (table.norm() * moved.norm())) if side > 1 else 1.0)
    return "" if min(found) > 0.2 else f", WRONG: other places in the image and in the maps ({found})"


TIMM = """
botnet26t_256 cait_xxs24_224 coat_tiny coat_lite_tiny coatnet_pico_rw_224
convit_tiny convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_s csatv2
cspnext_tiny cspresnet50 darknet53 davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224
deit_tiny_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientvim_m1 efficientvim_m1_dist efficientvit_b0
efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf
gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 hardcorenas_a
hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_v3 inception_v4
lambda_resnet26t lcnet_035 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s levit_conv_128s lowformer_b0
mambaout_femto maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 mixer_s32_224 mixnet_s mnasnet_small mobilenetv1_100
mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobileone_s1 mobilevit_xxs mobilevitv2_050
mvitv2_tiny nest_tiny nf_regnet_b0 pit_ti_224 pit_ti_distilled_224 poolformer_s12 poolformerv2_s12
pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1 res2net50_14w_8s
resmlp_12_224 resnest14d resnet10t resnet18 resnet26d resnet50 resnetv2_18 resnext26ts rexnet_100
selecsls42 semnasnet_075 sequencer2d_s shvit_s1 skresnet18 spnasnet_100 starnet_s050
swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
tf_efficientnetv2_b0 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 twins_pcpvt_small twins_svt_small
visformer_tiny vit_relpos_small_patch16_224 vit_small_patch14_reg4_dinov2
vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_small_patch16_dinov3
vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p16_224
"""
TORCHVISION = """
resnet18 alexnet convnext_tiny efficientnet_b0 googlenet maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnext50_32x4d shufflenet_v2_x0_5
squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2
"""


def architectures() -> Iterator[str]:
    """All, by library and name."""
    for library, names in (("timm", TIMM.split()), ("torchvision", TORCHVISION.split()), ("huggingface", HUGGING_FACE)):
        yield from (f"{library} {name}" for name in names)


def page(rows: list[Row]) -> str:
    """The table, in Markdown."""
    sentences: dict[str, int] = {}
    lines = []
    for row in rows:
        says = []
        for verdict in row.verdicts.values():
            said = verdict.says
            if not verdict.understood:
                said = f"refused [{sentences.setdefault(general(said), len(sentences) + 1)}]"
            says.append(said)
        shapes = list(dict.fromkeys(shape for shape, _ in row.verdicts))
        taken = ", ".join(f"{height} x {width}" for height, width in shapes)
        half = len(says) // 2
        evals, trains = dict.fromkeys(says[:half]), dict.fromkeys(says[half:])
        shown = "; ".join(evals) if evals == trains else f"{'; '.join(evals)} (train: {'; '.join(trains)})"
        lines.append(f"| {row.name} | {taken} | {shown} |")
    understood = sum(all(verdict.understood for verdict in row.verdicts.values()) for row in rows)
    wrong = sum("WRONG" in str(row.verdicts) for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchvision", "transformers"))
    return PAGE_TEXT.format(
        count=len(rows),
        understood=understood,
        refused=len(rows) - understood,
        wrong=wrong,
        versions=versions,
        lines="\n".join(lines),
        sentences="\n".join(
            textwrap.fill(f"{number}. {sentence}", 118, subsequent_indent="   ", break_on_hyphens=False)
            for sentence, number in sentences.items()
        ),
    )


def general(sentence: str) -> str:
    """A refusal without the names and numbers of one model."""
    sentence = sentence.partition(". Candidates")[0].partition("; the last map")[0]
    sentence = re.sub(
        r"( or '[^']*' to read the average of a map with \d+ channels)+", " (or those before it)", sentence
    )
    return re.sub(r"\b\d+\b", "N", re.sub(r"'[^']*'", "'...'", sentence))


PAGE_TEXT = """# Which classifiers are understood

{{py:func}}`~oaa_lib.wrap_classifier` was tried on {count} architectures with random weights: {understood} are
understood, {refused} are refused with a sentence, {wrong} came out wrong. Each saw images of two shapes (one after the
other in the same wrapper, or in a model made for each shape; of one where the model takes no other), in eval and in
train mode. The entries hold for both modes unless they say otherwise. `benchmarks/architectures.py` made this page with
{versions}:

```bash
OMP_NUM_THREADS=1 python -m benchmarks.architectures
```

It compares what the wrapper returns with what it works out by itself: logits, batch norm statistics, random numbers and
modes of an unwrapped copy; the average of each map with its logit, or each cell with what the model's own head makes of
that position; and whether a change in one place of the image changes that place of the maps. What the entries say:

- *average*: the average of each map is its logit.
- *hidden layers*: the head has hidden layers, which each position passes through.
- *class token*: the head reads a class token and is applied to each patch token; the patches have never been trained to
  answer for a class.
- *refused*: the number is that of the sentence below the table.

| architecture | images | score maps of one image |
|---|---|---|
{lines}

## The refusals

{sentences}
"""


def main() -> None:
    """Try the architectures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those with this in their name; the page is not written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    begun = time.time()
    for name in architectures():
        if arguments.only in name:
            rows.append(row := tried(name))
            verdicts = {verdict.says for verdict in row.verdicts.values()}
            print(f"{time.time() - begun:5.0f} s  {name}: {' / '.join(sorted(verdicts))}", flush=True)
    if not arguments.only:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
