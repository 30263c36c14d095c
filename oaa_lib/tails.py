"""What stands between the pool of a classifier and its logits: few kinds of layers, each checked by value."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oaa_lib.calls import Step, is_vector


def agrees(found: Tensor, expected: Tensor, tolerance: Tensor, *, dropout: bool = False) -> bool:
    """Whether two tensors are equal up to rounding, where both are finite.

    With ``dropout`` the second may be what dropout leaves of the first: some entries 0, the others divided by the share
    that is left.
    """
    if found.shape != expected.shape:
        return False
    known = found.isfinite() & expected.isfinite()
    if not known.any():
        return not bool(expected.isfinite().any())
    found, expected = (torch.where(known, entries, 0).to(tolerance.dtype) for entries in (found, expected))
    tolerance = torch.where(known, tolerance, 0)
    if bool(((found - expected).abs() <= tolerance).all()):
        return True
    kept = expected != 0
    if not dropout or not kept.any():
        return False
    at = torch.where(kept, found, 0).abs().argmax()
    scale = float(expected.flatten()[at] / found.flatten()[at])
    if not 1 < scale < torch.inf:
        return False
    counted = int((found.abs() > tolerance).sum())
    dropped = int(((found.abs() > tolerance) & ~kept).sum())
    share = 1 - 1 / scale
    likely = abs(dropped - counted * share) <= 8 * (counted * share / scale) ** 0.5 + 1
    return likely and bool(((found * scale - expected).abs() <= scale * tolerance)[kept].all())


def same(found: Tensor, expected: Tensor, *, dropout: bool = False) -> bool:
    """Whether two tensors hold the same values, in whatever shape; rounding to a coarser dtype is no difference."""
    if found.numel() != expected.numel():
        return False
    found, expected = found.detach().flatten(), expected.detach().flatten()
    return agrees(found, expected, rounding_of(found, expected) * wide(expected).abs(), dropout=dropout)


def wide(tensor: Tensor) -> Tensor:
    """In the dtype that comparisons are made in: float32, or float64 if the tensor has it."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def rounding_of(*tensors: Tensor) -> float:
    """Relative size of two roundings in the coarsest dtype among these."""
    return 2 * max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map at each position: a linear layer or 1x1 convolution."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm whose statistics `at_positions` knows."""
    return isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))


def _weight(layer: Any) -> Tensor:
    """A layer's weight as the call has used it: spectral norm would take another step if it were read in train mode."""
    training = [part for part in layer.modules() if part is not layer and part.training]
    for part in training:
        part.training = False
    try:
        weight: Tensor = layer.weight
    finally:
        for part in training:
            part.training = True
    return weight


def is_affine(module: nn.Module) -> bool:
    """Whether averaging commutes with a layer, if norms take the statistics of the average."""
    return is_linear(module) or (is_norm(module) and not _after_norm(module))


def _after_norm(norm: nn.Module) -> list[nn.Module]:
    """The activation that timm makes a part of some norms."""
    passing = (nn.Identity, nn.modules.dropout._DropoutNd)
    return [part for part in norm.children() if not isinstance(part, passing)]


def at_positions(layer: Any, maps: Tensor, pooled: Tensor, given: Tensor) -> Tensor:
    """What a layer makes of a vector, made at each position.

    Args:
        layer: linear, a norm or an activation.
        maps: (B, D, h, w).
        pooled: (B, D, 1, 1) whose statistics a layer norm takes at each position: with those of the average of the
            maps it is affine, and averaging stays exact. ``maps``: each position's own.
        given: (B, D) what the layer was given in this call, whose statistics batch norm takes in training.

    Returns:
        (B, D', h, w).
    """
    if is_linear(layer):
        return _linear(layer, maps)
    if is_norm(layer):
        return _norm(layer, maps, pooled, given)
    made: Tensor = layer.forward(maps.clone())  # without hooks of the user's; perhaps in place
    return made


def _linear(layer: Any, maps: Tensor) -> Tensor:
    weight = _weight(layer)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(maps.to(weight.dtype), weight, layer.bias)
    scores = weight @ maps.to(weight.dtype).flatten(2)
    bias = 0 if layer.bias is None else layer.bias.to(scores.dtype)[:, None]
    return (scores + bias).view(*scores.shape[:2], *maps.shape[-2:])


def _norm(layer: Any, maps: Tensor, pooled: Tensor, given: Tensor) -> Tensor:
    maps, pooled = (entries.to(torch.promote_types(entries.dtype, torch.float32)) for entries in (maps, pooled))
    if isinstance(layer, nn.LayerNorm):
        mean, variance = pooled.mean(1, keepdim=True), pooled.var(1, keepdim=True, correction=0)
    elif layer.training or layer.running_mean is None:
        batch = wide(given).reshape(len(given), -1, 1, 1)
        mean, variance = batch.mean(0), batch.var(0, correction=0)
    else:
        mean, variance = layer.running_mean.view(-1, 1, 1), layer.running_var.view(-1, 1, 1)
    made: Tensor = (maps - mean) * (variance + layer.eps).rsqrt()
    made = made if layer.weight is None else made * layer.weight.view(-1, 1, 1)
    made = made if layer.bias is None else made + layer.bias.view(-1, 1, 1)
    for part in _after_norm(layer):
        made = part.forward(made)
    return made


def keeps_its_formula(step: Step) -> bool:
    """Whether `at_positions` says of the vector that a layer was given what the layer made of it."""
    vector = step.given.flatten(1)
    expected = step.value.flatten(1)
    maps = vector[..., None, None]
    found = wide(at_positions(step.module, maps, maps, vector).flatten(1))
    exact = 1e-5 if vector.device.type == "cpu" else 1e-3  # TF32
    size = found.abs().amax(1, keepdim=True).expand_as(found)
    return agrees(found, expected, (rounding_of(vector, expected) + exact) * size)


def is_activation(step: Step) -> bool:
    """Whether a module changes each number by itself; tried on the numbers one by one."""
    module = step.module
    stateless = not any(module.children()) and not any(module.buffers()) and not is_linear(module)
    if not stateless or is_norm(module) or step.given.shape != step.made.shape:
        return False
    numbers = step.given.reshape(-1, 1, 1, 1)
    try:
        with torch.random.fork_rng(devices=[numbers.device] if numbers.is_cuda else []):
            made = module.forward(numbers.clone())
    except Exception:  # what a module of unknown kind does with a number of its own
        return False
    return isinstance(made, Tensor) and made.shape == numbers.shape and same(made, step.value)


class Tail(NamedTuple):
    """Layers from the pool to the logits.

    Attributes:
        place: of the first among the call's steps; what comes before may be the map.
        layers: in their order; none where the logits are the average of maps themselves.
        vector: (B, D) what the first is given.
    """

    place: int
    layers: tuple[Step, ...]
    vector: Tensor


def tails(steps: Sequence[Step], place: int) -> Iterator[Tail]:
    """What may be all that follows the pool, shortest first, given the place of the last linear layer."""
    layers: tuple[Step, ...] = (steps[place],)
    vector = layers[0].given
    yield Tail(place, layers, vector.flatten(1))
    for at in reversed(range(place)):
        step = steps[at]
        if not is_vector(step.given) or not same(step.value, vector, dropout=True):
            continue
        if same(step.given, step.value) or isinstance(step.module, nn.modules.dropout._DropoutNd):
            vector = step.given
        elif ((is_linear(step.module) or is_norm(step.module)) and keeps_its_formula(step)) or is_activation(step):
            layers, vector = (step, *layers), step.given
            yield Tail(at, layers, vector.flatten(1))
