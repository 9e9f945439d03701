"""LPIPS (Zhang et al. 2018) as a metric, with the networks that training uses (`models/perceptual.py`).

"lpips" is AlexNet with the heads of version 0.1, what papers mean; "lpips-squeeze" is a yardstick inside this project
and comparable with nothing published: its backbone isn't the one that the heads were made for.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dreamsr_cli.errors import DreamSRError, InputError, UsageError, WeightsError
from dreamsr_cli.evaluation.metric import Metric, Sample, require_weights
from dreamsr_cli.evaluation.results import MetricId
from dreamsr_cli.models import perceptual
from dreamsr_cli.models.perceptual import BACKBONES, SMALLEST_SIDE, Backbone, Lpips, load_perceptual
from dreamsr_cli.weights import file_sha256

KINDS = {"lpips": "lpips-alex", "lpips-vgg": "lpips-vgg", "lpips-squeeze": "lpips-squeeze"}
"""As typed -> the network's name in `BACKBONES`."""
OURS = "lpips-squeeze"
"""Shown with an asterisk: not a published LPIPS."""


def distance_metric(name: str, weights: Path | None, device: str) -> Metric:
    """The distance `name` with the weights below `weights`; the published ones fall back on pyiqa's where it is
    installed. `WeightsError` if neither can be had."""
    kind = KINDS[name]
    backbone = BACKBONES[kind]
    try:
        folder = require_weights(weights, name, f"{backbone.weights} and {backbone.heads}")
        network = _load(kind, folder)
    except WeightsError as error:
        from dreamsr_cli.evaluation.pyiqa_metrics import INSTALL, is_installed, pyiqa_metric

        if kind == OURS:
            raise
        if not is_installed():
            raise WeightsError(error.message, f"put the files there, or install pyiqa: {INSTALL}") from error
        return pyiqa_metric(name, device)
    network.to(device)
    ident = MetricId(
        id=f"{kind}*" if kind == OURS else kind,
        variant=backbone.made_of,
        definition="LPIPS v0.1 on RGB, whole picture, float32, no border cut",
        weights_sha256=_weights_sha256(backbone, folder),
        lower_better=True,
        unit="",
    )

    @torch.no_grad()
    def score(sample: Sample) -> float:
        if sample.hq_PQC is None:
            raise DreamSRError("no reference", "add one")
        if min(sample.sr_PQC.shape[:2]) < SMALLEST_SIDE:
            raise InputError(f"LPIPS needs {SMALLEST_SIDE} pixels per side", "leave it out")
        pair = [
            torch.tensor(x_PQC, dtype=torch.float32, device=device).permute(2, 0, 1)[None] / 127.5 - 1
            for x_PQC in (sample.sr_PQC, sample.hq_PQC)
        ]
        return float(network(*pair))

    return Metric(ident, True, score)


def _load(kind: str, folder: Path) -> Lpips:
    try:
        network = load_perceptual(kind, folder)
    except UsageError as error:
        raise WeightsError(error.message, error.hint) from error
    assert isinstance(network, Lpips)
    return network


def _weights_sha256(backbone: Backbone, folder: Path) -> str:
    """One sha256 for network and heads: that of both digests, sorted and joined by a line end."""
    digests = []
    for pattern in (backbone.weights, backbone.heads):
        found = [file_sha256(path) for path in sorted(folder.glob(pattern))]
        digests.append(next(digest for digest in found if digest in perceptual.PINS.values()))
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
