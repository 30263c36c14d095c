"""Print one table of ratios measured in one run on this machine, on one thread, and write it as JSON.

With --device the rows that mean something on an accelerator are measured there: how long an update keeps the host and
the device, its share of a training step, the time and memory of the loss.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import accumulation, labelling, losses, processes
from benchmarks.timing import Device, Row

ROWS: dict[str, Callable[..., Iterator[Row]]] = {
    "png": accumulation.png,
    "floor": accumulation.floor,
    "update": accumulation.launch_and_work,
    "step": accumulation.training_step,
    "loss": losses.time_and_memory,
    "labels": labelling.pseudo_labels,
    "scale": accumulation.scale,
    "mapped": accumulation.mapped,
    "synchronize": processes.synchronize,
}
ON_AN_ACCELERATOR = ("update", "step", "loss")
ON_THE_HOST = tuple(name for name in ROWS if name != "update")  # there the host is the device
QUICK: dict[str, dict[str, int]] = {"step": {"side": 32}, "scale": {"largest": 20_000}, "synchronize": {"images": 64}}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        metavar="ROW",
        help=f"default: all that suit the device; {', '.join(ROWS)}",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or xpu; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a look at every row: numbers mean little")
    parser.add_argument("--json", type=Path, default=Path("out/benchmarks.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.json.is_dir():
        parser.error(f"--json {arguments.json}: expected a file, got a folder")
    try:
        device = Device(arguments.device)
    except RuntimeError as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    if not (device.is_host or device.module.is_available()):
        parser.error(f"expected a device that this machine has, got {arguments.device}")
    meant = ON_THE_HOST if device.is_host else ON_AN_ACCELERATOR
    asked = arguments.rows or meant
    if not device.is_host and (host_only := [name for name in arguments.rows or ROWS if name not in meant]):
        print(f"Left out on {device}, since they measure the host: {', '.join(host_only)}.")
        asked = [name for name in asked if name in meant]
        if not asked:
            parser.error("--rows: none of them is measured on this device")
    about = machine(device)
    print(f"{'':44} {'ours':>10} {'baseline':>10} {'ratio':>9}               {'target':>8}")
    rows = []
    for name in asked:
        options: dict[str, Any] = dict(QUICK.get(name, {})) if arguments.quick else {}
        if name in ON_AN_ACCELERATOR:
            options["device"] = device
        for row in ROWS[name](0.02 if arguments.quick else 5.0, **options):
            rows.append(row)
            print(_line(row), flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    table = [
        {**row._asdict(), "ours": row.ours._asdict(), "baseline": row.baseline._asdict(), "verdict": row.verdict}
        for row in rows
    ]
    arguments.json.write_text(json.dumps({"machine": about, "quick": arguments.quick, "rows": table}, indent=2))
    print(f"written to {arguments.json}")


def machine(device: Device) -> dict[str, object]:
    """What the numbers depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # there is no git
        commit = ""
    return {
        "device": str(device),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _line(row: Row) -> str:
    target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"
    numbers = (_short(row.ours.median, row.unit), _short(row.baseline.median, row.unit))
    return (
        f"{row.name:44} {numbers[0]:>10} {numbers[1]:>10} {row.ratio:9.3g} {row.ratio_is:12} {target:>9}  {row.verdict}"
    )


def _short(value: float, unit: str) -> str:
    if value == 0:
        return "-"
    if unit == "B":
        return f"{value:.0f} B" if value < 1e4 else f"{value / 1e6:.2f} MB"
    for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value / 1e-9:.3g} ns"


if __name__ == "__main__":
    main()
