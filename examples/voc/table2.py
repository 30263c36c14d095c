"""The paper's Table 2 as cue quality: runs every stage for each seed, skips what is done, prints one table.

Rows: CAM, CAM averaged over the mirrored view (the control: part of what accumulation gives is averaging), cumulative
attention by mean and by max, OAA+ by multi-label cross entropy (as in the paper, and with the hybrid loss's threshold)
and by the hybrid loss. Seeds can also run side by side:
start `--seeds 0` and `--seeds 1` in two shells, then `--seeds 0 1` to print both.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from data import VOCFolder
from evaluate_cues import count_cues, evaluate_maps
from networks import BACKBONES
from recipes import RECIPES

HERE = Path(__file__).parent
ROWS = {  # name: (training run, --source); the cumulative ones exist for the train split alone
    "CAM": ("attention", "cam"),
    "CAM, flip-averaged": ("attention", "cam_flip"),
    "OAA mean (Eq. 10)": ("attention", "mean"),
    "OAA max (Eq. 5)": ("attention", "max"),
    "OAA max + MCE (Eq. 6)": ("mce", "integral"),
    "OAA max + MCE, same threshold": ("mce_same", "integral"),
    "OAA+ = max + hybrid (Eq. 9)": ("hybrid", "integral"),
}


def stage(script: str, *options: object) -> None:
    """Run one script; stop everything if it fails."""
    command = [sys.executable, str(HERE / script), *map(str, options)]
    print("$", " ".join(["python", f"examples/voc/{script}", *command[2:]]), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(
            f"{script} failed; after mending the cause run this command again, it goes on where it stopped"
        )


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, object]]:
    """All stages of one seed; returns the scores of each row."""
    folder = arguments.out / f"seed{seed}"
    common = ["--voc-root", arguments.voc_root, "--device", arguments.device, "--workers", arguments.workers]
    recipe = ["--recipe", arguments.recipe]
    training = [*common, *recipe, "--backbone", arguments.backbone, "--weights", arguments.weights, "--seed", seed]
    training += ["--amp"] if arguments.amp else []
    if arguments.negatives:
        training += ["--negatives", arguments.negatives]
    stage("train_attention.py", *training, "--out", folder / "attention", *arguments.attention)
    for run, loss in (("mce", ["mce", "--threshold", 0.0]), ("mce_same", ["mce"]), ("hybrid", ["hybrid"])):
        options = ["--maps", folder / "attention" / "max.safetensors", "--out", folder / run, *arguments.integral]
        stage("train_integral.py", *training, *options, "--loss", *loss)

    results: dict[str, dict[str, object]] = {}
    train, val = (VOCFolder(arguments.voc_root, split) for split in ("train", "val"))
    for name, (run, source) in ROWS.items():
        scores = {}
        for split in ("train", "val") if source not in ("max", "mean") else ("train",):
            maps = folder / "maps" / (run if source == "integral" else source) / split
            stage(
                "export_attention.py",
                *common,
                "--run",
                folder / run,
                "--source",
                source,
                "--split",
                split,
                "--out",
                maps,
                *recipe,
            )
            if split == "train":
                scores[split], train_maps = evaluate_maps(train, maps), maps
            else:
                scores[split] = evaluate_maps(val, maps, count_cues(train, train_maps))
        results[name] = scores
    (folder / "scores.json").write_text(json.dumps(results, indent=1))
    background = results["OAA+ = max + hybrid (Eq. 9)"]["train"]["oracle_threshold"]
    labels = ["--maps", folder / "maps/hybrid/train", "--split", "train", "--out", folder / "pseudo_labels", *recipe]
    labels += ["--background", "threshold", "--background-level", background]
    stage("make_pseudo_labels.py", "--voc-root", arguments.voc_root, *labels)
    stage("evaluate_cues.py", "--voc-root", arguments.voc_root, "--labels", folder / "pseudo_labels")
    columns = [folder / "maps" / which / "train" for which in ("cam", "mean", "max", "mce", "hybrid")]
    sheet = ["--run", folder / "attention", "--labels", folder / "pseudo_labels", "--out", folder / "contact_sheet.jpg"]
    stage("contact_sheet.py", "--voc-root", arguments.voc_root, "--maps", *columns, *sheet)
    return results


def diagnostics(folder: Path) -> str:
    """What decides whether accumulation pays, from the logs of one seed."""
    with open(folder / "attention/log.csv") as file:
        log = list(csv.DictReader(file))
    with open(folder / "hybrid/log.csv") as file:
        integral = list(csv.DictReader(file))

    def series(column: str) -> str:
        return " ".join(f"{float(row[column]):.2f}" for row in log)

    share = sum(float(r["accumulation_seconds"]) for r in log) / sum(float(r["seconds"]) for r in log)
    return (
        f"gate pass rate by epoch {series('gate_pass_rate')}; pairs never accumulated {log[-1]['pairs_empty']}; cosine "
        f"similarity of a pair's latest two maps {series('similarity')}; soft labels in N- "
        f"{float(integral[-1]['share_constrained']):.0%}; accumulation {share:.2%} of the training time"
    )


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16")
    parser.add_argument("--recipe", choices=RECIPES, default="paper")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--negatives", help="list of images that show no class, mixed into the training")
    parser.add_argument("--attention", type=str.split, default=[], help="further options of stage 1, in one string")
    parser.add_argument("--integral", type=str.split, default=[], help="further options of stage 2, in one string")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    results = {seed: run_seed(arguments, seed) for seed in arguments.seeds}
    lines = [
        "| cues | train mIoU | spread | threshold | val mIoU | spread | per seed, train |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        cells = [name]
        for split in ("train", "val"):
            scores = [100 * result[name][split]["mean_iou"] for result in results.values() if split in result[name]]
            spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else "-"
            cells += [f"{statistics.mean(scores):.1f}", spread] if scores else ["-", "-"]
            if split == "train":
                levels = [level for result in results.values() for level in result[name][split]["thresholds"]]
                cells.append(f"{min(levels):.2f}-{max(levels):.2f}")
                by_seed = " ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {' | '.join([*cells, by_seed])} |")
    print("\n" + "\n".join(lines))
    print(
        "\ntrain: each half of the split scored at the threshold that is best on the other half; val: at the one that "
        "is best on the train split; spread: standard deviation over seeds"
    )
    for seed in arguments.seeds:
        print(f"seed {seed}: {diagnostics(arguments.out / f'seed{seed}')}")
    (arguments.out / "table2.md").write_text("\n".join(lines) + "\n")
    print(f"done: {len(results)} seeds -> {arguments.out}/table2.md")


if __name__ == "__main__":
    main()
