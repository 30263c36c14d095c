"""What the accumulation must do, written as slow loops over plain numbers from the paper's words and equations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import oaa_lib

Map = list[list[float]]
Pair = tuple[int, int]
Box = tuple[float, float, float, float, bool]  # left, top, right, bottom, flip: what an `oaa_lib.View` holds


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


def value_at(values: Map, x: Fraction, y: Fraction) -> float:
    """Bilinear, at a place from (0, 0), the outer corner of the first pixel, to (1, 1), that of the last one."""
    height, width = len(values), len(values[0])
    across = min(max(x * width - Fraction(1, 2), Fraction(0)), Fraction(width - 1))
    down = min(max(y * height - Fraction(1, 2), Fraction(0)), Fraction(height - 1))
    left, top = int(across), int(down)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    to_right, to_bottom = float(across - left), float(down - top)
    upper = values[top][left] * (1 - to_right) + values[top][right] * to_right
    lower = values[bottom][left] * (1 - to_right) + values[bottom][right] * to_right
    return upper * (1 - to_bottom) + lower * to_bottom


def show(values: Map, box: Box, size: tuple[int, int]) -> list[list[float | None]]:
    """What a view's map says about each pixel of its image; None where the view does not show the pixel's centre."""
    left, top, right, bottom = map(Fraction, box[:4])
    if box[4]:
        values = [row[::-1] for row in values]  # as it looks in the image
    shown: list[list[float | None]] = []
    for row in range(size[0]):
        y = (Fraction(2 * row + 1, 2 * size[0]) - top) / (bottom - top)
        shown.append([])
        for column in range(size[1]):
            x = (Fraction(2 * column + 1, 2 * size[1]) - left) / (right - left)
            shown[-1].append(value_at(values, x, y) if 0 <= x <= 1 and 0 <= y <= 1 else None)
    return shown


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
    "latest": lambda m, a, t: a,
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
    views: list[oaa_lib.View] | None = None

    def give_to(self, accumulator: oaa_lib.AttentionAccumulator) -> None:
        accumulator.update(self.indices, self.score_maps, self.logits, self.views, fill_empty=self.fill_empty)

    def single(self) -> list["Batch"]:
        """The same images, one batch each."""
        return [
            Batch(
                [index],
                self.score_maps[i : i + 1],
                None if self.logits is None else self.logits[i : i + 1],
                views=None if self.views is None else self.views[i : i + 1],
            )
            for i, index in enumerate(self.indices)
        ]


@dataclass
class NaiveAccumulator:
    """Eq. 2-5 and 10, one pair and one pixel at a time: each pixel keeps all that it was shown. Never rounds.

    Attributes:
        histories: for each pixel of each pair that accepted a map, the values that it was shown, in order.
        counts: how many maps each pair has accepted.
        log: what became of each map offered: "accepted", "refused" by the gate, "skipped" for a fault, or "unseen".
    """

    labels: list[list[int]]
    map_size: tuple[int, int] | list[tuple[int, int]]
    fusion: str
    gate: str | None
    histories: dict[Pair, list[list[list[float]]]] = field(default_factory=dict)
    counts: dict[Pair, int] = field(default_factory=dict)
    log: list[tuple[Pair, str]] = field(default_factory=list)

    @property
    def offered(self) -> int:
        return len(self.log)

    @property
    def skipped(self) -> int:
        return sum(outcome == "skipped" for _, outcome in self.log)

    def update(self, batch: Batch) -> None:
        for position, image in enumerate(batch.indices):
            maps: list[Map] = batch.score_maps[position].double().tolist()
            scores: list[float] | None = None
            if batch.logits is not None:
                scores = batch.logits[position].double().tolist()
            elif self.gate is not None:
                scores = [sum(map(sum, m)) / (len(m) * len(m[0])) for m in maps]  # Eq. 1
            targets = [c for c, shown in enumerate(self.labels[image]) if shown]
            view = None if batch.views is None else batch.views[position]
            for target in targets:
                outcome = self.offer((image, target), maps[target], scores, targets, batch.fill_empty, view)
                self.log.append(((image, target), outcome))

    def offer(
        self,
        pair: Pair,
        score_map: Map,
        scores: list[float] | None,
        targets: list[int],
        fill_empty: bool,
        view: Box | None,
    ) -> str:
        numbers = [value for row in score_map for value in row]
        if scores is not None:
            numbers += [score for c, score in enumerate(scores) if c == pair[1] or c not in targets]
        if not all(map(math.isfinite, numbers)):
            return "skipped"
        is_open = self.gate is None or GATES[self.gate](scores or [], targets, pair[1])
        if not is_open and not (fill_empty and pair not in self.histories):
            return "refused"
        size, attention = self.size_of(pair[0]), normalize(score_map)
        shown = resize(attention, size) if view is None else show(attention, view, size)
        if all(value is None for row in shown for value in row):
            return "unseen"
        pixels = self.histories.setdefault(pair, [[[] for _ in range(size[1])] for _ in range(size[0])])
        for y, row in enumerate(shown):
            for x, value in enumerate(row):
                if value is not None:
                    pixels[y][x].append(value)
        self.counts[pair] = self.counts.get(pair, 0) + 1
        return "accepted"

    def size_of(self, image: int) -> tuple[int, int]:
        return self.map_size if isinstance(self.map_size, tuple) else self.map_size[image]

    def attention(self, image: int) -> Tensor:
        """(C, H, W) float64, 0 where nothing was accumulated: M_1 = A_1, M_t = AF(M_{t-1}, A_t), pixel by pixel."""
        return self.summary(image, lambda history: fold(FUSIONS[self.fusion], history))

    def latest(self, image: int) -> Tensor:
        """(C, H, W) float64: what each pixel was shown last, 0 if nothing."""
        return self.summary(image, lambda history: history[-1])

    def summary(self, image: int, of: Callable[[list[float]], float]) -> Tensor:
        maps = torch.zeros(len(self.labels[image]), *self.size_of(image), dtype=torch.float64)
        for target in range(len(maps)):
            for y, row in enumerate(self.histories.get((image, target), [])):
                for x, history in enumerate(row):
                    maps[target, y, x] = of(history) if history else 0
        return maps

    def dense(self) -> Tensor:
        """(N, C, H, W) float64, if all maps have one size."""
        return torch.stack([self.attention(image) for image in range(len(self.labels))])

    def dense_counts(self) -> Tensor:
        """(N, C) int64."""
        dense = torch.zeros(len(self.labels), len(self.labels[0]), dtype=torch.int64)
        for (image, target), count in self.counts.items():
            dense[image, target] = count
        return dense


def fold(fuse: Callable[[float, float, int], float], history: Sequence[float]) -> float:
    """M_1 = A_1 (Eq. 3), then Eq. 4."""
    cumulative = history[0]
    for t, attention in enumerate(history[1:], start=2):
        cumulative = fuse(cumulative, attention, t)
    return cumulative


def cosine(both: Sequence[tuple[float, float]]) -> float:
    """Cosine similarity of two vectors, 0 if one of them is."""
    product = math.sqrt(sum(a * a for a, _ in both) * sum(b * b for _, b in both))
    return sum(a * b for a, b in both) / product if product else 0.0


@dataclass
class Stream:
    """A data set and the batches that a training run shows of it."""

    labels: list[list[int]]
    size: tuple[int, int] | list[tuple[int, int]]
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
    views: bool = False,
    sizes: str = "the score maps'",
) -> Stream:
    """Few images and classes, so that images meet again; scores in steps of 1/8, for ties and for exact sums.

    Args:
        dtypes: what score maps and logits may be.
        faults: whether NaN and infinities occur.
        logits: whether logits are given; None draws it.
        fill_empty: whether batches may have `fill_empty` set.
        batches: how many at most.
        views: whether batches may show parts of their images, see `some_view`.
        sizes: of the stored maps: ``"the score maps'"``, ``"another"``, or ``"each"`` image's own.
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
    if sizes == "another":
        stream.size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)), label="map size")
    elif sizes == "each":
        stream.size = [tuple(each) for each in rng.integers(1, 6, (num_images, 2)).tolist()]
    for _ in range(draw(st.integers(1, batches))):
        batch = draw(st.integers(1, 5))
        stream.batches.append(
            Batch(
                rng.integers(0, num_images, batch).tolist(),
                scores(batch, num_classes, *size),
                scores(batch, num_classes) if (draw(st.booleans()) if logits is None else logits) else None,
                fill_empty and draw(st.booleans()),
                [some_view(rng) for _ in range(batch)] if views and draw(st.booleans()) else None,
            )
        )
    return stream


def some_view(rng: np.random.Generator) -> oaa_lib.View:
    """A view whose edges are exact in binary, so that a pixel's centre is often on one.

    It shows all of the image, a part, something beyond its edge too, or so little that no pixel's centre is in it.
    """
    flip = bool(rng.integers(2))
    kind = rng.integers(6)
    if kind == 0:
        return oaa_lib.View(flip=flip)
    left, top = (rng.integers(-8, 20, 2) / 16).tolist()
    width, height = (rng.integers(1, 25, 2) / (256 if kind == 1 else 16)).tolist()
    return oaa_lib.View(left, top, left + width, top + height, flip)


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


def rows_of(state: dict[str, object]) -> list[dict[str, bytes]]:
    """All that each pair keeps, from a state."""
    per_image = np.diff(np.asarray(state["offsets"]))
    sizes = np.broadcast_to(np.asarray(state["map_size"]), (len(per_image), 2)).prod(1).repeat(per_image)
    rows: list[dict[str, bytes]] = [{} for _ in sizes]
    for name in ("maps", "missed", "counts", "synchronized"):
        if name in state:
            flat = np.asarray(state[name]).reshape(-1)
            ends = np.cumsum(sizes if name in ("maps", "missed") else np.ones_like(sizes))
            for row, piece in zip(rows, np.split(flat, ends[:-1]), strict=True):
                row[name] = piece.tobytes()
    return rows


def what_was_left(
    found: dict[str, object], before: dict[str, object], after: dict[str, object], *, one_step: bool
) -> tuple[list[bool], bool]:
    """Which pairs have changed, and whether all has, where a change was cut short: whole pairs, the totals last."""
    rows = list(zip(*map(rows_of, (found, before, after)), strict=True))
    assert all(row in (old, new) for row, old, new in rows), "a pair is torn"
    done = [row == new for row, _, new in rows]
    untouched = all(row == old for row, old, _ in rows)
    as_before, as_after = (
        all(torch.equal(found[name], state[name]) for name in ("offered", "skipped", "totals_then"))  # type: ignore[arg-type]
        for state in (before, after)
    )
    assert (as_after and all(done)) or (as_before and (untouched or not one_step)), "pairs or totals are amiss"
    return done, as_after and all(done)
