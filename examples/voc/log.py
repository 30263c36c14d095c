"""The table of a training, log.csv: what its steps note, on average, a row every so many steps."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from files import ends_with, write_text
from texts import read_text


class Log:
    """Gathers what the steps of a training note until a row is due.

    Args:
        file: the table.
        epoch_length: steps in a pass over the images.

    Attributes:
        noted: of each step since the last row.
    """

    def __init__(self, file: Path, epoch_length: int) -> None:
        self.file, self.epoch_length = file, epoch_length
        self.noted: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    def note(self, **values: Any) -> None:
        """Numbers of one step, or tensors of several, which are averaged; a function is called once for each row.

        A tensor may be empty where a step has nothing to say; NaN stands in a row that all of its steps left empty.
        """
        self.noted.append(values)

    def row(self, step: int) -> dict[str, Any]:
        """The row that is due after so many steps."""
        row: dict[str, Any] = {"step": step, "epoch": round(step / self.epoch_length, 2)}
        for name, last in self.noted[-1].items():
            if callable(last):
                row |= last()
            else:
                series = [torch.as_tensor(values[name], dtype=torch.float32).flatten() for values in self.noted]
                row[name] = torch.cat(series).mean().item()
        row["seconds"] = time.perf_counter() - self._started
        self._started, self.noted = time.perf_counter(), []
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, below a head if it is the first."""
        advice = "the last checkpoint is whole, and the same command goes on from it"
        with ends_with(f"{self.file}", advice), open(self.file, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def shorten(self, step: int) -> None:
        """Drop what was logged after a checkpoint: these steps are done again."""
        head, *rows = (read_text(self.file) if self.file.exists() else "").splitlines(keepends=True) or [""]
        whole = [(row, row.split(",")[0]) for row in rows if row.endswith("\n")]  # of a full disk: half a row
        if head:
            kept = [row for row, done in whole if done.isdecimal() and int(done) <= step]
            write_text(self.file, "".join([head, *kept]))
