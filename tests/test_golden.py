"""The `release` recipe against what the authors' released programs return, see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from oaa_lib import AttentionAccumulator, hybrid_loss, pseudo_label_from_cues


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("given_logits", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_accumulation_agrees_with_the_release_in_any_order_and_batching(seed, given_logits):
    data, rng = golden("accumulation_max"), np.random.default_rng(seed)
    num_epochs, num_images, _, *map_size = data["scores"].shape
    accumulator = AttentionAccumulator(data["labels"], tuple(map_size), gate="topk")
    assert not data["accumulated"][0].any()  # the release does not accumulate in epoch 0
    for epoch in range(1, num_epochs):
        order = rng.permutation(num_images)
        cuts = np.flatnonzero(rng.integers(0, 2, num_images - 1)) + 1
        for indices in np.split(order, cuts):
            score_maps = torch.from_numpy(data["scores"][epoch, indices])
            logits = score_maps.mean((2, 3)) if given_logits else None
            accumulator.update(indices, score_maps, logits, fill_empty=epoch == num_epochs - 1)
        soft_labels = accumulator[range(num_images)] * 255
        expected = torch.from_numpy(data["maps"][epoch].astype(np.float32))
        assert (soft_labels - expected).abs().max() <= 1 + 1e-3
        assert np.array_equal(accumulator.accumulated.numpy(), data["accumulated"][epoch])


def test_every_pair_holds_something_after_the_last_epoch():
    data = golden("accumulation_max")
    assert np.array_equal(data["accumulated"][-1], data["labels"] == 1)  # what the test above checks last
    assert not np.array_equal(data["accumulated"][-2], data["labels"] == 1)


@pytest.mark.parametrize("case", range(8))
def test_the_pooled_hybrid_loss_agrees_with_the_release(case):
    data = golden("hybrid_loss_pooled")
    scores = torch.from_numpy(data["scores"][case]).requires_grad_()
    value = hybrid_loss(scores, torch.from_numpy(data["targets"][case]), normalization="pooled", threshold=0.001)
    value.backward()
    tolerance = 1e-6 * max(1, abs(data["value"][case]))  # the release adds 1e-8 inside one logarithm
    assert value.item() == pytest.approx(data["value"][case], abs=tolerance)
    assert np.abs(scores.grad.numpy() - data["grad"][case]).max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proxy_labels_agree_with_the_release(dtype):
    data, different, pixels = golden("proxy_labels"), 0, 0
    for case in range(sum(name.startswith("label_") for name in data)):
        attention, saliency = (torch.from_numpy(data[f"{x}_{case}"]).to(dtype) / 255 for x in ("attention", "saliency"))
        label = pseudo_label_from_cues(attention, torch.from_numpy(data[f"classes_{case}"]), saliency)
        different += int((label.numpy() != data[f"label_{case}"]).sum())
        pixels += label.numel()
    assert pixels > 50000
    assert different <= pixels // 5000
