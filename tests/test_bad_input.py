"""Every wrong call says what was expected and what arrived, and changes nothing."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from reference import same, snapshot

import oaa_lib
from oaa_lib import (
    AttentionAccumulator,
    CAMHead,
    ConfusionMatrix,
    HybridLoss,
    hybrid_loss,
    multilabel_cross_entropy,
    normalize_attention,
    pseudo_label_from_cues,
)

NAN, INF = float("nan"), float("inf")


def cases(table):
    """Parameters named by the keys of the table."""
    return [pytest.param(*case, id=name) for name, case in table.items()]


def assert_raises(error, expected, arrived, call):
    """The call raises, and its message says both things."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert re.search(f"expected.*{expected}", message), message
    assert re.search(arrived, message), message


# Attention and its head

SCORE_MAPS = {
    "integers": (torch.ones(2, 2, dtype=torch.int64), TypeError, "floating point", "got torch.int64"),
    "booleans": (torch.ones(2, 2, dtype=torch.bool), TypeError, "floating point", "got torch.bool"),
    "complex numbers": (torch.ones(2, 2, dtype=torch.complex64), TypeError, "floating point", "got torch.complex64"),
    "a list": ([[1.0]], TypeError, "floating point tensor", "got list"),
    "an array": (np.ones((2, 2)), TypeError, "floating point tensor", "got ndarray"),
    "None": (None, TypeError, "floating point tensor", "got NoneType"),
    "a vector": (torch.ones(3), ValueError, r"\(\.\.\., h, w\)", r"got \(3,\)"),
    "a number": (torch.tensor(1.0), ValueError, r"\(\.\.\., h, w\)", r"got \(\)"),
    "no pixels": (torch.ones(2, 0, 3), ValueError, "h, w >= 1", r"got \(2, 0, 3\)"),
}


@pytest.mark.parametrize(("score_maps", "error", "expected", "arrived"), cases(SCORE_MAPS))
def test_normalize_attention_refuses(score_maps, error, expected, arrived):
    assert_raises(error, expected, arrived, lambda: normalize_attention(score_maps))


@pytest.mark.parametrize("method", ["sum", "MAX", None, 1])
def test_normalize_attention_knows_two_methods(method):
    assert_raises(
        ValueError,
        "'max' or 'minmax'",
        f"got {method!r}",
        lambda: normalize_attention(torch.ones(2, 2), method=method),
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"in_channels": 0},
        {"num_classes": 0},
        {"num_classes": -20},
        {"hidden_channels": 0},
        {"num_convs": -1},
    ],
    ids=str,
)
def test_cam_head_refuses_sizes_below_the_least(sizes):
    ((name, size),) = sizes.items()
    least = 0 if name == "num_convs" else 1
    sizes = {"in_channels": 4, "num_classes": 2, **sizes}
    assert_raises(ValueError, f"{name} >= {least}", f"got {size}", lambda: CAMHead(**sizes))


@pytest.mark.parametrize("shape", [(2, 4), (4, 7, 7), (2, 3, 7, 7), (2, 7, 7, 4), (1, 2, 4, 7, 7)], ids=str)
def test_cam_head_refuses_features_of_another_shape(shape):
    head = CAMHead(4, 2, hidden_channels=3)
    assert_raises(ValueError, r"\(B, 4, h, w\)", re.escape(f"got {shape}"), lambda: head(torch.ones(shape)))


# Gates, called directly

GATE_ARGUMENTS = {
    "integer labels": (torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64), TypeError, "bool", "got.*int64"),
    "another class count": (torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bool), ValueError, "shape", r"\(1, 3\)"),
    "another batch": (torch.ones(1, 2), torch.ones(4, 2, dtype=torch.bool), ValueError, "shape", r"\(4, 2\)"),
    "score maps": (torch.ones(1, 2, 3, 3), torch.ones(1, 2, dtype=torch.bool), ValueError, "shape", r"\(1, 2, 3, 3\)"),
}


@pytest.mark.parametrize("gate", [oaa_lib.score_gate, oaa_lib.topk_gate])
@pytest.mark.parametrize(("logits", "labels", "error", "expected", "arrived"), cases(GATE_ARGUMENTS))
def test_a_gate_refuses(gate, logits, labels, error, expected, arrived):
    assert_raises(error, expected, arrived, lambda: gate(logits, labels))


# Building an accumulator


def needing(dtype):
    """A fusion with a storage dtype."""

    def fusion(cumulative, attention, count):
        return attention

    fusion.storage_dtype = dtype
    return fusion


SETTINGS = {
    "labels of one image": ({"labels": [1, 0]}, ValueError, r"\(N, C\)", r"got \(2,\)"),
    "labels as a box": ({"labels": torch.ones(1, 2, 3)}, ValueError, r"\(N, C\)", r"got \(1, 2, 3\)"),
    "no images": ({"labels": torch.ones(0, 3)}, ValueError, "N and C at least 1", r"got \(0, 3\)"),
    "no classes": ({"labels": torch.ones(3, 0)}, ValueError, "N and C at least 1", r"got \(3, 0\)"),
    "no labels": ({"labels": None}, ValueError, r"\(N, C\)", r"got (\(\)|None)"),
    "class ids of each image": ({"labels": [[0, 14], [3]]}, ValueError, r"\(N, C\)", "got"),
    "names": ({"labels": [["cat", "dog"]]}, TypeError, "labels", "got <U3"),
    "labels that are probabilities": ({"labels": [[0.5, 1]]}, ValueError, "0 and 1", "0.5"),
    "labels with two": ({"labels": [[2, 1]]}, ValueError, "0 and 1", "2"),
    "labels with minus one": ({"labels": [[-1, 1]]}, ValueError, "0 and 1", "-1"),
    "labels with 255": ({"labels": torch.tensor([[255, 1]], dtype=torch.uint8)}, ValueError, "0 and 1", "255"),
    "labels with NaN": ({"labels": [[NAN, 1]]}, ValueError, "0 and 1", "nan"),
    "labels all 0": ({"labels": [[0, 0], [0, 0]]}, ValueError, "at least one", "got.*0"),
    "no height": ({"map_size": (0, 3)}, ValueError, "map_size", r"got \(0, 3\)"),
    "a negative width": ({"map_size": (3, -1)}, ValueError, "map_size", r"got \(3, -1\)"),
    "one side": ({"map_size": 7}, TypeError, r"\(H, W\)", "got.*7"),
    "three sides": ({"map_size": (3, 7, 7)}, ValueError, r"\(H, W\)", r"got.*\(3, 7, 7\)"),
    "half a pixel": ({"map_size": (3.5, 7)}, TypeError, r"\(H, W\)", r"got.*3\.5"),
    "a size in words": ({"map_size": "77"}, TypeError, r"\(H, W\)", "got.*77"),
    "too few keys": ({"keys": ["a"]}, ValueError, "2 images", "got 1"),
    "too many keys": ({"keys": ["a", "b", "c"]}, ValueError, "2 images", "got 3"),
    "no keys": ({"keys": []}, ValueError, "2 images", "got 0"),
    "a key twice": ({"keys": ["a", "a"]}, ValueError, "every key once", "'a'"),
    "keys that are numbers": ({"keys": [101, 102]}, TypeError, "str", "got.*(int|101)"),
    "keys without order": ({"keys": {"a", "b"}}, TypeError, "list", "got {"),
    "one name for all keys": ({"keys": "ab"}, TypeError, "(list|sequence)", "got.*'ab'"),
    "an unknown fusion": ({"fusion": "median"}, ValueError, "fusion.*max.*mean", "got 'median'"),
    "no fusion": ({"fusion": None}, TypeError, "fusion.*max.*mean", "got NoneType"),
    "a fusion class": ({"fusion": oaa_lib.MaxFusion}, TypeError, "fusion", r"got.*(class|type)"),
    "64-bit storage for a mean": ({"fusion": "mean", "dtype": torch.float64}, TypeError, "dtype", "got torch.float64"),
    "a fusion that needs bfloat16": ({"fusion": needing(torch.bfloat16)}, TypeError, "storage_dtype", "bfloat16"),
    "a fusion that needs integers": ({"fusion": needing(torch.int32)}, TypeError, "storage_dtype", "int32"),
    "a fusion that needs a word": ({"fusion": needing("float32")}, TypeError, "storage_dtype", "got 'float32'"),
    "an unknown gate": ({"gate": "prob"}, ValueError, "gate.*score.*topk", "got 'prob'"),
    "a number as gate": ({"gate": 0.5}, TypeError, "gate.*score.*topk", "got float"),
    "8-bit signed storage": ({"dtype": torch.int8}, TypeError, "torch.uint8", "got torch.int8"),
    "64-bit storage": ({"dtype": torch.float64}, TypeError, "torch.float32", "got torch.float64"),
    "bfloat16 storage": ({"dtype": torch.bfloat16}, TypeError, "torch.float16", "got torch.bfloat16"),
    "storage by name": ({"dtype": "uint8"}, TypeError, "torch.uint8", "got.*uint8"),
}


@pytest.mark.parametrize(("settings", "error", "expected", "arrived"), cases(SETTINGS))
def test_an_accumulator_is_not_built_from(settings, error, expected, arrived):
    settings = {"labels": [[1, 0], [1, 1]], "map_size": (3, 3), **settings}
    assert_raises(error, expected, arrived, lambda: AttentionAccumulator(**settings))


# Naming images

LABELS = [[1, 1, 0], [0, 0, 1]]


def filled(**settings):
    """Two images of three classes, each with something in its maps."""
    accumulator = AttentionAccumulator(**{"labels": LABELS, "map_size": (3, 3), "gate": None, **settings})
    score_maps = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    return accumulator.update(settings.get("keys") or [0, 1], score_maps)


INDICES = {
    "too large": ([0, 2], IndexError, r"0\.\.1", "got 2"),
    "far too large": ([2**63], IndexError, r"0\.\.1", f"got {2**63}"),
    "negative": ([0, -1], IndexError, r"0\.\.1", "got -1"),
    "floating point": ([0.0, 1.0], TypeError, "integer", "got float"),
    "a floating point tensor": (torch.tensor([0.0, 1.0]), TypeError, "integer", "got.*float"),
    "a tensor with gradient": (torch.ones(2, requires_grad=True), TypeError, "integer", "got.*float"),
    "a bfloat16 tensor": (torch.ones(2, dtype=torch.bfloat16), TypeError, "integer", "got.*bfloat16"),
    "a mask": ([True, False], TypeError, "integer", "got.*bool"),
    "a mask tensor": (torch.tensor([True, False]), TypeError, "integer", "got.*bool"),
    "empty": ([], ValueError, r"\(B,\)", r"got \(0,\)"),
    "an empty tensor": (torch.ones(0, dtype=torch.int64), ValueError, r"\(B,\)", r"got \(0,\)"),
    "a column": (torch.tensor([[0], [1]]), ValueError, r"\(B,\)", r"got \(2, 1\)"),
    "ragged": ([[0], [0, 1]], ValueError, r"\(B,\)", "got"),
    "a set": ({0, 1}, TypeError, "sequence", "got a set, which has no order"),
    "one number": (1, TypeError, "sequence", "got 1"),
    "one NumPy number": (np.int64(1), TypeError, "sequence", "got.*1"),
    "one NumPy boolean": (np.bool_(True), TypeError, "sequence", "got.*True"),
    "one boolean": (True, TypeError, "sequence", "got True"),
    "one floating point number": (1.0, TypeError, "sequence", r"got.*(1\.0|float)"),
    "a tensor of one number": (torch.tensor(1), ValueError, r"\(B,\)", r"got \(\)"),
    "None": (None, TypeError, "sequence", "got None"),
    "a slice": (slice(0, 2), TypeError, "sequence", "got.*slice"),
    "objects": ([None, None], TypeError, "integer", "got.*(object|None)"),
    "names without keys": (["a", "b"], ValueError, "integer", "got names.*keys="),
    "bytes": ([b"a", b"b"], TypeError, "names", "got.*(S1|bytes)"),
    "on another device": (torch.ones(2, dtype=torch.int64, device="meta"), ValueError, "host", "got.*meta"),
}
NAMES = {
    "unknown": (["a", "c"], KeyError, "2 keys", "'c'"),
    "a set of names": (frozenset("ab"), TypeError, "sequence", "got a set, which has no order"),
    "one name": ("a", TypeError, "sequence", "got 'a'"),
    "one name in bytes": (b"a", TypeError, "sequence", "got b'a'"),
    "a name and a number": (["a", 1], KeyError, "2 keys", "1"),
    "a number and a name": ([1, "a"], KeyError, "2 keys", "1"),
    "a name and nothing": (["a", None], KeyError, "2 keys", "None"),
    "a name with a NUL more": (["a", "a\0"], KeyError, "2 keys", "x00"),
}
NAMING = [
    *(pytest.param(None, *case, id=name) for name, case in INDICES.items()),
    *(pytest.param(["a", "b"], *case, id=name) for name, case in NAMES.items()),
]


@pytest.mark.parametrize(("keys", "indices", "error", "expected", "arrived"), NAMING)
def test_images_are_not_named_by(keys, indices, error, expected, arrived):
    accumulator = filled(keys=keys)
    before = snapshot(accumulator)
    assert_raises(error, expected, arrived, lambda: accumulator.update(indices, torch.ones(2, 3, 3, 3)))
    assert_raises(error, expected, arrived, lambda: accumulator[indices])
    assert same(snapshot(accumulator), before)


def test_a_number_is_not_taken_for_a_name():
    accumulator = AttentionAccumulator(torch.eye(3), (2, 2), gate=None, keys=["x", "2", "y"])
    assert_raises(KeyError, "3 keys", "got 2", lambda: accumulator.update(["x", 2], torch.rand(2, 3, 2, 2)))
    assert accumulator.offered == 0


def test_names_that_differ_in_a_nul_are_two():
    accumulator = AttentionAccumulator([[1], [1]], (2, 2), gate=None, keys=["a", "a\0"])
    accumulator.update(["a\0"], torch.rand(1, 1, 2, 2))
    assert accumulator.counts.tolist() == [[0], [1]]


@pytest.mark.parametrize("method", ["classes", "attention"])
@pytest.mark.parametrize(
    ("keys", "index", "error", "expected", "arrived"),
    [
        (None, 2, IndexError, r"0\.\.1", "got 2"),
        (None, -1, IndexError, r"0\.\.1", "got -1"),
        (None, 0.0, TypeError, "integer", "got float"),
        (None, True, TypeError, "integer", "got bool"),
        (None, "a", ValueError, "integer", "got names"),
        (None, [0, 1], ValueError, r"\(B,\)", r"got \(1, 2\)"),
        (["a", "b"], "c", KeyError, "2 keys", "'c'"),
    ],
)
def test_one_image_is_not_named_by(method, keys, index, error, expected, arrived):
    accumulator = filled(keys=keys)
    assert_raises(error, expected, arrived, lambda: getattr(accumulator, method)(index))


# Updating

MAPS, LOGITS = torch.ones(2, 3, 3, 3), torch.ones(2, 3)
SHAPE = r"\(2, 3, h, w\)"
BATCHES = {
    "an image without batch": ({"score_maps": MAPS[0]}, ValueError, SHAPE, r"got \(3, 3, 3\)"),
    "logits as score maps": ({"score_maps": LOGITS}, ValueError, SHAPE, r"got \(2, 3\)"),
    "a clip": ({"score_maps": MAPS[None]}, ValueError, SHAPE, r"got \(1, 2, 3, 3, 3\)"),
    "more images than indices": ({"score_maps": torch.ones(3, 3, 3, 3)}, ValueError, SHAPE, r"got \(3, 3, 3, 3\)"),
    "fewer images than indices": ({"score_maps": MAPS[:1]}, ValueError, SHAPE, r"got \(1, 3, 3, 3\)"),
    "a background channel": ({"score_maps": torch.ones(2, 4, 3, 3)}, ValueError, SHAPE, r"got \(2, 4, 3, 3\)"),
    "maps without pixels": ({"score_maps": torch.ones(2, 3, 0, 3)}, ValueError, SHAPE, r"got \(2, 3, 0, 3\)"),
    "integer maps": ({"score_maps": MAPS.int()}, TypeError, "score_maps.*floating point", "got torch.int32"),
    "8-bit maps": ({"score_maps": MAPS.byte()}, TypeError, "score_maps.*floating point", "got torch.uint8"),
    "an array": ({"score_maps": MAPS.numpy()}, TypeError, "score_maps.*tensor", "got ndarray"),
    "the output tuple": ({"score_maps": (LOGITS, MAPS)}, TypeError, "score_maps.*tensor", "got tuple"),
    "no maps": ({"score_maps": None}, TypeError, "score_maps.*tensor", "got NoneType"),
    "maps as logits": ({"logits": MAPS}, ValueError, r"logits.*\(2, 3\)", r"got \(2, 3, 3, 3\)"),
    "logits of more images": ({"logits": torch.ones(3, 3)}, ValueError, r"logits.*\(2, 3\)", r"got \(3, 3\)"),
    "logits of more classes": ({"logits": torch.ones(2, 4)}, ValueError, r"logits.*\(2, 3\)", r"got \(2, 4\)"),
    "logits of one image": ({"logits": LOGITS[0]}, ValueError, r"logits.*\(2, 3\)", r"got \(3,\)"),
    "logits as labels": ({"logits": LOGITS.bool()}, TypeError, "logits.*floating point", "got torch.bool"),
    "logits as a list": ({"logits": LOGITS.tolist()}, TypeError, "logits.*tensor", "got list"),
    "logits elsewhere": ({"logits": LOGITS.to("meta")}, ValueError, "one device", "got cpu and meta"),
    "score maps elsewhere": (
        {"score_maps": MAPS.to("meta"), "logits": LOGITS},
        ValueError,
        "one device",
        "got meta and cpu",
    ),
    "an unknown normalization": ({"normalization": "sum"}, ValueError, "'max' or 'minmax'", "got 'sum'"),
    "scores as attention": (
        {"score_maps": MAPS * 3.25, "normalization": None},
        ValueError,
        r"attention in \[0, 1\]",
        r"got \[3\.25, 3\.25\]; call normalize_attention",
    ),
    "negative attention": (
        {"score_maps": -MAPS, "normalization": None},
        ValueError,
        r"attention in \[0, 1\]",
        r"got \[-1, -1\]",
    ),
}


@pytest.mark.parametrize("gate", ["score", None])
@pytest.mark.parametrize(("batch", "error", "expected", "arrived"), cases(BATCHES))
def test_update_refuses(gate, batch, error, expected, arrived):
    accumulator = filled(gate=gate)
    before = snapshot(accumulator)
    batch = {"indices": [0, 1], "score_maps": MAPS, **batch}
    assert_raises(error, expected, arrived, lambda: accumulator.update(**batch))
    assert same(snapshot(accumulator), before)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param([0, 0], id="both maps of one image"),
        pytest.param([1, 0], id="one map among good ones"),
    ],
)
def test_one_map_out_of_range_refuses_the_whole_batch(index):
    accumulator, score_maps = filled(), torch.rand(2, 3, 3, 3)
    before = snapshot(accumulator)
    score_maps[1, 0, 1, 1] = 1.5
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        accumulator.update(index, score_maps, normalization=None)
    assert same(snapshot(accumulator), before)


def returning(value):
    return lambda *arguments: value


def failing(*arguments):
    raise RuntimeError("expected by the user, got trouble")


USERS_GATES = {
    "numbers": (returning(torch.ones(2, 3)), TypeError, r"gate.*bool.*\(2, 3\)", "got.*float32"),
    "another shape": (returning(torch.ones(2, dtype=torch.bool)), TypeError, r"gate.*bool.*\(2, 3\)", r"got.*\(2,\)"),
    "nothing": (returning(None), TypeError, r"gate.*bool.*\(2, 3\)", "got NoneType"),
    "a list": (returning([[True] * 3] * 2), TypeError, r"gate.*bool.*\(2, 3\)", "got list"),
    "an error": (failing, RuntimeError, "by the user", "got trouble"),
}


@pytest.mark.parametrize(("gate", "error", "expected", "arrived"), cases(USERS_GATES))
def test_a_users_gate_may_not_return(gate, error, expected, arrived):
    accumulator = AttentionAccumulator(LABELS, (3, 3), gate=gate)
    before = snapshot(accumulator)
    assert_raises(error, expected, arrived, lambda: accumulator.update([0, 1], MAPS))
    assert same(snapshot(accumulator), before)


# A fusion sees the maps of one round at a time, and an image that is given twice takes two rounds.
USERS_FUSIONS = {
    "another shape": (lambda m, a, n: a[:, :1], ValueError, r"fusion.*\(\d, 3, 3\)", r"got.*\(\d, 1, 3\)"),
    "fewer maps": (lambda m, a, n: a.amax(0), ValueError, r"fusion.*\(\d, 3, 3\)", r"got.*\(3, 3\)"),
    "NaN": (lambda m, a, n: a * NAN, ValueError, r"fusion.*\[0, 1\]", "got.*nan"),
    "more than 1": (lambda m, a, n: m + a + 1, ValueError, r"fusion.*\[0, 1\]", r"got.*\d"),
    "less than 0": (lambda m, a, n: -1 - a, ValueError, r"fusion.*\[0, 1\]", r"got.*-\d"),
    "nothing": (returning(None), TypeError, "fusion.*tensor", "got NoneType"),
    "an array": (lambda m, a, n: a.numpy(), TypeError, "fusion.*tensor", "got ndarray"),
    "an error": (failing, RuntimeError, "by the user", "got trouble"),
    "an error in the second round": (
        lambda m, a, n: failing() if n.max() > 1 else torch.maximum(m, a),
        RuntimeError,
        "by the user",
        "got trouble",
    ),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("fusion", "error", "expected", "arrived"), cases(USERS_FUSIONS))
def test_a_users_fusion_may_not_return(fusion, error, expected, arrived, dtype):
    wrong = False

    def moody(cumulative, attention, count):
        return fusion(cumulative, attention, count) if wrong else torch.maximum(cumulative, attention)

    accumulator = filled(fusion=moody, dtype=dtype)
    before, wrong = snapshot(accumulator), True
    assert_raises(error, expected, arrived, lambda: accumulator.update([0, 1, 0], MAPS[[0, 1, 0]]))
    assert same(snapshot(accumulator), before)


# Joining

OTHERS = {
    "a state": ({}, TypeError, "AttentionAccumulator", "got dict"),
    "nothing": (None, TypeError, "AttentionAccumulator", "got NoneType"),
    "another data set": (filled(labels=[[1, 1, 0], [0, 1, 0]]), ValueError, "labels", "got.*image 1"),
}


@pytest.mark.parametrize(("other", "error", "expected", "arrived"), cases(OTHERS))
def test_an_accumulator_does_not_merge(other, error, expected, arrived):
    accumulator = filled()
    before = snapshot(accumulator)
    assert_raises(error, expected, arrived, lambda: accumulator.merge(other))
    assert same(snapshot(accumulator), before)


def test_a_fusion_without_merge_is_not_merged():
    def product(cumulative, attention, count):
        return cumulative * attention

    accumulator = filled(fusion=product)
    before = snapshot(accumulator)
    with pytest.raises(ValueError, match=r"product.*cannot merge.*give it a merge method"):
        accumulator.merge(filled(fusion=product))
    assert same(snapshot(accumulator), before)


# Losses

ONES = torch.ones(1, 2, 3, 3)
LOSS_ARGUMENTS = {
    "integer scores": (ONES.int(), ONES, {}, TypeError, "score_maps.*floating point", "got torch.int32"),
    "8-bit soft labels": (ONES, ONES.byte(), {}, TypeError, "soft_labels.*floating point", "got torch.uint8"),
    "boolean soft labels": (ONES, ONES.bool(), {}, TypeError, "soft_labels.*floating point", "got torch.bool"),
    "a list": (ONES, ONES.tolist(), {}, TypeError, "soft_labels.*tensor", "got list"),
    "no soft labels": (ONES, None, {}, TypeError, "soft_labels.*tensor", "got NoneType"),
    "no batch": (ONES[0], ONES[0], {}, ValueError, r"\(B, C, h, w\)", r"got \(2, 3, 3\)"),
    "logits and labels": (ONES[..., 0, 0], ONES[..., 0, 0], {}, ValueError, r"\(B, C, h, w\)", r"got \(1, 2\)"),
    "other sizes": (
        ONES,
        torch.ones(1, 2, 6, 6),
        {},
        ValueError,
        "one shape",
        r"got \(1, 2, 3, 3\) and \(1, 2, 6, 6\)",
    ),
    "that broadcast": (ONES, ONES[:, :1], {}, ValueError, "one shape", r"got \(1, 2, 3, 3\) and \(1, 1, 3, 3\)"),
    "an empty batch": (ONES[:0], ONES[:0], {}, ValueError, "none of them 0", r"got \(0, 2, 3, 3\)"),
    "no pixels": (ONES[..., :0], ONES[..., :0], {}, ValueError, "none of them 0", r"got \(1, 2, 3, 0\)"),
    "two devices": (ONES, ONES.to("meta"), {}, ValueError, "one device", "got cpu and meta"),
    "NaN": (ONES, ONES * NAN, {}, ValueError, r"soft labels in \[0, 1\]", r"got \[nan, nan\]"),
    "soft labels of 255": (ONES, ONES * 255, {}, ValueError, r"soft labels in \[0, 1\]", r"got \[255, 255\]"),
    "negative soft labels": (ONES, -ONES, {}, ValueError, r"soft labels in \[0, 1\]", r"got \[-1, -1\]"),
    "a negative threshold": (ONES, ONES, {"threshold": -0.1}, ValueError, r"threshold in \[0, 1\)", r"got -0\.1"),
    "a threshold of 1": (ONES, ONES, {"threshold": 1}, ValueError, r"threshold in \[0, 1\)", "got 1"),
    "a threshold in 8 bits": (ONES, ONES, {"threshold": 30}, ValueError, r"threshold in \[0, 1\)", "got 30"),
    "a NaN threshold": (ONES, ONES, {"threshold": NAN}, ValueError, r"threshold in \[0, 1\)", "got nan"),
}


@pytest.mark.parametrize("loss", [hybrid_loss, partial(hybrid_loss, normalization="pooled"), multilabel_cross_entropy])
@pytest.mark.parametrize(
    ("score_maps", "soft_labels", "options", "error", "expected", "arrived"), cases(LOSS_ARGUMENTS)
)
def test_a_loss_refuses(loss, score_maps, soft_labels, options, error, expected, arrived):
    assert_raises(error, expected, arrived, lambda: loss(score_maps, soft_labels, **options))


@pytest.mark.parametrize("normalization", ["sample", None])
def test_a_hybrid_loss_knows_two_normalizations(normalization):
    for call in (
        lambda: hybrid_loss(ONES, ONES, normalization=normalization),
        lambda: HybridLoss(normalization=normalization)(ONES, ONES),
    ):
        assert_raises(ValueError, "'class' or 'pooled'", f"got {normalization!r}", call)


# Pseudo labels

CUES = {
    "8-bit attention": ({"attention": torch.ones(2, 3, 3).byte()}, TypeError, "attention.*floating", "got torch.uint8"),
    "attention as an array": ({"attention": np.ones((2, 3, 3))}, TypeError, "attention.*tensor", "got ndarray"),
    "one map": ({"attention": torch.ones(3, 3)}, ValueError, r"\(K, H, W\)", r"got \(3, 3\)"),
    "a batch": ({"attention": torch.ones(1, 2, 3, 3)}, ValueError, r"\(K, H, W\)", r"got \(1, 2, 3, 3\)"),
    "no pixels": ({"attention": torch.ones(2, 0, 3)}, ValueError, "at least 1", r"got \(2, 0, 3\)"),
    "raw scores": ({"attention": torch.ones(2, 3, 3) * 7}, ValueError, r"attention in \[0, 1\]", r"got \[7, 7\]"),
    "negative scores": ({"attention": -torch.ones(2, 3, 3)}, ValueError, r"attention in \[0, 1\]", r"got \[-1, -1\]"),
    "NaN": ({"attention": torch.full((2, 3, 3), NAN)}, ValueError, r"attention in \[0, 1\]", r"got \[nan, nan\]"),
    "8-bit saliency": ({"saliency": torch.ones(3, 3).byte()}, TypeError, "saliency.*floating", "got torch.uint8"),
    "saliency up to 255": (
        {"saliency": torch.ones(3, 3) * 255},
        ValueError,
        r"saliency in \[0, 1\]",
        r"got \[255, 255\]",
    ),
    "NaN saliency": ({"saliency": torch.full((3, 3), NAN)}, ValueError, r"saliency in \[0, 1\]", r"got \[nan, nan\]"),
    "larger saliency": ({"saliency": torch.ones(6, 6)}, ValueError, r"saliency.*\(3, 3\)", r"got \(6, 6\)"),
    "saliency with a channel": ({"saliency": torch.ones(1, 3, 3)}, ValueError, r"\(H, W\)", r"got \(1, 3, 3\)"),
    "saliency elsewhere": ({"saliency": torch.ones(3, 3, device="meta")}, ValueError, "saliency.*cpu", "got.*meta"),
    "no background cue": ({"saliency": None}, ValueError, "saliency map or a background", "got neither"),
    "8-bit background": ({"background": torch.ones(3, 3).byte()}, TypeError, "background.*floating", "got torch.uint8"),
    "larger background": ({"background": torch.ones(6, 6)}, ValueError, r"background.*\(3, 3\)", r"got \(6, 6\)"),
    "a background above 1": ({"background": 128}, ValueError, r"background in \[0, 1\]", "got 128"),
    "a negative background": ({"background": -0.5}, ValueError, r"background in \[0, 1\]", r"got -0\.5"),
    "a NaN background": ({"background": NAN}, ValueError, r"background in \[0, 1\]", "got nan"),
    "too few classes": ({"classes": [1]}, ValueError, "2 maps", r"got.*\(1,\)"),
    "no classes": ({"classes": []}, ValueError, "2 maps", r"got.*\(0,\)"),
    "a class alone": ({"classes": 1}, ValueError, "2 maps", r"got.*\(\)"),
    "a class twice": ({"classes": [1, 1]}, ValueError, "different", r"got \[1, 1\]"),
    "a negative class": ({"classes": [0, -1]}, ValueError, ">= 0", r"got \[0, -1\]"),
    "the class whose label is ignored": ({"classes": [0, 254]}, ValueError, "not 255", r"got \[0, 254\]"),
    "floating point classes": ({"classes": [0.0, 1.0]}, TypeError, "integers", "got torch.float32"),
    "a row of labels": ({"classes": torch.tensor([True, True])}, TypeError, "integers", "got torch.bool"),
    "class names": ({"classes": ["cat", "dog"]}, TypeError, "integers", "got.*(str|cat)"),
    "background as ignored": ({"ignore_index": 0}, ValueError, "ignore_index", "got 0"),
    "an 8-bit foreground threshold": ({"foreground_threshold": 76}, ValueError, r"\[0, 1\]", "got 76"),
    "an 8-bit conflict threshold": ({"conflict_threshold": 230}, ValueError, r"\[0, 1\]", "got 230"),
    "an 8-bit saliency threshold": ({"uncertain_saliency": 32}, ValueError, r"\[0, 1\]", "got 32"),
    "an 8-bit attention threshold": ({"strong_attention": 204}, ValueError, r"\[0, 1\]", "got 204"),
    "a share in percent": ({"min_foreground": 2}, ValueError, r"\[0, 1\]", "got 2"),
    "a flag as a word": ({"rescale": "no"}, TypeError, "rescale as True or False", "got str"),
}


@pytest.mark.parametrize(("cues", "error", "expected", "arrived"), cases(CUES))
def test_a_pseudo_label_is_not_made_from(cues, error, expected, arrived):
    cues = {"attention": torch.rand(2, 3, 3), "classes": [0, 1], "saliency": torch.rand(3, 3), **cues}
    assert_raises(error, expected, arrived, lambda: pseudo_label_from_cues(**cues))


# Metrics


@pytest.mark.parametrize(
    ("settings", "expected", "arrived"),
    [
        ({"num_classes": 0}, "num_classes >= 1", "got 0"),
        ({"num_classes": 21, "ignore_index": 20}, r"outside 0\.\.20", "got 20"),
        ({"num_classes": 256}, r"outside 0\.\.255", "got 255"),
    ],
)
def test_a_confusion_matrix_is_not_built_from(settings, expected, arrived):
    assert_raises(ValueError, expected, arrived, lambda: ConfusionMatrix(**settings))


ZEROS = torch.zeros(2, 2, dtype=torch.int64)
PIXELS = {
    "scores": (torch.zeros(2, 2), ZEROS, TypeError, "prediction.*integer", "got torch.float32"),
    "soft targets": (ZEROS, torch.zeros(2, 2), TypeError, "target.*integer", "got torch.float32"),
    "an array": (ZEROS.numpy(), ZEROS, TypeError, "prediction.*tensor", "got ndarray"),
    "another size": (ZEROS, ZEROS[:1], ValueError, "one shape", r"got \(2, 2\) and \(1, 2\)"),
    "turned": (ZEROS.view(4, 1), ZEROS.view(1, 4), ValueError, "one shape", r"got \(4, 1\) and \(1, 4\)"),
    "an unknown class predicted": (ZEROS + 3, ZEROS, ValueError, r"prediction in 0\.\.2,", "got 3"),
    "the ignored value predicted": (ZEROS + 255, ZEROS, ValueError, r"prediction in 0\.\.2,", "got 255"),
    "a negative prediction": (ZEROS - 1, ZEROS, ValueError, r"prediction in 0\.\.2,", "got -1"),
    "an unknown target": (ZEROS, ZEROS + 3, ValueError, r"target in 0\.\.2 or 255", "got 3"),
    "a negative target": (ZEROS, ZEROS - 1, ValueError, r"target in 0\.\.2 or 255", "got -1"),
}


@pytest.mark.parametrize(("prediction", "target", "error", "expected", "arrived"), cases(PIXELS))
def test_a_confusion_matrix_does_not_count(prediction, target, error, expected, arrived):
    matrix = ConfusionMatrix(3).update(ZEROS, ZEROS + 1)
    before = matrix.counts.clone()
    assert_raises(error, expected, arrived, lambda: matrix.update(prediction, target))
    assert torch.equal(matrix.counts, before)


def test_one_wrong_pixel_counts_nothing_of_its_image():
    matrix, target = ConfusionMatrix(3), ZEROS.clone()
    target[1, 1] = 7
    with pytest.raises(ValueError, match="got 7"):
        matrix.update(ZEROS, target)
    assert not matrix.counts.any()


@pytest.mark.parametrize(
    ("other", "error", "expected", "arrived"),
    [
        (ConfusionMatrix(4), ValueError, r"\(3, 255\)", r"got \(4, 255\)"),
        (ConfusionMatrix(3, ignore_index=-1), ValueError, r"\(3, 255\)", r"got \(3, -1\)"),
        (torch.zeros(3, 3, dtype=torch.int64), TypeError, "ConfusionMatrix", "got Tensor"),
    ],
)
def test_a_confusion_matrix_does_not_merge(other, error, expected, arrived):
    matrix = ConfusionMatrix(3).update(ZEROS, ZEROS)
    before = matrix.counts.clone()
    assert_raises(error, expected, arrived, lambda: matrix.merge(other))
    assert torch.equal(matrix.counts, before)
