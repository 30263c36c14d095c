"""Whatever is given for one argument of a call, it works or the error names the argument; nothing is changed.

Values that only the user's own function would complain about are left out.
"""

import contextlib
import re
import warnings
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from reference import same, snapshot
from torch import nn
from torchvision.transforms import v2

import oaa_lib
from oaa_lib import interop, plotting
from oaa_lib.augmentation import WithViews, transform_with_view

PHOTOGRAPH = np.zeros((6, 8, 3), np.uint8)


class Network(nn.Module):
    def forward(self, images):
        return oaa_lib.CAMOutput(torch.zeros(len(images), 2), torch.ones(len(images), 2, 3, 4))


class OwnTensor(torch.Tensor):
    """A subclass that adds nothing."""


def accumulator():
    return oaa_lib.AttentionAccumulator([[1, 0], [1, 1]], (4, 4), gate=None, keys=["a", "b"])


def used():
    """An accumulator of two images and two classes that holds something."""
    made = oaa_lib.AttentionAccumulator([[1, 0], [1, 1]], (4, 4), gate=None, keys=["a", "b"])
    generator = torch.Generator().manual_seed(0)
    return made.update(["a", "b"], torch.rand(2, 2, 4, 4, generator=generator, dtype=torch.float32) + 0.1)


def numbered():
    return oaa_lib.AttentionAccumulator([[1, 0], [1, 1]], (4, 4), fusion="mean", gate="topk")


def snapshots():
    made = oaa_lib.Snapshots(used(), ["a"], [0, 3])
    made.take(0)
    return made


def method(make, name):
    """A method of what is new each time; an accumulator must be what it was if the call fails."""

    def call(**arguments):
        it = make()
        before = snapshot(it) if isinstance(it, oaa_lib.AttentionAccumulator) else None
        try:
            return getattr(it, name)(**arguments)
        except Exception:
            assert before is None or same(snapshot(it), before)
            raise

    return call


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
    used().save(folder / "saved")
    labels, logits = torch.tensor([[True, False], [True, True]]), torch.rand(2, 2)
    read = {"a": interop.ImageMaps(torch.tensor([0]), torch.ones(1, 2, 2))}
    views = [oaa_lib.View(0, 0, 0.5, 0.5), oaa_lib.View(flip=True)]
    cues = {
        "foreground_threshold": 0.3,
        "conflict_threshold": 0.9,
        "uncertain_saliency": 0.1,
        "strong_attention": 0.8,
        "min_foreground": 0.01,
        "background": 0.5,
        "ignore_index": 255,
    }
    return {
        "AttentionAccumulator": (
            oaa_lib.AttentionAccumulator,
            {
                "labels": [[1, 0], [1, 1]],
                "map_size": (4, 4),
                "fusion": "max",
                "gate": "score",
                "dtype": torch.uint8,
                "device": "cpu",
                "keys": ["a", "b"],
                "path": None,
                "resume": False,
            },
        ),
        "AttentionAccumulator at a path": (
            partial(oaa_lib.AttentionAccumulator, [[1, 0], [1, 1]], keys=["a", "b"]),
            {
                "map_size": (4, 4),
                "path": folder / "mapped",
                "resume": True,
                "device": "cpu",
            },
        ),
        "AttentionAccumulator.update": (
            method(used, "update"),
            {
                "indices": ["a", "b"],
                "score_maps": maps,
                "logits": logits,
                "views": views,
                "normalization": "max",
                "fill_empty": False,
            },
        ),
        "AttentionAccumulator.update by number": (
            method(numbered, "update"),
            {"indices": torch.tensor([0, 1]), "score_maps": maps, "normalization": None},
        ),
        "AttentionAccumulator.soft_labels": (
            method(used, "soft_labels"),
            {"indices": ["a", "b"], "views": views, "size": (3, 3)},
        ),
        "AttentionAccumulator[]": (method(used, "__getitem__"), {"indices": ["a", "b"]}),
        "AttentionAccumulator.attention": (method(used, "attention"), {"index": "a"}),
        "AttentionAccumulator.classes": (method(numbered, "classes"), {"index": 1}),
        "AttentionAccumulator.merge": (method(used, "merge"), {"other": used()}),
        "AttentionAccumulator.load_state_dict": (
            method(used, "load_state_dict"),
            {"state_dict": used().state_dict(), "known_to_all": False},
        ),
        "AttentionAccumulator.save": (method(used, "save"), {"path": folder / "again"}),
        "AttentionAccumulator.load": (
            oaa_lib.AttentionAccumulator.load,
            {"path": folder / "saved", "fusion": None, "gate": "saved", "device": "cpu"},
        ),
        "ExponentialMovingAverage": (oaa_lib.ExponentialMovingAverage, {"momentum": 0.5}),
        "harmonic_mix": (oaa_lib.harmonic_mix, {"mean": torch.rand(3, 4), "maximum": torch.rand(3, 4)}),
        "score_gate": (oaa_lib.score_gate, {"logits": logits, "labels": labels}),
        "topk_gate": (oaa_lib.topk_gate, {"logits": logits, "labels": labels}),
        "CAMHead": (
            oaa_lib.CAMHead,
            {"in_channels": 3, "num_classes": 2, "hidden_channels": 4, "num_convs": 1},
        ),
        "CAMHead()": (oaa_lib.CAMHead(3, 2, hidden_channels=4), {"features": images}),
        "normalize_attention": (oaa_lib.normalize_attention, {"score_maps": maps, "method": "minmax"}),
        "hybrid_loss": (
            oaa_lib.hybrid_loss,
            {"score_maps": maps, "soft_labels": maps / 2, "normalization": "class", "threshold": 0.1},
        ),
        "HybridLoss": (oaa_lib.HybridLoss, {"normalization": "class", "threshold": 0.1}),
        "multilabel_cross_entropy": (
            oaa_lib.multilabel_cross_entropy,
            {"score_maps": maps, "soft_labels": maps / 2, "threshold": 0.1},
        ),
        "MultiLabelCrossEntropy": (oaa_lib.MultiLabelCrossEntropy, {"threshold": 0.1}),
        "pseudo_label_from_cues": (
            oaa_lib.pseudo_label_from_cues,
            {"attention": torch.rand(2, 3, 4), "classes": [0, 1], "saliency": torch.rand(3, 4), **cues},
        ),
        "attention_similarity": (oaa_lib.attention_similarity, {"before": maps, "after": maps / 2}),
        "Snapshots": (oaa_lib.Snapshots, {"accumulator": used(), "indices": ["a"], "steps": [0, 3]}),
        "Snapshots.take": (method(snapshots, "take"), {"step": 3}),
        "Snapshots.cumulative": (method(snapshots, "cumulative"), {"index": "a"}),
        "Snapshots.load_state_dict": (
            method(snapshots, "load_state_dict"),
            {"state": {"taken": [0], "maps": {"a": [torch.zeros(1, 4, 4, dtype=torch.uint8)]}}},
        ),
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
    kinds += [[2**70, 1], [10**9, 10**9], (2**40, 2**40), ["a", 1], ["a\0"], [torch.ones(2), 1], [images.to("meta")]]
    kinds += [torch.int32, torch.float64, torch.device("meta"), np.bool_(True), slice(2), {"maps": 1, "taken": [None]}]
    kinds += [range(3), iter([1]), oaa_lib.View(), [oaa_lib.View()], [[PHOTOGRAPH]], [[PHOTOGRAPH, None]]]
    kinds += [PIL.Image.new("L", (4, 4)), PIL.Image.new("RGB", (4, 4))]
    numbers = [3, -1, 0, 2**70, -(2**70), 10**5000, 0.5, float("nan"), float("inf"), -1e300]
    arrays = [np.float64(0.5), np.int64(2), np.zeros(3), np.zeros((2, 2)), np.full((2, 3, 4), np.nan)]
    arrays += [np.array(["a"]), np.array([None]), np.zeros((0, 3))]
    tensors = [torch.tensor(1), torch.tensor(0.5), torch.zeros(0), torch.rand(3), torch.rand(2, 2)]
    tensors += [torch.rand(2, 3, 4) * 9, -torch.rand(2, 3, 4), images, maps, images * torch.nan, maps * torch.inf]
    tensors += [images.to(dtype) for dtype in (torch.uint8, torch.complex64, torch.bool, torch.float16, torch.bfloat16)]
    tensors += [maps.to(torch.float8_e4m3fn), maps.double(), torch.ones(2, 2).bool().to_sparse(), maps.bool()]
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
    "AttentionAccumulator",
    "AttentionAccumulator at a path",
    "AttentionAccumulator.update",
    "AttentionAccumulator.update by number",
    "AttentionAccumulator.soft_labels",
    "AttentionAccumulator[]",
    "AttentionAccumulator.attention",
    "AttentionAccumulator.classes",
    "AttentionAccumulator.merge",
    "AttentionAccumulator.load_state_dict",
    "AttentionAccumulator.save",
    "AttentionAccumulator.load",
    "ExponentialMovingAverage",
    "harmonic_mix",
    "score_gate",
    "topk_gate",
    "CAMHead",
    "CAMHead()",
    "normalize_attention",
    "hybrid_loss",
    "HybridLoss",
    "multilabel_cross_entropy",
    "MultiLabelCrossEntropy",
    "pseudo_label_from_cues",
    "attention_similarity",
    "Snapshots",
    "Snapshots.take",
    "Snapshots.cumulative",
    "Snapshots.load_state_dict",
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
]


SAYS = {
    "index": "ind(ex|ices)",
    "indices": "indices|of the . images",
    "soft_labels": "soft.labels",
}  # in which words, if not in the argument's own


def faults_of(name, call, right):
    """Calls with one wrong argument each that neither work nor end in an error which names the argument."""
    call(**right)
    tensors = [value for value in right.values() if isinstance(value, torch.Tensor)]
    before, faults = [tensor.clone() for tensor in tensors], []
    for argument in right:
        for value in anything():
            if name == "transform_with_view" and getattr(value, "dtype", None) == torch.float8_e4m3fn:
                continue  # torchvision's own transforms do not know it
            given = value.clone() if isinstance(value, torch.Tensor) and value.layout == torch.strided else None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, on sparse tensors and nested lists
                    call(**{**right, argument: value})
            except (FileNotFoundError, IsADirectoryError):
                pass  # of a file of this name
            except (TypeError, ValueError, IndexError, KeyError) as error:
                if not re.search(SAYS.get(argument, argument.rstrip("s")), str(error), re.IGNORECASE):
                    faults.append(f"{argument}={type(value).__name__}: {type(error).__name__} {error}")
            except Exception as error:
                faults.append(f"{argument}={type(value).__name__}: {type(error).__name__} {error}")
            if given is not None and not given.is_meta:
                assert repr(given.cfloat().tolist()) == repr(value.cfloat().tolist()), argument
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    return faults


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_works_or_the_error_names_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder may be named "x"
    assert faults_of(name, *calls(tmp_path)[name]) == []


def test_every_callable_is_tried(tmp_path):
    assert list(calls(tmp_path)) == NAMES
    tried = {re.split(r"[.\[( ]", name)[0] for name in NAMES}
    left_out = {
        *("CAMOutput", "Statistics"),  # plain tuples
        *("Fusion", "Gate"),  # only to derive from, or to describe
        *("LatestFusion", "MaxFusion", "MeanFusion", "NoisyOr"),  # without arguments
        *("WrappedClassifier", "wrap_classifier"),  # see test_wrapping
        "interop",
    }
    assert set(oaa_lib.__all__) - tried == left_out


@pytest.mark.parametrize("entry", used().state_dict())
def test_a_state_is_taken_or_refused_whole_whatever_one_entry_is(entry):
    load, state = (
        method(used, "load_state_dict"),
        used().state_dict(),
    )  # which looks whether a failure changes something
    for value in anything():
        with contextlib.suppress(ValueError):
            load(state_dict={**state, entry: value})


DETERMINED = [
    *(name for name in NAMES if name.startswith(("AttentionAccumulator", "Snapshots.", "ThresholdSweep"))),
    *("harmonic_mix", "score_gate", "topk_gate", "normalize_attention", "hybrid_loss", "multilabel_cross_entropy"),
    *("pseudo_label_from_cues", "attention_similarity", "pixel_adaptive_refinement"),
]


def read(result):
    """All tensors that a result consists of."""
    if isinstance(result, oaa_lib.AttentionAccumulator):
        view = oaa_lib.View(0, 0, 0.5, 0.5)
        maps = [result.attention(result.pairs.keys[1])] if result.pairs.keys else [result.soft_labels([1], [view])]
        return [*maps, result.statistics().pass_rate, *read(result.state_dict())]
    values = vars(result) if isinstance(result, oaa_lib.ThresholdSweep) else result
    values = values.values() if isinstance(values, dict) else [values]
    return [value.clone() for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DETERMINED)
def test_nothing_depends_on_the_default_dtype(name, dtype, tmp_path):
    call, right = calls(tmp_path)[name]
    expected = read(call(**right))
    torch.set_default_dtype(dtype)
    try:
        found = read(call(**right))
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_batch_of_negatives_can_be_read_at_any_size():
    accumulator = oaa_lib.AttentionAccumulator([[1, 0], [0, 0], [0, 0]], (2, 2), gate=None)
    for views in (None, [oaa_lib.View(0, 0, 0.5, 0.5)] * 2):
        assert torch.equal(accumulator.soft_labels([1, 2], views, size=(3, 5)), torch.zeros(2, 2, 3, 5))
    assert accumulator.attention(1).shape == (0, 2, 2)


@pytest.mark.parametrize("size", [(4, 4), (5, 5)])
def test_the_gate_reads_float64_as_it_is(size):
    logits = torch.tensor([[1.0, 1.0 - 1e-12]], dtype=torch.float64)
    for score_maps, given in ((torch.rand(1, 2, 4, 4), logits), (logits[..., None, None].expand(1, 2, 4, 4), None)):
        assert oaa_lib.AttentionAccumulator([[1, 0]], size).update([0], score_maps, given).accepted == 1


def test_a_link_to_no_file_is_no_path(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"expected path.*link to no file"):
            oaa_lib.AttentionAccumulator([[1]], (1, 1), path=tmp_path / "link", resume=resume)
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("kind", [list, iter, np.array, torch.tensor], ids=["list", "iterator", "array", "tensor"])
def test_snapshots_take_images_and_steps_of_any_kind(kind):
    made = oaa_lib.Snapshots(numbered(), kind([1, 0]), kind([0, 2]))
    for step in range(3):
        made.take(step)
    assert made.taken == [0, 2]
    assert made.cumulative(1).shape == (2, 2, 4, 4)


def test_the_state_of_snapshots_does_not_follow_them():
    made = snapshots()
    state = made.state_dict()
    made.take(3)
    again = snapshots()
    again.load_state_dict(state)
    assert again.taken == [0]
    assert again.cumulative("a").shape == (1, 1, 4, 4)
