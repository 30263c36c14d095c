"""A fully connected CRF: labels that follow the edges of the photograph (Krähenbühl and Koltun, NeurIPS 2011)."""

from typing import Any

import numpy as np


def dense_crf(
    probabilities: np.ndarray,
    photograph: np.ndarray,
    *,
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> np.ndarray:
    """Class probabilities after some iterations of mean field inference.

    Every two pixels that are near, or near and of like colour, are drawn to the same class; both kernels are normalised
    symmetrically.

    Args:
        probabilities: (C, H, W) float32 of the network.
        photograph: (H, W, 3) uint8 RGB.
        iterations: at least 0, which changes nothing.
        gaussian: of the kernel of places: its width in pixels and its weight (sxy, compat).
        bilateral: of the kernel of places and colours: width in pixels, width in grey levels, weight (sxy, srgb,
            compat).

    Returns:
        (C, H, W) float32, summing to 1 over the classes.
    """
    classes, height, width = probabilities.shape
    if photograph.shape != (height, width, 3):
        raise ValueError(f"expected a photograph of shape {(height, width, 3)}, got {photograph.shape}")
    library = pydensecrf()
    unary = -np.log(np.clip(probabilities, 1e-8, None), dtype=np.float32)
    field = library.DenseCRF2D(width, height, classes)  # in this order
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1)))
    kind = {"kernel": library.DIAG_KERNEL, "normalization": library.NORMALIZE_SYMMETRIC}
    field.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1], **kind)
    pixels = np.array(photograph, order="C")  # contiguous and writable, as the library asks
    field.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixels, compat=bilateral[2], **kind)
    return np.array(field.inference(iterations)).reshape(classes, height, width)


def pydensecrf() -> Any:
    """The library, if it is installed."""
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise SystemExit(
            f"the CRF needs pydensecrf ({error}): pip install 'oaa_lib[crf]' (Python up to 3.12), or go without: "
            "evaluate.py --crf-iterations 0, refine_cues.py --method pamr"
        ) from error
    return densecrf
