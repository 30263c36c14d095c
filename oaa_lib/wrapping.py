"""Score maps of classifiers that were written without them in mind: class activation maps by their own weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oaa_lib.cam import CAMOutput


def wrap_classifier(model: nn.Module) -> "WrappedClassifier":
    """Give any classifier score maps without changing it.

    These kinds are understood, whoever wrote the model:

    - *global average pool, then a linear layer* (ResNet, EfficientNet, ConvNeXt, MobileNetV2, DenseNet, Swin; in
      torchvision, timm or Hugging Face): the linear layer is applied to each position as a 1x1 convolution. The average
      of the score maps equals the logits. A layer norm between the two (ConvNeXt) takes the pooled vector's mean and
      variance at each position, which keeps that equality.
    - *hidden layers between pool and logits* (MobileNetV3 of torchvision): these layers at each position. The average
      of the maps is not the logits then.
    - *fully convolutional heads* (`CAMHead`, SqueezeNet): the maps whose average the logits are, as they are.
    - *vision transformers* (ViT, DeiT, DINOv2): the linear layer at each patch token. Where it reads the class token,
      the average of the maps is not the logits; where it reads class token and average (DINOv2 of Hugging Face), the
      class token's share is added at each position, and it is.

    The first call looks which kind it is, and checks by value that it understood (this waits for the device, and needs
    real images rather than zeros); later calls take one feature map on its way, by a hook that is gone when the call
    returns. Parameters, mode and gradients are the model's own: under ``torch.no_grad`` nothing is kept for a backward
    pass, without it the score maps can be trained, as the integral attention model needs. Works in a training loop,
    under autocast, inside or around ``DistributedDataParallel``. A compiled model runs its uncompiled original here,
    and a compiled wrapper runs as it is, since the compiler and hooks do not go together.

    Args:
        model: called with images (B, 3, H, W); returns logits (B, C), or an object with ``.logits``, or a tuple whose
            first entry they are.

    Returns:
        A module that returns `CAMOutput`; its ``.logits`` are the model's own.

    Raises:
        TypeError: no module.
        ValueError: on the first call, if the logits cannot be traced to a map: none is left (VGG's fully connected
            layers see a flattened map), the linear layer has another width than the map, tokens form no rectangle, or
            the model's output went through a sigmoid or softmax.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        ... )
        >>> logits, score_maps = wrap_classifier(model)(torch.rand(2, 3, 32, 48))
        >>> logits.shape, score_maps.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 8, 12]))
        >>> torch.allclose(score_maps.mean((-2, -1)), logits, atol=1e-6)
        True

    Source: paper, section 5 ("simply plugged into any classification networks"); Zhou et al., CVPR 2016, for the
    equality of the linear layer and the 1x1 convolution.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    return WrappedClassifier(model)


class WrappedClassifier(nn.Module):
    """What `wrap_classifier` returns: ``images (B, 3, H, W) -> CAMOutput(logits (B, C), score_maps (B, C, h, w))``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._route: _Route | None = None

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> CAMOutput:
        """Logits of the model, and score maps; what follows the images goes to the model as it is."""
        if torch.compiler.is_compiling():
            run: Callable[..., CAMOutput] = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
            return run(images, *args, **kwargs)
        return self._run(images, *args, **kwargs)

    def _run(self, images: Tensor, *args: Any, **kwargs: Any) -> CAMOutput:
        model = getattr(
            self.model, "_orig_mod", self.model
        )  # of torch.compile, which does not see hooks that come later
        modules = dict(model.named_modules())
        if self._route is None:
            steps: list[_Step] = []
            with _hooks(modules, lambda name, module, given, made: steps.append(_Step(name, module, given, made))):
                output = model(images, *args, **kwargs)
            if isinstance(output, CAMOutput):
                return output
            logits = _logits(output)
            self._route = _find_route(steps, logits, images)
            features = next(step.made for step in reversed(steps) if step.name == self._route.features)
        else:
            found: dict[str, Tensor] = {}
            with _hooks(
                {self._route.features: modules[self._route.features]},
                lambda name, module, given, made: found.__setitem__(name, made),
            ):
                output = model(images, *args, **kwargs)
            if isinstance(output, CAMOutput):
                return output
            logits, features = _logits(output), found[self._route.features]
        return CAMOutput(logits, self._route.score_maps(features, modules, images))


@dataclass(frozen=True)
class _Step:
    """One module's call: its first argument and its result."""

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor


@dataclass(frozen=True)
class _Route:
    """How score maps come from one module's output.

    Attributes:
        features: name of the module.
        layout: of its output: (B, D, h, w), (B, h, w, D) or tokens (B, N, D).
        relu: whether the model rectifies it before pooling, outside of any module.
        head: name of the linear layer, or of the layers after the pool; None: the output is the score maps.
        norm: name of a layer norm between pool and linear layer, or None.
        class_token: whether the linear layer reads the class token ("only"), or it and the average ("too"), or "no".
        patches: (rows, columns) of pixels that make one token, 0 without tokens.
    """

    features: str
    layout: str
    relu: bool = False
    head: str | None = None
    norm: str | None = None
    class_token: str = "no"
    patches: tuple[float, float] = (0.0, 0.0)

    def score_maps(self, features: Tensor, modules: dict[str, nn.Module], images: Tensor) -> Tensor:
        """(B, C, h, w) from the features of a call."""
        if self.head is None:
            return features
        first = features
        if self.layout == "tokens":
            height, width = (
                max(round(side / patch), 1) for side, patch in zip(images.shape[-2:], self.patches, strict=True)
            )
            positions = height * width
            if positions > features.shape[1]:
                raise ValueError(
                    f"expected tokens that form a rectangle of {height} x {width} for images of "
                    f"{tuple(images.shape[-2:])}, got {features.shape[1]}; feed images whose sides are multiples of "
                    "the patch size"
                )
            features = features[:, features.shape[1] - positions :].transpose(1, 2)
            features = features.reshape(*features.shape[:2], height, width)
        elif self.layout == "last":
            features = features.permute(0, 3, 1, 2)
        features = features.relu() if self.relu else features
        if self.norm is not None:
            features = _norm_of_pooled(features, modules[self.norm])
        head: Any = modules[self.head]
        if not _is_linear(head):
            each: Tensor = head(features.permute(0, 2, 3, 1).flatten(0, 2))
            return each.view(len(features), *features.shape[-2:], -1).permute(0, 3, 1, 2)
        weight, bias = head.weight.flatten(1), head.bias
        if self.class_token == "too":
            width = features.shape[1]
            fixed = F.linear(first[:, 0], weight[:, :width], bias)
            return F.conv2d(features, weight[:, width:, None, None]) + fixed[..., None, None]
        return F.conv2d(features, weight[..., None, None], bias)


def _norm_of_pooled(features: Tensor, norm: Any) -> Tensor:
    """Layer norm at each position with the mean and variance of the pooled vector: then it is affine, and GAP exact."""
    pooled = features.mean((-2, -1), keepdim=True)
    mean, variance = pooled.mean(1, keepdim=True), pooled.var(1, correction=0, keepdim=True)
    features = (features - mean) * (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        features = features * norm.weight.view(-1, 1, 1)
    if norm.bias is not None:
        features = features + norm.bias.view(-1, 1, 1)
    return features


@contextmanager
def _hooks(modules: dict[str, nn.Module], note: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Note each module's first tensor argument and its tensor result, as long as the context lasts."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(made, Tensor):
                note(name, module, given[0], made)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(output: Any) -> Tensor:
    """The class scores in what a classifier returns."""
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected a classifier that returns logits (B, C), got {shape}")
    return logits


def _find_route(steps: list[_Step], logits: Tensor, images: Tensor) -> _Route:
    """Where the logits come from, checked by value."""
    with torch.no_grad():
        last = {step.name: place for place, step in enumerate(steps)}
        steps = [step for place, step in enumerate(steps) if last[step.name] == place]
        for step in reversed(steps):  # fully convolutional: the logits are the average of maps
            is_map = step.made.ndim == 4 and step.made.shape[:2] == logits.shape and step.made[0, 0].numel() > 1
            if is_map and _equal(step.made.mean((-2, -1)), logits):
                return _Route(step.name, "first")
        place, tails = _tails(steps, logits)
        patches = [
            step.made.shape[-2:]
            for step in steps
            if isinstance(step.module, nn.Conv2d) and step.module.stride == step.module.kernel_size != (1, 1)
        ]
        for tail in tails:
            for step in reversed(steps[:place]):
                for layout, features in _layouts(step.made, tail.vector.shape[1]):
                    route = _match(step.name, layout, features, tail.vector, patches, images)
                    if route is not None:
                        return replace(route, head=tail.head, norm=tail.norm)
        maps = [step for step in steps[:place] if step.made.ndim == 4 and step.made[0, 0].numel() > 1]
        seen = f"the last map is that of {maps[-1].name!r}, {tuple(maps[-1].made.shape)}" if maps else "there is no map"
        raise ValueError(
            f"no spatial map explains the logits: expected the linear layer {tails[0].head!r} to read the average of a "
            f"map with {tails[0].vector.shape[1]} channels, or a class token; {seen}. Put a CAMHead on the backbone's "
            "last map, or a global average pool and one linear layer"
        )


class _Tail(NamedTuple):
    """What follows the pooled vector.

    Attributes:
        head: name of the module that turns the vector into logits: a linear layer, or several layers.
        vector: (B, D) what it is given, NaN where dropout has taken it.
        norm: name of a layer norm that comes before it.
    """

    head: str
    vector: Tensor
    norm: str | None = None


def _tails(steps: list[_Step], logits: Tensor) -> tuple[int, list[_Tail]]:
    """The place of the linear layer that gives the logits, and what may count as all that follows the pooled vector."""
    for place in reversed(range(len(steps))):
        step = steps[place]
        if not _is_linear(step.module) or step.made.numel() != logits.numel():
            continue
        scores = step.made.reshape(logits.shape)
        if torch.equal(scores, logits):
            break
        for name, squashed in (("a sigmoid", scores.sigmoid()), ("a softmax", scores.softmax(1))):
            if _equal(squashed, logits):
                raise ValueError(f"expected logits, got those of {step.name!r} after {name}; wrap the model without it")
    else:
        raise ValueError(
            "expected a classifier whose logits a linear layer or 1x1 convolution returns, found none; give the "
            "accumulator score maps of your own"
        )
    vector, norm = step.given, None
    for before in reversed(steps[:place]):  # dropout, flattening and a norm leave a vector a vector
        if before.made.numel() != vector.numel() or not _equal(before.made.flatten(), vector.flatten()):
            continue
        if (
            isinstance(before.module, nn.Dropout) and before.module.training
        ):  # in place, perhaps: what it was given is lost
            vector = (before.made * (1 - before.module.p)).masked_fill(before.made == 0, torch.nan)
        elif isinstance(before.module, nn.LayerNorm) and norm is None:
            norm, vector = before.name, before.given
        elif isinstance(before.module, (nn.Dropout, nn.Flatten, nn.Identity)):
            vector = before.given
    several = [
        _Tail(outer.name, outer.given)  # MobileNetV3: hidden layers between pool and logits
        for outer in steps[place + 1 :]
        if outer.made.shape == logits.shape and outer.given.ndim == 2 and torch.equal(outer.made, logits)
    ]
    return place, [_Tail(step.name, vector.flatten(1), norm), *several]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


def _layouts(made: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
    """A module's output as (B, D, positions), in each way to read it; ``width`` is D, or 2 D with a class token."""
    if made.ndim == 4 and made.shape[1] == width and made[0, 0].numel() > 1:
        yield "first", made.flatten(2)
    if made.ndim == 4 and made.shape[3] == width and made[0, ..., 0].numel() > 1:
        yield "last", made.flatten(1, 2).transpose(1, 2)
    if made.ndim == 3 and made.shape[2] in (width, width / 2) and made.shape[1] > 1:
        yield "tokens", made.transpose(1, 2)


def _match(
    name: str, layout: str, features: Tensor, vector: Tensor, patches: list[torch.Size], images: Tensor
) -> _Route | None:
    """The route on which features (B, D, positions) give the vector (B, D or 2 D), or None."""
    width = features.shape[1]
    if layout != "tokens":
        for relu in (False, True):
            if _equal((features.relu() if relu else features).mean(2), vector):
                return _Route(name, layout, relu=relu)
        return None
    token, grid = features[..., 0], _grid(features.shape[2], patches, images)
    average = features if grid is None else features[..., features.shape[2] - grid[0] * grid[1] :]
    if vector.shape[1] == 2 * width:
        kind = "too" if _equal(torch.cat([token, average.mean(2)], 1), vector) else None
    elif _equal(token, vector):
        kind = "only"
    else:
        kind = "no" if _equal(average.mean(2), vector) or _equal(features.mean(2), vector) else None
    if kind is None:
        return None
    if grid is None:
        raise ValueError(
            f"expected tokens that form a rectangle, got {features.shape[2]} from {name!r} for images of "
            f"{tuple(images.shape[-2:])}; feed images whose sides are multiples of the patch size"
        )
    return _Route(name, layout, class_token=kind, patches=(images.shape[-2] / grid[0], images.shape[-1] / grid[1]))


def _grid(tokens: int, patches: list[torch.Size], images: Tensor) -> tuple[int, int] | None:
    """(h, w) of the patch tokens, which come last: as the patch convolution has them, or fewer once merged by 2 x 2."""
    for height, width in patches:
        for merged in (1, 2, 4, 8, 16):
            grid = (-(-height // merged), -(-width // merged))
            if grid[0] * grid[1] > 1 and 0 <= tokens - grid[0] * grid[1] <= (16 if merged == 1 else 0):
                return grid
    for more in (0, 1):  # patches cut without a convolution
        side = round((tokens - more) ** 0.5)
        if side > 1 and side * side == tokens - more and images.shape[-2] == images.shape[-1]:
            return side, side
    return None


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Equality up to rounding, where what is expected is known (not NaN)."""
    known = ~expected.isnan()
    if found.shape != expected.shape or not known.any():
        return False
    rounding = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps) * 100
    found, expected = found[known].double(), expected[known].double()
    return bool(((found - expected).abs().amax() <= rounding * expected.abs().amax()).item())
