"""What `hybrid_loss` costs, forward and backward, against one fused binary cross entropy on the same tensors."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity, profile

from benchmarks.data import CLASSES, labels
from benchmarks.timing import Measured, Row, take_turns
from oaa_lib import hybrid_loss


def time_and_memory(seconds: float) -> Iterator[Row]:
    """Batch 16, soft labels of one to three classes an image."""
    for side in (28, 41):
        scores = torch.randn(16, CLASSES, side, side, requires_grad=True)
        present = labels(16)[:, :, None, None]
        soft_labels = torch.rand(16, CLASSES, side, side).sub(0.3).clamp(min=0) * present
        ours, fused = take_turns(
            _step(hybrid_loss, scores, soft_labels),
            _step(binary_cross_entropy_with_logits, scores, soft_labels),
            seconds=seconds,
        )
        ratio = ours.median / fused.median
        yield Row(f"hybrid loss, {side} x {side}", ours, fused, ratio, "times", 1.5, True)
    size = scores.numel() * scores.element_size()
    peak = _peak_bytes(_step(hybrid_loss, scores, soft_labels))
    yield Row("hybrid loss, peak memory", Measured.once(peak), Measured.once(size), peak / size, "times", 2, True, "B")


def _step(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, soft_labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        scores.grad = None
        loss(scores, soft_labels).backward()

    return step


def _peak_bytes(step: Callable[[], None]) -> int:
    """The most that is allocated at once beside what was there before, the gradient of the scores included."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
