"""Score maps of classifiers that were written without them in mind: class activation maps by their own weights."""

import sys
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oaa_lib.calls import layouts, recorded, visible_modules
from oaa_lib.cam import CAMOutput
from oaa_lib.routes import Route
from oaa_lib.search import Search


def wrap_classifier(model: nn.Module, features: str | None = None, head: str | None = None) -> "WrappedClassifier":
    """Give any classifier score maps without changing it.

    These kinds are understood, whoever wrote the model (the documentation has a table of architectures):

    - *global average pool, then a linear layer* (ResNet, EfficientNet, ConvNeXt, MobileNetV2, DenseNet, Swin; in
      torchvision, timm or Hugging Face): the linear layer is applied to each position as a 1x1 convolution. The average
      of the score maps equals the logits. A layer norm between the two (ConvNeXt) takes the pooled vector's mean and
      variance at each position, which keeps that equality, and so does batch norm (LeViT).
    - *two linear layers, averaged or added* (EfficientFormer, LeViT, DeiT distilled): the same for their maps.
    - *hidden layers between pool and logits* (MobileNetV3): these layers at each position. The average of the maps is
      not the logits then.
    - *fully convolutional heads* (`CAMHead`, SqueezeNet): the maps whose average the logits are, as they are.
    - *vision transformers* (ViT, DeiT, DINOv2): the linear layer at each patch token. Where it reads the class token,
      the average of the maps is not the logits. Where it reads class token and average (DINOv2 of Hugging Face), or an
      average that the class token is part of, the class token's share is added at each position, and it is.

    Nothing is taken on trust: the first call with a size of images, and each after a part of the model was replaced or
    changed its mode, looks for the layers among those of this very call and compares values all the way from the
    features to the logits, up to rounding and dropout. On a CPU every later call compares them as well; elsewhere that
    would wait for the device. The grid of tokens is what the call itself has laid out. Of several maps that explain the
    logits it takes the finest. ``repr`` shows the layers of the last call.

    Parameters, mode, statistics, random numbers and gradients are the model's own, and its hooks are gone when the call
    returns: under ``torch.no_grad`` nothing is kept for a backward pass, without it the score maps can be trained, as
    the integral attention model needs. Works in a training loop, in several threads, under autocast, inside or around
    ``DistributedDataParallel``. Compiled models and parts run uncompiled here (parts need torch 2.6), and a compiled
    wrapper runs as it is, since the compiler and hooks do not go together.

    Args:
        model: called with images (B, 3, H, W); returns logits (B, C), or an object with ``.logits``, or a tuple whose
            first entry they are.
        features: name of the module, as ``model.named_modules()`` has it, whose output is the map or the tokens. None:
            it is looked for.
        head: name of the linear layer or 1x1 convolution that returns the logits, or of a module that holds it (or
            both). None: it is looked for.

    Returns:
        A module that returns `CAMOutput`; its ``.logits`` are the model's own.

    Raises:
        TypeError: no module.
        ValueError: a name that the model does not have. When called, if the logits cannot be traced to a map: none is
            left (VGG's fully connected layers see a flattened map), the pool is no average, the linear layer has
            another width than the map, tokens form no rectangle, or the model's output went through a sigmoid or
            softmax. The message lists the layers that could be named.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        ... )
        >>> logits, score_maps = wrap_classifier(model)(torch.rand(2, 3, 32, 48))
        >>> logits.shape, score_maps.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 8, 12]))
        >>> torch.allclose(score_maps.mean((-2, -1)), logits, atol=1e-6)
        True
        >>> named = wrap_classifier(model, features="1", head="4")

    Source: paper, section 5 ("simply plugged into any classification networks"); Zhou et al., CVPR 2016, for the
    equality of the linear layer and the 1x1 convolution.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    return WrappedClassifier(model, features, head)


class _Known(NamedTuple):
    """A route that was found, and how the parts of the model that matter to it looked."""

    route: Route | None
    parts: tuple[str, ...]
    look: list[tuple[nn.Module, dict[str, Any]]] | None


class WrappedClassifier(nn.Module):
    """What `wrap_classifier` returns: ``images (B, 3, H, W) -> CAMOutput(logits (B, C), score_maps (B, C, h, w))``."""

    def __init__(self, model: nn.Module, features: str | None = None, head: str | None = None) -> None:
        super().__init__()
        names = dict(_uncompiled(model).named_modules())
        for argument, name in (("features", features), ("head", head)):
            if name is not None and name not in names:
                last = ", ".join(repr(known) for known in list(names)[-8:] if known)
                raise ValueError(
                    f"expected {argument} to be the name of a module in model.named_modules(), got {name!r}; the last "
                    f"ones are {last}"
                )
        self.model = model
        self._features, self._head = features, head
        self._known: dict[Hashable, _Known] = {}
        self._last: Route | None = None

    def extra_repr(self) -> str:
        """The layers of the last call."""
        if self._last is None:
            return f"features={self._features!r}, head={self._head!r}  # None: found by the first call"
        return f"features={self._last.features!r}, head={self._last.head}"

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> CAMOutput:
        """Logits of the model, and score maps; what follows the images goes to the model as it is."""
        run: Any = self._run
        if torch.compiler.is_compiling():
            compiler: Any = torch.compiler
            run = compiler.disable(run)
        output: CAMOutput = run(images, *args, **kwargs)
        return output

    def _run(self, images: Tensor, *args: Any, **kwargs: Any) -> CAMOutput:
        model = _uncompiled(self.model)
        circumstances = _circumstances(images)
        known = self._known.get(circumstances)
        if known is not None and known.look != _look(model, known.parts):
            self._known.clear()  # what holds in other circumstances may have changed as well
            known = None
        if known is not None:
            return self._follow(known.route, model, images, *args, **kwargs)
        with _eagerly(), recorded(visible_modules(model)) as calls, layouts(len(images)) as layout:
            output = model(images, *args, **kwargs)
        if isinstance(output, CAMOutput):
            self._known[circumstances] = _Known(None, ("",), _look(model, ("",)))
            return output
        logits, sides = _logits(output), (images.shape[-2], images.shape[-1])
        route = Search(calls, logits, sides, layout, features=self._features, head=self._head).route()
        steps = {step.name: step for step in calls}
        if route.is_telling(steps):
            parts = _parts(route, [step.name for step in calls])
            self._known[circumstances] = _Known(route, parts, _look(model, parts))
        self._last = route
        return CAMOutput(logits, route.score_maps(steps))

    def _follow(self, route: Route | None, model: nn.Module, images: Tensor, *args: Any, **kwargs: Any) -> CAMOutput:
        """A call in circumstances that are known; without a route, the model returned score maps of its own in them."""
        names = route.names if route else ()
        with _eagerly(), recorded((name, model.get_submodule(name)) for name in names) as calls:
            output = model(images, *args, **kwargs)
        if isinstance(output, CAMOutput):
            return output
        logits, steps = _logits(output), {step.name: step for step in calls}
        fault = "it returned score maps then" if route is None else None
        if route is not None and logits.device.type == "cpu":  # elsewhere a look at values would wait for the device
            fault = route.fault(steps, logits)
        if route is None or fault is not None:
            self._known.clear()
            raise ValueError(
                f"expected the model to make its logits as in the call before, but {fault}; call again to have the "
                "layers looked for anew, or name them: wrap_classifier(model, features=..., head=...)"
            )
        self._last = route
        return CAMOutput(logits, route.score_maps(steps))


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given: the compiler does not see hooks that come later."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


def _circumstances(images: Tensor) -> Hashable:
    """What may change a model's way without a change of the model."""
    kind = images.device.type
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return tuple(images.shape[1:]), images.dtype, images.device, casts, torch.is_grad_enabled()


def _parts(route: Route, called: list[str]) -> tuple[str, ...]:
    """The modules whose replacement or change may change a route: those around its layers, and all that come after."""
    after = called[len(called) - called[::-1].index(route.features) :]
    around = {name.rpartition(".")[0] for name in (*after, *route.names)}
    outer = {name[:end] for name in around for end, letter in enumerate(name) if letter == "."}
    return tuple(sorted({"", *route.names, *after, *around, *outer}))


def _look(model: nn.Module, parts: tuple[str, ...]) -> list[tuple[nn.Module, dict[str, Any]]] | None:
    """These modules, and their flags, words and functions; None if there is no such module (any more)."""
    try:
        modules = [model.get_submodule(name) for name in parts]
    except AttributeError:
        return None
    return [
        (
            module,
            {key: value for key, value in vars(module).items() if isinstance(value, (bool, str)) or callable(value)},
        )
        for module in modules
    ]


class _Eagerly:
    """Lets compiled parts of a model run uncompiled, as hooks need, until the last such call of any thread returns."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0
        self.stance: Any = None  # the compiler's, which is one for all threads

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # nothing is compiled
            yield
            return
        with self.lock:
            self.calls += 1
            if self.calls == 1:
                self.stance = torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if self.calls == 0:
                    self.stance.__exit__(None, None, None)


_eagerly = _Eagerly()


def _logits(output: Any) -> Tensor:
    """The class scores in what a classifier returns."""
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected a classifier that returns logits (B, C), got {shape}")
    return logits
