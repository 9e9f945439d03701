"""NIQE (Mittal, Soundararajan and Bovik 2013): how far a photo's statistics lie from those of pristine photos.

Written from the paper. The pristine model (mean and covariance of 36 features) and the window come from a folder of the
user's, `niqe/niqe_pris_params.npz`; none ship with the package. Smaller is better.

Axes: P Q pixel rows and columns, N blocks, K features.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dreamsr_cli.errors import InputError, WeightsError

BLOCK = 96
"""Side of a block at full size, in pixels; half of it at half size."""
PARAMS = "niqe/niqe_pris_params.npz"
"""Where the pristine model lies below the folder of perceptual weights."""
_GREY = (0.299, 0.587, 0.114)
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Rows and columns to the neighbours whose products are modelled: right, below, and both diagonals."""
DEFINITION = (
    "NIQE (2013): blocks of 96 px at two scales (half size by the antialiased cubic), grey = 0.299 R + 0.587 G + "
    "0.114 B on 0-255, rounded; 7x7 Gaussian window, edges repeated; no border cropped; distance to the model "
    "niqe_pris_params.npz"
)


@dataclass(frozen=True, eq=False)
class PristineModel:
    """What the statistics are compared with."""

    mean_K: np.ndarray
    covariance_KK: np.ndarray
    window_PQ: np.ndarray
    """Gaussian, sums to 1, a product of its row and column sums."""


def load_model(folder: Path) -> PristineModel:
    """The pristine model below the folder of perceptual weights; `WeightsError` if it isn't there or isn't one."""
    path = folder / PARAMS
    if not path.is_file():
        raise WeightsError(f"{folder}: no {PARAMS}", "put it there, or leave out niqe")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            model = PristineModel(
                arrays["mu_pris_param"].reshape(-1), arrays["cov_pris_param"], arrays["gaussian_window"]
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: not a model of pristine photos", "fetch it again") from error
    if model.mean_K.shape != (36,) or model.covariance_KK.shape != (36, 36):
        raise WeightsError(f"{path}: expected 36 features, found {model.mean_K.shape}", "fetch it again")
    return model


def niqe(rgb_PQC: np.ndarray, model: PristineModel) -> float:
    """NIQE of RGB on [0, 255]; `InputError` for photos with fewer than two blocks of 96 px, or without any texture."""
    grey_PQ = np.round(rgb_PQC.astype(np.float64) @ np.asarray(_GREY))
    rows, cols = (side // BLOCK for side in grey_PQ.shape)
    if rows * cols < 2:
        raise InputError(
            f"NIQE needs {BLOCK}x{2 * BLOCK} pixels, got {grey_PQ.shape[1]}x{grey_PQ.shape[0]}", "leave it out"
        )
    grey_PQ = grey_PQ[: rows * BLOCK, : cols * BLOCK]
    sizes = ((grey_PQ, BLOCK), (_half(grey_PQ), BLOCK // 2))
    features_NK = np.concatenate([_features(_normalised(g_PQ, model.window_PQ), side) for g_PQ, side in sizes], axis=1)
    known_NK = features_NK[np.isfinite(features_NK).all(axis=1)]
    if len(known_NK) < 2:
        raise InputError("NIQE is not defined: the photo has no texture", "leave it out")
    spread_KK = (model.covariance_KK + np.cov(known_NK, rowvar=False)) / 2
    offset_K = model.mean_K - np.nanmean(np.where(np.isfinite(features_NK), features_NK, np.nan), axis=0)
    return math.sqrt(float(offset_K @ np.linalg.pinv(spread_KK) @ offset_K))


def _half(grey_PQ: np.ndarray) -> np.ndarray:
    import torch

    from dreamsr_cli.resample import resize

    rows, cols = grey_PQ.shape
    return resize(torch.tensor(grey_PQ), rows // 2, cols // 2).numpy()


def _normalised(grey_PQ: np.ndarray, window_PQ: np.ndarray) -> np.ndarray:
    """(x - local mean) / (local deviation + 1)."""
    mean_PQ = _blur(grey_PQ, window_PQ)
    deviation_PQ = np.sqrt(np.abs(_blur(grey_PQ**2, window_PQ) - mean_PQ**2))
    return (grey_PQ - mean_PQ) / (deviation_PQ + 1)


def _blur(x_PQ: np.ndarray, window_PQ: np.ndarray) -> np.ndarray:
    radius = len(window_PQ) // 2
    padded_PQ = np.pad(x_PQ, radius, mode="edge")
    rows, cols = x_PQ.shape
    down_PQ = sum(weight * padded_PQ[i : i + rows] for i, weight in enumerate(window_PQ.sum(axis=1)))
    return np.asarray(sum(weight * down_PQ[:, i : i + cols] for i, weight in enumerate(window_PQ.sum(axis=0))))


def _features(x_PQ: np.ndarray, side: int) -> np.ndarray:
    """(N, 18) features of each block of a normalised picture."""
    rows, cols = (length // side for length in x_PQ.shape)
    blocks_NPQ = x_PQ.reshape(rows, side, cols, side).swapaxes(1, 2).reshape(-1, side, side)
    shape_N, left_N, right_N = _fit(blocks_NPQ)
    features = [shape_N, (left_N + right_N) / 2]
    for down, across in _NEIGHBOURS:
        products_NPQ = blocks_NPQ * np.roll(blocks_NPQ, (down, across), axis=(1, 2))
        shape_N, left_N, right_N = _fit(products_NPQ)
        gammas_N = np.array([math.gamma(2 / a) / math.gamma(1 / a) for a in shape_N])
        features += [shape_N, (right_N - left_N) * gammas_N, left_N, right_N]
    return np.stack(features, axis=1)


def _fit(x_NPQ: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape and both scales of the asymmetric generalised Gaussian that has the moments of each block; not a number
    where a block has no values on one side."""
    flat = x_NPQ.reshape(len(x_NPQ), -1)

    def deviation(side: np.ndarray) -> np.ndarray:
        count = side.sum(axis=1)
        total = np.where(side, flat**2, 0.0).sum(axis=1)
        return np.sqrt(np.divide(total, count, out=np.full(len(flat), np.nan), where=count > 0))

    left_N, right_N = deviation(flat < 0), deviation(flat > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_N = left_N / right_N
        moment_N = np.abs(flat).mean(axis=1) ** 2 / (flat**2).mean(axis=1)
        wanted_N = moment_N * (ratio_N**3 + 1) * (ratio_N + 1) / (ratio_N**2 + 1) ** 2
    shapes, moments, widths = _shape_table()
    nearest_N = np.abs(moments - np.where(np.isfinite(wanted_N), wanted_N, 1.0)[:, None]).argmin(axis=1)
    return shapes[nearest_N], left_N * widths[nearest_N], right_N * widths[nearest_N]


@cache
def _shape_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate shapes a, their E|x|^2 / E x^2, and scale over deviation."""
    shapes = np.arange(0.2, 10.001, 0.001)
    one, two, three = (np.array([math.gamma(k / a) for a in shapes]) for k in (1, 2, 3))
    return shapes, two**2 / (one * three), np.sqrt(one / three)
