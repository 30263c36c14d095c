"""Online attention accumulation in a training run of Lightning (extra ``lightning``)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oaa_lib.accumulator import AttentionAccumulator
from oaa_lib.cam import CAMOutput
from oaa_lib.cumulative import Indices
from oaa_lib.fusion import adapt, fusion_name
from oaa_lib.views import View, Views


class AttentionCallback(Callback):
    """Accumulates the attention of every training step, and keeps it in Lightning's checkpoints.

    It takes what the network returned in the step, so nothing is computed twice. Steps of validation and test are left
    alone. With several processes the maps are synchronised whenever a checkpoint is made and when training ends. A run
    that goes on from a checkpoint (``fit(..., ckpt_path=)``) goes on with its maps, on as many processes as you like. A
    step that does not end, since the epoch is skipped or something fails, accumulates nothing and leaves nothing on the
    network. A checkpoint that a process writes because it fails has that process's maps, see `state_dict`.

    Processes must be started as scripts (``strategy="ddp"``, not ``"ddp_spawn"``, ``"ddp_fork"`` or
    ``"ddp_notebook"``), and for several the fusion must have a ``reduction``: ``"max"``, ``"mean"``, ``"latest"``.

    Args:
        accumulator: of the training images; a file at ``path=`` is for one process alone.
        network: the part of the `LightningModule` that returns `CAMOutput`: a wrapped classifier, a `CAMHead`, or a
            model that ends in one. ``training_step`` calls it once.
        indices: takes a batch as the data loader made it (on the module's device by then) and returns its images' rows
            or names, see `AttentionAccumulator.update`. A tensor of rows is brought to the host, which waits for the
            device; names do not.
        views: likewise their views. None: the whole images, not flipped.
        name: tells the maps of several callbacks apart in a checkpoint. Those whose fusions differ need none; where two
            have one fusion and, say, different gates, Lightning asks for different state keys: give each a name.

    Raises:
        TypeError: no accumulator, module, functions or string; while training, if the network returns something else.
        RuntimeError: while training, if the network was not called in a step, or twice.
        ValueError: when training begins, if the strategy or the fusion is not for this, see above.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from oaa_lib import AttentionAccumulator, CAMHead
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4, padding=1), CAMHead(8, 2))
        ...     def training_step(self, batch):
        ...         images, labels, rows = batch
        ...         return torch.nn.functional.binary_cross_entropy_with_logits(self.network(images).logits, labels)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model, labels = Classifier(), torch.eye(2)
        >>> accumulator = AttentionAccumulator(labels, map_size=(8, 8), gate=None)
        >>> callback = AttentionCallback(accumulator, model.network, indices=lambda batch: batch[2])
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(max_epochs=2, callbacks=[callback], enable_checkpointing=False, **quiet)
        >>> loader = torch.utils.data.DataLoader([(torch.rand(3, 32, 32), labels[row], row) for row in (0, 1)])
        >>> trainer.fit(model, loader)
        >>> accumulator.accepted
        4

    Source: paper, section 3.2.
    """

    def __init__(
        self,
        accumulator: AttentionAccumulator,
        network: nn.Module,
        indices: Callable[[Any], Indices],
        views: Callable[[Any], Views] | None = None,
        *,
        name: str = "",
    ) -> None:
        if not isinstance(accumulator, AttentionAccumulator) or not isinstance(network, nn.Module):
            raise TypeError(
                "expected an AttentionAccumulator and a module, got "
                f"{type(accumulator).__name__} and {type(network).__name__} as accumulator and network"
            )
        for argument, given in (("indices", indices), ("views", views)):
            if not callable(given) and (given is not None or argument == "indices"):
                raise TypeError(f"expected {argument} as a function of a batch, got {type(given).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"expected name as a string, got {type(name).__name__}")
        self.accumulator, self.network, self.indices, self.views = accumulator, network, indices, views
        self.name = name
        self._outputs: list[CAMOutput] = []
        self._hook: RemovableHandle | None = None
        self._failed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse at once what would lose maps at the end."""
        if stage != "fit":
            return
        self._failed = False
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "expected a strategy whose processes run the whole script, got one that spawns or forks them: no map "
                "comes back from there to this accumulator; use strategy='ddp'"
            )
        fusion = adapt(self.accumulator.fusion)
        if trainer.world_size > 1 and (fusion.reduction is None or fusion.refusal is not None):
            raise ValueError(
                "expected a fusion that can be synchronised again and again, such as 'max', 'mean' or 'latest', for "
                f"{trainer.world_size} processes, got {fusion.name!r}; use another, or one process"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the network."""
        self._stop()
        self._hook = self.network.register_forward_hook(self._listen)

    def _listen(self, network: nn.Module, given: Any, output: Any) -> None:
        if not isinstance(output, CAMOutput):
            raise TypeError(
                f"expected a network that returns CAMOutput, got {type(output).__name__}; wrap_classifier it"
            )
        self._outputs.append(CAMOutput(output.logits.detach(), output.score_maps.detach()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Accumulate."""
        returned = self._stop()
        if len(returned) != 1:
            raise RuntimeError(f"expected training_step to call the network once, got {len(returned)} calls")
        (output,) = returned
        indices, views = self.indices(batch), None if self.views is None else self.views(batch)
        indices = indices.cpu() if isinstance(indices, Tensor) else indices
        if isinstance(views, Tensor):
            views = views.cpu()
        elif isinstance(views, View):  # as a data loader collates it
            views = View(*(cast(Any, torch.as_tensor(column).cpu()) for column in views))
        self.accumulator.update(indices, output.score_maps, output.logits, views)

    def _stop(self) -> list[CAMOutput]:
        """What was heard since the step began; neither a hook nor a tensor stays."""
        if self._hook is not None:
            self._hook.remove()
        returned, self._outputs, self._hook = self._outputs, [], None
        return returned

    # A step may begin and not end: the module skips the rest of the epoch, the loader runs dry, something raises.

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no hook behind."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and wait for no other process from here on: it may not have failed."""
        self._stop()
        self._failed = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let every process hold what all have seen."""
        self._stop()
        self._synchronize()

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps the maps: the fusion's name, and ``name`` if there is one."""
        named = {"name": self.name} if self.name else {}
        return self._generate_state_key(fusion=fusion_name(self.accumulator.fusion), **named)

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint of Lightning, which asks all processes for it.

        Once training has failed here, it is what this process has seen, and the others up to the last checkpoint. A run
        that goes on from that lacks what the others have seen since; nothing counts twice.
        """
        if not self._failed:
            self._synchronize()
        return self.accumulator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the maps of a checkpoint, which Lightning gives to all processes: they count once.

        Raises:
            ValueError: they belong to another data set or setting.
        """
        several = self._in_group() and torch.distributed.get_world_size() > 1
        self.accumulator.load_state_dict(state_dict, known_to_all=several)

    def _synchronize(self) -> None:
        if self._in_group():
            self.accumulator.synchronize()

    @staticmethod
    def _in_group() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()
