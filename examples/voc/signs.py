"""What is known of a run of stage 1 without masks, and what that says of accumulation: the rule."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from files import ends_with
from stream import last_pass
from texts import read_lines
from training import OTHER_RUN, finished

from oaa_lib import AttentionAccumulator

# PROVISIONAL, and of a constant background alone: on the quickstart's drawn images, where the maximum gains 15 and 22
# points over the CAM, the area grew 2.5 and 3.5 times (seeds 0 and 1). Of sixteen classifiers on photographs none
# fulfils the rule, and none gains beyond chance. With saliency as the background it gained on one of two data sets,
# whatever these signs say; the similarity of consecutive maps tells nothing. docs/when_it_pays.md has the numbers.
GROWN = 2.0  # times the area of a single map, above which the cumulative map has something to complete
EMPTY = 0.1  # share of pairs without any map, above which these decide
LEVEL = 0.5  # attention from which a cell belongs to the area of a map


@dataclass(frozen=True)
class Signs:
    """What is known of a run without masks.

    Attributes:
        epochs: at which the next two were logged; without a last row that covers less than half of what the first does.
        pass_rate: of the gate, since the row before; in [0, 1].
        similarity: of the maps that pairs accepted to those before, since the row before (cosine; NaN: there was none).
        pairs: how many there are.
        empty: of these, how many had no map that passed the gate; those that were filled (--fill-empty) are among them.
        maps_a_pair: how many maps a pair has accepted, on average.
        growth: area of the cumulative maps (max) over that of the latest ones, all pairs together; NaN without maps.
    """

    epochs: list[float]
    pass_rate: list[float]
    similarity: list[float]
    pairs: int
    empty: int
    maps_a_pair: float
    growth: float

    @property
    def last_similarity(self) -> float:
        """The last one that is known; NaN if none is."""
        known = [value for value in self.similarity if not math.isnan(value)]
        return known[-1] if known else math.nan


def to_json(found: Signs) -> dict[str, Any]:
    """Its numbers, with None for NaN, which JSON has not."""
    return {name: _each(value, lambda x: None if math.isnan(x) else x) for name, value in vars(found).items()}


def from_json(numbers: dict[str, Any]) -> Signs:
    """What `to_json` has written."""
    return Signs(**{name: _each(value, lambda x: math.nan if x is None else x) for name, value in numbers.items()})


def _each(value: Any, call: Callable[[Any], Any]) -> Any:
    return [call(item) for item in value] if isinstance(value, list) else call(value)


def signs(run: Path) -> Signs:
    """Those of a folder of train_attention.py that has run to its end."""
    settings, state = finished(run)
    with ends_with(f"{run}", OTHER_RUN, ValueError, KeyError):
        maximum = AttentionAccumulator.load(run / "max.safetensors")
        latest = AttentionAccumulator(maximum.pairs, maximum.map_size, fusion="latest")
        latest.load_state_dict(state["latest"])
    log = list(csv.DictReader(read_lines(run / "log.csv")))
    columns = ("epoch", "gate_pass_rate", "similarity")
    if not log or any(log[0].get(column) is None for column in columns):
        raise SystemExit(f"{run}/log.csv is not one of train_attention.py: expected the columns {', '.join(columns)}")
    epochs, pass_rate, similarity = ([float(row[column]) for row in log] for column in columns)
    if len(epochs) > 1 and epochs[-1] - epochs[-2] < epochs[0] / 2:  # a rest of an epoch, few batches: noise
        epochs, pass_rate, similarity = epochs[:-1], pass_rate[:-1], similarity[:-1]
    pairs, empty = maximum.pairs.num_pairs, int(maximum.statistics().never_accumulated.sum())
    if settings["recipe"].get("fill_empty", "no") != "no":
        empty = empty_before_filling(settings, log, pairs)
    return Signs(epochs, pass_rate, similarity, pairs, empty, maximum.accepted / pairs, growth(maximum, latest))


def empty_before_filling(settings: dict[str, Any], log: list[dict[str, str]], pairs: int) -> int:
    """How many pairs were empty in the last row of the log before they were filled; all, if there is none."""
    recipe, last = settings["recipe"], math.inf
    if recipe["fill_empty"] == "last-epoch":
        last = last_pass(recipe["iterations"], recipe["batch_size"], settings["data"]["images"])[0]
    before = [int(row["pairs_empty"]) for row in log if int(row["step"]) <= last]
    return before[-1] if before else pairs


def growth(maximum: AttentionAccumulator, latest: AttentionAccumulator) -> float:
    """Cells from `LEVEL` on: of the cumulative maps, over those of the latest ones, of the pairs that have both."""
    areas, counts = torch.zeros(2), latest.counts
    for image in range(len(maximum)):
        both = counts[image, latest.classes(image)] > 0  # a map of the final model (--fill-empty) is no latest one
        for number, accumulator in enumerate((maximum, latest)):
            areas[number] += (accumulator.attention(image)[both] >= LEVEL).sum()
    return (areas[0] / areas[1]).item()


def expectation(found: Signs) -> tuple[bool, str]:
    """Whether accumulation may pay by the provisional rule, and that in one line, for the end of stage 1."""
    share_empty = found.empty / found.pairs
    known = [epoch for value, epoch in zip(found.similarity, found.epochs, strict=True) if not math.isnan(value)]
    if not known:
        return False, "no pair has accepted two maps: there is nothing to accumulate yet; train longer"
    told = f"similarity {found.last_similarity:.2f} after epoch {known[-1]:.0f}, area grew {found.growth:.1f} times"
    if share_empty > EMPTY:
        told += f", {share_empty:.0%} of the pairs have no map that passed the gate"
    pays = found.growth > GROWN and share_empty <= EMPTY
    says = "may beat" if pays else "is not expected to beat"
    where = "with a constant background; for saliency, and what the rule rests on, see docs/when_it_pays.md"
    return pays, f"{told}: accumulation {says} the flip-averaged CAM {where}"
