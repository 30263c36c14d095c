"""The same run twice gives the same bits, with `torch.use_deterministic_algorithms` or without, on a card as well.

A card differs from run to run where several threads write to one place: sums of floats by index, and backward passes
of sampling. Without a card every operator is watched: none of them adds up floats in an order that is left open, and
whatever is written by index goes to different places.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oaa_lib import (
    AttentionAccumulator,
    CAMHead,
    View,
    attention_drop,
    attention_similarity,
    harmonic_mix,
    hybrid_loss,
    multi_scale_attention,
    multilabel_cross_entropy,
    pixel_adaptive_refinement,
    pseudo_label_from_cues,
    wrap_classifier,
)

LABELS = [[1, 0, 1], [0, 1, 0], [1, 1, 0]]
FUSIONS = ("max", "mean", "latest", "ema", "noisy-or")
VIEWS = {
    "none": None,
    "flips": [View(flip=True), View(), View()],
    "crops": [View(0.1, 0, 0.9, 1), View(flip=True), View(0.2, 0.2, 0.7, 0.7, True)],
}
views = pytest.mark.parametrize("views", VIEWS.values(), ids=list(VIEWS))
# What `torch.use_deterministic_algorithms` lists, by parts of the operators' names: sums, and writing, by index.
SUMS = ("index_add", "scatter_add", "scatter_reduce", "cumsum", "histc", "bincount", "_backward", "put.default")
WRITES = ("index_put", "index_copy", "scatter.src", "index_fill")
HARMLESS = ("convolution_backward", "threshold_backward", "sigmoid_backward", "native_batch_norm_backward")


class Watch(TorchDispatchMode):
    """Refuses operators whose result depends on the order of threads; counts those of the list that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__ if "." in function.__name__ else str(function).removeprefix("aten.")
        if any(part in name for part in SUMS) and not any(part in name for part in HARMLESS):
            self.seen += 1
            values = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            assert not any(value.is_floating_point() for value in values), f"{name} adds up floats in any order"
        if any(part in name for part in WRITES):
            self.seen += 1
            indices = args[1] if isinstance(args[1], (list, tuple)) else [args[2]]
            places = torch.stack(torch.broadcast_tensors(*(each for each in indices if each is not None)))
            if not isinstance(places, torch._subclasses.FakeTensor):
                assert places.shape[1] == places.unique(dim=1).shape[1], f"{name} writes twice to one place"
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["deterministic", "as it comes"])
def deterministic(request) -> Iterator[bool]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def train(views: list[View] | None) -> list[Tensor]:
    """Steps of a wrapped classifier that accumulates, of an integral model, and what is made of both."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    classifier = wrap_classifier(nn.Sequential(*layers))
    integral = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), CAMHead(8, 3, hidden_channels=4, num_convs=1))
    optimizer = torch.optim.SGD([*classifier.parameters(), *integral.parameters()], lr=0.1)
    accumulators = [AttentionAccumulator(LABELS, (5, 7), fusion=fusion, gate="topk") for fusion in FUSIONS]
    for _ in range(3):
        images = torch.rand(3, 3, 8, 8)
        optimizer.zero_grad()
        out = classifier(images)
        F.binary_cross_entropy_with_logits(out.logits, torch.tensor(LABELS).float()).backward()
        for accumulator in accumulators:
            accumulator.update([0, 1, 2], out.score_maps, out.logits, views)
            accumulator.update([0, 1, 0], out.score_maps, out.logits, views)
            soft_labels = accumulator.soft_labels([0, 1, 2], views, size=(8, 8))
            score_maps = integral(images).score_maps
            (hybrid_loss(score_maps, soft_labels) + multilabel_cross_entropy(score_maps, soft_labels)).backward()
        optimizer.step()
    latest, mean = accumulators[2], accumulators[1]
    mean.merge(mean)
    refined = pixel_adaptive_refinement(images, soft_labels, iterations=2)
    label = pseudo_label_from_cues(mean.attention(0), mean.classes(0), torch.rand(5, 7))
    hidden = attention_drop(images, latest[[0, 1, 2]], torch.tensor(LABELS))
    averaged = multi_scale_attention(classifier, images)
    maps = [accumulator[[0, 1, 2]] for accumulator in accumulators]
    parameters = [parameter.detach() for parameter in [*classifier.parameters(), *integral.parameters()]]
    return [*maps, *parameters, refined, label, hidden, averaged, mean.counts, mean.statistics().accepted]


@views
def test_a_run_gives_the_same_bits_again_and_no_operator_refuses(views, deterministic):
    first, second = train(views), train(views)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    torch.use_deterministic_algorithms(not deterministic)
    assert all(torch.equal(*pair) for pair in zip(first, train(views), strict=True))


@views
def test_no_operator_depends_on_the_order_of_threads(views):
    """Forward and backward, on the host; the operators are those of a card but for the checks of values."""
    with Watch() as watch:
        train(views)
    assert watch.seen > 20


@views
@pytest.mark.parametrize(
    ("fusion", "map_size"), [*((fusion, (5, 7)) for fusion in FUSIONS), ("mean", [(4, 4), (5, 6), (2, 2)])], ids=str
)
def test_no_operator_on_a_card_depends_on_the_order_of_threads(fusion, map_size, views):
    with FakeTensorMode(), torch.device("cuda"), Watch() as watch:
        accumulator = AttentionAccumulator(LABELS, map_size, fusion=fusion, device="cuda")
        images, score_maps, logits = torch.empty(3, 3, 8, 8), torch.empty(3, 3, 5, 6), torch.empty(3, 3)
        accumulator.update([0, 1, 2], score_maps, logits, views).update([0, 0, 1], score_maps, logits, views)
        soft_labels = accumulator.soft_labels([0, 1, 2], views, size=(5, 6))
        hybrid_loss(score_maps, soft_labels)
        multilabel_cross_entropy(score_maps, soft_labels)
        pseudo_label_from_cues(accumulator.attention(0), [0, 2], background=0.5)
        pixel_adaptive_refinement(images, soft_labels, iterations=2)
        attention_drop(images, soft_labels, torch.empty(3, 3))
        attention_similarity(soft_labels, soft_labels)
        harmonic_mix(soft_labels, soft_labels)
        with contextlib.suppress(ValueError):  # fusions that cannot be merged
            accumulator.merge(accumulator)
    assert watch.seen > 5


# The control: what must not happen is seen


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda x: x.index_add(0, torch.tensor([0, 0]), torch.ones(2)), "index_add"),
        (lambda x: x.index_put((torch.tensor([1, 1]),), torch.ones(2)), "index_put"),
        (lambda x: x.index_copy(0, torch.tensor([1, 1]), torch.ones(2)), "index_copy"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: F.interpolate(x[None, None, None], (2, 9), mode="bilinear").sum().backward(), "upsample"),
        (lambda x: F.grid_sample(x[None, None, None], torch.zeros(1, 2, 2, 2)).sum().backward(), "grid_sampler"),
        (lambda x: F.adaptive_avg_pool2d(x[None, None], (1, 2)).sum().backward(), "adaptive_avg_pool2d"),
    ],
    ids=["index_add", "index_put", "index_copy", "cumsum", "interpolate", "grid_sample", "pool"],
)
@pytest.mark.filterwarnings("ignore:Default grid_sample")
def test_an_operator_that_depends_on_the_order_of_threads_is_seen(work, name):
    with pytest.raises(AssertionError, match=name), Watch():
        work(torch.ones(4, requires_grad=True))
