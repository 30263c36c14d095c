"""How maps are kept: in 8 bits or as floats, and in a file that appears whole or not at all."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Arrays = dict[str, npt.NDArray[Any]]


def decode(stored: Tensor) -> Tensor:
    """Stored maps to float32 in [0, 1]."""
    return stored / 255 if stored.dtype == torch.uint8 else stored.float()


def encode(attention: Tensor, dtype: torch.dtype) -> Tensor:
    """Float maps in [0, 1] to storage; 8 bits are rounded to the nearest step of 1/255."""
    return (attention * 255).round_().to(dtype) if dtype == torch.uint8 else attention.to(dtype)


def write_archive(path: str | os.PathLike[str], arrays: Arrays, plain: dict[str, Any]) -> None:
    """Arrays and plain (JSON) values to one ``.npz`` file; it replaces an existing one once it is complete."""
    content = {**arrays, "plain": np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)}
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_archive(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, Any]]:
    """What `write_archive` wrote. Nothing in the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a damaged one.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # it checks every entry against its checksum
                arrays = {
                    name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)))
                    for name in archive.namelist()
                }
            plain = json.loads(arrays.pop("plain").tobytes())
            missing = {"maps", "counts", "skipped", "offsets", "classes"} - set(arrays)
            missing |= {"offered", "num_classes", "keys", "map_size", "fusion", "gate"} - set(plain)
            if missing:
                raise ValueError(f"it lacks {sorted(missing)}")
        except Exception as error:  # whatever a foreign or damaged file leads to
            raise ValueError(f"{os.fspath(path)} is no accumulator file, or it is damaged: {error}") from error
    return arrays, plain
