"""How score maps come from one module's output, and whether that explains the logits of a call, by value."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from oaa_lib.calls import Step
from oaa_lib.tails import agrees, at_positions, is_affine, keeps_its_formula, rounding_of, same, wide


@dataclass(frozen=True)
class Reading:
    """How a module's output is read as one vector at each position, and how the model pools these.

    Attributes:
        layout: "first" (B, D, h, w), "last" (B, h, w, D) or "tokens" (B, N, D).
        pooled: what the layer after the pool is given. "average": that of the positions. "all": that of all tokens,
            those that are no patches too; their share is added to each position. "beside": the first token, and the
            average after it; the token stands at each position. "token": one token alone; the positions are the
            patches then, and their average is not the logits.
        relu: whether the model rectifies the output before pooling, outside of any module.
        grid: (rows, columns) of tokens.
        start: the first token that is a patch.
        token: which token is read.
    """

    layout: str
    pooled: str = "average"
    relu: bool = False
    grid: tuple[int, int] = (0, 0)
    start: int = 0
    token: int = 0

    def positions(self, features: Tensor) -> Tensor:
        """The vector at each position, (B, D, h, w)."""
        if self.layout != "tokens":
            maps = features if self.layout == "first" else features.permute(0, 3, 1, 2)
            return maps.relu() if self.relu else maps
        end = self.start + self.grid[0] * self.grid[1]
        patches = features[:, self.start : end]
        if self.pooled == "all":
            others = torch.cat([features[:, : self.start], features[:, end:]], 1)
            patches = (patches * patches.shape[1] + others.sum(1, keepdim=True)) / features.shape[1]
        elif self.pooled == "beside":
            patches = torch.cat([features[:, :1].expand_as(patches), patches], 2)
        return patches.transpose(1, 2).reshape(len(patches), -1, *self.grid)

    def explains(self, features: Tensor, vector: Tensor) -> bool:
        """Whether the layer after the pool was given this vector (B, D), up to dropout and rounding.

        The rounding is that of an average of n numbers, summed in single precision and returned in the coarser dtype of
        the two: relative to the result, and to what n such numbers with random signs would give.
        """
        if self.layout == "tokens" and features.shape[1] < self.start + self.grid[0] * self.grid[1]:
            return False
        if self.pooled == "token":
            found, cells = wide(features[:, self.token]), 1
            spread = found.abs()
        else:
            positions = wide(self.positions(features)).flatten(2)
            found, spread, cells = positions.mean(2), positions.abs().mean(2), positions.shape[2]
        tolerance = rounding_of(features, vector) * (found.abs() + spread / cells**0.5)
        tolerance = tolerance + (8 + cells**0.5) * torch.finfo(found.dtype).eps * spread
        return agrees(found, vector, tolerance, dropout=True)


def token_readings(count: int, grid: tuple[int, int], start: int, beside: bool) -> Iterator[Reading]:
    """The ways in which tokens may be pooled, given which of them are patches."""
    end = start + grid[0] * grid[1]
    others = [*range(start), *range(end, count)]
    if beside:
        if start:
            yield Reading("tokens", "beside", grid=grid, start=start)
        return
    if end > start:
        yield Reading("tokens", grid=grid, start=start)
    if others:
        yield from (Reading("tokens", "token", grid=grid, start=start, token=token) for token in others)
        yield Reading("tokens", "all", grid=grid, start=start)


class Branch(NamedTuple):
    """One way from the features to the logits.

    Attributes:
        reading: of the features.
        layers: names of the modules after the pool; none where the logits are the average of maps themselves.
    """

    reading: Reading
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """How score maps come from one module's output.

    Attributes:
        features: name of the module.
        branches: one, or several whose logits the model averages or adds.
        share: of each branch in the logits.
    """

    features: str
    branches: tuple[Branch, ...]
    share: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """The modules whose calls the route reads."""
        return (self.features, *(name for branch in self.branches for name in branch.layers))

    @property
    def head(self) -> str:
        """The modules that return the logits, for people."""
        return " and ".join(repr(branch.layers[-1]) for branch in self.branches if branch.layers) or "None"

    def score_maps(self, steps: dict[str, Step]) -> Tensor:
        """(B, C, h, w) of a call."""
        total: Tensor | None = None
        for reading, layers in self.branches:
            maps = reading.positions(steps[self.features].made)
            modules = [steps[name].module for name in layers]
            # Affine layers give the logits as an average of maps, if norms take the statistics of the average.
            affine = reading.pooled != "token" and all(map(is_affine, modules))
            for name, layer in zip(layers, modules, strict=True):
                pooled = maps.mean((-2, -1), keepdim=True) if affine else maps
                maps = at_positions(layer, maps, pooled, steps[name].given)
            total = maps if total is None else total + maps
        assert total is not None
        return total if self.share == 1 else total * self.share

    def is_telling(self, steps: dict[str, Step]) -> bool:
        """Whether positions differ: where they do not, any way of pooling gives the same, and maps may be another's."""
        positions = self.branches[0].reading.positions(steps[self.features].made).detach().flatten(2)
        spread = positions.amax(2) - positions.amin(2)
        return positions.shape[2] == 1 or bool((spread > 4 * rounding_of(positions) * positions.abs().amax(2)).any())

    @torch.no_grad()
    def fault(self, steps: dict[str, Step], logits: Tensor) -> str | None:
        """What in a call is not as the route says, by value; None if all of it is."""
        missing = [name for name in self.names if name not in steps]
        if missing:
            return f"{missing[0]!r} was not called"
        ends = []
        for reading, names in self.branches:
            layers = [steps[name] for name in names]
            reader = repr(names[0]) if names else "the model"
            if not reading.explains(steps[self.features].made, layers[0].given.flatten(1) if layers else logits):
                return f"what {reader} {'reads' if names else 'returns'} is not pooled from {self.features!r} as it was"
            for before, layer in pairwise(layers):
                if not same(before.value, layer.given, dropout=True):
                    return f"{layer.name!r} does not read what {before.name!r} returns"
            wrong = [layer.name for layer in layers if not keeps_its_formula(layer)]
            if wrong:
                return f"{wrong[0]!r} does not return what its weights say"
            ends.append(wide(layers[-1].value).reshape(logits.shape) if layers else wide(logits))
        total = torch.stack(ends).sum(0) * self.share
        size = torch.stack(ends).abs().sum(0) * self.share
        return None if agrees(total, logits, rounding_of(logits) * size) else f"the logits are not those of {self.head}"
