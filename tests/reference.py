"""What the accumulation must do, written as slow loops over plain numbers from the paper's words and equations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import oaa_lib

Map = list[list[float]]


def normalize(score_map: Map, method: str = "max") -> Map:
    """Eq. 2: ReLU, then divide by the maximum; "minmax" also subtracts the minimum of the rectified map."""
    rectified = [[max(value, 0.0) for value in row] for row in score_map]
    low = min(map(min, rectified)) if method == "minmax" else 0.0
    high = max(map(max, rectified))
    if high == low:
        return [[0.0 for _ in row] for row in rectified]
    return [[(value - low) / (high - low) for value in row] for row in rectified]


def resize(values: Map, size: tuple[int, int]) -> Map:
    """Bilinear, with pixel centres at halves (align_corners=False) and the border repeated."""

    def neighbours(target: int, old: int, new: int) -> tuple[int, int, float]:
        centre = max((target + 0.5) * old / new - 0.5, 0.0)
        first = min(int(centre), old - 1)
        return first, min(first + 1, old - 1), centre - first

    height, width = len(values), len(values[0])
    resized = []
    for y in range(size[0]):
        top, bottom, down = neighbours(y, height, size[0])
        row = []
        for x in range(size[1]):
            left, right, across = neighbours(x, width, size[1])
            upper = values[top][left] * (1 - across) + values[top][right] * across
            lower = values[bottom][left] * (1 - across) + values[bottom][right] * across
            row.append(upper * (1 - down) + lower * down)
        resized.append(row)
    return resized


def score_gate(scores: Sequence[float], targets: Sequence[int], target: int) -> bool:
    """The paper: the score of the target category is higher than those of all non-target categories."""
    return all(scores[target] > score for other, score in enumerate(scores) if other not in targets)


def topk_gate(scores: Sequence[float], targets: Sequence[int], target: int) -> bool:
    """The release: among the K best scores of the image, K being its number of labels; a tie counts as among them."""
    return sum(score > scores[target] for score in scores) < len(targets)


GATES: dict[str | None, Callable[[Sequence[float], Sequence[int], int], bool]] = {
    "score": score_gate,
    "topk": topk_gate,
    None: lambda scores, targets, target: True,
}
FUSIONS: dict[str, Callable[[float, float, int], float]] = {
    "max": lambda cumulative, attention, t: max(cumulative, attention),  # Eq. 5
    "mean": lambda cumulative, attention, t: ((t - 1) * cumulative + attention) / t,  # Eq. 10
    "noisy_or": lambda cumulative, attention, t: 1 - (1 - cumulative) * (1 - attention),  # a user's own
}


def noisy_or(cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
    return 1 - (1 - cumulative) * (1 - attention)


@dataclass
class Batch:
    """Arguments of one `update`."""

    indices: list[int]
    score_maps: Tensor
    logits: Tensor | None = None
    fill_empty: bool = False

    def give_to(self, accumulator: oaa_lib.AttentionAccumulator) -> None:
        accumulator.update(self.indices, self.score_maps, self.logits, fill_empty=self.fill_empty)

    def single(self) -> list["Batch"]:
        """The same images, one batch each."""
        return [
            Batch([index], self.score_maps[i : i + 1], None if self.logits is None else self.logits[i : i + 1])
            for i, index in enumerate(self.indices)
        ]


@dataclass
class NaiveAccumulator:
    """Eq. 2-5 and 10, one pair and one pixel at a time; never rounds."""

    labels: list[list[int]]
    map_size: tuple[int, int]
    fusion: str
    gate: str | None
    maps: dict[tuple[int, int], Map] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    offered: int = 0
    skipped: int = 0

    def update(self, batch: Batch) -> None:
        for position, image in enumerate(batch.indices):
            maps: list[Map] = batch.score_maps[position].double().tolist()
            scores: list[float] | None = None
            if batch.logits is not None:
                scores = batch.logits[position].double().tolist()
            elif self.gate is not None:
                scores = [sum(map(sum, m)) / (len(m) * len(m[0])) for m in maps]  # Eq. 1
            targets = [c for c, shown in enumerate(self.labels[image]) if shown]
            for target in targets:
                self.offer((image, target), maps[target], scores, targets, batch.fill_empty)

    def offer(
        self, pair: tuple[int, int], score_map: Map, scores: list[float] | None, targets: list[int], fill_empty: bool
    ) -> None:
        self.offered += 1
        numbers = [value for row in score_map for value in row]
        if scores is not None:
            numbers += [score for c, score in enumerate(scores) if c == pair[1] or c not in targets]
        if not all(map(math.isfinite, numbers)):
            self.skipped += 1
            return
        is_open = self.gate is None or GATES[self.gate](scores or [], targets, pair[1])
        if not is_open and not (fill_empty and pair not in self.maps):
            return
        attention = resize(normalize(score_map), self.map_size)
        t = self.counts.get(pair, 0) + 1
        if t > 1:  # M_1 = A_1, M_t = AF(M_{t-1}, A_t)
            fuse = FUSIONS[self.fusion]
            attention = [
                [fuse(m, a, t) for m, a in zip(*rows, strict=True)]
                for rows in zip(self.maps[pair], attention, strict=True)
            ]
        self.maps[pair], self.counts[pair] = attention, t

    def dense(self) -> Tensor:
        """(N, C, H, W) float64, 0 where nothing was accumulated."""
        dense = torch.zeros(len(self.labels), len(self.labels[0]), *self.map_size, dtype=torch.float64)
        for (image, target), values in self.maps.items():
            dense[image, target] = torch.tensor(values, dtype=torch.float64)
        return dense

    def dense_counts(self) -> Tensor:
        """(N, C) int64."""
        dense = torch.zeros(len(self.labels), len(self.labels[0]), dtype=torch.int64)
        for (image, target), count in self.counts.items():
            dense[image, target] = count
        return dense


@dataclass
class Stream:
    """A data set and the batches that a training run shows of it."""

    labels: list[list[int]]
    size: tuple[int, int]
    batches: list[Batch]

    def accumulator(self, **options: object) -> oaa_lib.AttentionAccumulator:
        """An empty accumulator of this data set."""
        return oaa_lib.AttentionAccumulator(self.labels, **{"map_size": self.size, **options})  # type: ignore[arg-type]

    def give_to(self, accumulator: oaa_lib.AttentionAccumulator) -> oaa_lib.AttentionAccumulator:
        for batch in self.batches:
            batch.give_to(accumulator)
        return accumulator


@st.composite
def streams(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    faults: bool = False,
    logits: bool | None = None,
    fill_empty: bool = False,
    batches: int = 4,
) -> Stream:
    """Few images and classes, so that images meet again; scores in steps of 1/8, for ties and for exact sums.

    Args:
        dtypes: what score maps and logits may be.
        faults: whether NaN and infinities occur.
        logits: whether logits are given; None draws it.
        fill_empty: whether batches may have `fill_empty` set.
        batches: how many at most.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    num_images, num_classes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dtype = draw(st.sampled_from(list(dtypes)))
    labels = rng.integers(0, 2, (num_images, num_classes))
    labels[rng.integers(num_images), rng.integers(num_classes)] = 1

    def scores(*shape: int) -> Tensor:
        values = rng.integers(-8, 9, shape) / 8
        if faults:
            wrong = rng.random(shape) < 0.5 / math.prod(shape[1:])
            values = np.where(wrong, rng.choice([np.nan, np.inf, -np.inf], shape), values)
        return torch.tensor(values, dtype=dtype)

    stream = Stream(labels.tolist(), size, [])
    for _ in range(draw(st.integers(1, batches))):
        batch = draw(st.integers(1, 5))
        stream.batches.append(
            Batch(
                rng.integers(0, num_images, batch).tolist(),
                scores(batch, num_classes, *size),
                scores(batch, num_classes) if (draw(st.booleans()) if logits is None else logits) else None,
                fill_empty and draw(st.booleans()),
            )
        )
    return stream


def snapshot(accumulator: oaa_lib.AttentionAccumulator) -> dict[str, object]:
    """A copy of everything an accumulator keeps."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in accumulator.state_dict().items()
    }


def same(first: dict[str, object], second: dict[str, object]) -> bool:
    """Bit for bit equal snapshots."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]  # type: ignore[arg-type]
        for name, value in first.items()
    )
