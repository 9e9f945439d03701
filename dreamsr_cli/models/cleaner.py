"""The cleaner: a damaged photo four times as large, rid of noise, JPEG blocks and blur as far as its pixels tell.

Stage 1 and everything after it see a photo enlarged by the cubic, where a pixel's damage has become a blotch of
sixteen. A network at the photo's own size sees it where it is small, sixteen times cheaper, and learns within minutes
what takes those at the large size days (docs/mini.md, row 54). So it takes the place of stage 1, as in restoration
models that put a network trained by squares before their diffusion (DiffBIR, Lin et al. 2024). A U-Net of plain
residual blocks (Ronneberger et al. 2015), without normalisation, which spoils brightness (EDSR, Lim et al. 2017);
sub-pixels at its end (Shi et al. 2016).

Axes: B batch, C channels, P Q pixel rows and columns of the photo.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.models.fourfold import FACTOR, FourfoldRows
from dreamsr_cli.resample import KeptStrips, ReadRows

FAITHFUL, PLEASING = MANNERS = "faithful", "pleasing"
"""As close to the pixels as squares get, for results without texture; and as people would like it, as LPIPS says, for
texture to begin from."""
VIEWS: dict[int, tuple[int, ...]] = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}
"""How a photo is looked at, by number of views: by how many quarters it is turned in each. The mean of what a network
makes of them has fewer of its own patterns (Timofte et al. 2016). Turned views beat as many mirrored ones
(docs/mini.md, row 74)."""
_PLACES = "at_full", "at_half", "at_quarter"
ALIGN = 4
"""Sides of what the network sees are multiples of this: it halves them twice."""


class Cleaner(ModelMixin, ConfigMixin):
    """What is added to a photo that the antialiased cubic enlarged four times, in one of `MANNERS`."""

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, int, int] = (48, 96, 140),
        blocks: tuple[int, int, int] = (1, 2, 2),
        pleases: bool = False,
        views: int = 1,
    ) -> None:
        """`widths`: channels at the photo's size, at half and at a quarter of it. `blocks`: residual blocks there, on
        the way down, and again on the way up but at the quarter. `pleases`: whether it has that manner; else it is
        faithful always. `views`: a number in `VIEWS`. Untrained it adds nothing. ValueError for other views."""
        super().__init__()
        self.look(views)
        self.down = _Down(widths, blocks)
        self.faithful = _Up(widths, blocks)
        self.pleasing = _Up(widths, blocks) if pleases else None

    @property
    def reach(self) -> int:
        """Rows of the photo on each side that a row of the result depends on, at most; a multiple of `ALIGN`."""
        full, half, quarter = self.config["blocks"]
        return -(-(2 + 4 * full + 2 * 4 * half + 4 * 2 * quarter + ALIGN) // ALIGN) * ALIGN

    def learn_to_please(self) -> None:
        """From now on it has the pleasing manner, which begins as the faithful one."""
        if self.pleasing is None:
            self.pleasing = copy.deepcopy(self.faithful)
            self.register_to_config(pleases=True)

    def deepen(self, blocks: Sequence[int]) -> None:
        """From now on it has at least so many residual blocks at the photo's size, at half and at a quarter of it. New
        ones come after those that are there, and change nothing until they are trained."""
        widths, had = self.config["widths"], self.config["blocks"]
        wanted = tuple(map(max, had, blocks))
        for part in filter(None, (self.down, self.faithful, self.pleasing)):
            for name, width, count in zip(_PLACES, widths, wanted, strict=True):
                here = getattr(part, name, None)
                if here is not None:
                    here.extend(_blocks(width, count - len(here)))
        self.register_to_config(blocks=wanted)

    def look(self, views: int) -> None:
        """From now on it looks at photos in so many of `VIEWS`. ValueError for a number that isn't there."""
        if views not in VIEWS:
            raise ValueError(f"a cleaner with {views} views: use one of {', '.join(map(str, VIEWS))}")
        self.register_to_config(views=views)

    def forward(self, photo_B3PQ: Tensor, manner: str) -> Tensor:
        """Photos on [0, 1], P and Q multiples of `ALIGN`, to (B, 3, 4P, 4Q) on the same scale, float32: what the cubic
        gets added, the mean of all views. The way down learns from the faithful manner alone."""

        def seen(photo_B3PQ: Tensor) -> Tensor:
            levels = self._levels(photo_B3PQ)
            if manner == FAITHFUL or self.pleasing is None:
                return self.faithful(levels)
            return self.pleasing([level.detach() for level in levels])

        return self._mean_view(photo_B3PQ, seen)

    def both(self, photo_B3PQ: Tensor, sharing: float) -> tuple[Tensor, Tensor]:
        """What `forward` gives in each of `MANNERS`, (B, 3, 4P, 4Q) both; the way down learns from both, but gets only
        `sharing` (0 to 1) of the second one's gradient. `ValueError` where there is no second one."""
        if self.pleasing is None:
            raise ValueError("this cleaner has one manner: learn_to_please first")
        pleasing = self.pleasing

        def seen(photo_B3PQ: Tensor) -> Tensor:
            levels = self._levels(photo_B3PQ)
            shared = [level.detach() + sharing * (level - level.detach()) for level in levels]
            return torch.stack((self.faithful(levels), pleasing(shared)))

        faithful, pleased = self._mean_view(photo_B3PQ, seen)
        return faithful, pleased

    def _mean_view(self, photo_B3PQ: Tensor, seen: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of what is seen in each view, turned back; one after the other, which saves memory at inference."""
        _, *others = VIEWS[self.config["views"]]
        total = seen(photo_B3PQ)
        for quarters in others:
            # Turned by a quarter, a photo no longer lies in memory as convolutions want it.
            turned_B3PQ = torch.rot90(photo_B3PQ, quarters, (-2, -1)).contiguous(memory_format=torch.channels_last)
            total = total + torch.rot90(seen(turned_B3PQ), -quarters, (-2, -1))
        return total / (1 + len(others)) if others else total

    def _levels(self, photo_B3PQ: Tensor) -> list[Tensor]:
        return self.down((photo_B3PQ - 0.5).to(self.down.entry.weight.dtype))


class _Down(nn.Module):
    """A photo's features at its size, at half and at a quarter of it."""

    def __init__(self, widths: tuple[int, int, int], blocks: tuple[int, int, int]) -> None:
        super().__init__()
        full, half, quarter = widths
        self.entry = nn.Conv2d(3, full, 3, padding=1)
        self.to_half, self.to_quarter = nn.Conv2d(full, half, 2, 2), nn.Conv2d(half, quarter, 2, 2)
        self.at_full, self.at_half, self.at_quarter = (_blocks(w, n) for w, n in zip(widths, blocks, strict=True))

    def forward(self, photo_B3PQ: Tensor) -> list[Tensor]:
        full = self.at_full(self.entry(photo_B3PQ))
        half = self.at_half(self.to_half(full))
        return [full, half, self.at_quarter(self.to_quarter(half))]


class _Up(nn.Module):
    """From these features to pixels."""

    def __init__(self, widths: tuple[int, int, int], blocks: tuple[int, int, int]) -> None:
        super().__init__()
        full, half, quarter = widths
        self.from_quarter, self.from_half = (
            nn.ConvTranspose2d(quarter, half, 2, 2),
            nn.ConvTranspose2d(half, full, 2, 2),
        )
        self.at_half, self.at_full = _blocks(half, blocks[1]), _blocks(full, blocks[0])
        self.exit = nn.Conv2d(full, 3 * FACTOR**2, 3, padding=1)
        _silence(self.exit)

    def forward(self, levels: list[Tensor]) -> Tensor:
        full, half, quarter = levels
        x = self.at_half(half + self.from_quarter(quarter))
        x = self.at_full(full + self.from_half(x))
        return F.pixel_shuffle(self.exit(x).float(), FACTOR)


class _Residual(nn.Module):
    """A residual block of two convolutions; the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        _silence(self.second)

    def forward(self, x_BCPQ: Tensor) -> Tensor:
        return x_BCPQ + self.second(F.relu(self.first(x_BCPQ)))


def _silence(conv: nn.Conv2d) -> None:
    """Let it give zeros until it is trained."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width) for _ in range(count)))


class CleanedRows(FourfoldRows[Cleaner]):
    """Rows of a damaged photo, cleaned."""

    STRIP = 128
    """As large as the halo of a strip, which is computed with it, allows."""
    COLUMNS = 512
    """Of a strip that are computed at a time."""

    def __init__(
        self,
        network: Cleaner,
        manner: str,
        read_photo: ReadRows,
        height: int,
        width: int,
        out_height: int,
        out_width: int,
        device: torch.device,
        on_strip: Callable[[], None] = lambda: None,
        kept: KeptStrips | None = None,
    ) -> None:
        """As `FourfoldRows`, in one of `MANNERS`."""
        super().__init__(network, read_photo, height, width, out_height, out_width, device, on_strip, kept)
        self._manner = manner

    def _strip(self, strip: int) -> np.ndarray:
        first, last = strip * self.STRIP, min((strip + 1) * self.STRIP, self._height)
        reach = self._network.reach
        begin, end = max(0, first - reach), min(self._height, last + reach)
        made_PQC, photo_PQC = self._cubic(first, last), self._read_photo(begin, end)
        # A side of the photo is padded where it ends; where a strip or a block of columns begins nothing is: those
        # lie at multiples of ALIGN.
        photo_PQC = np.pad(photo_PQC, ((0, -len(photo_PQC) % ALIGN), (0, -self._width % ALIGN), (0, 0)), mode="edge")
        for left in range(0, self._width, self.COLUMNS):
            right = min(left + self.COLUMNS, self._width)
            near, far = max(0, left - reach), min(photo_PQC.shape[1], right + reach)
            far = min(photo_PQC.shape[1], -(-far // ALIGN) * ALIGN)
            rows, columns = slice(first - begin, last - begin), slice(left - near, right - near)
            made_PQC[:, FACTOR * left : FACTOR * right] += self._added(photo_PQC[:, near:far], rows, columns)
        self._on_strip()
        return np.clip(made_PQC, 0, 1, out=made_PQC)

    @torch.inference_mode()
    def _added(self, photo_PQC: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """What the cubic gets added within these rows and columns of a piece of the photo."""
        photo_BCPQ = torch.from_numpy(np.ascontiguousarray(photo_PQC.transpose(2, 0, 1)))[None].to(self._device)
        added_BCPQ = self._network(photo_BCPQ.contiguous(memory_format=torch.channels_last), self._manner)
        large = (slice(FACTOR * part.start, FACTOR * part.stop) for part in (rows, columns))
        return added_BCPQ[0].permute(1, 2, 0)[tuple(large)].cpu().numpy()
