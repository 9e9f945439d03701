"""The networks of one bundle that are open just now: loaded when they are wanted, kept or freed after their phase."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dreamsr_cli.models.autoencoder import Autoencoder, Refiner
from dreamsr_cli.models.bundle import CLEANER, GRAIN, Bundle
from dreamsr_cli.models.cleaner import Cleaner
from dreamsr_cli.models.grain import Grain
from dreamsr_cli.models.quantization import PLAIN, MemoryMode
from dreamsr_cli.models.restorer import Restorer
from dreamsr_cli.models.text_encoder import TextEncoder

TEXT_ENCODER, AUTOENCODER, RESTORER, ENLARGER = "text_encoder", "autoencoder", "restorer", "enlarger"


class OpenParts:
    """Opens a bundle's networks on one device. What `keep` names stays open until `close`, so that a folder of photos
    loads it once; everything else lives until the next `release`.

    Whoever holds a part must have let go of it before `release`, `make_room` and `close`: they take its weights away.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype,
        mode: MemoryMode = PLAIN,
        keep: Iterable[str] = (),
    ) -> None:
        self.bundle, self.device, self.dtype, self.mode = bundle, device, dtype, mode
        self.keep = frozenset(keep)
        self._open: dict[str, Any] = {}

    def text_encoder(self) -> TextEncoder:
        """See `Bundle.open_text_encoder`."""
        return self._get(TEXT_ENCODER, lambda: self.bundle.open_text_encoder(self.device, self.dtype, self.mode))

    def autoencoder(self) -> Autoencoder:
        """See `Bundle.open_autoencoder`."""
        return self._get(AUTOENCODER, lambda: self.bundle.open_autoencoder(self.device, self.dtype))

    def enlarging_refiner(self, looks: str) -> Refiner:
        """See `Bundle.open_enlarging_refiner`."""

        def open_part() -> Refiner:
            network: Any = self.bundle.open_enlarging_refiner(looks).to(self.device)
            return network.to(self.dtype, memory_format=torch.channels_last)

        return self._get(f"{ENLARGER} {looks}", open_part)

    def cleaner(self) -> Cleaner:
        """See `Bundle.open_cleaner`; the bundle has the part."""

        def open_part() -> Cleaner:
            network: Any = self.bundle.open_cleaner()
            return network.to(self.device).to(self.dtype, memory_format=torch.channels_last)

        return self._get(CLEANER, open_part)

    def grain(self) -> Grain:
        """See `Bundle.open_grain`; the bundle has the part."""

        def open_part() -> Grain:
            network: Any = self.bundle.open_grain()
            return network.to(self.device).to(self.dtype, memory_format=torch.channels_last)

        return self._get(GRAIN, open_part)

    def restorer(self, mask_pads: bool) -> Restorer:
        """See `Bundle.open_restorer`; not placed yet where it was just loaded. One that had to be offloaded block by
        block for an earlier photo is loaded again: each photo begins as if it were alone."""
        found = self._open.get(RESTORER)
        if found is not None and found.offload == "block" != self.mode.offload:
            found = None
            self._free([RESTORER])
        return self._get(
            RESTORER, lambda: self.bundle.open_restorer(self.device, self.dtype, mask_pads, self.mode, False)
        )

    def release(self) -> None:
        """Free what isn't kept."""
        self._free([name for name in self._open if name.split()[0] not in self.keep])

    def make_room(self, but: str | None = None) -> bool:
        """Free everything but one part, and keep nothing from now on; whether that gave any memory back."""
        others = [name for name in self._open if name != but]
        self.keep = frozenset()
        self._free(others)
        return bool(others)

    def close(self) -> None:
        """Free everything."""
        self._free(list(self._open))

    def _get(self, name: str, open_part: Callable[[], Any]) -> Any:
        if name not in self._open:
            self._open[name] = open_part()
        return self._open[name]

    def _free(self, names: list[str]) -> None:
        for name in names:
            # Networks lie in reference cycles. Emptied they give their memory back without a search through all
            # objects of the process, which takes longer than a small photo's decoding.
            for module in _networks(self._open.pop(name)):
                module._parameters.clear()
                module._buffers.clear()
        if names and (self.device.type != "cpu" or self.mode.offload != "none"):
            gc.collect()  # hooks that move weights hold them too
        if names and self.device.type == "cuda":
            torch.cuda.empty_cache()


def _networks(part: Any) -> Iterator[nn.Module]:
    """All modules of a part, which is a network or an object that has some."""
    own = [part] if isinstance(part, nn.Module) else [v for v in vars(part).values() if isinstance(v, nn.Module)]
    for network in own:
        yield from network.modules()
