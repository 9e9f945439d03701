"""report.html: one evaluation as a page that needs no network, with figures, distributions and the photos themselves.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dreamsr_cli.errors import DreamSRError
from dreamsr_cli.evaluation.crops_of_interest import find_places
from dreamsr_cli.evaluation.fidelity import open_spilled
from dreamsr_cli.evaluation.figures_text import figure
from dreamsr_cli.evaluation.lanczos import LanczosPhoto
from dreamsr_cli.evaluation.page import Picture, page, save, slider, text
from dreamsr_cli.evaluation.page_pictures import ReadRows, crop, data_uri, preview
from dreamsr_cli.evaluation.plots import distribution
from dreamsr_cli.evaluation.report_parts import (
    definitions,
    difference_table,
    failure_list,
    photo_table,
    summary_table,
)
from dreamsr_cli.evaluation.results import Evaluation, PhotoRow
from dreamsr_cli.images import Photo
from dreamsr_cli.progress import Progress, SilentProgress

LIMIT_PHOTOS = 24
"""Photos shown with pictures, unless asked otherwise."""
PICTURE_BYTES = 30 * 2**20
"""All pictures of a page together, at most; photos beyond have none."""
LARGEST, SMALLEST = 1024, 320
"""Longest side of a shown picture: as large as the bytes allow between these."""
CROP, PLACES = 96, 2
"""Side in result pixels, and number, of the zoomed crops of a photo."""
_BYTES_PER_PIXEL = 0.35  # of WebP at the quality used, photographs with noise; base64 included
_PICTURE_QUALITY, _CROP_QUALITY = 82, 92


@dataclass(frozen=True)
class _Source:
    """One picture of a photo at the common size."""

    name: str
    read_rows: ReadRows
    icc: bytes | None


def write_report(
    evaluation: Evaluation, folder: Path, limit_photos: int = LIMIT_PHOTOS, progress: Progress | None = None
) -> Path:
    """Write FOLDER/report.html, whole or not at all; its path.

    `limit_photos`: at most so many photos get pictures, spread from the best to the worst by the first metric. A photo
    whose files can't be read any more is named as such. `OutputError` if the folder can't be written.
    """
    progress = SilentProgress() if progress is None else progress
    groups = _by_photo(evaluation)
    chosen = choose_photos(evaluation, limit_photos)
    progress.phase("report", len(chosen))
    side = _picture_side(sum(len(groups[name]) + 1 + (groups[name][0].hq is not None) for name in chosen))
    shown: list[str] = []
    sections: list[str] = []
    left_out: list[str] = []
    used = 0
    for name in chosen:
        try:
            section = _photo_section(evaluation, groups[name], f"photo-{len(shown)}", side)
        except DreamSRError as error:
            left_out.append(f"{name}: {error.message}")
            continue
        finally:
            progress.advance()
        if used + len(section) > PICTURE_BYTES:
            left_out.append(f"{name}: the page would be larger than {PICTURE_BYTES // 2**20} MiB")
            continue
        used += len(section)
        shown.append(name)
        sections.append(section)
    body, parts = _body(evaluation, groups, shown, sections, left_out)
    return save(folder / "report.html", page(f"{evaluation.label} · dreamsr eval", body, parts))


def choose_photos(evaluation: Evaluation, limit: int) -> list[str]:
    """Names of the photos to show: all, or `limit` of them evenly from best to worst by the first method's first metric
    (those without a figure last), worst and best among them; in the order of the names."""
    names = sorted(_by_photo(evaluation))
    if len(names) <= limit:
        return names
    if limit < 1:
        return []
    first, metrics = evaluation.methods[0], evaluation.metrics
    values = {r.name: r.values.get(metrics[0].id) for r in evaluation.rows if r.method == first} if metrics else {}
    sign = 1 if metrics and metrics[0].lower_better else -1

    def rank(name: str) -> tuple[bool, float, str]:
        value = values.get(name)
        known = value is not None and not math.isnan(value)
        return not known, sign * value if value is not None and known else 0.0, name

    ranked = sorted(names, key=rank)
    places = [0] if limit == 1 else [round(i * (len(ranked) - 1) / (limit - 1)) for i in range(limit)]
    return sorted(ranked[place] for place in places)


def _by_photo(evaluation: Evaluation) -> dict[str, list[PhotoRow]]:
    groups: dict[str, list[PhotoRow]] = {}
    for method in evaluation.methods:
        for row in evaluation.rows:
            if row.method == method:
                groups.setdefault(row.name, []).append(row)
    return groups


def _picture_side(pictures: int) -> int:
    side = math.sqrt(0.8 * PICTURE_BYTES / (_BYTES_PER_PIXEL * max(1, pictures)))
    return int(min(LARGEST, max(SMALLEST, side)))


def _photo_section(evaluation: Evaluation, rows: list[PhotoRow], id: str, side: int) -> str:
    """One photo: its figures, the slider, and crops where its pictures differ most."""
    with ExitStack() as stack:
        photo = stack.enter_context(open_spilled(rows[0].lq))
        results = [(row.method, stack.enter_context(open_spilled(row.sr))) for row in rows]
        reference = next((row.hq for row in rows if row.hq is not None), None)
        if reference is not None:
            results.append(("reference", stack.enter_context(open_spilled(reference))))
        width, height = results[0][1].info.width, results[0][1].info.height
        sources = [_Source("photo, enlarged", LanczosPhoto(photo, width, height).read_rows, photo.info.icc)]
        sources += [_Source(name, _at_size(made, width, height), made.info.icc) for name, made in results]
        pictures = []
        for source in sources:
            small_PQC = preview(source.read_rows, source.icc, width, height, side)
            pictures.append(Picture(source.name, data_uri(small_PQC, _PICTURE_QUALITY)))
        shape = small_PQC.shape[1], small_PQC.shape[0]
        # what methods make of a photo; a single one is held against the photo itself
        held = sources[1 : 1 + len(rows)] if len(rows) > 1 else sources[:2]
        places = find_places([source.read_rows for source in held], width, height, CROP, PLACES)
        crops = "".join(_crops(sources, place) for place in places)
    figures = "".join(
        f"<li><strong>{text(row.method)}</strong>: "
        + ", ".join(f"{text(m.id)} {figure(row.values.get(m.id), m)}" for m in evaluation.metrics)
        + "</li>"
        for row in rows
    )
    against = "the methods differ most" if len(rows) > 1 else "the result differs most from the photo"
    zoom = f'<p class="soft">Zoomed, where {against}:</p>{crops}' if places else ""
    return (
        f'<section class="photo" id="{id}"><h3>{text(rows[0].name)} <span class="soft">{photo.info.width} × '
        f'{photo.info.height} → {width} × {height} pixels</span></h3><ul class="soft">{figures}</ul>'
        f"{slider(id + '-slider', pictures, shape, 0, 1)}{zoom}</section>"
    )


def _at_size(photo: Photo, width: int, height: int) -> ReadRows:
    if (photo.info.width, photo.info.height) == (width, height):
        return photo.read_rows
    return LanczosPhoto(photo, width, height).read_rows


def _crops(sources: list[_Source], place: tuple[int, int, int, int]) -> str:
    figures = []
    for source in sources:
        uri = data_uri(crop(source.read_rows, source.icc, place, CROP), _CROP_QUALITY)
        words = f"{source.name}, at {place[0]}, {place[1]}"
        figures.append(
            f'<figure><img src="{uri}" alt="{text(words)}" width="{place[2] - place[0]}" '
            f'height="{place[3] - place[1]}" loading="lazy"><figcaption>{text(source.name)}</figcaption></figure>'
        )
    return f'<div class="crops" style="grid-auto-flow:column" tabindex="0">{"".join(figures)}</div>'


def _body(
    evaluation: Evaluation,
    groups: dict[str, list[PhotoRow]],
    shown: list[str],
    sections: list[str],
    left_out: list[str],
) -> tuple[str, list[tuple[str, str]]]:
    """HTML of <main>, and (id, name) of its parts."""
    facts = [
        ("photos", len(groups)),
        ("methods", len(evaluation.methods)),
        ("metrics", len(evaluation.metrics)),
        ("failures", len(evaluation.failures)),
    ]
    notes = "".join(f"<p>{text(note)}</p>" for note in evaluation.notes)
    out = [
        f"<h1>{text(evaluation.label)}</h1>",
        '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>",
        f'<div class="warn">{notes}</div>' if notes else "",
    ]
    parts: list[tuple[str, str]] = []

    def add(id: str, name: str, lead: str, content: str) -> None:
        if content:
            parts.append((id, name))
            out.append(f'<section id="{id}"><h2>{name}</h2><p class="soft">{lead}</p>{content}</section>')

    lead = (
        "Mean over photos, its 95 % interval (bootstrap), median and number of photos. Bold: the best mean, where "
        "every method has the same number of photos. ↑ larger is better, ↓ smaller is better."
    )
    add("summary", "Summary", lead, summary_table(evaluation))
    lead = "Photo by photo on the same photos. An interval that does not hold 0 is a clear difference."
    add("differences", "Differences", lead, difference_table(evaluation))
    plots = "".join(f"<figure>{svg}</figure>" for m in evaluation.metrics if (svg := distribution(evaluation, m)))
    lead = "A dot is a photo, the box the middle half with the median in it, the diamond the mean on its interval."
    add("distributions", "Distributions", lead, f'<div class="plots">{plots}</div>' if plots else "")
    pictures = "".join(sections)
    if left_out:
        pictures += (
            '<div class="warn"><p>Without pictures:</p>' + "".join(f"<p>{text(w)}</p>" for w in left_out) + "</div>"
        )
    of = f"{len(shown)} of {len(groups)} photos" if len(shown) < len(groups) else "All photos"
    spread = ", spread from the best to the worst by the first metric" if len(shown) < len(groups) else ""
    lead = f"{of}{spread}. Drag the bar, or focus it and use the arrow keys; choose what is shown at each side."
    add("pictures", "Pictures", lead, pictures)
    lead = "Click a head to sort; again for the other direction."
    add("photos", "Every photo", lead, photo_table(evaluation, shown) if evaluation.rows else "")
    add("failures", "Not scored", "These are in no mean.", failure_list(evaluation))
    add("definitions", "Definitions", "What each figure is, in full.", definitions(evaluation))
    return "".join(out), parts
