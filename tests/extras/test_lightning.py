"""The callback in real training runs of Lightning, against the same run as a plain loop."""

import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from typing import Any

import lightning.pytorch as lightning
import pytest
import test_arguments
import torch
from test_examples import EXAMPLES, run  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from oaa_lib import AttentionAccumulator, CAMHead, CAMOutput, View, wrap_classifier
from oaa_lib.lightning import AttentionCallback

IMAGES, CLASSES = 6, 3
LABELS = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]])


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(row))
        return {
            "image": image,
            "label": LABELS[row].float(),
            "name": f"image {row}",
            "row": row,
            "view": View(flip=True),
        }


class Classifier(lightning.LightningModule):
    """A training run as people have it; the network is any that returns `CAMOutput`."""

    def __init__(self, network: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.network, self.calls = network, calls

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        losses = [
            F.binary_cross_entropy_with_logits(self.network(batch["image"]).logits, batch["label"])
            for _ in range(self.calls)
        ]
        return torch.stack(losses).sum() if losses else self.network.weight.sum()

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.network(batch["image"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), CAMHead(8, CLASSES, hidden_channels=8, num_convs=1)
    )


def classifier() -> nn.Module:
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return wrap_classifier(nn.Sequential(*features, nn.Linear(8, CLASSES)))


def accumulator(**options: Any) -> AttentionAccumulator:
    return AttentionAccumulator(LABELS, (8, 8), keys=[f"image {row}" for row in range(IMAGES)], **options)


def fit(module: nn.Module, callbacks: list[Any], epochs: int, root: Any, resume: Any = None, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, lightning.callbacks.ModelCheckpoint) for callback in callbacks),
        **options,
    )
    loader = DataLoader(Data(), batch_size=4)
    trainer.fit(module, loader, DataLoader(Data(), batch_size=4), ckpt_path=resume)
    return trainer


def plain_loop(network: nn.Module, kept: AttentionAccumulator, epochs: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(epochs):
        for batch in DataLoader(Data(), batch_size=4):
            out = network(batch["image"])
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(out.logits, batch["label"]).backward()
            optimizer.step()
            kept.update(batch["name"], out.score_maps.detach(), out.logits.detach())


def assert_same(one: AttentionAccumulator, other: AttentionAccumulator) -> None:
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one[range(IMAGES)], other[range(IMAGES)])
    assert one.offered == other.offered


@pytest.mark.parametrize("make", [network, classifier])
def test_a_run_of_lightning_accumulates_like_the_plain_loop(make, tmp_path):
    """Both fusions at once; validation between the epochs accumulates nothing, and no hook stays."""
    kept = {fusion: accumulator(fusion=fusion) for fusion in ("max", "mean")}
    module = Classifier(make())
    callbacks = [AttentionCallback(each, module.network, indices=lambda batch: batch["name"]) for each in kept.values()]
    fit(module, callbacks, 3, tmp_path)
    for fusion, each in kept.items():
        expected = accumulator(fusion=fusion)
        plain_loop(make(), expected, 3)
        assert 0 < each.accepted < each.offered == 3 * int(LABELS.sum())
        assert_same(each, expected)
    assert not module.network._forward_hooks


def test_rows_and_views_of_a_batch(tmp_path):
    module, kept, expected = Classifier(network()), accumulator(gate=None), accumulator(gate=None)
    callback = AttentionCallback(kept, module.network, lambda batch: batch["row"], lambda batch: batch["view"])
    fit(module, [callback], 1, tmp_path)
    plain_loop(network(), expected, 1)
    assert torch.equal(kept[range(IMAGES)], expected[range(IMAGES)].flip(-1))


def test_a_run_that_goes_on_from_a_checkpoint_goes_on_with_its_maps(tmp_path):
    whole, parts = accumulator(fusion="mean"), accumulator(fusion="mean")
    module = Classifier(network())
    fit(module, [AttentionCallback(whole, module.network, lambda batch: batch["name"])], 4, tmp_path)
    for epochs, resume in ((2, None), (4, tmp_path / "last.ckpt")):
        module = Classifier(network())
        parts.reset()
        callback = AttentionCallback(parts, module.network, lambda batch: batch["name"])
        saver = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0)
        fit(module, [callback, saver], epochs, tmp_path, resume)
    assert_same(parts, whole)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_step_that_does_not_call_the_network_once_is_refused(calls, tmp_path):
    module = Classifier(network(), calls)
    module.network.weight = nn.Parameter(torch.zeros(1))
    callback = AttentionCallback(accumulator(), module.network, lambda batch: batch["name"])
    with pytest.raises(RuntimeError, match=f"once, got {calls} calls"):
        fit(module, [callback], 1, tmp_path)
    assert not module.network._forward_hooks


def test_a_network_without_score_maps_is_refused_and_no_hook_stays(tmp_path):
    module = Classifier(network())
    callback = AttentionCallback(accumulator(), module.network[0], lambda batch: batch["name"])
    with pytest.raises(TypeError, match=r"expected a network that returns CAMOutput, got Tensor; wrap_classifier it"):
        fit(module, [callback], 1, tmp_path)
    assert not module.network[0]._forward_hooks
    with pytest.raises(TypeError, match="expected an AttentionAccumulator and a module, got Sequential and"):
        AttentionCallback(module.network, accumulator(), lambda batch: batch["name"])


class Skipping(Classifier):
    """Skips the rest of an epoch at some batches, as Lightning lets a module do."""

    def __init__(self, network: nn.Module, at: set[tuple[int, int]]) -> None:
        super().__init__(network)
        self.at = at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if (self.current_epoch, batch_idx) in self.at else None


@pytest.fixture
def assert_nothing_is_left():
    """Neither a hook on the network nor what it returned in a step."""

    def outputs() -> set[int]:
        return {id(kept) for kept in gc.get_objects() if type(kept) is CAMOutput}

    before = outputs()

    def check(network: nn.Module) -> None:
        assert not any(module._forward_hooks for module in network.modules())
        assert not outputs() - before

    return check


def test_an_epoch_that_is_skipped_leaves_nothing_behind(tmp_path, assert_nothing_is_left):
    """Validation follows, and epochs that are not skipped."""
    module, kept = Skipping(network(), {(0, 0), (1, 1), (3, 1)}), accumulator(gate=None)
    fit(module, [AttentionCallback(kept, module.network, lambda batch: batch["name"])], 4, tmp_path)
    times = [3, 3, 3, 3, 1, 1]  # the first batch has four images, the second two
    assert kept.counts.sum(1).tolist() == [n * int(labels.sum()) for n, labels in zip(times, LABELS, strict=True)]
    assert_nothing_is_left(module.network)


class Failing(lightning.Callback):
    """Raises where it is asked to, in the second batch."""

    def __init__(self, where: str, error: BaseException) -> None:
        def fail(trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step >= 1:
                raise error

        setattr(self, where, fail)


@pytest.fixture
def signals():
    """Lightning ignores Ctrl-C once it has come, and would go on to for all tests after."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("error", [ZeroDivisionError("failed"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize(
    "where", ["on_train_batch_start", "on_before_zero_grad", "on_after_backward", "on_validation_start"]
)
@pytest.mark.parametrize("first", [True, False], ids=["before us", "after us"])
def test_an_epoch_that_fails_leaves_nothing_behind(where, error, first, tmp_path, assert_nothing_is_left):
    module, kept = Classifier(network()), accumulator(gate=None)
    callback = AttentionCallback(kept, module.network, lambda batch: batch["name"])
    failing = Failing(where, error)
    with pytest.raises((type(error), SystemExit)):
        fit(module, [failing, callback] if first else [callback, failing], 1, tmp_path)
    assert_nothing_is_left(module.network)
    seen = kept.accepted
    assert seen == int(LABELS.sum() if where == "on_validation_start" else LABELS[:4].sum())
    fit(module, [callback], 1, tmp_path)  # the same callback, once more
    assert kept.accepted == seen + int(LABELS.sum())
    assert_nothing_is_left(module.network)


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"limit_train_batches": 1}, {"fast_dev_run": 1}], ids=str)
def test_an_epoch_that_is_stopped_leaves_nothing_behind(options, tmp_path, assert_nothing_is_left):
    module, kept = Classifier(network()), accumulator(gate=None)
    fit(module, [AttentionCallback(kept, module.network, lambda batch: batch["name"])], 1, tmp_path, **options)
    assert kept.accepted == int(LABELS[:4].sum())
    assert_nothing_is_left(module.network)


@pytest.mark.parametrize(("name", "given"), [("indices", None), ("indices", [0, 1]), ("views", 3)])
def test_indices_and_views_are_functions(name, given):
    functions = {"indices": lambda batch: batch["name"], name: given}
    with pytest.raises(TypeError, match=f"expected {name} as a function of a batch, got"):
        AttentionCallback(accumulator(), network(), **functions)


def launch(tmp_path: Any, script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a script that trains; Lightning starts it once more for each further process. ``folder`` is `tmp_path`."""
    head = """
        import os, sys
        from test_lightning import *
        folder, rank = sys.argv[1], int(os.environ.get("LOCAL_RANK", 0))
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(head) + textwrap.dedent(script))
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", tmp_path / "train.py", tmp_path, *arguments]
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def in_checkpoint(path: Any, **options: Any) -> AttentionAccumulator:
    """The maps that a checkpoint holds."""
    saved = torch.load(path, weights_only=True)["callbacks"]
    restored = accumulator(**options)
    restored.load_state_dict(next(state for state in saved.values() if "maps" in state))
    return restored


@pytest.mark.slow
def test_two_processes_end_with_the_maps_of_both(tmp_path):
    """Lightning's own sampler shares the images out; each process saves what it holds in the end."""
    script = """
        kept, module = accumulator(gate=None), Classifier(network())
        callback = AttentionCallback(kept, module.network, lambda batch: batch["name"])
        saver = lightning.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0)
        fit(module, [callback, saver], 2, folder, strategy="ddp", devices=2)
        kept.save(f"{folder}/{rank}.safetensors")
    """
    result = launch(tmp_path, script)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (AttentionAccumulator.load(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    assert first.counts.sum(1).tolist() == (2 * LABELS.sum(1)).tolist()
    assert_same(in_checkpoint(tmp_path / "last.ckpt", gate=None), first)


@pytest.mark.slow
def test_a_run_that_goes_on_with_more_or_fewer_processes_counts_each_map_once(tmp_path):
    """One epoch on one process, one on two, one on one, one on two."""
    script = """
        epoch, devices = int(sys.argv[2]), int(sys.argv[3])
        module, kept = Classifier(network()), [accumulator(gate=None, fusion=fusion) for fusion in ("max", "mean")]
        callbacks = [AttentionCallback(each, module.network, lambda batch: batch["name"]) for each in kept]
        saver = lightning.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0)
        options = {"strategy": "ddp", "devices": 2} if devices == 2 else {"devices": 1}
        fit(module, [*callbacks, saver], epoch, folder, f"{folder}/last.ckpt" if epoch > 1 else None, **options)
        for each in kept:
            each.save(f"{folder}/{each.fusion.label}-{rank}")
    """
    for epoch, devices in ((1, 1), (2, 2), (3, 1), (4, 2)):
        result = launch(tmp_path, script, epoch, devices)
        assert result.returncode == 0, result.stderr[-3000:]
        for fusion in ("max", "mean"):
            for rank in range(devices):
                found = AttentionAccumulator.load(tmp_path / f"{fusion}-{rank}")
                assert found.counts.sum(1).tolist() == (epoch * LABELS.sum(1)).tolist(), (epoch, fusion, rank)
                assert found.offered == epoch * int(LABELS.sum())


STRATEGIES = [("ddp_spawn", 1), ("ddp_spawn", 2), ("ddp_fork", 2), ("ddp_notebook", 2)]


@pytest.mark.parametrize(("strategy", "devices"), STRATEGIES)
def test_processes_whose_maps_would_not_come_back_are_refused(strategy, devices):
    trainer = lightning.Trainer(accelerator="cpu", strategy=strategy, devices=devices, logger=False)
    callback = AttentionCallback(accumulator(), network(), lambda batch: batch["name"])
    with pytest.raises(ValueError, match="no map comes back from there to this accumulator; use strategy='ddp'"):
        callback.setup(trainer, Classifier(callback.network), "fit")
    callback.setup(trainer, Classifier(callback.network), "validate")  # which accumulates nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "strategy", "sentence"),
    [
        ("max", "ddp_fork", "use strategy='ddp'"),
        ("noisy-or", "ddp", "2 processes, got 'noisy-or'; use another, or one process"),
        ("ema", "ddp", "2 processes, got 'ema(momentum=0.9)'; use another, or one process"),
    ],
)
def test_what_could_not_end_well_with_two_processes_does_not_begin(fusion, strategy, sentence, tmp_path):
    script = """
        module = Classifier(network())
        module.training_step = lambda batch: print("a step")
        callback = AttentionCallback(accumulator(fusion=sys.argv[2]), module.network, lambda batch: batch["name"])
        fit(module, [callback], 1, folder, strategy=sys.argv[3], devices=2)
    """
    result = launch(tmp_path, script, fusion, strategy)
    assert result.returncode
    assert sentence in result.stderr
    assert "a step" not in result.stdout


@pytest.mark.slow
def test_a_process_that_fails_writes_a_checkpoint_with_what_it_has_seen(tmp_path):
    """The first one fails in the second epoch; the other one is at work then, and answers nothing."""
    script = """
        class Strategy(lightning.strategies.DDPStrategy):
            def barrier(self, name=None):  # Lightning waits here, once the checkpoint is written, for ever
                if name != "Trainer.save_checkpoint" or not failing.failed:
                    super().barrier(name)

        class Fails(lightning.Callback):
            failed = False
            def on_train_batch_end(self, trainer, *rest):
                if rank == 0 and trainer.current_epoch == 1:
                    self.failed = True
                    raise ZeroDivisionError

        kept, module, failing = accumulator(gate=None, fusion="mean"), Classifier(network()), Fails()
        callback = AttentionCallback(kept, module.network, lambda batch: batch["name"])
        each_epoch = lightning.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1)
        saver = lightning.callbacks.OnExceptionCheckpoint(folder)
        fit(module, [saver, each_epoch, callback, failing], 2, folder, strategy=Strategy(), devices=2)
    """
    result = launch(tmp_path, script)
    assert "ZeroDivisionError" in result.stderr
    found = in_checkpoint(tmp_path / "on_exception.ckpt", gate=None, fusion="mean")
    in_second_epoch = found.counts.sum(1) - LABELS.sum(1)  # in the first one each image was seen by one of them
    assert 0 < in_second_epoch.sum() < LABELS.sum()
    assert all(seen in (0, all_of_it) for seen, all_of_it in zip(in_second_epoch, LABELS.sum(1), strict=True))


def test_names_tell_callbacks_of_one_fusion_apart_in_a_checkpoint(tmp_path):
    names = {"by score": "score", "by rank": "topk", "": None}

    def callbacks(module: nn.Module) -> list[AttentionCallback]:
        kept = {name: accumulator(gate=gate) for name, gate in names.items()}
        return [AttentionCallback(a, module.network, lambda b: b["name"], name=name) for name, a in kept.items()]

    module = Classifier(network())
    first, second = callbacks(module), callbacks(module)
    saver = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0)
    fit(module, [*first, saver], 1, tmp_path)
    fit(module, second, 1, tmp_path, tmp_path / "last.ckpt")  # all of it has been trained
    for one, other in zip(first, second, strict=True):
        assert_same(one.accumulator, other.accumulator)
    accepted = [callback.accumulator.accepted for callback in first]
    assert len(set(accepted)) == 3
    assert first[2].state_key == "AttentionCallback{'fusion': 'max'}"  # as in checkpoints from before there were names
    with pytest.raises(TypeError, match="expected name as a string, got int"):
        AttentionCallback(accumulator(), module.network, lambda batch: batch["name"], name=1)


def test_views_of_a_batch_as_a_tensor(tmp_path):
    flipped = torch.tensor([[0.0, 0, 1, 1, 1]])
    module, kept, expected = Classifier(network()), accumulator(gate=None), accumulator(gate=None)
    views = lambda batch: flipped.expand(len(batch["row"]), 5)  # noqa: E731
    fit(module, [AttentionCallback(kept, module.network, lambda batch: batch["row"], views)], 1, tmp_path)
    plain_loop(network(), expected, 1)
    assert torch.equal(kept[range(IMAGES)], expected[range(IMAGES)].flip(-1))


def test_an_argument_of_the_callback_works_or_the_error_names_it():
    right = {"accumulator": test_arguments.accumulator(), "network": test_arguments.Network(), "indices": len}
    assert test_arguments.faults_of("AttentionCallback", AttentionCallback, {**right, "views": None, "name": "a"}) == []


@pytest.mark.slow
def test_the_example_accumulates_every_epoch_and_keeps_a_checkpoint_with_the_maps(run, tmp_path):
    options = ["--images", 20, "--size", 64, "--epochs", 2, "--out", tmp_path]
    done = run("with_lightning.py", *options).splitlines()[-1].split()
    _, labels, _ = runpy.run_path(str(EXAMPLES / "quickstart.py"))["draw_data"](20, 0)
    assert done[0] == "done:"
    assert int(done[3]) == 2 * int(labels.sum())
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    (state,) = (s for s in torch.load(checkpoint, weights_only=True)["callbacks"].values() if "maps" in s)
    assert int(state["counts"].sum()) == int(done[1])
