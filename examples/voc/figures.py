"""The paper's figures from a run: attention wandering (1), segmentations (4), each method (5); and curves of scores."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import VOCFolder, read_label
from maps import read_map
from networks import BACKBONES
from signs import from_json
from torch import Tensor
from torch.nn import functional as F
from training import finished

from oaa_lib.plotting import Overlay, contact_sheet


def wandering(data: VOCFolder, run: Path, out: Path) -> None:
    """Figure 1: attention at moments of the training, and what has accumulated at its end.

    Args:
        data: the training images.
        run: folder of train_attention.py; its watched images are drawn.
        out: the picture.
    """
    settings, state = finished(run)
    align = BACKBONES[settings["arguments"]["backbone"]].geometry.centred
    taken, latest = state["snapshots"]["taken"], state["snapshots"]["latest"]
    moments = sorted({0, len(taken) // 3, 2 * len(taken) // 3, len(taken) - 1})
    rows = []
    for name, maps in latest.items():
        photograph = np.asarray(data.photograph(name))
        cells = [*(maps[moment][0] for moment in moments), state["snapshots"]["cumulative"][name][-1][0]]
        rows.append([photograph, *(Overlay(photograph, at_size(c, photograph, align)) for c in cells)])
    titles = ["image", *(f"after {taken[moment]} its" for moment in moments), "accumulated (max)"]
    contact_sheet(rows, titles, [data.classes[data.class_ids(name)[0]] for name in latest]).savefig(out, dpi=110)


def comparison(data: VOCFolder, run: Path, maps: dict[str, Path], labels: Path, out: Path) -> None:
    """Figure 5: attention of each method; beside it the proxy label and the truth.

    Args:
        data: the training images.
        run: folder of train_attention.py; its watched images are drawn, each with its first class; where one of these
            has no mask, as many others that have, at even distances.
        maps: folders of attention maps, by title.
        labels: folder of proxy labels.
        out: the picture.
    """
    names = list(finished(run)[1]["snapshots"]["latest"])
    if not all(data.has_mask(name) for name in names):
        known = with_masks(data)
        names = known[:: max(len(known) // max(len(names), 1), 1)][: len(names)]
    rows = []
    for name in names:
        photograph, shown = np.asarray(data.photograph(name)), data.class_ids(name)[0]
        size = photograph.shape[:2]
        heat = [Overlay(photograph, read_map(path / f"{name}_{shown}.png", size) / 255) for path in maps.values()]
        label = labels / f"{name}.png"  # none without a saliency map
        ends = [read_label(label) if label.exists() else torch.full(photograph.shape[:2], 255), data.mask(name)]
        rows.append([photograph, *heat, *ends])
    titles = ["image", *maps, "proxy label", "truth"]
    contact_sheet(rows, titles, [data.classes[data.class_ids(name)[0]] for name in names]).savefig(out, dpi=110)


def with_masks(data: VOCFolder) -> list[str]:
    """The images of figure 5: those that show a class and have a mask; without any there is none."""
    names = [name for name in data.names if data.has_mask(name) and data.class_ids(name)]
    if not names:
        raise SystemExit(f"no image of {data.split} has a mask: there is no truth to draw")
    return names


def segmentations(
    data: VOCFolder, results: dict[str, Path], out: Path, *, examples: int = 6, failures: int = 2
) -> None:
    """Figure 4: what the segmentation networks make of val images, and where they fail.

    Args:
        data: the val images, with masks.
        results: folders of evaluate.py, by title.
        out: the picture.
        examples: evenly spread over the images, from the best to the median one.
        failures: of the worst ones, by the last result's share of right pixels.
    """

    def right(name: str) -> float | None:
        truth = data.mask(name)
        shown = read_label(list(results.values())[-1] / f"{name}.png")
        return (shown == truth)[truth != 255].float().mean().item() if (truth != 255).any() else None

    scores = {name: score for name in data.names if (score := right(name)) is not None}
    if not scores:
        raise SystemExit(f"no score: every pixel of the masks of {data.split} is 255 (ignored)")
    best_first = sorted(scores, key=lambda name: scores[name], reverse=True)
    places = np.linspace(0, len(best_first) // 2, min(examples, len(best_first)), dtype=int)
    chosen = list(dict.fromkeys([*(best_first[place] for place in places), *best_first[-failures:]]))
    rows = []
    for name in chosen:
        ends = [*(read_label(folder / f"{name}.png") for folder in results.values()), data.mask(name)]
        rows.append([data.photograph(name), *ends])
    notes = [f"{scores[name]:.0%}" for name in chosen]
    contact_sheet(rows, ["image", *results, "truth"], notes).savefig(out, dpi=110)


def at_size(cells: Tensor, photograph: np.ndarray, align_corners: bool) -> Tensor:
    """A map (h, w) uint8 of the network's cells at the photograph's size, in [0, 1]."""
    cells = cells[None, None].float() / 255
    return F.interpolate(cells, photograph.shape[:2], mode="bilinear", align_corners=align_corners)[0, 0]


def gains(results: dict[str, dict[str, Any]], path: Path) -> None:
    """What the maximum gains over the CAM, for each background, against each number that might tell it.

    Args:
        results: of when_it_pays.py, by run; those without masks are left out.
        path: the picture.
    """
    from matplotlib.figure import Figure

    scored = {name: found for name, found in results.items() if "scores" in found}
    if not scored:
        raise SystemExit("no run has scores to draw: give --voc-root with masks")
    known = [from_json(found["signs"]) for found in scored.values()]
    numbers: dict[str, list[float]] = {
        "recall of the CAM in % (needs masks)": [100 * found["scores"]["cam"]["recall"] for found in scored.values()],
        "area growth from the latest maps to max": [each.growth for each in known],
        "similarity of consecutive maps at the end": [each.last_similarity for each in known],
        "gate pass rate at the end": [each.pass_rate[-1] for each in known],
        "accepted maps a pair": [each.maps_a_pair for each in known],
        "pairs without any map in %": [100 * each.empty / each.pairs for each in known],
    }
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for axis, (label, values) in zip(figure.subplots(2, 3, sharey=True).flat, numbers.items(), strict=True):
        for background in ("constant", "saliency"):
            rows = [row for row, found in enumerate(scored.values()) if background in found["scores"]]
            gain = [list(scored.values())[row]["scores"][background]["gains"]["max - cam"] for row in rows]
            middle = 100 * np.array([each["difference"] for each in gain])
            ends = 100 * np.array([each["interval"] for each in gain]).reshape(-1, 2).T
            at = [values[row] for row in rows]
            style = {"fmt": "o", "markersize": 4, "linewidth": 1, "label": f"background: {background}"}
            axis.errorbar(at, middle, np.abs(ends - middle), **style)
            for row, height in zip(rows, middle, strict=True):
                axis.annotate(str(row + 1), (values[row], height), (3, 3), textcoords="offset points", fontsize=7)
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xlabel(label)
    figure.supylabel("gain of the maximum over the CAM in points of mIoU, 95 % interval")
    figure.axes[0].legend(fontsize=8)
    names = [f"{number}: {name}" for number, name in enumerate(short(list(scored)), 1)]
    figure.supxlabel("\n".join("   ".join(names[start : start + 6]) for start in range(0, len(names), 6)), fontsize=8)
    figure.savefig(path, dpi=110)


def short(names: list[str]) -> list[str]:
    """Folders without what all of them begin with."""
    parts = [Path(name).parts for name in names]
    while len({each[0] for each in parts}) == 1 < min(map(len, parts)):
        parts = [each[1:] for each in parts]
    return ["/".join(each) for each in parts]


def curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean IoU over the threshold, and precision over recall of the classes, for each folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_threshold, over_recall = figure.subplots(1, 2)
    for folder, result in results.items():
        (line,) = over_threshold.plot(
            np.linspace(0, 1, len(result["curve"])), 100 * np.array(result["curve"], float), label=folder
        )
        for threshold in result["thresholds"]:
            over_threshold.axvline(threshold, color=line.get_color(), linestyle=":", linewidth=1)
        recall, precision = (100 * np.array(result[f"curve_{name}"], float) for name in ("recall", "precision"))
        over_recall.plot(recall, precision)
    told = next(iter(results.values()))
    over_threshold.set(xlabel="threshold (dotted: as chosen)", ylabel="mIoU in %")
    over_threshold.set_title(f"{told['split']}, {told['images']} images; thresholds from {told['threshold_from']}")
    if len(told["score_classes"]) < len(told["class_iou"]):
        over_threshold.set_xlabel(f"threshold (dotted: as chosen)\nmean over {','.join(told['score_classes'])}")
    over_threshold.legend()
    over_recall.set(xlabel="recall in %, mean of the classes", ylabel="precision in %", title="without background")
    figure.savefig(path, dpi=120)
