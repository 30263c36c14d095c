"""Which pairs may accumulate now: a gate reads the classifier's own scores (paper, section 3.2)."""

import math
from typing import Protocol

import torch
from torch import Tensor

from oaa_lib.arguments import floats, kind


class Gate(Protocol):
    """A rule that lets target classes accumulate: any callable of this form, a plain function included.

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> def confident(logits, labels):
        ...     return labels & (logits.sigmoid() > 0.5)
        >>> accumulator = AttentionAccumulator([[1, 0]], (7, 7), gate=confident)
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, C) bool, True where a class may accumulate, from logits (B, C) float and labels (B, C) bool.

        Logits that are not finite arrive as -infinity (NaN) or the largest finite numbers; what depends on them is
        skipped whatever the gate says.
        """
        ...


def score_gate(logits: Tensor, labels: Tensor) -> Tensor:
    """The paper's gate: a target class passes if it scores higher than every class the image does not show.

    Args:
        logits: (B, C) float, any monotone form of the class scores.
        labels: (B, C) bool, True at the image's classes.

    Returns:
        (B, C) bool, False at non-target classes. An image labelled with all classes passes whole; a tie does not pass.

    Raises:
        TypeError: logits that are not floating point, or labels that are not bool.
        ValueError: shapes that are not one (B, C), or two devices.

    Example:
        >>> import torch
        >>> score_gate(torch.tensor([[3.0, 0.5, 1.0]]), torch.tensor([[True, True, False]]))
        tensor([[ True, False, False]])

    Source: paper, section 3.2, last paragraph.
    """
    _check(logits, labels)
    best_non_target = logits.masked_fill(labels, float("-inf")).amax(1, keepdim=True)
    return labels & (logits > best_non_target)


def topk_gate(logits: Tensor, labels: Tensor) -> Tensor:
    """The authors' releases' gate: a target class passes if it is among the K best, K being the image's label count.

    Args:
        logits: (B, C) float, any monotone form of the class scores.
        labels: (B, C) bool, True at the image's classes.

    Returns:
        (B, C) bool, False at non-target classes. A tie with the K-th score passes.

    Raises:
        TypeError: logits that are not floating point, or labels that are not bool.
        ValueError: shapes that are not one (B, C), or two devices.

    Example:
        >>> import torch
        >>> topk_gate(torch.tensor([[3.0, 0.5, 1.0]]), torch.tensor([[True, True, False]]))
        tensor([[ True, False, False]])

    Source: the authors' public releases (not the paper).
    """
    _check(logits, labels)
    logits = logits.nan_to_num(-math.inf)  # or NaN would rank first
    ranked = logits.sort(1, descending=True).values
    last_place = (labels.sum(1, keepdim=True) - 1).clamp(min=0)
    return labels & (logits >= ranked.gather(1, last_place))


GATES: dict[str, Gate] = {"score": score_gate, "topk": topk_gate}


def resolve_gate(gate: str | Gate | None) -> Gate | None:
    """The gate of a name, the gate itself, or None, with which everything passes.

    Raises:
        TypeError: neither a name nor a callable.
        ValueError: an unknown name.
    """
    if gate is None:
        return None
    if isinstance(gate, str):
        if gate not in GATES:
            raise ValueError(f"expected gate to be one of {sorted(GATES)} or a callable, got {gate!r}")
        return GATES[gate]
    if isinstance(gate, type):
        raise TypeError(
            f"expected gate to be one of {sorted(GATES)} or a callable, got the class {gate.__name__}; "
            "pass an instance of it"
        )
    if not callable(gate):
        raise TypeError(f"expected gate to be one of {sorted(GATES)} or a callable, got {type(gate).__name__}")
    return gate


def gate_name(gate: Gate | None) -> str | None:
    """The name a gate is saved under: the built-in one, or "own:" and that of your function or class."""
    if gate is None:
        return None
    for name, built_in in GATES.items():
        if gate is built_in:
            return name
    return f"own:{getattr(gate, '__qualname__', type(gate).__qualname__)}"


def judge(gate: Gate, logits: Tensor, labels: Tensor) -> Tensor:
    """What a gate says, (B, C) bool. One of the user's sees no NaN, may write on what it is given, and is checked."""
    if gate in GATES.values():
        return gate(logits, labels)
    passed: object = gate(logits.nan_to_num(-math.inf), labels)
    right = isinstance(passed, Tensor) and passed.dtype == torch.bool and passed.layout == torch.strided
    if not isinstance(passed, Tensor) or not right or passed.shape != labels.shape:
        raise TypeError(f"expected the gate to return bool of shape {tuple(labels.shape)}, got {kind(passed)}")
    if passed.device != labels.device:
        raise ValueError(f"expected the gate to return a tensor on {labels.device}, got one on {passed.device}")
    return passed


def _check(logits: Tensor, labels: Tensor) -> None:
    floats("logits", logits)
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool or labels.layout != torch.strided:
        found = (labels.dtype, labels.layout) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"expected labels as bool, got {found}; convert with .bool()")
    if logits.ndim != 2 or logits.shape != labels.shape or not logits.shape[1]:
        raise ValueError(
            "expected logits and labels of one shape (B, C), C at least 1, got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.device != labels.device:
        raise ValueError(f"expected logits and labels on one device, got {logits.device} and {labels.device}")
