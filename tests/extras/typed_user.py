"""A program as a user with types writes it: every public name, checked by mypy --strict and run (test_typing.py)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import assert_type

import oaa_lib
from oaa_lib import (
    AttentionAccumulator,
    AttentionDrop,
    CAMHead,
    CAMOutput,
    ConfusionMatrix,
    ExponentialMovingAverage,
    Fusion,
    Gate,
    HybridLoss,
    LatestFusion,
    MaxFusion,
    MeanFusion,
    MultiLabelCrossEntropy,
    NoisyOr,
    Snapshots,
    Statistics,
    ThresholdSweep,
    View,
    WrappedClassifier,
    attention_drop,
    attention_similarity,
    harmonic_mix,
    hybrid_loss,
    interop,
    multi_scale_attention,
    multilabel_cross_entropy,
    normalize_attention,
    pixel_adaptive_refinement,
    pseudo_label_from_cues,
    score_gate,
    topk_gate,
    two_fold,
    wrap_classifier,
)
from oaa_lib.interop import ImageMaps, MapFolder
from oaa_lib.testing import check_fusion

NAMES = ["cat", "dog", "bird"]
LABELS = torch.tensor([[1, 0], [0, 1], [1, 1]])


class Softened(Fusion):
    """A fusion of one's own, as a class."""

    storage_dtype = torch.float32
    order_free = False

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        return torch.lerp(cumulative, torch.maximum(cumulative, attention), self.share)


def common(cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
    """A fusion of one's own, as a function."""
    return torch.minimum(cumulative, attention)


class Confident:
    """A gate of one's own, as a class."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return labels & (logits.sigmoid() > self.probability)


def positive(logits: Tensor, labels: Tensor) -> Tensor:
    """A gate of one's own, as a function."""
    return labels & (logits > 0)


class Sample(TypedDict):
    name: str
    image: Tensor
    view: View


class Images(Dataset[Sample]):
    """A data set whose samples carry their views."""

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, index: int) -> Sample:
        view = View().crop(top=0, left=2, height=16, width=14, size=(16, 16)).pad(1, 1, 1, 1, size=(16, 14))
        return {"name": NAMES[index], "image": torch.rand(3, 16, 16), "view": view.hflip()}


def network() -> nn.Sequential:
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), *pooled, nn.Linear(8, 2))


def accumulators() -> Iterator[AttentionAccumulator]:
    gates: list[str | Gate | None] = ["score", "topk", None, score_gate, topk_gate, positive, Confident(0.5)]
    for gate in gates:
        yield AttentionAccumulator(LABELS, (8, 8), gate=gate, keys=NAMES)
    for fusion in (MaxFusion(), MeanFusion(), LatestFusion(), ExponentialMovingAverage(0.5), NoisyOr(), Softened(0.5)):
        yield AttentionAccumulator([[1, 0], [0, 1], [1, 1]], (8, 8), fusion=fusion, gate=None, keys=NAMES)
    yield AttentionAccumulator(LABELS.bool().numpy(), (8, 8), fusion="mean", dtype=torch.float16, keys=NAMES)
    yield AttentionAccumulator(LABELS, torch.full((3, 2), 8), fusion=common, device="cpu", keys=tuple(NAMES))


def train(accumulator: AttentionAccumulator, model: WrappedClassifier) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hide, losses = AttentionDrop(rate=0.5, threshold=0.6), (HybridLoss(), MultiLabelCrossEntropy(threshold=0.001))
    total = torch.zeros(())
    for batch in DataLoader(Images(), batch_size=2):
        latest = accumulator.soft_labels(batch["name"], batch["view"], size=(8, 8))
        images: Tensor = hide(batch["image"], latest, torch.ones(len(latest), 2))
        output: CAMOutput = model(images)
        logits, score_maps = output
        accumulator.update(batch["name"], score_maps, logits, batch["view"], fill_empty=True)
        soft_labels = accumulator.soft_labels(batch["name"], batch["view"], size=(8, 8))
        loss: Tensor = losses[0](score_maps, soft_labels) + losses[1](score_maps, soft_labels)
        loss = loss + hybrid_loss(score_maps, soft_labels, normalization="pooled", threshold=0.001)
        loss = loss + multilabel_cross_entropy(score_maps, soft_labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)  # torch has no types for loss.backward()
        optimizer.step()
        total = total + loss.detach()
    return total


def look(accumulator: AttentionAccumulator, model: WrappedClassifier) -> None:
    statistics: Statistics = accumulator.statistics()
    numbers: tuple[int, int, int] = accumulator.offered, accumulator.accepted, accumulator.skipped
    assert_type(numbers, tuple[int, int, int])
    assert_type(statistics.pass_rate, Tensor)
    attention, classes = accumulator.attention("bird"), accumulator.classes("bird")
    label: Tensor = pseudo_label_from_cues(attention, classes, torch.rand(8, 8), min_foreground=0.0)
    label = pseudo_label_from_cues(attention, classes.tolist(), background=0.5)
    images = torch.rand(3, 3, 16, 16)
    averaged: Tensor = multi_scale_attention(model, images, scales=[1.0, 0.5], size=(8, 8))
    refined = pixel_adaptive_refinement(images, averaged, iterations=2, dilations=[1, 2])
    assert_type(attention_similarity(averaged, normalize_attention(averaged, method="minmax")), Tensor)
    assert_type(harmonic_mix(averaged * 0.5, averaged), Tensor)
    assert_type(attention_drop(images, refined, LABELS), Tensor)
    halves = [ThresholdSweep(2).update(attention, classes, label.clamp(max=2)) for _ in range(2)]
    matrix, thresholds = two_fold(*halves)
    assert_type(matrix, ConfusionMatrix)
    assert_type(thresholds, tuple[float, float])
    iou: float = ConfusionMatrix(3).update(label.clamp(max=2), label.clamp(max=2)).merge(matrix).mean_iou()
    print(iou, halves[0].at(0.5).iou().tolist(), numbers)


def keep(accumulator: AttentionAccumulator, folder: Path) -> AttentionAccumulator:
    snapshots = Snapshots(accumulator, ["cat"], steps=[0, 1])
    snapshots.take(0)
    state = accumulator.state_dict()
    accumulator.reset().load_state_dict(state)
    accumulator.save(folder / "maps")
    loaded = AttentionAccumulator.load(folder / "maps", fusion=accumulator.fusion, gate=accumulator.gate)
    interop.write_maps(loaded, folder / "files", layout="psa")
    maps: MapFolder = interop.read_maps(folder / "files", layout="psa", allow_pickle=True)
    one: ImageMaps = maps["bird"]
    print(one.classes.tolist(), interop.load_into(AttentionAccumulator(LABELS, (8, 8), gate=None, keys=NAMES), maps))
    return loaded


def main() -> None:
    head: CAMOutput = CAMHead(8, 2, hidden_channels=4, num_convs=1)(torch.rand(1, 8, 5, 5))
    assert_type(head.logits, Tensor)
    for number, accumulator in enumerate(accumulators()):
        model = wrap_classifier(network(), head="4")
        train(accumulator, model)
        if number in (0, 8):
            look(accumulator, model.eval())
            with tempfile.TemporaryDirectory() as folder:
                loaded = keep(accumulator, Path(folder))
            accumulator.merge(loaded).verify()
    check_fusion("max", [torch.rand(4, 4) for _ in range(3)])
    check_fusion(common, [torch.rand(4, 4) for _ in range(3)])
    print(f"oaa_lib {oaa_lib.__version__}")


if __name__ == "__main__":
    main()
