"""Columns that need no reference photo: colour kept, and seams between tiles (`fidelity.py` computes them)."""

from __future__ import annotations

from functools import lru_cache

from dreamsr_cli.errors import InputError
from dreamsr_cli.evaluation.metric import Metric, Sample
from dreamsr_cli.evaluation.results import MetricId

_IDS = {
    "delta-e": MetricId(
        id="delta-e",
        variant="mean CIEDE2000 against the low-quality photo",
        definition="mean CIEDE2000 between the low-quality photo and the result shrunk to its size by the antialiased "
        "cubic; no reference used",
        weights_sha256=None,
        lower_better=True,
        unit="",
    ),
    "seam": MetricId(
        id="seam",
        variant="1: as seamless as the Lanczos picture",
        definition="mean absolute second difference of luma across tile borders over the same across parallel lines at "
        "least 32 px away at multiples of 16 px, minus that ratio in the Lanczos picture, plus 1",
        weights_sha256=None,
        lower_better=True,
        unit="",
    ),
}
_KEYS = {"delta-e": "delta_e_mean", "seam": "seam"}


def fidelity_metric(name: str) -> Metric:
    """The column "delta-e" or "seam"."""

    def score(sample: Sample) -> float:
        if name == "seam" and (sample.grid is None or len(sample.grid.tiles) < 2):
            raise InputError("made in one tile, so there is no seam", "leave it out")
        found = _figures(sample).get(_KEYS[name])
        if found is None:
            raise InputError("no line lies far enough from the tile borders", "leave it out")
        return found

    return Metric(_IDS[name], False, score)


@lru_cache(maxsize=1)
def _figures(sample: Sample) -> dict[str, float]:
    from dreamsr_cli.evaluation.fidelity import photo_fidelity

    return photo_fidelity(sample.lq, sample.sr, sample.grid)
