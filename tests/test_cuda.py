"""The way of the data on a real card, where the host's results are the reference. Skipped without one."""

import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from oaa_lib import AttentionAccumulator, CAMHead, View, hybrid_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]])
SIZE = (8, 8)
VIEWS = {
    "whole images": None,
    "flips": [View(flip=True), View(), View(flip=True)],
    "crops": [View(0.25, -0.5, 1.25, 0.5, True), View(), View(0.1, 0.2, 0.9, 0.7)],
}
FUSIONS = {"max": torch.uint8, "mean": torch.float32}  # and how they store their maps


def batches(steps: int = 4):
    """Images, their numbers in the data set, and nothing that depends on a device."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        indices = torch.randperm(len(LABELS), generator=generator)[:3].tolist()
        yield step, indices, torch.randn(3, 3, *SIZE, generator=generator, dtype=torch.float64)


def build(device: str, fusion: str, gate: str | None = "score") -> AttentionAccumulator:
    return AttentionAccumulator(LABELS, SIZE, fusion=fusion, gate=gate, device=device)


def network(device: str) -> nn.Sequential:
    """In float64, so that a device's own ways of convolving make no difference that matters."""
    torch.manual_seed(0)
    head = CAMHead(4, LABELS.shape[1], hidden_channels=4, num_convs=1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), head).double().to(device)


def train(device: str, views: list[View] | None) -> dict[str, torch.Tensor]:
    """Some steps of a classifier that accumulates, then some of an integral model on its soft labels."""
    results = {}
    classifier, integral = network(device), network(device)
    accumulators = {fusion: build(device, fusion) for fusion in FUSIONS}
    optimizer = torch.optim.SGD([*classifier.parameters(), *integral.parameters()], lr=0.1)
    for step, indices, images in batches():
        out = classifier(images.to(device))
        loss = binary_cross_entropy_with_logits(out.logits, LABELS[indices].to(device, out.logits.dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for accumulator in accumulators.values():
            accumulator.update(indices, out.score_maps, out.logits, views, fill_empty=step == 3)
    for step, indices, images in batches():
        soft_labels = accumulators["mean"].soft_labels(indices, views)
        loss = hybrid_loss(integral(images.to(device)).score_maps, soft_labels, threshold=0.001)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results[f"loss {step}"] = loss.detach().cpu()
    results["weights"] = (
        nn.utils.parameters_to_vector([*classifier.parameters(), *integral.parameters()]).detach().cpu()
    )
    for fusion, accumulator in accumulators.items():
        assert accumulator.device.type == device
        results[fusion] = accumulator[range(len(LABELS))].cpu()
        results[f"{fusion}, counts"] = accumulator.counts.cpu()
    return results


@pytest.mark.parametrize("views", VIEWS.values(), ids=list(VIEWS))
def test_training_gives_what_it_gives_on_the_host(views):
    found, expected = train(DEVICE, views), train("cpu", views)
    assert (expected["max, counts"] > 0).sum() > 3
    assert (expected["max"] > 0).float().mean() > 0.05
    for name, values in expected.items():
        tolerance = 1.01 / 255 if name == "max" else 1e-5  # a rounding may fall to the other side
        torch.testing.assert_close(
            found[name], values, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("views", VIEWS.values(), ids=list(VIEWS))
def test_an_update_never_waits_for_the_card(fusion, views):
    accumulator = build(DEVICE, fusion)
    score_maps = torch.randn(3, 3, 5, 6, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for indices in ([0, 1, 2], [2, 5, 2]):
            accumulator.update(indices, score_maps, score_maps.mean((2, 3)), views)
            accumulator.update(indices, score_maps, views=views, fill_empty=True)
        accumulator.soft_labels([0, 1, 2], views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert accumulator.offered == 24


def grow(accumulator: AttentionAccumulator, first: int, last: int) -> AttentionAccumulator:
    for step, indices, images in batches(last):
        if step >= first:
            accumulator.update(indices, images.to(DEVICE))
    return accumulator


def same(first: AttentionAccumulator, second: AttentionAccumulator) -> bool:
    """To the bit, all that a state holds."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert set(ours) == set(theirs)
    return all(
        torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


@pytest.mark.parametrize("place", [None, "cpu", DEVICE])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_resumed_run_is_the_uninterrupted_one(fusion, place):
    file = io.BytesIO()
    torch.save(grow(build(DEVICE, fusion), 0, 3).state_dict(), file)
    file.seek(0)
    resumed = build(DEVICE, fusion)
    resumed.load_state_dict(torch.load(file, map_location=place, weights_only=True))
    assert resumed.device.type == DEVICE
    whole = grow(build(DEVICE, fusion), 0, 6)
    assert not same(resumed, whole)
    assert same(grow(resumed, 3, 6), whole)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_process_synchronizes_over_nccl(fusion):
    alone = grow(build(DEVICE, fusion), 0, 6)
    together = grow(build(DEVICE, fusion), 0, 3)
    card = torch.device(DEVICE, torch.cuda.current_device())
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=card)
    try:
        together.synchronize()
        grow(together, 3, 6).synchronize()
    finally:
        dist.destroy_process_group()
    indices = range(len(LABELS))
    assert torch.equal(together.counts, alone.counts)
    torch.testing.assert_close(together[indices], alone[indices], rtol=0, atol=0 if fusion == "max" else 1e-6)
