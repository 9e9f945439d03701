"""Texture erasure: a good crop whose structure stays and whose texture goes, made by the bundle's own transformer.

Source: DreamSR, section 3.3 ("i2i degradation"): downsample, encode, noise to a strength of 0.3 to 0.5, partially
denoise on `P_img + P_neg`. What the paper leaves open is decided in docs/texture_erasure.md, and so is the other way of
bundles whose transformer predicts corrections (the built-in model).

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from dreamsr_cli import resample
from dreamsr_cli.config import TOKEN_SIDE
from dreamsr_cli.degradations.erasure_denoising import Job, by_euler, by_mean, units
from dreamsr_cli.degradations.erasure_params import ERASE_TEXT, ErasureParams, draw_erasure, erasure_text
from dreamsr_cli.device import dtype_name
from dreamsr_cli.errors import DeviceError
from dreamsr_cli.models.autoencoder import Autoencoder
from dreamsr_cli.models.bundle import Bundle, Restorer
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.part_loading import load_part
from dreamsr_cli.models.text_encoder import TextEmbedding, TextEncoder
from dreamsr_cli.progress import Progress, SilentProgress

__all__ = [
    "BATCH",
    "ERASE_TEXT",
    "Eraser",
    "ErasureParams",
    "draw_erasure",
    "erasure_text",
    "open_eraser",
    "shrink_and_back",
]

BATCH = 4
"""Crops per network call. Part of what decides the bytes: small matrix products differ between batch sizes."""
KEEP_BYTES = 2 * 2**30
"""Bundles whose parts are smaller than this together stay in memory between calls."""


def shrink_and_back(hq_BCPQ: Tensor, factor: float) -> Tensor:
    """The picture downsampled by `factor` and enlarged to its size again, both by the field's antialiased cubic; values
    may overshoot."""
    rows, cols = hq_BCPQ.shape[-2:]
    small = resample.resize(hq_BCPQ, max(1, round(rows / factor)), max(1, round(cols / factor)))
    return resample.resize(small, rows, cols)


def open_eraser(
    bundle: Bundle, device: torch.device, dtype: torch.dtype, batch: int = BATCH, keep: bool | None = None
) -> Eraser:
    """An `Eraser` of this bundle; `WeightsError` if a part that it needs isn't there. Networks are opened when they are
    first needed."""
    return Eraser(bundle, device, dtype, batch, keep)


class Eraser:
    """Text encoder, autoencoder and transformer of a bundle, opened when needed.

    Bundles of less than `KEEP_BYTES` stay open; of larger ones each call opens text encoder, autoencoder, transformer
    and autoencoder one after the other, so give it many crops per call (`keep` overrides this). A context manager:
    `close` frees what is open.
    """

    def __init__(
        self, bundle: Bundle, device: torch.device, dtype: torch.dtype, batch: int = BATCH, keep: bool | None = None
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.bundle, self.device, self.dtype, self.batch = bundle, device, dtype, batch
        self.corrects = bundle.config.sampling.prediction == "correction"
        size = _bytes(bundle, ("text_encoder", "vae", "transformer") + ("controlnet",) * self.corrects)
        self.keep = size <= KEEP_BYTES if keep is None else keep
        self._open: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a result beside crop, parameters and prompt, to be recorded; plain data."""
        return {
            "bundle": self.bundle.config.name,
            "bundle_sha256": self.bundle.sha256,
            "denoise": "mean" if self.corrects else "euler",
            "precision": dtype_name(self.dtype),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "batch": self.batch,
            "torch": torch.__version__,
        }

    @torch.inference_mode()
    def erase(
        self,
        hq_BCPQ: Tensor,
        params: Sequence[ErasureParams],
        prompts: Sequence[str],
        progress: Progress | None = None,
    ) -> Tensor:
        """Erase the texture of any number of crops.

        hq_BCPQ: (B, 3, P, Q) floating point RGB in [0, 1], P and Q at least 16; sides that are no multiples of 16 are
        padded by reflection inside. `params` and `prompts` (P_img): one per crop. `progress` hears `at` only. Returns
        (B, 3, P, Q) float32 in [0, 1] on the CPU, not rounded to levels.

        A crop's result depends on its pixels, parameters, prompt and `settings` alone: the same bytes whatever else is
        in the call. Raises `ValueError` for wrong shapes, `WeightsError` and `ConfigError` of the bundle, `DeviceError`
        when the device's memory doesn't suffice.
        """
        _check(hq_BCPQ, params, prompts)
        progress = progress or SilentProgress()
        rows, cols = hq_BCPQ.shape[-2:]
        try:
            texts, mask_pads = self._embed(params, prompts, progress)
            jobs = self._encode(hq_BCPQ, params, texts, progress)
            latents = self._denoise(jobs, mask_pads, progress)
            return self._decode(latents, rows, cols, progress)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"out of memory on {self.device} erasing crops of {cols}x{rows}, {self.batch} at a time",
                "use smaller crops, or fewer at a time",
            ) from error

    def close(self) -> None:
        """Free what is open; the next call opens it again."""
        self._open.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Eraser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _embed(
        self, params: Sequence[ErasureParams], prompts: Sequence[str], progress: Progress
    ) -> tuple[list[TextEmbedding], bool]:
        """Embeddings on the CPU, each of batch 1, and whether padding is masked."""
        progress.at("reading prompts")
        encoder: TextEncoder = self._part("text_encoder")
        limit = self.bundle.config.defaults.max_text_tokens
        texts = [erasure_text(prompt, one.erase_text) for prompt, one in zip(prompts, params, strict=True)]
        embeddings, cut = encoder.encode(texts, limit)
        if cut:
            # P_neg stands last and would be lost. In texts too long it goes first, and the prompt's end is lost.
            again, _ = encoder.encode([erasure_text(params[i].erase_text, prompts[i]) for i in cut], limit)
            replaced = dict(zip(cut, again, strict=True))
            embeddings = [replaced.get(i, embedding) for i, embedding in enumerate(embeddings)]
        mask_pads = not encoder.pads_are_seen
        del encoder
        self._release()
        return [embedding.to("cpu", self.dtype) for embedding in embeddings], mask_pads

    def _encode(
        self, hq_BCPQ: Tensor, params: Sequence[ErasureParams], texts: Sequence[TextEmbedding], progress: Progress
    ) -> list[Job]:
        """Crop by crop, so that none depends on its neighbours."""
        progress.at("encoding")
        autoencoder: Autoencoder = self._part("vae")
        jobs = []
        for index, one in enumerate(params):
            rgb_BCPQ = hq_BCPQ[index : index + 1].float().cpu()
            z_hq = self._latent(autoencoder, shrink_and_back(rgb_BCPQ, one.factor))
            scale = self.bundle.config.scale
            condition = self._latent(autoencoder, shrink_and_back(rgb_BCPQ, scale)) if self.corrects else None
            jobs.append(Job(index, one, texts[index], z_hq, condition))
        del autoencoder
        self._release()
        return jobs

    def _latent(self, autoencoder: Autoencoder, rgb_BCPQ: Tensor) -> Tensor:
        """(C, H, W) on the CPU of one picture in [0, 1], padded to multiples of 16."""
        rows, cols = rgb_BCPQ.shape[-2:]
        wide_BCPQ = F.pad(rgb_BCPQ, (0, -cols % TOKEN_SIDE, 0, -rows % TOKEN_SIDE), mode="reflect")
        return autoencoder.encode(wide_BCPQ.to(self.device) * 2 - 1)[0].float().cpu()

    def _denoise(self, jobs: list[Job], mask_pads: bool, progress: Progress) -> list[Tensor]:
        """The erased latents (C, H, W) on the CPU, in the order of the jobs."""
        network: Restorer | ConditionedDiT = self._part("restorer" if self.corrects else "transformer", mask_pads)
        dit = network.dit if isinstance(network, Restorer) else network
        guidance = self.bundle.config.sampling.guidance if dit.transformer.config["guidance_embeds"] else None
        done: dict[int, Tensor] = {}
        work = list(units(jobs, self.batch))
        for number, unit in enumerate(work, start=1):
            full = unit + [unit[-1]] * (self.batch - len(unit))

            def report(place: str, unit: str = f"batch {number} of {len(work)}") -> None:
                progress.at(f"{unit}, {place}")

            if isinstance(network, Restorer):
                z_BCHW = by_mean(network, full, self.bundle.config.control, guidance, self.device, report)
            else:
                z_BCHW = by_euler(network, full, guidance, self.device, report)
            done.update({job.index: z_CHW for job, z_CHW in zip(unit, z_BCHW.cpu(), strict=False)})
        del network, dit
        self._release()
        return [done[index] for index in range(len(jobs))]

    def _decode(self, latents: list[Tensor], rows: int, cols: int, progress: Progress) -> Tensor:
        progress.at("decoding")
        autoencoder: Autoencoder = self._part("vae")
        pictures = [autoencoder.decode(z_CHW[None].to(self.device))[0, :, :rows, :cols].cpu() for z_CHW in latents]
        del autoencoder
        self._release()
        return (torch.stack(pictures) / 2 + 0.5).clamp(0, 1)

    def _part(self, name: str, mask_pads: bool = False) -> Any:
        if name not in self._open:
            self._open[name] = self._opened(name, mask_pads)
        return self._open[name]

    def _opened(self, name: str, mask_pads: bool) -> Any:
        bundle, device, dtype = self.bundle, self.device, self.dtype
        if name == "text_encoder":
            return bundle.open_text_encoder(device, dtype)
        if name == "vae":
            return bundle.open_autoencoder(device, dtype)
        if name == "restorer":
            return bundle.open_restorer(device, dtype, mask_pads)
        # Alone: a bundle that is yet to be trained on these very pairs may have no ControlNet.
        transformer = load_part(FluxTransformer2DModel, bundle.part_folder("transformer"), dtype)
        return ConditionedDiT(transformer, None, (), mask_pads).to(device, dtype).eval().requires_grad_(False)

    def _release(self) -> None:
        if not self.keep:
            self.close()


def _bytes(bundle: Bundle, parts: tuple[str, ...]) -> int:
    files = [path for name in parts for path in bundle.part_folder(name).rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _check(hq_BCPQ: Tensor, params: Sequence[ErasureParams], prompts: Sequence[str]) -> None:
    shape = tuple(hq_BCPQ.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or not hq_BCPQ.is_floating_point():
        raise ValueError(f"expected (B, 3, P, Q) floating point, got {shape} {hq_BCPQ.dtype}")
    if min(shape[2:]) < TOKEN_SIDE:
        raise ValueError(f"crops of {shape[3]}x{shape[2]}: sides must be at least {TOKEN_SIDE}")
    if not len(params) == len(prompts) == shape[0]:
        raise ValueError(f"{shape[0]} crops, {len(params)} parameters and {len(prompts)} prompts")
