"""A fusion of your own, and the test that it keeps the laws: attention that is forgotten slowly.

python examples/own_fusion.py      # accumulates a stream of maps with it, beside max and mean
pytest examples/own_fusion.py      # tries the laws on streams that hypothesis makes up
"""

import torch
from hypothesis import given
from torch import Tensor

from oaa_lib import AttentionAccumulator, Fusion
from oaa_lib.testing import assert_monotone, attention_streams, check_fusion


class FadingMax(Fusion):
    """The maximum, where what was seen before fades by a share with each map: early mistakes wear off.

    Args:
        keep: what remains of the cumulative map, in [0, 1]; 1 is the paper's maximum.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_t from M_{t-1}, A_t and t (Eq. 4); the accumulator sees to the first map."""
        return torch.maximum(self.keep * cumulative, attention)


@given(attention_streams())
def test_fading_max_is_a_fusion(maps: list[Tensor]) -> None:
    """Bounded, starts with the first map, depends on nothing but its arguments."""
    check_fusion(FadingMax(0.9), maps)


@given(attention_streams())
def test_without_fading_it_never_falls(maps: list[Tensor]) -> None:
    """A law that only the maximum keeps: with keep=0.9 hypothesis finds a stream that breaks it."""
    assert_monotone(FadingMax(1.0), maps)


def main() -> None:
    """A spot that wanders over an object of eight cells, one a step, as three fusions remember it."""
    print("cumulative attention of cells 1 to 8 after a spot has passed over them")
    for name, fusion in {"max": "max", "mean": "mean", "fading max": FadingMax(0.9)}.items():
        accumulator = AttentionAccumulator([[1]], map_size=(1, 8), fusion=fusion, gate=None)
        for cell in range(8):
            spot = torch.zeros(1, 1, 1, 8)
            spot[..., cell] = 1
            accumulator.update([0], spot)
        print(f"{name:>10}  " + " ".join(f"{value:.2f}" for value in accumulator.attention(0).flatten().tolist()))


if __name__ == "__main__":
    main()
