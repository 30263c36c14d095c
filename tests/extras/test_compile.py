"""`torch.compile` of a training step that includes the head, the loss and the accumulator."""

import os
import pathlib
import shutil
import sysconfig

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from oaa_lib import AttentionAccumulator, CAMHead, HybridLoss, View

pytestmark = [
    pytest.mark.slow,
    # Dynamo looks at .grad of what it carries over a graph break.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]
HAS_COMPILER = (
    shutil.which(os.environ.get("CXX", "g++")) is not None
    and (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
)
BACKEND = "inductor" if HAS_COMPILER else "aot_eager"
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]])
BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [7, 0, 7, 1], [2, 2, 2, 2], [3, 4, 1, 0], [6, 5, 4, 4]]  # 0 to 3 pairs an image
INDICES = {"list": list, "tensor": torch.tensor}


class Training:
    """A few steps of the classifier or of the integral model, on random features."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = CAMHead(4, 3, hidden_channels=5, num_convs=1)
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=0.5)
        self.accumulator = AttentionAccumulator(LABELS, (6, 6))
        self.hybrid_loss = HybridLoss()

    def classify(self, indices: list[int] | Tensor, features: Tensor, labels: Tensor, views: Tensor) -> Tensor:
        out = self.head(features)
        loss = nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.accumulator.update(indices, out.score_maps, out.logits)
        return loss.detach()

    def classify_views(self, indices: list[int] | Tensor, features: Tensor, labels: Tensor, views: Tensor) -> Tensor:
        out = self.head(features)
        loss = nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.accumulator.update(indices, out.score_maps, out.logits, views, fill_empty=True)
        return loss.detach()

    def integrate(self, indices: list[int] | Tensor, features: Tensor, labels: Tensor, views: Tensor) -> Tensor:
        loss = self.hybrid_loss(self.head(features).score_maps, self.accumulator[indices])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def integrate_views(self, indices: list[int] | Tensor, features: Tensor, labels: Tensor, views: Tensor) -> Tensor:
        soft_labels = self.accumulator.soft_labels(indices, views, size=(6, 6))
        loss = self.hybrid_loss(self.head(features).score_maps, soft_labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def data(batch: int, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and views of a batch."""
    generator = torch.Generator().manual_seed(batch)
    views = [View(flip=batch % 2 == 1), View(0.25, 0.25, 1.25, 0.75), View(right=0.5, flip=True), View(top=batch / 8)]
    return torch.randn(4, 4, 6, 6, generator=generator), LABELS[indices].float(), torch.tensor(views)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(  # each step once, each form of indices with both: compiling takes seconds
    ("name", "kind"),
    [("classify", "list"), ("classify_views", "tensor"), ("integrate", "tensor"), ("integrate_views", "list")],
)
def test_a_compiled_training_step_gives_the_same(name, kind):
    eager, compiled = Training(), Training()
    if name.startswith("integrate"):
        for training in (eager, compiled):
            maps = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
            training.accumulator.update(range(8), maps, normalization=None, fill_empty=True)
    step, frames = torch.compile(getattr(compiled, name), backend=BACKEND), []
    for batch, indices in enumerate(BATCHES):
        given = INDICES[kind](indices)
        expected = getattr(eager, name)(given, *data(batch, indices))
        torch.testing.assert_close(step(given, *data(batch, indices)), expected, rtol=1e-4, atol=1e-5)
        frames.append(counters["frames"]["total"])
    assert frames[0] > 0
    assert torch.equal(compiled.accumulator.counts, eager.accumulator.counts)
    assert torch.equal(compiled.accumulator.statistics().offered, eager.accumulator.statistics().offered)
    step_of_8_bits = 1 / 255 + 1e-6
    torch.testing.assert_close(compiled.accumulator[range(8)], eager.accumulator[range(8)], rtol=0, atol=step_of_8_bits)
    for ours, theirs in zip(compiled.head.parameters(), eager.head.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_update_itself_may_be_compiled():
    eager, compiled = (AttentionAccumulator(LABELS, (6, 6), gate=None, fusion="mean") for _ in range(2))
    update, soft_labels = (
        torch.compile(function, backend="eager") for function in (compiled.update, compiled.soft_labels)
    )
    for batch, indices in enumerate(BATCHES):
        features, _, views = data(batch, indices)
        eager.update(indices, features[:, :3], views=views)
        assert update(indices, features[:, :3], views=views) is compiled
        assert torch.equal(soft_labels(indices, views), eager.soft_labels(indices, views))
    assert torch.equal(compiled[range(8)], eager[range(8)])


def test_errors_are_raised_from_a_compiled_step_too():
    accumulator = AttentionAccumulator(LABELS, (6, 6))

    @torch.compile(backend="eager")
    def step(indices, features):
        return accumulator.update(indices, features.relu())

    with pytest.raises(IndexError, match=r"expected indices in 0\.\.7, got 8"):
        step([8], torch.ones(1, 3, 6, 6))
    with pytest.raises(ValueError, match="expected score_maps of shape"):
        step([7], torch.ones(1, 2, 6, 6))
    assert step([7], torch.ones(1, 3, 6, 6)).offered == 2
