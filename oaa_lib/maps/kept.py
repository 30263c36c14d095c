"""What can be kept: of which dtype, for what, and how two streams of it become one."""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from oaa_lib.maps.layout import MapLayout

MOST = 3 << 29  # maps that a pair may have accepted when something is loaded or joined: far from where int32 ends


@runtime_checkable
class Joint(Protocol):
    """How the cumulative maps of two streams become one; a fusion says so."""

    @property
    def guarded(self) -> bool:
        """Whether `join` may fail, since a part of it is the user's."""
        ...

    @property
    def reduction(self) -> Literal["max", "mean", "latest"] | None:
        """The all-reduce that does it for many processes, if one does."""
        ...

    @property
    def refusal(self) -> str | None:
        """Why two streams cannot become one; None if they can."""
        ...

    def join(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """One stored map of each pair from two, and from how often each of their pixels was seen."""
        ...


class Kept(NamedTuple):
    """One kind of value that is kept. Its shape, its reset, its part of a state and its merging follow from this.

    Attributes:
        dtype: of the values.
        per: what has a value of its own: each pixel of a map, each pair, each class; or each class has two.
        joined: how the values of two streams become one: ``"sum"``, a `Joint`, or None for what is no part of a stream.
        on_host: whether the host keeps it wherever the maps live, so that reading it never waits for a device.
    """

    dtype: torch.dtype
    per: Literal["pixel", "pair", "class", "class twice"]
    joined: Literal["sum"] | Joint | None
    on_host: bool = False

    def shape(self, layout: MapLayout) -> tuple[int, ...]:
        """Of the tensor that holds all values."""
        pairs, classes = layout.pairs.num_pairs, layout.pairs.num_classes
        return {"pixel": layout.shape, "pair": (pairs,), "class": (classes,), "class twice": (2, classes)}[self.per]
