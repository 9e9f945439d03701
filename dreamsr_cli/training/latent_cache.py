"""Latents kept on disk by the content of their pictures: worth it where the same crops come back.

That is a set of pairs whose size is the crop's, without turns (`data.turns = 1`); random crops of photos never come
back, and fill the cache for nothing. Axes: B batch, C channels, H W latent, P Q pixels.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dreamsr_cli.models.autoencoder import Autoencoder

MOST_BYTES = 50_000_000_000


class LatentCache:
    """Latents by the autoencoder with the hash `autoencoder_sha256`."""

    def __init__(self, folder: Path, autoencoder_sha256: str, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.autoencoder_sha256 = folder, autoencoder_sha256
        self._room = most_bytes - sum(p.stat().st_size for p in folder.glob("*/*.safetensors"))
        self.hits = self.misses = 0

    def path(self, x_CPQ: torch.Tensor) -> Path:
        """Where the latent of a picture lies, or would."""
        pixels = x_CPQ.detach().float().cpu().contiguous()
        digest = hashlib.sha256(f"{self.autoencoder_sha256} {tuple(pixels.shape)} ".encode())
        digest.update(pixels.numpy().tobytes())
        key = digest.hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    @torch.no_grad()
    def encode(self, autoencoder: Autoencoder, x_BCPQ: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) float32 of pictures on [-1, 1], on their device. Each is encoded alone, so a hit and a
        miss give the same bytes."""
        return torch.cat([self._one(autoencoder, x_BCPQ[b : b + 1]) for b in range(len(x_BCPQ))])

    def _one(self, autoencoder: Autoencoder, x_1CPQ: torch.Tensor) -> torch.Tensor:
        path = self.path(x_1CPQ[0])
        try:
            found = load_file(path)["z_BCHW"]
            self.hits += 1
            return found.to(x_1CPQ.device)
        except (OSError, SafetensorError, KeyError):
            self.misses += 1
        z_BCHW = autoencoder.encode(x_1CPQ).float()
        size = z_BCHW.numel() * 4
        if size <= self._room:
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"z_BCHW": z_BCHW.cpu().contiguous()}, part)
                os.replace(part, path)
                self._room -= size
            except (OSError, SafetensorError):
                part.unlink(missing_ok=True)
                self._room = 0
        return z_BCHW
