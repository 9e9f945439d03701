"""Every metric by name: what it is in full, and how it is computed.

Names as they are typed: "psnr" and "ssim" make one column per channel asked for; "lpips" and the metrics of pyiqa name
the variant that the literature's tables use. A metric that can't be had is not an error: it is listed as unavailable
with the reason, and never becomes zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dreamsr_cli.errors import DreamSRError, UsageError, WeightsError
from dreamsr_cli.evaluation.metric import Metric, Sample, require_weights
from dreamsr_cli.evaluation.results import MetricId

CHANNELS = ("rgb", "y")
PAPER_METRICS = ("psnr", "ssim", "lpips", "musiq", "maniqa", "clipiqa+")
"""Those of the paper's Table 1."""
DEFAULT_METRICS = ("psnr", "ssim", "lpips", "lpips-squeeze", "niqe", "delta-e", "seam")
"""Those that need no download."""
_DISTANCES = ("lpips", "lpips-vgg", "lpips-squeeze")
"""By the networks of `perceptual_metrics`."""
_FIDELITY = ("delta-e", "seam")
_PYIQA = ("musiq", "maniqa", "maniqa-pipal", "clipiqa+", "clipiqa+_vitL14_512", "dists")
KNOWN_METRICS = ("psnr", "ssim", *_DISTANCES, "niqe", *_FIDELITY, *_PYIQA)
ALIASES = {"paper": PAPER_METRICS, "default": DEFAULT_METRICS, "all": KNOWN_METRICS}


@dataclass(frozen=True)
class MetricOptions:
    """What decides the columns."""

    names: tuple[str, ...] = DEFAULT_METRICS
    channels: tuple[str, ...] = ("rgb", "y")
    crop_border: int = 0
    """Pixels cut from each side before PSNR and SSIM."""
    weights: Path | None = None
    """Folder of perceptual weights (lpips/, squeezenet/, alexnet/, vgg16/, niqe/)."""
    device: str = "cpu"
    """Where networks of metrics run."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The metrics of a run, in the order asked for."""

    metrics: tuple[Metric, ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Column -> why it can't be had."""
    notes: tuple[str, ...] = ()


def parse_names(text: str) -> tuple[str, ...]:
    """ "psnr,ssim,paper" as names, in order, each once; aliases spelled out. `UsageError` for an unknown one."""
    names: list[str] = []
    known = {*KNOWN_METRICS, *ALIASES, *(f"{kind}-{channel}" for kind in ("psnr", "ssim") for channel in CHANNELS)}
    by_lower = {name.lower(): name for name in known}
    for word in (w.strip() for w in text.split(",")):
        if not word:
            continue
        name = by_lower.get(word.lower())
        if name is None:
            near = difflib.get_close_matches(word.lower(), by_lower, n=1)
            hint = f"did you mean {by_lower[near[0]]}? " if near else ""
            raise UsageError(f"--metrics: {word!r} is not known", f"{hint}use {', '.join((*KNOWN_METRICS, *ALIASES))}")
        names += [n for n in ALIASES.get(name, (name,)) if n not in names]
    if not names:
        raise UsageError("--metrics names no metric", f"use some of {', '.join(KNOWN_METRICS)}, or paper")
    return tuple(names)


def choose_metrics(options: MetricOptions, has_references: bool) -> Columns:
    """The columns that `options` ask for, as far as they can be had here."""
    metrics: list[Metric] = []
    unavailable: dict[str, str] = {}
    for name in options.names:
        try:
            made = _make(name, options)
        except WeightsError as error:
            unavailable[name] = f"{error.message}; {error.hint}"
            continue
        for metric in made:
            if metric.needs_reference and not has_references:
                unavailable[metric.ident.id] = "this set has no references"
            elif all(metric.ident.id != other.ident.id for other in metrics):
                metrics.append(metric)
    return Columns(tuple(metrics), unavailable, _offers(options.names))


def _offers(names: Sequence[str]) -> tuple[str, ...]:
    from dreamsr_cli.evaluation.pyiqa_metrics import OFFER, is_installed

    return () if is_installed() or not (set(names) & set(_PYIQA) or tuple(names) == DEFAULT_METRICS) else (OFFER,)


def _make(name: str, options: MetricOptions) -> list[Metric]:
    kind, _, channel = name.partition("-")
    if kind in ("psnr", "ssim"):
        channels = (channel,) if channel else options.channels
        return [signal_metric(kind, one, options.crop_border) for one in channels]
    if name == "niqe":
        return [_niqe(options.weights)]
    if name in _DISTANCES:
        from dreamsr_cli.evaluation.perceptual_metrics import distance_metric

        return [distance_metric(name, options.weights, options.device)]
    if name in _FIDELITY:
        from dreamsr_cli.evaluation.fidelity_metrics import fidelity_metric

        return [fidelity_metric(name)]
    from dreamsr_cli.evaluation.pyiqa_metrics import pyiqa_metric

    return [pyiqa_metric(name, options.device)]


def signal_metric(kind: str, channel: str, crop: int) -> Metric:
    """PSNR or SSIM of one channel; the border is part of the column's name."""
    from dreamsr_cli.evaluation import signal_metrics as signal

    plane = {"rgb": "mean over R, G and B", "y": "Y of BT.601, studio range 16-235, unrounded"}[channel]
    border = f"border of {crop} px cut" if crop else "no border cut"
    if kind == "psnr":
        text = f"10 log10(255^2 / MSE), levels 0-255 in float64, {plane}, {border}"
    else:
        text = (
            "SSIM of Wang et al. 2004: Gaussian window 11x11 of sigma 1.5, K 0.01 and 0.03, range 255, population "
            f"variances, whole windows only, {plane}, {border}"
        )
    ident = MetricId(
        id=f"{kind}-{channel}" + (f"-crop{crop}" if crop else ""),
        variant=f"{channel.upper()}, {border}",
        definition=text,
        weights_sha256=None,
        lower_better=False,
        unit="dB" if kind == "psnr" else "",
    )
    compute = signal.psnr if kind == "psnr" else signal.ssim

    def score(sample: Sample) -> float:
        if sample.hq_PQC is None:
            raise DreamSRError("no reference", "add one")
        return compute(signal.planes(sample.sr_PQC, channel, crop), signal.planes(sample.hq_PQC, channel, crop))

    return Metric(ident, True, score)


def _niqe(weights: Path | None) -> Metric:
    from dreamsr_cli.evaluation import niqe
    from dreamsr_cli.weights import file_sha256

    folder = require_weights(weights, "niqe", niqe.PARAMS)
    model = niqe.load_model(folder)
    ident = MetricId(
        id="niqe",
        variant="pristine model of BasicSR's niqe_pris_params.npz",
        definition=niqe.DEFINITION,
        weights_sha256=file_sha256(folder / niqe.PARAMS),
        lower_better=True,
        unit="",
    )
    return Metric(ident, False, lambda sample: niqe.niqe(sample.sr_PQC, model))
