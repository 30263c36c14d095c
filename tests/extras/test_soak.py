"""A long run takes no more than a short one: memory, objects, tensors, handles, threads, files."""

import gc
import threading
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from oaa_lib import AttentionAccumulator, CAMHead, View, hybrid_loss, wrap_classifier

STEPS, BEFORE = 2000, 300
HANDLES = Path("/proc/self/fd")


def held() -> dict[str, int]:
    """What a process holds that could grow."""
    gc.collect()
    found = {"objects": len(gc.get_objects()), "threads": threading.active_count()}
    found["tensors"] = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    if HANDLES.exists():
        found["handles"] = len(list(HANDLES.iterdir()))
        found["mappings"] = len(Path("/proc/self/maps").read_text().splitlines())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("where", "fusion"), [("memory", "max"), ("file", "mean")])
def test_thousands_of_updates_take_nothing_more(where, fusion, tmp_path):
    """As a training does it: batches of all kinds, views, repeats, faults, soft labels, saving now and then."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "maps" if where == "file" else None
    accumulator = AttentionAccumulator(torch.rand(50, 3, generator=generator) < 0.6, (4, 4), fusion=fusion, path=path)
    views = [View(0.1, 0.1, 0.8, 0.9, i % 2 == 0) for i in range(4)]

    def step(number: int) -> None:
        indices = torch.randint(0, 50, (4,), generator=generator)
        score_maps = torch.randn(4, 3, 4 + number % 2, 4, generator=generator)
        score_maps[0, 0, 0, 0] = torch.nan if number % 7 == 0 else 0
        accumulator.update(indices, score_maps, views=views if number % 3 == 0 else None, fill_empty=number % 5 == 0)
        with pytest.raises(ValueError, match="expected"):
            accumulator.update(indices, score_maps[:, :2])
        accumulator.soft_labels(indices, views)
        if number % 200 == 0:
            accumulator.save(tmp_path / "saved")
            accumulator.statistics()
            accumulator.load_state_dict(AttentionAccumulator.load(tmp_path / "saved").state_dict())

    for number in range(BEFORE):
        step(number)
    before = held()
    tracemalloc.start()
    try:
        step(BEFORE)
        taken = tracemalloc.get_traced_memory()[0]
        for number in range(BEFORE + 1, STEPS):
            step(number)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - taken
    finally:
        tracemalloc.stop()
    after = held()
    grown = {name: after[name] - before[name] for name in before}
    assert all(amount < 100 for amount in grown.values()), grown  # of 1,700 steps
    assert (grown["threads"], grown.get("handles", 0)) == (0, 0)
    assert taken < 100_000
    assert sorted(each.name for each in tmp_path.iterdir() if not each.name.startswith(".")) == sorted(
        ["saved", *(["maps"] if where == "file" else [])]
    )


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Failing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the model's own fault")


def use(how: str) -> list[weakref.ref]:
    """A model that was wrapped, called and let go of; and all that it made."""
    model = nn.Sequential(classifier(), Failing()) if how == "fails" else classifier()
    wrapped = wrap_classifier(model)
    kept = [weakref.ref(model), weakref.ref(wrapped)]
    images = torch.rand(2, 3, 8, 8)
    if how == "fails":
        with pytest.raises(RuntimeError, match="own fault"):
            wrapped(images)
        return kept
    with torch.set_grad_enabled(how == "trained"):
        outputs = [wrapped(images) for _ in range(3)]
    if how == "trained":
        for out in outputs:
            hybrid_loss(out.score_maps, torch.rand_like(out.score_maps)).backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return kept + [weakref.ref(tensor) for out in outputs for tensor in out]


@pytest.mark.parametrize("how", ["trained", "without gradient", "fails"])
def test_a_wrapped_model_leaves_nothing(how):
    for _ in range(2):
        kept = use(how)
        gc.collect()
        assert [each() for each in kept] == [None] * len(kept)
    before = held()
    for _ in range(20):
        use(how)
    after = held()
    assert all(after[name] - before[name] < 10 for name in before), (before, after)


def test_a_wrapper_holds_nothing_of_its_calls():
    """The model stays; what a call made goes when its result does, without waiting for the collector."""
    wrapped = wrap_classifier(classifier())
    wrapped(torch.rand(2, 3, 8, 8))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            images = torch.rand(2, 3, 8, 8)
            out = wrapped(images)
            kept = [weakref.ref(each) for each in (images, out.logits, out.score_maps)]
            del images, out
            assert [each() for each in kept] == [None] * 3
    finally:
        gc.enable()


def test_an_accumulator_that_is_let_go_of_leaves_its_file_alone(tmp_path):
    handles = held().get("handles")
    for number in range(5):
        accumulator = AttentionAccumulator([[1, 0]], (4, 4), path=tmp_path / f"{number}")
        accumulator.update([0], CAMHead(3, 2, num_convs=0)(torch.rand(1, 3, 4, 4)).score_maps)
        kept = weakref.ref(accumulator)
        del accumulator
        gc.collect()
        assert kept() is None
    assert held().get("handles") == handles
    assert AttentionAccumulator([[1, 0]], (4, 4), path=tmp_path / "0", resume=True).offered == 1
