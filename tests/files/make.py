"""How the files in this folder were made, by the commit that CHANGELOG.md names; later versions must still read them.

They hold what `stream` gives. `expected.json` says what must come out, as this program read it then.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from oaa_lib import AttentionAccumulator, View

HERE = Path(__file__).parent
LABELS = [[1, 1, 0], [0, 0, 1], [1, 0, 1]]
KEYS = ["a", "b", "c"]
SIZES = [[2, 3], [4, 1], [3, 3]]
CASES = {
    "max": {"map_size": (3, 4)},
    "max-float16-sizes": {"map_size": SIZES, "dtype": torch.float16, "gate": "topk"},
    "max-latest": {"map_size": (3, 4), "keep_latest": True},
    "mean": {"map_size": (3, 4), "fusion": "mean", "gate": None},
    "mean-sizes": {"map_size": SIZES, "fusion": "mean"},
    "ema": {"map_size": (3, 4), "fusion": "ema"},
    "noisy-or": {"map_size": (3, 4), "fusion": "noisy-or"},
    "harmonic": {"map_size": (3, 4), "fusion": "harmonic"},
}


def stream(accumulator: AttentionAccumulator, batches: range) -> None:
    """Score maps with a NaN, crops, flips and a repeated image."""
    for number in batches:
        rng = np.random.default_rng(number)
        score_maps = torch.from_numpy(rng.integers(-8, 9, (4, 3, 3, 4)) / 8).float()
        score_maps[0, 0, 0, 0] = float("nan") if number == 1 else 1.0
        views = [View(), View(flip=True), View(0.25, 0, 1, 0.5), View(-0.25, 0.25, 1.25, 1, True)]
        accumulator.update(["a", "b", "c", "a"], score_maps, views=views, fill_empty=True)


def read(accumulator: AttentionAccumulator) -> dict[str, object]:
    """What users see."""
    return {
        "attention": [accumulator.attention(key).tolist() for key in KEYS],
        "counts": accumulator.counts.tolist(),
        "offered": accumulator.offered,
        "skipped": accumulator.skipped,
    }


if __name__ == "__main__":
    from oaa_lib import storage

    storage.JOURNAL_BYTES = 1  # the smallest that serves, so that the files are small
    expected = {}
    for name, options in CASES.items():
        options = {"labels": LABELS, "keys": KEYS, **options}
        saved = AttentionAccumulator(**options)
        stream(saved, range(3))
        saved.save(HERE / f"{name}.saved")
        torch.save(saved.state_dict(), HERE / f"{name}.state.pt")
        mapped = AttentionAccumulator(**options, path=HERE / f"{name}.mapped")
        stream(mapped, range(3))
        expected[name] = {"then": read(saved)}
        stream(saved, range(3, 5))
        expected[name]["later"] = read(saved)  # after two batches more
        del mapped
    # killed after the journal was written and before the maps were: the batch must be repeated from the journal
    settle, apply = storage.MappedFile.settle, sys.modules["oaa_lib.maps"].PairStore._apply
    killed = AttentionAccumulator(**{"labels": LABELS, "keys": KEYS, **CASES["max"]}, path=HERE / "max.killed")
    stream(killed, range(2))
    sys.modules["oaa_lib.maps"].PairStore._apply = lambda *arguments: None
    storage.MappedFile.settle = lambda *arguments: None
    stream(killed, range(2, 3))
    (HERE / "expected.json").write_text(json.dumps(expected))
