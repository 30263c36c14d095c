"""Does accumulation pay for this classifier? What a finished stage 1 tells without masks, and what masks say to it.

    python examples/voc/when_it_pays.py --run runs/voc/seed0 runs/other/seed0
    python examples/voc/when_it_pays.py --run runs/voc/seed0 --voc-root VOC --saliency SALIENCY --beside study.json

--run takes folders of train_attention.py, or those of a seed of reproduce.py, and prints one row for each: the gate's
pass rate and the similarity of consecutive maps at the end; how many maps a pair has accepted; the pairs that never
accumulated; and by how much the area of the cumulative map exceeds that of the last single map.

With --voc-root the run's maps are scored, too: precision, recall and area of the CAM, and what accumulation gains over
it and over its averages, with 95 % intervals (compare.py), with a constant background and with --saliency. Maps that
are not there yet are made first: maps/cam, cam_flip, mean and max, and mce and hybrid where there are folders of
train_integral.py of that name. maps/cam_ms, which takes as much inference as 15 CAMs, is scored where it is there.

--beside puts the runs of an earlier --json into the same table and the same --figure.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare import differences, marginals, mean_iou, read_counts
from data import VOCFolder
from evaluate_cues import evaluate_maps
from files import ends_with, read_json, write_text
from images import png
from maps import map_files, read_map
from parallel import on_all_cores
from scores import add_score_classes, chosen_classes, names_of
from seeds import LOSSES, launch
from signs import expectation, from_json, signs, to_json
from torch import Tensor

from oaa_lib import ConfusionMatrix, pseudo_label_from_cues

CONTROLS, METHODS = ("cam", "cam_flip", "cam_ms"), ("mean", "max", *LOSSES)
# A background pixel is one where neither attention nor 1 - saliency reaches 0.3, or the latter is the highest
RULE = {"foreground_threshold": 0.3, "conflict_threshold": 1, "strong_attention": 1, "min_foreground": 0}
Result = dict[str, Any]
WRONG_FORM = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what other JSON raises


class Scored:
    """A run's maps and labels on images with masks.

    Args:
        run: the folder.
        arguments: of this script.
    """

    def __init__(self, run: Path, arguments: argparse.Namespace) -> None:
        self.run, self.arguments = run, arguments
        self.data = VOCFolder(arguments.voc_root, arguments.split)
        self.scored = chosen_classes(arguments.score_classes, self.data.classes)
        there = {"cam_ms": run / "maps/cam_ms"} | {loss: run / loss for loss in LOSSES}  # dear, and so not made here
        self.kinds = [kind for kind in CONTROLS + METHODS if kind not in there or there[kind].is_dir()]

    def __call__(self) -> Result:
        """Coverage of the CAM at its best thresholds; mIoU of all maps and labels; what each gains over the others."""
        maps = {kind: self.maps(kind) for kind in self.kinds}
        cam = evaluate_maps(self.data, maps["cam"], scored=self.scored)
        read = partial(read_counts, self.data, scored=self.scored, are_labels=False, level=None)
        found = {"cam": cam["foreground"], "constant": self.gains({kind: read(each) for kind, each in maps.items()})}
        if saliency := self.arguments.saliency:
            counts = {kind: counts_with_saliency(self.data, folder, saliency) for kind, folder in maps.items()}
            found["saliency"] = self.gains(counts)
        chosen = names_of(self.scored, self.data.classes)
        return found | {"split": self.data.split, "images": len(self.data), "score_classes": chosen}

    def gains(self, counts: dict[str, Tensor]) -> Result:
        """Mean IoU of each kind of map, and the differences to the controls before it."""
        means = {kind: mean_iou(each.sum(0), self.scored).item() for kind, each in counts.items()}
        return {"mean_iou": means, "gains": differences(counts, CONTROLS, self.scored)}

    def maps(self, kind: str) -> Path:
        """The folder of maps, which is made if it is not there."""
        out = self.run / "maps" / kind
        source, stage = ("integral", kind) if kind in LOSSES else (kind, "attention")
        trained = self.run / stage if (self.run / stage).is_dir() else self.run
        if not all((out / file).exists() for name in self.data.names for file in map_files(self.data, name)):
            options = ["--run", trained, "--source", source, "--split", self.data.split, "--recipe", "small"]
            options += ["--voc-root", self.arguments.voc_root, "--workers", 0, "--out", out]
            launch("export_attention.py", [str(option) for option in options], 1)
        return out


def counts_with_saliency(data: VOCFolder, maps: Path, saliency: Path) -> Tensor:
    """Counts as compare.py has them, of labels with 1 - saliency as the background; no pixel is ignored."""
    missing = [name for name in data.names if not png(saliency, name).exists()]
    if missing:
        raise SystemExit(f"--saliency {saliency} lacks {len(missing)} of {len(data)} images, first {missing[0]}.png")
    count = partial(count_with_saliency, data=data, maps=maps, saliency=saliency)
    return torch.stack(on_all_cores(count, data.names, f"{maps}, saliency"))


def count_with_saliency(name: str, *, data: VOCFolder, maps: Path, saliency: Path) -> Tensor:
    """The same of one image, (3, C + 1)."""
    size = data.drawn_size(name)
    background = 1 - read_map(png(saliency, name), size).float() / 255
    found = [read_map(maps / file, size).float() / 255 for file in map_files(data, name)]
    attention = torch.stack(found) if found else torch.zeros(0, *size)
    label = pseudo_label_from_cues(attention, data.class_ids(name), background=background, **RULE)
    return marginals(ConfusionMatrix(len(data.classes) + 1).update(label, data.mask(name)))


HEAD = ("run", "gate pass rate", "similarity", "maps a pair", "pairs without", "area growth", "CAM mIoU", "precision")
HEAD += ("recall", "area", "max - CAM", "max - flip", "mean - flip", "with saliency: max - flip", "rule")
COLUMNS = (("constant", "max - cam"), ("constant", "max - cam_flip"), ("constant", "mean - cam_flip"))
COLUMNS += (("saliency", "max - cam_flip"),)


def row_of(name: str, found: Result) -> str:
    """One row of the table, of the numbers of one run."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    known, scores = from_json(found["signs"]), found.get("scores", {})
    cells = [name, f"{known.pass_rate[-1]:.2f}", f"{known.last_similarity:.2f}", f"{known.maps_a_pair:.1f}"]
    cells += [f"{known.empty} of {known.pairs}", f"{known.growth:.2f}"]
    cam = scores.get("cam", {})
    cells.append(percent(scores["constant"]["mean_iou"]["cam"] if scores else None))
    cells += [percent(cam.get(key)) for key in ("precision", "recall")]
    cells.append(f"{cam['recall'] / cam['precision']:.2f}" if cam.get("precision") else "-")
    for background, pair in COLUMNS:
        gain = scores.get(background, {}).get("gains", {}).get(pair)
        low, high = gain["interval"] if gain else (0, 0)
        cells.append(f"{100 * gain['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" if gain else "-")
    return f"| {' | '.join([*cells, 'may pay' if expectation(known)[0] else 'no'])} |"


def main() -> None:
    """Print the table."""
    arguments = parse_arguments()
    results: dict[str, Result] = read_json(arguments.beside) if arguments.beside else {}
    for run in arguments.run:
        found = signs(run / "attention" if (run / "attention").is_dir() else run)
        print(f"{run}: {expectation(found)[1]}", flush=True)
        scores = {"scores": Scored(run, arguments)()} if arguments.voc_root else {}
        results[str(run)] = {"signs": to_json(found)} | scores
    with ends_with(f"--beside {arguments.beside}", "expected a file of an earlier --json", *WRONG_FORM):
        rows = [row_of(name, found) for name, found in results.items()]
    print("\n".join(["", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *rows]))
    for told in dict.fromkeys(scored_on(found["scores"]) for found in results.values() if "scores" in found):
        print(f"\n{told}")
    if arguments.json:
        with ends_with(f"--json {arguments.json}", "the table is above"):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.json, json.dumps(results, indent=1))
    if arguments.figure:
        import figures

        with ends_with(f"--figure {arguments.figure}", "the table is above"):
            figures.gains(results, arguments.figure)


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="of train_attention.py, or seedN")
    parser.add_argument("--voc-root", type=Path, help="also score the runs' maps: folder with JPEGImages, ...")
    parser.add_argument("--split", default="train", help="list of the images with masks (default: train)")
    parser.add_argument("--saliency", type=Path, help="also score labels by these 8-bit maps NAME.png")
    add_score_classes(parser)
    parser.add_argument("--beside", type=Path, help="runs of an earlier --json, for the same table and figure")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    parser.add_argument("--figure", type=Path, help="also draw the gains over each of the other numbers here (.png)")
    arguments = parser.parse_args()
    if not arguments.run and not arguments.beside:
        parser.error("expected folders of stage 1 (--run), or the numbers of an earlier --json (--beside)")
    if arguments.saliency and not (arguments.voc_root and arguments.saliency.is_dir()):
        parser.error(f"--saliency {arguments.saliency}: expected a folder, and --voc-root with the masks to score on")
    return arguments


def scored_on(scores: Result) -> str:
    """A line under the table."""
    return f"Means over {','.join(scores['score_classes'])} on {scores['images']} images of {scores['split']}."


if __name__ == "__main__":
    main()
