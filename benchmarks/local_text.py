"""Whether the local text does something: the loss of the velocity with right, shuffled and no local prompts.

    python benchmarks/local_text.py PHOTOS --model mini

Every photo is degraded and cut into tiles. For each tile the loss of eq. 5 is taken at several t, with the same noise,
under three local prompts: the tile's own (described from the good crop, as in training), another tile's, and an empty
one; the global prompt stays. The other tile is the same one of the next photo, or with --shuffle tiles one of the same
photo, half of its tiles further: its words are wrong about the tile, but not about the photo. With --detail-words
prompts also say how much fine detail the good tile has, as a share of the training prompts does: what its degraded copy
doesn't show. Differences are paired, their 95 % intervals by bootstrap over photos and over tiles. Also: how large each
text injection is, |M_txt(...)| / |f_txt| over the tokens that are text.

Axes: B batch, C channels, H W latent, P Q pixels, T tokens, D width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("right", "shuffled", "none")
PAIRS = (("right", "shuffled"), ("shuffled", "none"), ("right", "none"))


@dataclass(frozen=True)
class Tiles:
    """One photo's tiles, in the same order everywhere."""

    good_BCPQ: Tensor
    """On [-1, 1]."""
    bad_BCPQ: Tensor
    """Degraded and enlarged again, on [-1, 1]."""
    texts: list[str]
    glob: str


def read_tiles(path: Path, side: int, preset: str, seed: int, detailed: bool = False) -> Tiles:
    """Tiles of `side` pixels, side by side; the photo is cropped to whole tiles and degraded as a whole."""
    from bad_photo import degraded

    from dreamsr_cli.degradations import pixel
    from dreamsr_cli.models.captioner import Describer
    from dreamsr_cli.models.detail_words import with_detail

    good, small = degraded(path, side, preset, seed)
    rows, columns = (n // side for n in good.shape[1:])
    bad = pixel.enlarge(small, *good.shape[1:])

    def cut(x_CPQ: Tensor) -> Tensor:
        return x_CPQ.unflatten(1, (rows, side)).unflatten(3, (columns, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)

    def words(rgb_PQC: np.ndarray) -> str:
        said = Describer().describe(rgb_PQC)
        return with_detail(said, rgb_PQC) if detailed else said

    tiles = cut(good)
    texts = [words(tile.permute(1, 2, 0).numpy()) for tile in tiles]
    return Tiles(
        tiles * 2 - 1, cut(bad).clamp(0, 1) * 2 - 1, texts, Describer().describe(good.permute(1, 2, 0).numpy())
    )


class Injected:
    """Collects, for every context cross-attention, the size of what it adds relative to what it is added to."""

    def __init__(self, restorer: Any) -> None:
        attention = restorer.dit.context_attention
        self.blocks = [] if attention is None else list(attention.blocks)
        self.ratios: list[list[float]] = [[] for _ in self.blocks]

    @contextmanager
    def watching(self) -> Generator[None]:
        """Inside, the ratios of every forward pass are collected."""
        handles = [b.register_forward_hook(self._hook(i)) for i, b in enumerate(self.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def look(_: Any, args: tuple[Any, ...], after_BTD: Tensor) -> None:
            before_BTD = args[0]
            added = (after_BTD - before_BTD).float().norm(dim=-1) / before_BTD.float().norm(dim=-1).clamp_min(1e-9)
            self.ratios[index].append(float(added.mean()))

        return look

    def table(self) -> list[float]:
        """Mean ratio of each injection, in block order."""
        return [float(np.mean(r)) if r else 0.0 for r in self.ratios]


class Bench:
    """A bundle's networks, asked for velocities of tiles."""

    def __init__(self, model: str) -> None:
        from dreamsr_cli.models.bundle import open_bundle

        self.bundle = open_bundle(model)
        cpu = torch.device("cpu")
        self.text_encoder = self.bundle.open_text_encoder(cpu, torch.float32)
        self.mask_pads = not self.text_encoder.pads_are_seen
        self.restorer = self.bundle.open_restorer(cpu, torch.float32, self.mask_pads)
        self.autoencoder = self.bundle.open_autoencoder(cpu, torch.float32)
        self.longest = self.bundle.config.defaults.max_text_tokens
        self.injected = Injected(self.restorer)

    def embed(self, texts: list[str]) -> Any:
        from dreamsr_cli.models.text_encoder import stack

        return stack(self.text_encoder.encode(texts, self.longest)[0], self.longest)

    def control(self, condition_BCHW: Tensor, texts: list[str], t: float) -> Any:
        config = self.bundle.config.control
        times = torch.full((len(texts),), 0.0 if config.timestep == "clean" else t)
        features = self.restorer.controlnet(condition_BCHW, times, self.embed(texts), self.mask_pads)
        return self.restorer.dit.prepare(features, config.scale)

    def remove(self, z_lq_BCHW: Tensor, tiles: Tiles) -> Tensor:
        sampling = self.bundle.config.sampling
        ready = self.control(z_lq_BCHW, tiles.texts, sampling.t_r)
        lora = self.restorer.lora
        assert lora is not None, "a bundle without a LoRA has no removal step"
        with lora.on():
            made = self.restorer.dit(z_lq_BCHW, torch.full((1,), sampling.t_r), self.embed([tiles.glob]), ready)
        return z_lq_BCHW - (sampling.t_r * made if sampling.prediction == "velocity" else made)

    @torch.no_grad()
    def losses(self, tiles: Tiles, texts: dict[str, list[str]], ts: list[float], draws: int, seed: int) -> Any:
        """Array (kind, tile): the loss of eq. 5 weighted as in training, t^2 |v - (z_1 - z_0)|^2, mean over t and
        noise."""
        from dreamsr_cli import flow
        from dreamsr_cli.draws import generator

        z_0 = self.autoencoder.encode(tiles.good_BCPQ)
        z_dr = self.remove(self.autoencoder.encode(tiles.bad_BCPQ), tiles)
        glob = self.embed([tiles.glob])
        found = np.zeros((len(KINDS), len(z_0)))
        correction = self.bundle.config.sampling.prediction == "correction"
        clean = self.bundle.config.control.timestep == "clean"
        for k, kind in enumerate(KINDS):
            kept = self.control(z_dr, texts[kind], 0.0) if clean else None
            for t in ts:
                ready = kept if kept is not None else self.control(z_dr, texts[kind], t)
                for draw in range(draws):
                    rng = generator(seed, "local-text", draw)
                    eps = torch.from_numpy(rng.standard_normal(tuple(z_0.shape), dtype=np.float32))
                    z_t = flow.mix(z_0, eps, t)
                    with self.injected.watching():
                        v = self.restorer.dit(z_t, torch.full((1,), t), glob, ready)
                    if correction:
                        v = flow.velocity_of_correction(z_t, z_dr, v, t)
                    error = (t * (v - (eps - z_0))).square().mean((1, 2, 3))
                    found[k] += error.numpy() / (len(ts) * draws)
        return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from dreamsr_cli.errors import InputError
    from dreamsr_cli.evaluation.statistics import bootstrap_interval

    paths = sorted(p for p in Path(options.photos).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif"))
    photos = [
        read_tiles(path, options.tile, options.preset, options.seed, options.detail_words)
        for path in paths[: options.limit]
    ]
    if len(photos) < 2:
        raise InputError(f"{options.photos} holds {len(photos)} photos", "give a folder of two or more")
    bench = Bench(options.model)
    losses: list[np.ndarray] = []
    for i, tiles in enumerate(photos):
        other = photos[(i + 1) % len(photos)].texts
        if options.shuffle == "tiles":
            half = len(tiles.texts) // 2
            other = tiles.texts[half:] + tiles.texts[:half]
        texts = {
            "right": tiles.texts,
            "shuffled": [other[j % len(other)] for j in range(len(tiles.texts))],
            "none": [""] * len(tiles.texts),
        }
        losses.append(bench.losses(tiles, texts, options.t, options.draws, options.seed))
        print(f"{paths[i].name}: {len(tiles.texts)} tiles", file=sys.stderr)
    by_photo, by_tile = np.stack([x.mean(1) for x in losses], 1), np.concatenate(losses, 1)
    pairs = {}
    for a, b in PAIRS:
        i, j = KINDS.index(a), KINDS.index(b)
        pairs[f"{a} - {b}"] = {
            "mean": float((by_tile[i] - by_tile[j]).mean()),
            "relative": float((by_tile[i] - by_tile[j]).mean() / by_tile[j].mean()),
            "over_photos": bootstrap_interval((by_photo[i] - by_photo[j]).tolist(), 0, "local-text", a, b),
            "over_tiles": bootstrap_interval((by_tile[i] - by_tile[j]).tolist(), 0, "local-text-tiles", a, b),
            "tiles_lower": int((by_tile[i] < by_tile[j]).sum()),
        }
    return {
        "model": options.model,
        "photos": len(photos),
        "tiles": int(by_tile.shape[1]),
        "t": options.t,
        "loss": {kind: float(by_tile[k].mean()) for k, kind in enumerate(KINDS)},
        "differences": pairs,
        "injections": bench.injected.table(),
    }


def text(found: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    yield f"{found['model']}: {found['photos']} photos, {found['tiles']} tiles, t = {found['t']}"
    for kind, loss in found["loss"].items():
        yield f"  {kind:9} {loss:.6f}"
    for name, d in found["differences"].items():
        low, high = d["over_photos"]
        tiles = d["over_tiles"]
        yield (
            f"  {name:17} {d['mean']:+.2e} ({100 * d['relative']:+.3f} %), 95 % over photos [{low:+.2e}, {high:+.2e}], "
            f"over tiles [{tiles[0]:+.2e}, {tiles[1]:+.2e}], lower in {d['tiles_lower']} of {found['tiles']}"
        )
    yield "  |M_txt| / |f_txt| by injection: " + ", ".join(f"{x:.4f}" for x in found["injections"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="folder of good photos")
    parser.add_argument("--model", default="mini", help="bundle: a name or a folder")
    parser.add_argument("--preset", default="seesr-mild", help="degradation preset")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile in pixels, a multiple of 16")
    parser.add_argument("--t", type=float, nargs="+", default=[0.1, 0.3, 0.5], help="times")
    parser.add_argument("--draws", type=int, default=2, help="noise draws per tile and time")
    parser.add_argument("--detail-words", action="store_true", help="prompts that also say how much detail there is")
    parser.add_argument("--shuffle", choices=("photos", "tiles"), default="photos", help="whose the wrong prompts are")
    parser.add_argument("--limit", type=int, default=None, help="only the first photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    from command import report

    return report(lambda: measure(options), text, options.json)


if __name__ == "__main__":
    sys.exit(main())
