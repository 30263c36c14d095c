"""One training step of each stage as the scripts run it, on fake CUDA tensors of the paper's size (see test_fake_cuda).

Autograd's engine asks for a real device, so backward passes are walked by hand here: each node of the graph runs its
own derivative on fake tensors.
"""

import argparse
import contextlib
import math
from types import SimpleNamespace

import export_attention
import numpy as np
import pytest
import recipes
import torch
import train_attention
import train_integral
import train_segmentation
import training
from deeplab import build_segmentation_network
from diagnosis import Diagnosis, Wandering
from log import Log
from networks import Network, build_network
from optimization import make_optimizer, rate
from options import replace_checked
from PIL import Image
from processes import Process
from samples import network_size
from stream import Part
from test_fake_cuda import Transfers, cuda_bfloat16_autocast
from test_voc_networks import training_memory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from windows import probabilities

from oaa_lib import AttentionAccumulator, CAMOutput, View

IMAGES, PAIRS, CLASSES = 10_582, 15_555, 20  # of VOC 2012 + SBD
SIZES = [(375, 500), (375, 500), (500, 375), (333, 500), (500, 334)]  # of photographs, a batch of the paper's 5
PROCESS = Process(torch.device("cuda"), 0, 1)
NOTHING = SimpleNamespace(take=lambda done: None)  # is watched


def walk_back(loss: Tensor) -> None:
    """``loss.backward()`` without autograd's engine: nodes are run by hand, each after all that lead to it."""
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    arrived = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            gradients = arrived.pop(node)
            if hasattr(node, "variable"):  # a leaf
                before = node.variable.grad
                node.variable.grad = gradients[0] if before is None else before + gradients[0]
                continue
            derivative = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            results = derivative(*(gradients.get(place) for place in range(max(gradients) + 1)))
            results = results if isinstance(results, tuple) else (results,)
            # a function of Python's own has further arguments behind its tensors, with None as their gradients
            for (following, place), result in zip(node.next_functions, results, strict=False):
                if following is not None and result is not None:
                    places = arrived.setdefault(following, {})
                    places[place] = places[place] + result if place in places else result


def test_a_backward_pass_walked_by_hand_gives_the_gradients_of_autograd():
    torch.manual_seed(0)
    network = build_network("efficientnet_lite0", 3, weights="none")
    out = network(torch.rand(2, 3, 49, 49))
    loss = out.logits.square().sum() + train_integral.hybrid_loss(out.score_maps, torch.rand(2, 3, 4, 4))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    walk_back(loss)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.fixture
def without_gpu(monkeypatch):
    """Backward passes and autocast do without one."""
    monkeypatch.setattr(Tensor, "backward", walk_back)
    monkeypatch.setattr(
        training.Run,
        "autocast",
        lambda run: cuda_bfloat16_autocast() if run.arguments.amp else contextlib.nullcontext(),
    )


class Data:
    """What `Run` asks of a data set."""

    split, classes = "train", ()

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images


class GivenRun(training.Run):
    """A run of a network that is there already, on batches that are given."""

    def __init__(self, path, batches, network, settings, *, process=PROCESS, amp=False, images=IMAGES) -> None:
        options = {"seed": 0, "workers": 0, "log_every": 10**9, "checkpoint_every": 10**9, "amp": amp}
        super().__init__(argparse.Namespace(out=path, **options), settings, Data(images), process)
        self.network, self.given = network, batches

    def batches(self, images):
        return self.given


@pytest.mark.parametrize("shape", [(3, 4), (1, 2)])
def test_logits_are_pooled_as_loops_pool_them(shape):
    maps = 3 * torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    out = CAMOutput(maps.mean((2, 3)), maps)
    naive = {
        "average": lambda cells: sum(cells) / len(cells),
        "max": lambda cells: cells[-1],
        "lse": lambda cells: math.log(sum(math.exp(5 * cell) for cell in cells) / len(cells)) / 5,
        "topk": lambda cells: sum(cells[-max(len(cells) // 5, 1) :]) / max(len(cells) // 5, 1),
    }
    for pooling, pool in naive.items():
        expected = torch.tensor([[pool(sorted(each.flatten().tolist())) for each in image] for image in maps])
        torch.testing.assert_close(train_attention.pooled(out, pooling), expected)
    huge = CAMOutput(maps.mean((2, 3)) * 1e4, maps * 1e4)
    assert train_attention.pooled(huge, "lse").isfinite().all()


class Shows(nn.Module):
    """A network that shows the same score maps (B, C, h, w) whatever it is given."""

    def __init__(self, score_maps: Tensor) -> None:
        super().__init__()
        self.scale, self.score_maps = nn.Parameter(torch.ones(())), score_maps

    def forward(self, images: Tensor) -> CAMOutput:
        score_maps = self.scale * self.score_maps
        return CAMOutput(score_maps.mean((-2, -1)), score_maps)


CPU = Process(torch.device("cpu"), 0, 1)


def one_step(stage, run, settings, *options):
    """The loss of a step of `learn`."""
    optimizer = torch.optim.SGD([{"params": run.network.parameters(), "multiplier": 1.0}], lr=0)
    stage.learn(run, None, run.network, optimizer, *options)
    return run.log.noted[-1]["loss"].item()


@pytest.mark.parametrize(("pooling", "accepted"), [("average", 0), ("topk", 1), ("max", 1)])
def test_loss_and_gate_see_the_pooled_scores(tmp_path, pooling, accepted):
    score_maps = torch.full((1, 2, 4, 4), -1.0)
    score_maps[0, 1] = 0  # the class that is not shown is higher on average
    score_maps[0, 0, 0, :3] = 3  # the one that is shown at its peak
    settings = replace_checked(recipes.SMALL.attention, {"pooling": pooling})
    kept = {
        fusion: AttentionAccumulator([[1, 0]], (4, 4), fusion=fusion, keys=["a"]) for fusion in train_attention.FUSIONS
    }
    part = Part(["a"], [View()], torch.zeros(1, 3, 8, 8), torch.tensor([[1.0, 0.0]]))
    run = GivenRun(tmp_path, [[part]], Shows(score_maps), settings, process=CPU, images=1)
    loss = one_step(train_attention, run, settings, kept, NOTHING, Diagnosis(kept))
    assert [accumulator.accepted for accumulator in kept.values()] == [accepted] * 3
    logits = train_attention.pooled(run.network(part.images), pooling)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, part.targets)
    assert loss == pytest.approx(expected.item() / settings.batch_size)


@pytest.mark.parametrize("loss", ["hybrid", "mce"])
@pytest.mark.parametrize("constrain_below", ["threshold", "mean"])
def test_the_integral_model_is_trained_on_what_is_above_the_mean(tmp_path, constrain_below, loss):
    changes = {"constrain_below": constrain_below, "threshold": 0.1, "loss": loss}
    settings = replace_checked(recipes.PAPER.integral, changes)
    attention = torch.tensor([[0.05, 0.2, 0.3, 1.0]])  # the mean is 0.3875
    accumulator = AttentionAccumulator([[1]], (1, 4), gate=None, keys=["a"])
    accumulator.update(["a"], attention[None, None])
    part = Part(["a"], [View()], torch.zeros(1, 3, 8, 8), torch.ones(1, 1))
    network = Shows(torch.tensor([[[[-1.0, 0.5, 2.0, 1.0]]]]))
    run = GivenRun(tmp_path, [[part]], network, settings, process=CPU, images=1)
    found = one_step(train_integral, run, settings, accumulator)
    level = 0.1 if constrain_below == "threshold" else 0.39
    p = [value if value > level else 0 for value in accumulator.attention("a").flatten().tolist()]
    q = [1 / (1 + math.exp(-score)) for score in (-1.0, 0.5, 2.0, 1.0)]
    if loss == "mce":
        terms = [-a * math.log(b) - (1 - a) * math.log(1 - b) for a, b in zip(p, q, strict=True)]
        expected = sum(terms) / 4
    else:
        high = [-a * math.log(b) for a, b in zip(p, q, strict=True) if a]
        low = [-math.log(1 - b) for a, b in zip(p, q, strict=True) if not a]
        expected = sum(high) / len(high) + sum(low) / len(low)
    assert found == pytest.approx(expected / settings.batch_size, rel=1e-5)
    assert run.log.noted[-1]["share_constrained"].tolist() == [sum(not a for a in p) / 4]


def test_what_is_not_above_the_mean_of_its_map_is_constrained():
    soft_labels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    soft_labels[0, 1] = 0  # a class that the image does not show
    soft_labels[1, 2] = 1  # no cell is above the mean
    found = train_integral.above_mean(soft_labels)
    for image in range(2):
        for c in range(3):
            cells = soft_labels[image, c].flatten().tolist()
            mean = sum(cells) / len(cells)
            expected = [cell if cell > mean else 0 for cell in cells]
            assert found[image, c].flatten().tolist() == pytest.approx(expected)
    assert not found[0, 1].any()
    assert not found[1, 2].any()


def test_a_row_of_the_log_is_the_mean_of_all_that_its_steps_noted(tmp_path):
    log = Log(tmp_path / "log.csv", 10)
    log.note(loss=torch.tensor(1.0), share=torch.tensor([0.5, 0.25, 0.0]))
    log.note(loss=3, share=torch.tensor([1.0]))
    log.note(loss=torch.tensor(5.0), share=torch.zeros(0))  # a step with nothing but negatives, at the end
    row = log.row(3)
    assert (row["loss"], row["share"]) == (3, 1.75 / 4)
    log.write(row)
    log.note(loss=torch.tensor(math.nan), share=torch.zeros(0))
    row = log.row(4)
    log.write(row)
    assert math.isnan(row["loss"])  # a loss that has diverged stays visible
    head, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [len(each.split(",")) for each in rows] == 2 * [len(head.split(","))]
    assert rows[1].split(",")[head.split(",").index("share")] == "nan"


precisions = pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
backbones = pytest.mark.parametrize("backbone", ["vgg16", "resnet101"])


def on_the_gpu(network: Network) -> Network:
    """`Process.wrap`, which cannot turn fake parameters."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def photographs(network: Network, short_side: int) -> tuple[list[tuple[int, int]], list[Part]]:
    """The networks' sizes of a batch, and its parts; mirrored and not, the fifth image shows nothing."""
    sizes = [network_size(size, short_side, network.geometry) for size in SIZES]
    parts = []
    for size in dict.fromkeys(sizes):
        rows = [row for row in range(5) if sizes[row] == size]
        views = [View(flip=row % 2 == 1) for row in rows]
        images = torch.empty(len(rows), 3, *size)
        parts.append(Part([f"2007_{row:06}" for row in rows], views, images, torch.empty(len(rows), CLASSES)))
    return sizes, parts


def accumulators(network: Network, sizes: list[tuple[int, int]], settings: recipes.Attention, device: str):
    """Those of stage 1 for a data set as large as VOC's."""
    labels = np.zeros((IMAGES, CLASSES), dtype=np.float32)
    labels[np.arange(IMAGES), np.arange(IMAGES) % CLASSES] = 1
    labels[np.arange(PAIRS - IMAGES), np.arange(PAIRS - IMAGES) % CLASSES - 1] = 1
    labels[4] = 0
    map_sizes = [[network.geometry.cells(side) for side in sizes[row % 5]] for row in range(IMAGES)]
    return {
        fusion: AttentionAccumulator(
            labels,
            map_sizes,
            fusion=fusion,
            gate=settings.gate,
            keys=[f"2007_{row:06}" for row in range(IMAGES)],
            device=device,
        )
        for fusion in train_attention.FUSIONS
    }


def check_step(network: Network, settings, step, told, record_property) -> int:
    """Run a step, under whose end everything is on the GPU, and print its memory; returns the transfers to the host.

    Args:
        network: fake, on the GPU.
        settings: of the stage.
        step: takes the optimiser, returns the loss.
        told: what is printed beside the memory.
        record_property: of pytest.
    """
    optimizer = make_optimizer(network, settings)
    before = [parameter._version for parameter in network.parameters() if parameter.requires_grad]
    losses = []

    def loss_of(_: Network) -> Tensor:
        losses.append(step(optimizer))
        return losses[-1]

    with Transfers() as transfers:
        memory = training_memory(network, loss_of, settings)  # of all parts together: more than is held at once
    assert [(loss.device.type, loss.dtype, loss.shape) for loss in losses] == [("cuda", torch.float32, ())]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(now._version > version for now, version in zip(trained, before, strict=True))
    assert len(optimizer.state) == len(trained)
    assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"cuda"}
    assert [group["lr"] for group in optimizer.param_groups] == [
        rate(settings, 0) * group["multiplier"] for group in optimizer.param_groups
    ]
    gib = {name: f"{count / 2**30:.2f}" for name, count in memory.items()}
    record_property("memory in GiB", gib)
    print(*told, gib)
    assert sum(memory.values()) < 16 * 2**30
    return transfers.count


def fake_network(build, backbone: str, classes: int) -> Network:
    with torch.device("cuda"):
        return on_the_gpu(build(backbone, classes, weights="none"))


@precisions
@pytest.mark.parametrize(
    ("backbone", "maps", "drop"),
    [("vgg16", "cpu", 0), ("vgg16", "cuda", 0), ("vgg16", "cpu", 0.5), ("vgg16", "cuda", 0.5), ("resnet101", "cpu", 0)],
)
def test_stage_1(without_gpu, tmp_path, backbone, maps, drop, amp, record_property):
    settings = recipes.for_backbone(recipes.PAPER, backbone).attention
    settings = replace_checked(settings, {"drop": drop})
    with FakeTensorMode():
        network = fake_network(build_network, backbone, CLASSES).train()
        sizes, batch = photographs(network, settings.short_side)
        kept = accumulators(network, sizes, settings, maps)
        run, diagnosis = GivenRun(tmp_path, [batch], network, settings, amp=amp), Diagnosis(kept)

        def step(optimizer):
            train_attention.learn(run, None, network, optimizer, kept, NOTHING, diagnosis)
            return run.log.noted[-1]["loss"]

        values = [value for accumulator in kept.values() for value in accumulator.state_dict().values()]
        size = sum(value.nbytes for value in values if isinstance(value, Tensor)) / 2**30
        told = ("attention", backbone, "bfloat16" if amp else "float32", f"maps on {maps} {size:.2f} GiB")
        transfers = check_step(network, settings, step, told, record_property)
    # maps on the host, as the script has them: each fusion takes three tensors of each of the three parts with labels
    assert transfers == (0 if maps == "cuda" else 3 * 3 * 3)
    assert kept["max"].offered == kept["mean"].offered == 8  # pairs of the four images that show something


def test_the_drop_hides_what_the_network_looked_at_last_in_the_frame_it_is_shown(tmp_path):
    """A network that looks at the left half of the upright image: the second time that half is 0, mirrored or not."""

    class LooksLeft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.shown: list[Tensor] = []

        def forward(self, images: Tensor) -> CAMOutput:
            self.shown.append(images)
            score_maps = self.scale * torch.tensor([1.0, 0]).repeat_interleave(4).expand(2, 2, 8, 8)
            score_maps = torch.stack([score_maps[0], score_maps[1].flip(-1)])  # the second image is shown mirrored
            return CAMOutput(score_maps.mean((-2, -1)), score_maps)

    settings = replace_checked(recipes.SMALL.attention, {"drop": 1.0})
    options = {"gate": None, "keys": ["a", "b"]}
    kept = {
        fusion: AttentionAccumulator([[1, 0], [0, 1]], (8, 8), fusion=fusion, **options)
        for fusion in train_attention.FUSIONS
    }
    process, network = Process(torch.device("cpu"), 0, 1), LooksLeft()
    views = [View(), View(flip=True)]
    batch = [Part(["a", "b"], views, torch.ones(2, 3, 16, 16), torch.eye(2))]
    optimizer = torch.optim.SGD([{"params": network.parameters(), "multiplier": 1.0}], lr=0.1)
    run = GivenRun(tmp_path, [batch, batch], network, settings, process=process, images=2)
    train_attention.learn(run, None, network, optimizer, kept, NOTHING, Diagnosis(kept))
    first, second = network.shown
    assert (first == 1).all()
    left = torch.tensor([0.0, 1]).repeat_interleave(8).expand(3, 16, 16)
    assert torch.equal(second, torch.stack([left, left.flip(-1)]))
    assert (batch[0].images == 1).all()


def test_wandering_is_the_average_over_the_maps_that_followed_another():
    wandering = Wandering()
    empty, left, right, both = (torch.tensor([[values]]) for values in ([0.0, 0], [1.0, 0], [0, 1.0], [1.0, 1]))
    assert np.isnan(wandering.take())
    before = torch.stack([torch.stack([empty, left]), torch.stack([left, both])]).squeeze(3)
    after = torch.stack([torch.stack([left, right]), torch.stack([both, both])]).squeeze(3)
    wandering.add(before, after)  # a first map, another (cosine 0), one half as wide (0.71), and one that stayed
    assert wandering.take() == pytest.approx(0.5**0.5 / 2)
    wandering.add(left.expand(1, 1, 1, 2), both.expand(1, 1, 1, 2))
    wandering.add(left.expand(1, 1, 1, 2), right.expand(1, 1, 1, 2))
    assert wandering.take() == pytest.approx(0.5**0.5 / 2)


@precisions
@pytest.mark.parametrize(("backbone", "loss"), [("vgg16", "hybrid"), ("vgg16", "mce"), ("resnet101", "hybrid")])
def test_stage_2(without_gpu, tmp_path, backbone, loss, amp, record_property):
    settings = replace_checked(recipes.for_backbone(recipes.PAPER, backbone).integral, {"loss": loss})
    with FakeTensorMode():
        network = fake_network(build_network, backbone, CLASSES).train()
        sizes, batch = photographs(network, settings.short_side)
        attention = recipes.PAPER.attention
        kept = accumulators(network, sizes, attention, "cpu")["max"]

        run = GivenRun(tmp_path, [batch], network, settings, amp=amp)

        def step(optimizer):
            train_integral.learn(run, None, network, optimizer, kept)
            share = run.log.noted[-1]["share_constrained"]
            assert (share.device.type, share.ndim) == ("cpu", 1)
            return run.log.noted[-1]["loss"]

        told = ("integral", loss, backbone, "bfloat16" if amp else "float32")
        assert check_step(network, settings, step, told, record_property) == 0


@precisions
@backbones
def test_stage_4(without_gpu, tmp_path, backbone, amp, record_property):
    settings = recipes.for_backbone(recipes.PAPER, backbone).segmentation
    with FakeTensorMode():
        network = fake_network(build_segmentation_network, backbone, CLASSES + 1).train()
        crop, number = (settings.crop, settings.crop), settings.batch_size
        labels = torch.empty(number, *crop, dtype=torch.long)
        part = Part(["name"] * number, [View()] * number, torch.empty(number, 3, *crop), labels)

        run = GivenRun(tmp_path, [[part]], network, settings, amp=amp)

        def step(optimizer):
            train_segmentation.learn(run, None, network, optimizer, align_corners=network.geometry.centred)
            return run.log.noted[-1]["loss"]

        told = ("segmentation", backbone, "bfloat16" if amp else "float32")
        assert check_step(network, settings, step, told, record_property) == 0


class Waits(nn.Module):
    """A network that looks at what it computes."""

    def __init__(self, network: Network, look) -> None:
        super().__init__()
        self.network, self.look = network, look

    def forward(self, images: Tensor):
        out = self.network(images)
        self.look(out.logits)
        return out


@pytest.mark.parametrize(
    ("look", "error"),
    [
        (lambda logits: logits.sum().item(), DataDependentOutputException),
        (lambda logits: logits.nonzero(), DynamicOutputShapeException),
        (lambda logits: logits + torch.empty(CLASSES), RuntimeError),
    ],
    ids=["item", "nonzero", "two devices"],
)
def test_a_step_that_waited_or_mixed_devices_would_be_seen(without_gpu, tmp_path, look, error):
    settings = recipes.PAPER.attention
    with FakeTensorMode():
        network = fake_network(build_network, "vgg16", CLASSES)
        optimizer = make_optimizer(network, settings)
        sizes, batch = photographs(network, settings.short_side)
        kept, waits = accumulators(network, sizes, settings, "cpu"), Waits(network, look)
        run, diagnosis = GivenRun(tmp_path, [batch], waits, settings), Diagnosis(kept)
        with pytest.raises(error):
            train_attention.learn(run, None, waits, optimizer, kept, NOTHING, diagnosis)


@backbones
def test_attention_of_a_photograph_stays_on_the_gpu_until_it_is_written(backbone):
    with FakeTensorMode(allow_non_fake_inputs=True), Transfers() as transfers:
        network = fake_network(build_network, backbone, CLASSES).eval()
        folder = SimpleNamespace(photograph=lambda _: Image.new("RGB", (500, 375)))
        images = SimpleNamespace(folder=folder, sizes={"a": network_size((375, 500), 224, network.geometry)})
        for scale, flip, class_ids, read_out in ((1.0, False, [3, 14], "relu"), (0.5, True, [], "sigmoid")):
            attention = export_attention.one_view(network, images, "a", class_ids, scale, flip, read_out)
            attention = export_attention.resize(attention, (375, 500), network)
            assert (attention.device.type, attention.dtype) == ("cuda", torch.float32)
            assert attention.shape == (len(class_ids), 375, 500)
    assert transfers.count == 0


@backbones
def test_the_segmentation_of_a_photograph_stays_on_the_gpu_until_it_is_written(backbone):
    settings = recipes.for_backbone(recipes.PAPER, backbone).evaluation  # ResNet-101 has windows
    settings = replace_checked(settings, {"test_scales": (0.5, 1.25), "test_flip": backbone == "vgg16"})
    with FakeTensorMode(allow_non_fake_inputs=True), Transfers() as transfers:
        network = fake_network(build_segmentation_network, backbone, CLASSES + 1).eval()
        scores = probabilities(network, Image.new("RGB", (500, 375)), settings)
    assert (scores.device.type, scores.dtype, scores.shape) == ("cuda", torch.float32, (21, 375, 500))
    assert transfers.count == 0
