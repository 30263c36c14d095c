"""Does accumulation pay for this classifier? What a finished stage 1 tells without masks, and what masks say to it.

    python examples/voc/when_it_pays.py --run runs/voc/seed0 runs/other/seed0 --voc-root VOC --score-classes ...

--run takes folders of train_attention.py, or those of a seed of reproduce.py, and prints one row for each: the gate's
pass rate and the similarity of consecutive maps, epoch by epoch; how many maps a pair has accepted; the pairs that
never accumulated; and by how much the area of the cumulative map exceeds that of the last single map. With --voc-root
the maps that are there (maps/cam, maps/cam_flip, maps/cam_ms, maps/mean, maps/max, maps/hybrid) are scored, too:
precision and recall of the CAM, and what each of the others gains over it and over its averages, with 95 % intervals
(compare.py).

The rule at the end of each row is provisional; see the constants below.
"""

import argparse
import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare import difference, read_counts
from data import VOCFolder
from evaluate_cues import evaluate_maps
from files import ends_with, write_text
from scores import add_score_classes, chosen_classes, over, plain
from texts import read_lines
from training import OTHER_RUN, finished

from oaa_lib import AttentionAccumulator

# PROVISIONAL: the rule rests on three classifiers. Of the quickstart's drawn images, where the maximum gains 15 and 21
# points over the CAM, the area grew 2.5 and 3.5 times (seeds 0 and 1); of VOC 2007, where it gains nothing, 1.5 times.
# The similarity of consecutive maps is no part of it: at the end it is 0.98 on the drawn images and 0.91 on VOC 2007.
GROWN = 2.0  # times the area of a single map, above which the cumulative map has something to complete
EMPTY = 0.1  # share of pairs without any map, above which these decide
LEVEL = 0.5  # attention from which a cell belongs to the area of a map

CONTROLS, METHODS = ("cam", "cam_flip", "cam_ms"), ("mean", "max", "hybrid")


@dataclass(frozen=True)
class Signs:
    """What is known of a run without masks.

    Attributes:
        epochs: at which the next two were logged.
        pass_rate: of the gate, since the row before; in [0, 1].
        similarity: of the maps that pairs accepted to those before, since the row before (cosine; NaN: there was none).
        pairs: how many there are.
        empty: of these, how many never accumulated.
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


def signs(run: Path) -> Signs:
    """Those of a folder of train_attention.py that has run to its end."""
    _, state = finished(run)
    with ends_with(f"{run}", OTHER_RUN, ValueError, KeyError):
        maximum = AttentionAccumulator.load(run / "max.safetensors")
        latest = AttentionAccumulator(maximum.pairs, maximum.map_size, fusion="latest")
        latest.load_state_dict(state["latest"])
    log = list(csv.DictReader(read_lines(run / "log.csv")))
    columns = ("epoch", "gate_pass_rate", "similarity")
    if not log or any(log[0].get(column) is None for column in columns):
        raise SystemExit(f"{run}/log.csv is not one of train_attention.py: expected the columns {', '.join(columns)}")
    epochs, pass_rate, similarity = ([float(row[column]) for row in log] for column in columns)
    pairs, empty = maximum.pairs.num_pairs, int(maximum.statistics().never_accumulated.sum())
    return Signs(epochs, pass_rate, similarity, pairs, empty, maximum.accepted / pairs, growth(maximum, latest))


def growth(maximum: AttentionAccumulator, latest: AttentionAccumulator) -> float:
    """Cells from `LEVEL` on: of the cumulative maps, over those of the latest ones."""
    areas = torch.zeros(2)
    for image in range(len(maximum)):
        for number, accumulator in enumerate((maximum, latest)):
            areas[number] += (accumulator.attention(image) >= LEVEL).sum()
    return (areas[0] / areas[1]).item()


def expectation(found: Signs) -> tuple[bool, str]:
    """Whether accumulation may pay by the provisional rule, and that in one line, for the end of stage 1."""
    share_empty = found.empty / found.pairs
    known = [each for each in zip(found.similarity, found.epochs, strict=True) if not math.isnan(each[0])]
    if not known:
        return False, "no pair has accepted two maps: there is nothing to accumulate yet; train longer"
    similarity, epoch = known[-1]
    told = f"similarity {similarity:.2f} after epoch {epoch:.0f}, area grew {found.growth:.1f} times"
    if share_empty > EMPTY:
        told += f", {share_empty:.0%} of the pairs hold nothing"
    pays = found.growth > GROWN and share_empty <= EMPTY
    says = "may beat" if pays else "is not expected to beat"
    return pays, f"{told}: accumulation {says} the flip-averaged CAM (a provisional rule, see when_it_pays.py)"


def with_masks(run: Path, data: VOCFolder, scored: Sequence[int]) -> dict[str, Any]:
    """Coverage of the CAM at its best thresholds, and what the other maps of a run gain over the controls."""
    folders = {name: run / "maps" / name for name in CONTROLS + METHODS if (run / "maps" / name).is_dir()}
    if "cam" not in folders:
        return {}
    cam = evaluate_maps(data, folders["cam"], scored=scored)
    counts = {name: read_counts(data, folder, scored, are_labels=False, level=None) for name, folder in folders.items()}
    gains = {
        f"{name} - {control}": difference(counts[name], counts[control], scored)
        for control in CONTROLS
        for name in counts
        if control in counts and name != control and (name in METHODS or control == "cam")
    }
    return {"cam_mean_iou": cam["mean_iou"], **cam["foreground"], "gains": gains}


def row_of(name: str, found: Signs, masks: dict[str, Any]) -> str:
    """One row of the table."""

    def series(values: Sequence[float]) -> str:
        return " ".join(f"{value:.2f}" for value in values)

    cells = [name, series(found.pass_rate), series(found.similarity), f"{found.maps_a_pair:.1f}"]
    cells += [f"{found.empty} of {found.pairs}", f"{found.growth:.2f}"]
    for key in ("cam_mean_iou", "precision", "recall"):
        cells.append("-" if masks.get(key) is None else f"{100 * masks[key]:.1f}")
    told = [
        f"{pair} {100 * gain['difference']:+.1f} ({100 * gain['interval'][0]:+.1f} to {100 * gain['interval'][1]:+.1f})"
        for pair, gain in masks.get("gains", {}).items()
    ]
    return f"| {' | '.join([*cells, '; '.join(told) or '-', 'may pay' if expectation(found)[0] else 'no'])} |"


HEAD = ("run", "gate pass rate", "similarity", "maps a pair", "pairs without", "area growth", "CAM mIoU", "precision")
HEAD += ("recall", "gains in mIoU (95 % interval)", "rule")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="of train_attention.py, or seedN")
    parser.add_argument("--voc-root", type=Path, help="also score the runs' maps: folder with JPEGImages, ...")
    parser.add_argument("--split", default="train", help="list of the images with masks (default: train)")
    add_score_classes(parser)
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    arguments = parser.parse_args()
    data = VOCFolder(arguments.voc_root, arguments.split) if arguments.voc_root else None
    scored = chosen_classes(arguments.score_classes, data.classes) if data else []
    results, rows = {}, []
    for run in arguments.run:
        found = signs(run / "attention" if (run / "attention").is_dir() else run)
        masks = with_masks(run, data, scored) if data else {}
        rows.append(row_of(str(run), found, masks))
        numbers = dataclasses.asdict(found)
        numbers["similarity"] = plain(torch.tensor(found.similarity, dtype=torch.float64))
        numbers["growth"] = plain(torch.tensor([found.growth], dtype=torch.float64))[0]
        results[str(run)] = numbers | masks | {"may_pay": expectation(found)[0]}
        print(f"{run}: {expectation(found)[1]}")
    print("\n".join(["", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *rows]))
    if data:
        print(f"\nScores{over(scored, data.classes)} on {len(data)} images of {data.split}.")
    if arguments.json:
        with ends_with(f"--json {arguments.json}", "the table is above"):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.json, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
