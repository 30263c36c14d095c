"""Does accumulation pay for this classifier? What a finished stage 1 shows without masks, and what masks add.

    python examples/voc/when_it_pays.py --run runs/voc/seed0 runs/other/seed0
    python examples/voc/when_it_pays.py --run runs/voc/seed0 --voc-root VOC --saliency SALIENCY --beside study.json

--run takes folders of train_attention.py, or those of a seed of reproduce.py, and prints one row for each: the gate's
pass rate and the similarity of consecutive maps at the end; how many maps a pair has accepted; the pairs that never
accumulated; and by how much the area of the cumulative map exceeds that of the last single map.

With --voc-root the run's maps are scored, too: precision, recall and area of the CAM, and what accumulation gains, with
95 % intervals (compare.py), with a constant background and with --saliency, each kind of map at thresholds of its own.
The table has the maximum over the CAM and over the flip-averaged CAM; --json has the gains of every method over every
control. Maps that RUN/maps does not hold for all images of --split are made first, in RUN/maps_SPLIT: cam, cam_flip,
mean and max, and mce and hybrid where there are finished folders of train_integral.py of that name. cam_ms, which takes
as much inference as 15 CAMs, is scored where it is there.

--beside puts the runs of an earlier --json into the same table and the same --figure.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from compare import counts_of_maps, paired_differences
from data import VOCFolder
from evaluate_cues import evaluate_maps
from files import ends_with, read_json, write_text
from maps import check_saliency, map_files
from scores import add_score_classes, chosen_classes, names_of
from seeds import LOSSES, launch
from signs import expectation, from_json, signs, to_json
from texts import read_text
from training import finished

CONTROLS, METHODS = ("cam", "cam_flip", "cam_ms"), ("mean", "max", *LOSSES)
Result = dict[str, Any]
OTHER_FORM = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)


def main() -> None:
    """Print the table."""
    arguments = parse_arguments()
    results = earlier(arguments.beside) if arguments.beside else {}
    known = {run: signs(stage_1(run)) for run in arguments.run}
    data = VOCFolder(arguments.voc_root, arguments.split) if arguments.voc_root else None
    scored = chosen_classes(arguments.score_classes, data.classes) if data else []
    if data and arguments.saliency:
        check_saliency(data, arguments.saliency)  # now, rather than after the maps are made
    for run, found in known.items():
        print(f"{run}: {expectation(found)[1]}", flush=True)
        before = {key: value for key, value in results.get(str(run), {}).items() if key == "scores"}
        scores = {"scores": score(run, data, scored, arguments.saliency)} if data else before
        results[str(run)] = {"signs": to_json(found)} | scores
    rows = [row_of(name, found) for name, found in results.items()]
    print("\n".join(["", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *rows, *scored_on(results)]))
    if arguments.json:
        with ends_with(f"--json {arguments.json}", "the table is above"):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.json, json.dumps(results, indent=1))
    if arguments.figure:
        import figures

        with ends_with(f"--figure {arguments.figure}", "the table is above", ValueError):
            arguments.figure.parent.mkdir(parents=True, exist_ok=True)
            figures.gains(results, arguments.figure)


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="of train_attention.py, or seedN")
    parser.add_argument("--voc-root", type=Path, help="also score the runs' maps: folder with JPEGImages, ...")
    parser.add_argument("--split", default="train", help="list of the images with masks (default: train)")
    parser.add_argument("--saliency", type=Path, help="also score with these 8-bit maps NAME.png as the background")
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


def earlier(path: Path) -> dict[str, Result]:
    """The runs of a --json, which is looked through before anything is computed."""
    with ends_with(f"--beside {path}", "expected a file of an earlier --json", *OTHER_FORM):
        results: dict[str, Result] = json.loads(read_text(path))
        for name, found in results.items():
            row_of(name, found)
            if "saliency" in found.get("scores", {}) and "thresholds" not in found["scores"]["saliency"]:
                raise SystemExit(
                    f"--beside {path}: {name} has one threshold for all maps with saliency; score it again"
                )
        scored_on(results)
        return results


def stage_1(run: Path) -> Path:
    """The folder of stage 1 in that of a seed, or the folder itself."""
    return run / "attention" if (run / "attention").is_dir() else run


def score(run: Path, data: VOCFolder, scored: list[int], saliency: Path | None) -> Result:
    """Coverage of the CAM at its best thresholds; mIoU of all maps; what each gains over the controls before it."""
    maps = {kind: folder for kind in CONTROLS + METHODS if (folder := maps_of(run, kind, data))}
    records = {kind: folder / "source.json" for kind, folder in maps.items()}
    stretched = {kind: read_json(path)["views"]["stretch"] for kind, path in records.items() if path.exists()}
    if len(set(stretched.values())) > 1:
        raise SystemExit(f"{run}: maps of different --stretch cannot be compared ({stretched}); export them anew")
    found: Result = {"constant": gains(data, maps, scored, None)}
    if saliency:
        found["saliency"] = gains(data, maps, scored, saliency)
    return found | {
        "cam": found["constant"]["foreground"]["cam"],
        "split": data.split,
        "images": len(data),
        "score_classes": names_of(scored, data.classes),
    }


def gains(data: VOCFolder, maps: dict[str, Path], scored: list[int], saliency: Path | None) -> Result:
    """What evaluate_cues.py finds of each kind of map, and the differences to the controls before it."""
    told = ("mean_iou", "thresholds", "foreground")
    best = {kind: evaluate_maps(data, folder, scored=scored, saliency=saliency) for kind, folder in maps.items()}
    counts = {kind: counts_of_maps(data, folder, best[kind]["thresholds"], saliency) for kind, folder in maps.items()}
    numbers = {key: {kind: result[key] for kind, result in best.items()} for key in told}
    return numbers | {"gains": paired_differences(counts, CONTROLS, scored)}


def maps_of(run: Path, kind: str, data: VOCFolder) -> Path | None:
    """The folder of a kind of map, which is made if need be; None for those that are not made here."""
    out = run / f"maps_{data.split}" / kind
    trained, source = (run / kind, "integral") if kind in LOSSES else (stage_1(run), kind)
    for folder in (run / "maps" / kind, out):
        if all((folder / file).exists() for name in data.names for file in map_files(data, name)):
            made_by, settings = folder / "source.json", trained / "settings.json"
            known = made_by.exists() and settings.exists()
            if known and read_json(made_by)["run"] != read_json(settings):
                raise SystemExit(
                    f"{folder} has maps of another training than {trained}; remove it to have them made anew"
                )
            return folder
    if kind == "cam_ms" or not trained.is_dir():
        return None
    try:
        settings, _ = finished(trained)
    except SystemExit as error:
        print(f"{kind} is left out: {error}")
        return None
    options: list[Any] = ["--run", trained, "--source", source, "--recipe", settings["arguments"]["recipe"]]
    options += ["--voc-root", data.root, "--split", data.split, "--workers", 0, "--out", out]
    launch("export_attention.py", [str(option) for option in options], 1)
    return out


HEAD = ("run", "gate pass rate", "similarity", "maps a pair", "pairs without", "area growth", "CAM mIoU", "precision")
HEAD += ("recall", "area over the objects'", "max - CAM", "max - flip", "saliency: max - CAM", "max - flip")
HEAD += ("rule, constant",)
COLUMNS = [(background, pair) for background in ("constant", "saliency") for pair in ("max - cam", "max - cam_flip")]


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


def scored_on(results: dict[str, Result]) -> list[str]:
    """What the means of the runs are over, in lines under the table."""
    lines: dict[str, list[str]] = {}
    for name, found in results.items():
        if scores := found.get("scores"):
            told = f"means over {','.join(scores['score_classes'])} on {scores['images']} images of {scores['split']}"
            lines.setdefault(told, []).append(name)
    return [f"\n{', '.join(names)}: {told}" for told, names in lines.items()]


if __name__ == "__main__":
    main()
