"""The paper's figures from a run: attention wandering (1), segmentations (4), each method (5); and curves of scores."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import VOCFolder, read_label
from maps import read_map
from networks import BACKBONES
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
        run: folder of train_attention.py; its watched images are drawn, each with its first class.
        maps: folders of attention maps, by title.
        labels: folder of proxy labels.
        out: the picture.
    """
    names = list(finished(run)[1]["snapshots"]["latest"])
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
