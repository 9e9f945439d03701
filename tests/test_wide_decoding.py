"""FLUX's autoencoder on wide strips: spans of bounded width, cross-faded; memory doesn't grow with the canvas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreamsr_cli.counting_pixels import FLUX_COLUMNS, FLUX_HALO, column_spans
from dreamsr_cli.models.autoencoder import STRIDE, FluxAutoencoder
from dreamsr_cli.models.bundle import open_bundle

WIDTH = 2600


@pytest.fixture(scope="module")
def autoencoder(tiny_flux_bundle: Path) -> FluxAutoencoder:
    made = open_bundle(str(tiny_flux_bundle)).open_autoencoder(torch.device("cpu"), torch.float32)
    assert isinstance(made, FluxAutoencoder)
    return made


@pytest.mark.parametrize("columns", [8, 1024, 1032, WIDTH, 2048, 65536])
def test_spans_cover_the_width_once_and_never_grow(columns: int) -> None:
    spans = column_spans(columns)
    assert spans[0][0] == 0 and spans[-1][1] == columns
    assert all(one[1] == other[0] for one, other in zip(spans, spans[1:], strict=False))
    for begin, end, first, last in spans:
        assert begin % STRIDE == end % STRIDE == first % STRIDE == last % STRIDE == 0
        assert 0 < end - begin <= FLUX_COLUMNS + STRIDE and last - first <= FLUX_COLUMNS + STRIDE + 2 * FLUX_HALO
        assert (first, last) == (max(0, begin - FLUX_HALO), min(columns, end + FLUX_HALO))


@torch.no_grad()
def test_wide_strips_are_handled_span_by_span(autoencoder: FluxAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode, decode = autoencoder._encode, autoencoder._decode
    monkeypatch.setattr(autoencoder, "_encode", lambda x: (seen.append(x.shape[3]), encode(x))[1])
    monkeypatch.setattr(autoencoder, "_decode", lambda z: (seen.append(STRIDE * z.shape[3]), decode(z))[1])
    rgb = torch.rand(1, 3, 32, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = autoencoder.encode(rgb)
    out = autoencoder.decode(z)
    assert z.shape == (1, 8, 4, WIDTH // 8) and out.shape == rgb.shape and out.isfinite().all()
    assert len(seen) == 6 and max(seen) <= FLUX_COLUMNS + STRIDE + 2 * FLUX_HALO
    # Away from the seams a span is what it is alone; at the very seam the two have equal weight.
    (_, end, first, last), (begin, _, other_first, other_last) = column_spans(WIDTH)[:2]
    one = autoencoder._decode(z[..., first // 8 : last // 8])
    other = autoencoder._decode(z[..., other_first // 8 : other_last // 8])
    assert torch.allclose(out[..., : end - FLUX_HALO], one[..., : end - FLUX_HALO], atol=1e-5)
    beside = 0.5 * (one[..., end - 1 : end + 1] + other[..., end - 1 - other_first : end + 1 - other_first])
    assert begin == end and torch.allclose(out[..., end - 1 : end + 1], beside, atol=0.02 * float(out.std()) + 1e-3)


@torch.no_grad()
def test_a_flat_canvas_shows_no_seam(autoencoder: FluxAutoencoder) -> None:
    z = torch.full((1, 8, 4, WIDTH // 8), 0.3)
    out = autoencoder.decode(z)
    inside = out[..., 200:-200]
    alone = autoencoder._decode(z[..., :144])[..., 200:-200]
    assert inside.amax() - inside.amin() <= (alone.amax() - alone.amin()) * 1.5 + 1e-3
