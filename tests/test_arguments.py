"""Whatever is given for one argument of a call, it works or the error names the argument; nothing is changed.

The callables here are those around the accumulator. Values that only the user's own function would complain about are
left out.
"""

import re
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import oaa_lib
from oaa_lib import interop, plotting
from oaa_lib.augmentation import WithViews, transform_with_view
from oaa_lib.lightning import AttentionCallback

PHOTOGRAPH = np.zeros((6, 8, 3), np.uint8)


class Network(nn.Module):
    def forward(self, images):
        return oaa_lib.CAMOutput(torch.zeros(len(images), 2), torch.ones(len(images), 2, 3, 4))


class OwnTensor(torch.Tensor):
    """A subclass that adds nothing."""


def accumulator():
    return oaa_lib.AttentionAccumulator([[1, 0], [1, 1]], (4, 4), gate=None, keys=["a", "b"])


def method(make, name):
    return lambda **arguments: getattr(make(), name)(**arguments)


def matrix():
    return oaa_lib.ConfusionMatrix(3)


def sweep():
    return oaa_lib.ThresholdSweep(2)


def calls(folder):
    """Each callable with arguments that are right."""
    images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 2, 4, 4)
    label = torch.zeros(3, 4, dtype=torch.long)
    counts = {"ignore_index": 255, "device": "cpu"}
    drop = {"rate": 0.5, "threshold": 0.6}
    rows = [[PHOTOGRAPH, plotting.Overlay(PHOTOGRAPH, torch.rand(3, 4))]]
    interop.write_maps(accumulator(), folder / "maps")
    read = {"a": interop.ImageMaps(torch.tensor([0]), torch.ones(1, 2, 2))}
    return {
        "ConfusionMatrix": (oaa_lib.ConfusionMatrix, {"num_classes": 3, **counts}),
        "ConfusionMatrix.update": (method(matrix, "update"), {"prediction": label + 1, "target": label}),
        "ConfusionMatrix.merge": (method(matrix, "merge"), {"other": matrix()}),
        "ThresholdSweep": (oaa_lib.ThresholdSweep, {"num_classes": 2, **counts}),
        "ThresholdSweep.update": (
            method(sweep, "update"),
            {"attention": torch.rand(2, 3, 4), "classes": [0, 1], "target": label},
        ),
        "ThresholdSweep.at": (method(sweep, "at"), {"threshold": 0.5}),
        "ThresholdSweep.merge": (method(sweep, "merge"), {"other": sweep()}),
        "two_fold": (oaa_lib.two_fold, {"first": sweep(), "second": sweep()}),
        "AttentionDrop": (oaa_lib.AttentionDrop, drop),
        "attention_drop": (
            oaa_lib.attention_drop,
            {"images": images, "attention": maps, "labels": torch.ones(2, 2), **drop},
        ),
        "pixel_adaptive_refinement": (
            oaa_lib.pixel_adaptive_refinement,
            {"images": images, "attention": maps, "iterations": 2, "dilations": (1, 2)},
        ),
        "multi_scale_attention": (
            oaa_lib.multi_scale_attention,
            {"model": Network(), "images": images, "scales": (1.0,), "flip": True, "size": (4, 4)},
        ),
        "View.crop": (oaa_lib.View().crop, {"top": 0, "left": 0, "height": 2, "width": 2, "size": (4, 4)}),
        "View.pad": (oaa_lib.View().pad, {"left": 0, "top": 0, "right": 1, "bottom": 1, "size": (4, 4)}),
        "overlay": (
            plotting.overlay,
            {"image": PHOTOGRAPH, "attention": torch.rand(2, 3, 4), "titles": ["a", "b"], "opacity": 0.5},
        ),
        "contact_sheet": (plotting.contact_sheet, {"rows": rows, "titles": ["a", "b"], "notes": ["c"]}),
        "evolution": (
            plotting.evolution,
            {
                "image": PHOTOGRAPH,
                "maps": torch.rand(3, 1, 3, 4),
                "steps": [0, 1, 2],
                "classes": ["a"],
                "columns": 3,
                "opacity": 0.5,
            },
        ),
        "write_maps": (
            interop.write_maps,
            {
                "accumulator": accumulator(),
                "folder": folder / "out",
                "layout": "oaa",
                "sizes": {"a": (3, 3), "b": (3, 3)},
            },
        ),
        "read_maps": (interop.read_maps, {"folder": folder / "maps", "layout": "oaa"}),
        "load_into": (interop.load_into, {"accumulator": accumulator(), "maps": read}),
        "transform_with_view": (
            transform_with_view,
            {"transform": v2.RandomHorizontalFlip(1), "image": torch.rand(3, 8, 9)},
        ),
        "WithViews": (WithViews, {"dataset": [1, 2], "transform": None}),
        "WithViews[]": (method(lambda: WithViews([1, 2]), "__getitem__"), {"index": 0}),
        "AttentionCallback": (
            AttentionCallback,
            {"accumulator": accumulator(), "network": Network(), "indices": len, "views": None},
        ),
    }


def anything():
    """Wrong kinds, shapes, dtypes, devices, layouts, NaN, huge and negative numbers, subclasses."""
    images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 2, 4, 4)
    kinds = [None, True, "x", "", "cpu", "meta", "nonsense", "a\0b", b"x", object(), 1j, {}, {"a": 1}, {1, 2}, [None]]
    kinds += [
        [],
        (),
        [1],
        [[1], [1, 2]],
        (3,),
        (0, 0),
        (2, -1),
        (2.5, 1),
        ["a", "b"],
        ["a", 3],
        [[3]],
        [["x"]],
        [[None]],
    ]
    kinds += [range(3), iter([1]), oaa_lib.View(), [oaa_lib.View()], [[PHOTOGRAPH]], [[PHOTOGRAPH, None]]]
    kinds += [PIL.Image.new("L", (4, 4)), PIL.Image.new("RGB", (4, 4))]
    numbers = [3, -1, 0, 2**70, -(2**70), 10**5000, 0.5, float("nan"), float("inf"), -1e300]
    arrays = [np.float64(0.5), np.int64(2), np.zeros(3), np.zeros((2, 2)), np.full((2, 3, 4), np.nan)]
    arrays += [np.array(["a"]), np.array([None]), np.zeros((0, 3))]
    tensors = [torch.tensor(1), torch.tensor(0.5), torch.zeros(0), torch.rand(3), torch.rand(2, 2)]
    tensors += [torch.rand(2, 3, 4) * 9, -torch.rand(2, 3, 4), images, maps, images * torch.nan, maps * torch.inf]
    tensors += [images.to(dtype) for dtype in (torch.uint8, torch.complex64, torch.bool, torch.float16, torch.bfloat16)]
    tensors += [
        images.double(),
        images.to_sparse(),
        images.to("meta"),
        maps.to("meta"),
        torch.zeros(2, 2, device="meta"),
    ]
    tensors += [
        images.transpose(1, 3),
        images[:, :, :0],
        images[:0],
        images.as_subclass(OwnTensor),
        nn.Parameter(images),
    ]
    tensors += [torch.full((3, 4), 10**9), torch.tensor([0, 1]), torch.tensor([5, -3]), torch.tensor([255, 254])]
    return [*kinds, *numbers, *arrays, *tensors]


NAMES = [
    "ConfusionMatrix",
    "ConfusionMatrix.update",
    "ConfusionMatrix.merge",
    "ThresholdSweep",
    "ThresholdSweep.update",
    "ThresholdSweep.at",
    "ThresholdSweep.merge",
    "two_fold",
    "AttentionDrop",
    "attention_drop",
    "pixel_adaptive_refinement",
    "multi_scale_attention",
    "View.crop",
    "View.pad",
    "overlay",
    "contact_sheet",
    "evolution",
    "write_maps",
    "read_maps",
    "load_into",
    "transform_with_view",
    "WithViews",
    "WithViews[]",
    "AttentionCallback",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_works_or_the_error_names_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder may be named "x"
    call, right = calls(tmp_path)[name]
    call(**right)
    tensors = [value for value in right.values() if isinstance(value, torch.Tensor)]
    before, faults = [tensor.clone() for tensor in tensors], []
    for argument in right:
        for value in anything():
            given = value.clone() if isinstance(value, torch.Tensor) and value.layout == torch.strided else None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, on sparse tensors and nested lists
                    call(**{**right, argument: value})
            except FileNotFoundError:
                pass  # of a folder of this name
            except (TypeError, ValueError, IndexError, KeyError) as error:
                if not re.search(argument.rstrip("s"), str(error), re.IGNORECASE):
                    faults.append(f"{argument}={type(value).__name__}: {type(error).__name__} {error}")
            except Exception as error:
                faults.append(f"{argument}={type(value).__name__}: {type(error).__name__} {error}")
            if given is not None and not given.is_meta:
                assert torch.equal(given.nan_to_num(), value.nan_to_num()), argument
    assert faults == []
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_every_callable_is_tried(tmp_path):
    assert list(calls(tmp_path)) == NAMES
