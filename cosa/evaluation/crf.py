"""The dense CRF of segmentation's post-processing (Tab. 6): an optional extra, run in processes of its own.

pydensecrf keeps the interpreter locked while it computes, so that threads would take turns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, UInt8
from joblib import Parallel, delayed

_ITERATIONS = 1
_POSITION_STD, _POSITION_WEIGHT = 1, 1
_BILATERAL_XY_STD, _BILATERAL_RGB_STD, _BILATERAL_WEIGHT = 121, 5, 4
_FLOOR = 1e-5  # probability below which a pixel is not surer of what it is not


def require_crf() -> None:
    """Refuse in one line where the extra is not installed.

    Raises:
        ValueError: pydensecrf is missing.
    """
    if importlib.util.find_spec("pydensecrf") is None:
        raise ValueError(
            "evaluation.crf must be false where pydensecrf is not installed, got True; "
            'pip install "cosa-wsss[crf]", which compiles for a minute'
        )


def refine(
    image: UInt8[np.ndarray, "h w 3"], probs: Float[np.ndarray, "k h w"]
) -> Float32[np.ndarray, "k h w"]:
    """Probabilities after mean-field inference: pixels that are near and look alike agree.

    A class whose probability is 0 everywhere stays out of it and at 0: so do the classes an image lacks in
    the labelled protocol.

    Args:
        image: RGB in the size of the maps.
        probs: Over the classes of each pixel; in evaluation the softmax of the sum of the views' logits.
    """
    from pydensecrf.densecrf import DenseCRF2D

    kept = probs.any((1, 2))
    height, width = probs.shape[1:]
    unary = -np.log(np.clip(probs[kept], _FLOOR, 1)).astype(np.float32)
    crf = DenseCRF2D(width, height, len(unary))
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(len(unary), -1)))
    crf.addPairwiseGaussian(sxy=_POSITION_STD, compat=_POSITION_WEIGHT)
    crf.addPairwiseBilateral(
        sxy=_BILATERAL_XY_STD,
        srgb=_BILATERAL_RGB_STD,
        rgbim=np.ascontiguousarray(image),
        compat=_BILATERAL_WEIGHT,
    )
    refined = np.zeros(probs.shape, np.float32)
    refined[kept] = np.array(crf.inference(_ITERATIONS), np.float32).reshape(-1, height, width)
    return refined


def refined_maps(
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    probs: Sequence[Float[np.ndarray, "_k _h2 _w2"]],
    *,
    workers: int,
) -> list[UInt8[np.ndarray, "_h _w"]]:
    """The likeliest class of each pixel after the CRF, image by image.

    Args:
        images: RGB, each in the size of its maps.
        probs: As `refine` takes them; 0 for the classes an image lacks in the labelled protocol.
        workers: Processes that refine side by side, as `data.loader_workers`; they stay for the next call.
    """
    # a copy for each process: pydensecrf cannot read the read-only memory that joblib would share
    parallel = Parallel(n_jobs=max(1, workers), max_nbytes=None)
    return list(parallel(delayed(_index_map)(image, maps) for image, maps in zip(images, probs, strict=True)))


def _index_map(
    image: UInt8[np.ndarray, "h w 3"], probs: Float[np.ndarray, "k h w"]
) -> UInt8[np.ndarray, "h w"]:
    index_map: UInt8[np.ndarray, "h w"] = refine(image, probs).argmax(0).astype(np.uint8)
    return index_map
