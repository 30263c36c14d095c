"""What `hybrid_loss` costs, forward and backward, against one fused binary cross entropy on the same tensors."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.data import CLASSES, labels
from benchmarks.timing import HOST, Device, Measured, Row, take_turns
from oaa_lib import hybrid_loss


def time_and_memory(seconds: float, device: Device = HOST) -> Iterator[Row]:
    """Batch 16, soft labels of one to three classes an image."""
    for side in (28, 41):
        scores = torch.randn(16, CLASSES, side, side, device=device.name, requires_grad=True)
        present = labels(16)[:, :, None, None]
        soft_labels = torch.rand(16, CLASSES, side, side).sub(0.3).clamp(min=0).mul(present).to(device.name)
        steps = (_step(loss, scores, soft_labels) for loss in (hybrid_loss, binary_cross_entropy_with_logits))
        ours, fused = take_turns(*(device.finishing(step) for step in steps), seconds=seconds)
        ratio = ours.median / fused.median
        yield Row(f"hybrid loss, {side} x {side}", ours, fused, ratio, "times", 1.5, True)
    size = scores.numel() * scores.element_size()
    peak = device.peak_bytes(_step(hybrid_loss, scores, soft_labels))
    yield Row("hybrid loss, peak memory", Measured.once(peak), Measured.once(size), peak / size, "times", 2, True, "B")


def _step(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, soft_labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        scores.grad = None
        loss(scores, soft_labels).backward()

    return step
