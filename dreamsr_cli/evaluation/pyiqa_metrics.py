"""Metrics of pyiqa, where the user has installed it: MUSIQ, MANIQA, CLIPIQA+, DISTS, and LPIPS without own weights.

pyiqa is under the PolyForm Noncommercial licence, so it is an optional extra and never a dependency. It downloads
weights when a metric is first made; a metric whose weights don't come is unavailable, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dreamsr_cli.errors import DreamSRError, WeightsError
from dreamsr_cli.evaluation.metric import Metric, Sample
from dreamsr_cli.evaluation.results import MetricId
from dreamsr_cli.weights import file_sha256

INSTALL = "pip install 'dreamsr[eval]'"
OFFER = (
    f"pyiqa is not installed: MUSIQ, MANIQA, CLIPIQA+ and DISTS come with {INSTALL} "
    "(PolyForm Noncommercial licence), then --metrics paper"
)


@dataclass(frozen=True)
class Variant:
    """One of pyiqa's metrics, named in full."""

    id: str
    variant: str
    file: str
    """Weights as pyiqa keeps them; the backbone's come beside them."""
    reference: bool = False
    lower_better: bool = False


VARIANTS = {
    "musiq": Variant("musiq-koniq", "KonIQ-10k weights", "musiq_koniq_ckpt-e95806b9.pth"),
    "maniqa": Variant("maniqa-koniq", "KonIQ-10k weights, scale 0.8", "ckpt_koniq10k.pt"),
    "maniqa-pipal": Variant("maniqa-pipal", "PIPAL weights", "MANIQA_PIPAL-ae6d356b.pth"),
    "clipiqa+": Variant("clipiqa+-rn50", "CLIP RN50, learned prompts", "CLIP-IQA+_learned_prompts-603f3273.pth"),
    "clipiqa+_vitL14_512": Variant(
        "clipiqa+-vitL14-512", "CLIP ViT-L/14 at 512 px", "CLIPIQA+_ViTL14_512-e66488f2.pth"
    ),
    "dists": Variant("dists", "VGG16", "DISTS_weights-f5e65c96.pth", True, True),
    "lpips": Variant("lpips-alex", "AlexNet, heads v0.1", "LPIPS_v0.1_alex-df73285e.pth", True, True),
    "lpips-vgg": Variant("lpips-vgg", "VGG16, heads v0.1", "LPIPS_v0.1_vgg-a78928a0.pth", True, True),
}
"""By pyiqa's own names. Those without a family in their name are what the paper's tables match."""


def is_installed() -> bool:
    """Whether pyiqa is there; it is not imported."""
    return importlib.util.find_spec("pyiqa") is not None


def pyiqa_metric(name: str, device: str) -> Metric:
    """pyiqa's metric `name`; `WeightsError` if pyiqa or the weights can't be had."""
    if not is_installed():
        raise WeightsError("pyiqa is not installed", INSTALL)
    known = VARIANTS[name]
    try:
        import pyiqa  # ty: ignore[import-not-found]

        network = pyiqa.create_metric(name, device=torch.device(device), as_loss=False)
    # An optional plug-in may fail in any way (no network, a missing library of its own): that costs its columns only.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(
            f"pyiqa can't make {name}: {type(error).__name__}: {reason}",
            "check the network, or put the weights into its cache",
        ) from error
    version = importlib.metadata.version("pyiqa")
    ident = MetricId(
        id=known.id,
        variant=known.variant,
        definition=f"pyiqa {version}, {name!r} with its defaults, RGB on [0, 1], no border cut; {known.variant}",
        weights_sha256=_weights_sha256(known.file),
        lower_better=known.lower_better,
        unit="",
    )

    @torch.no_grad()
    def score(sample: Sample) -> float:
        inputs = [sample.sr_PQC]
        if known.reference:
            if sample.hq_PQC is None:
                raise DreamSRError("no reference", "add one")
            inputs.append(sample.hq_PQC)
        pictures = [torch.tensor(x, dtype=torch.float32, device=device).permute(2, 0, 1)[None] / 255 for x in inputs]
        try:
            return float(network(*pictures))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise DreamSRError(f"pyiqa's {name}: {error}", "leave it out for this photo") from error

    return Metric(ident, known.reference, score)


def _weights_sha256(file: str) -> str | None:
    homes = [Path(torch.hub.get_dir()) / "pyiqa", Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))]
    for home in homes:
        found = next(iter(sorted(home.rglob(file))), None) if home.is_dir() else None
        if found is not None:
            return file_sha256(found)
    return None
