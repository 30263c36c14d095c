"""The search for the way from a feature map to the logits, among the modules of one call."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from oaa_lib.calls import Layouts, Step, is_vector
from oaa_lib.routes import Branch, Reading, Route, token_readings
from oaa_lib.tails import Tail, agrees, is_linear, rounding_of, same, tails, wide

TWO = (2, (2, 2))


class Search:
    """One call's modules, and what the user has named of them.

    Args:
        steps: of all modules, in the order of their ends.
        logits: (B, C) that the model returned.
        sides: height and width of the images.
        layouts: how the call makes tokens.
        features: name of the module that makes the features, or None.
        head: name of the module that returns the logits or holds those that do, or None.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        logits: Tensor,
        sides: tuple[int, int],
        layouts: Layouts,
        *,
        features: str | None,
        head: str | None,
    ) -> None:
        last = {step.name: place for place, step in enumerate(steps)}
        self.steps = [step for place, step in enumerate(steps) if last[step.name] == place]
        self.logits, self.features, self.head, self.sides = logits, features, head, sides
        self._named = {"features": features, "head": head}
        self.layouts = layouts
        self.unlaid: Step | None = None  # tokens that explain the logits, whose grid is not known
        self.vectors: list[Tail] = []  # what layers after the pool are given

    @torch.no_grad()
    def route(self) -> Route:
        """The route with the finest map, of those with the fewest layers after the pool.

        Raises:
            ValueError: there is none; the candidates are named. Or there is no finite logit to compare with.
        """
        if not self.logits.isfinite().any():
            raise ValueError(
                "expected finite logits, to compare them with the model's layers, got NaN or infinity alone"
            )
        found = self._maps_themselves()
        for places, share in [] if found else self._heads():
            found = found or self._through(places, share)
        fault = found.fault({step.name: step for step in self.steps}, self.logits) if found else None
        if found is None or fault:
            raise ValueError(self._refusal(fault))
        return found

    def _maps_themselves(self) -> Route | None:
        """The route of a fully convolutional head: the logits are the average of maps."""
        named = self.head or self.features
        readings = {
            place: reading
            for place, reading in self._readings(Tail(len(self.steps), (), self.logits)).items()
            if named is None or _within(self.steps[place].name, named)
        }
        place = self._finest(readings)
        return None if place is None else Route(self.steps[place].name, (Branch(readings[place], ()),))

    def _heads(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """Places of the linear layers whose outputs are the logits, alone or averaged or added, and their share."""
        linear = [
            place
            for place, step in enumerate(self.steps)
            if is_linear(step.module) and step.value.numel() == self.logits.numel() and is_vector(step.value)
        ]
        groups = [*((place,) for place in reversed(linear)), tuple(linear[-2:]), tuple(linear)]
        for group in filter(None, dict.fromkeys(groups)):
            if self.head is not None and not any(_within(self.steps[place].name, self.head) for place in group):
                continue
            scores = [wide(self.steps[place].value).reshape(self.logits.shape) for place in group]
            size = torch.stack(scores).abs().sum(0)
            for share in (1 / len(group), 1.0)[: len(group)]:
                tolerance = rounding_of(self.logits, *(self.steps[place].value for place in group)) * size * share
                if agrees(torch.stack(scores).sum(0) * share, self.logits, tolerance):
                    yield group, share

    def _through(self, places: tuple[int, ...], share: float) -> Route | None:
        """The route on which these linear layers read one module's output."""
        ways = []
        for place in places:
            for tail in tails(self.steps, place):
                self.vectors.append(tail)
                readings = self._readings(tail)
                if self._finest(readings) is not None:
                    ways.append((tail, readings))
                    break
        if len(ways) < len(places):
            return None
        shared = set.intersection(*(set(readings) for _, readings in ways))
        finest = self._finest({at: reading for at, reading in ways[0][1].items() if at in shared})
        if finest is None:
            return None
        branches = [Branch(readings[finest], tuple(layer.name for layer in tail.layers)) for tail, readings in ways]
        alike = len({(branch.reading.layout, branch.reading.grid, branch.reading.start) for branch in branches}) == 1
        return Route(self.steps[finest].name, tuple(branches), share) if alike else None

    def _readings(self, tail: Tail) -> dict[int, Reading]:
        """Places before a tail whose outputs explain the vector that it is given, and how."""
        found = {}
        for place, step in enumerate(self.steps[: tail.place]):
            if self.features is not None and step.name != self.features and tail.layers:
                continue
            if step.made.ndim == 3:
                reading = self._of_tokens(step, tail.vector)
            else:
                reading = self._of_maps(step.made, tail.vector)
            if reading is not None:
                found[place] = reading
        return found

    def _of_maps(self, made: Tensor, vector: Tensor) -> Reading | None:
        """How the average of a map (B, D, h, w) or (B, h, w, D) gives the vector."""
        if made.ndim != 4 or len(made) != len(vector):
            return None
        for layout, width, grid in (("first", made.shape[1], made.shape[2:]), ("last", made.shape[3], made.shape[1:3])):
            if width == vector.shape[1] and (layout == "first" or self._is_shaped(grid)):
                for relu in (False, True):
                    reading = Reading(layout, relu=relu)
                    if reading.explains(made, vector):
                        return reading
        return None

    def _of_tokens(self, step: Step, vector: Tensor) -> Reading | None:
        """How tokens (B, N, D) give the vector: as an average, as one of them, or both beside each other."""
        made = step.made
        count, width = made.shape[1:]
        if len(made) != len(vector) or vector.shape[1] not in (width, 2 * width):
            return None
        beside = vector.shape[1] == 2 * width
        patches = [place for place in self.layouts.patches(count) if self._is_shaped(place[0])]
        for grid, start in patches:
            for reading in token_readings(count, grid, start, beside):
                if reading.explains(made, vector):
                    if any(other != grid and math.prod(other) == math.prod(grid) for other, _ in patches):
                        break  # 2 x 6 or 3 x 4?
                    return reading
        anyhow = token_readings(count, (1, count - 1), 1, beside) if count > 1 else ()
        if any(reading.explains(made, vector) for reading in anyhow):
            self.unlaid = step
        return None

    def _finest(self, readings: dict[int, Reading]) -> int | None:
        """The place of the finest map; the last of several, which is that of the outermost module."""

        def cells(place: int) -> int:
            made, reading = self.steps[place].made, readings[place]
            if reading.layout == "tokens":
                return reading.grid[0] * reading.grid[1]
            return made[0].numel() // made.shape[1 if reading.layout == "first" else 3]

        one_cell = self._first_of_one_cell()
        places = [
            place for place in readings if cells(place) > 1 or readings[place].layout == "tokens" or place >= one_cell
        ]
        return max(places, key=lambda place: (cells(place), place), default=None)

    def _first_of_one_cell(self) -> int:
        """The place of the convolution that left one cell of the last map, as ResNet does with 32 x 32 pixels.

        A pool leaves one cell as well, but says nothing on what it has pooled.
        """
        for place in reversed(range(len(self.steps))):
            step = self.steps[place]
            if step.given.ndim == step.made.ndim == 4 and not is_vector(step.given):
                strided = isinstance(step.module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and step.module.stride in TWO
                if is_vector(step.made) and not any(step.module.children()):
                    return place if strided else len(self.steps)
                if not is_vector(step.made):
                    break
        return len(self.steps)

    def _is_shaped(self, grid: Sequence[int]) -> bool:
        """Whether one stride makes these rows and columns of the images, both rounded up or both rounded down."""
        sides = list(zip(self.sides, grid, strict=True))
        up = max(side / cells for side, cells in sides), min(side / max(cells - 1, 1e-9) for side, cells in sides)
        down = max(side / (cells + 1) for side, cells in sides), min(side / cells for side, cells in sides)
        return up[0] < up[1] or down[0] < down[1]

    def _refusal(self, fault: str | None) -> str:
        """What was looked for, what there is, and what to do."""
        linear = [step for step in self.steps if is_linear(step.module) and step.value.numel() == self.logits.numel()]
        for step in linear:
            scores = wide(step.value).reshape(self.logits.shape)
            for name, squashed in (("a sigmoid", scores.sigmoid()), ("a softmax", scores.softmax(1))):
                if same(squashed, self.logits):
                    return f"expected logits, got those of {step.name!r} after {name}; wrap the model without it"
        named = "".join(f" with {key}={name!r}" for key, name in self._named.items() if name is not None)
        maps = self._candidate_maps()
        candidates = (
            f"Candidates{named and ' instead'}: features={' or '.join(maps) or 'none'}; "
            f"head={' or '.join(repr(step.name) for step in linear) or 'none'}"
        )
        if fault:
            return f"expected layers that do what their weights say, but {fault}. {candidates}"
        if self.unlaid is not None:
            return (
                f"the tokens of {self.unlaid.name!r}, {tuple(self.unlaid.made.shape)}, explain the logits{named}, but "
                f"expected tokens that form a rectangle, got {self.unlaid.made.shape[1]} for images of {self.sides}, "
                "which the model lays out in no rows and columns of one size, or in blocks; put a CAMHead on a map "
                "instead"
            )
        if not self.vectors:
            return (
                "expected a classifier whose logits a linear layer or 1x1 convolution returns (or two, averaged), "
                f"found none{named}; give the accumulator score maps of your own. {candidates}"
            )
        read = " or ".join(
            f"{tail.layers[0].name!r} to read the average of a map with {tail.vector.shape[1]} channels"
            for tail in self.vectors
            if is_linear(tail.layers[0].module)
        )
        return (
            f"no spatial map explains the logits{named}: expected {read}, or a class token; "
            + (f"the last map is that of {maps[0]}" if maps else "there is no map of more than one cell")
            + ". Put a CAMHead on the backbone's last map, or a global average pool and one linear layer. "
            + candidates
        )

    def _candidate_maps(self) -> list[str]:
        """The last maps and tokens of the call, each by its outermost module."""
        found: dict[tuple[int, torch.Size], str] = {}
        for step in reversed(self.steps):
            if step.made.ndim in (3, 4) and not is_vector(step.made):
                found.setdefault((step.made.data_ptr(), step.made.shape), f"{step.name!r}, {tuple(step.made.shape)}")
        return list(found.values())[:5]


def _within(name: str, named: str) -> bool:
    return name == named or name.startswith(named + ".")
