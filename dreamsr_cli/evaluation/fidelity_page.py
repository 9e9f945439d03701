"""A fidelity report as a page that needs no network: before and after, the map of differences, tiles, borders.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dreamsr_cli.evaluation.fidelity import FidelityReport, TileScore, open_spilled
from dreamsr_cli.evaluation.lanczos import LanczosPhoto
from dreamsr_cli.evaluation.page import Picture, frame, page, save, slider, sortable, text
from dreamsr_cli.evaluation.page_pictures import HEAT, crop, data_uri, heat_map, preview
from dreamsr_cli.evaluation.suspicion import CUT, FEWEST
from dreamsr_cli.images import Photo

SIDE = 1400
"""Longest side of the shown pictures; larger ones are shrunk."""
SHOWN_TILES = 8
"""Suspicious tiles with pictures, those with most reasons first."""
LISTED_TILES = 1000
"""Most rows of the table of tiles; suspicious ones come first."""
_TILE_SIDE = 448
_QUALITY = 84
_NUMBERS_FIT = 300  # tiles; more of them leave no room for their numbers on the map


def write_fidelity_page(report: FidelityReport, path: Path) -> Path:
    """Write the page to `path`, whole or not at all; its path. Reads both pictures again, in strips.

    `InputError` as in `open_photo`, `OutputError` if the folder can't be written.
    """
    width, height = report.width, report.height
    anything = sys.maxsize  # both were opened for the report already
    with open_spilled(report.input, anything) as photo, open_spilled(report.output, anything) as result:
        plain = LanczosPhoto(photo, width, height)
        before_PQC = preview(plain.read_rows, photo.info.icc, width, height, SIDE)
        after_PQC = preview(result.read_rows, result.info.icc, width, height, SIDE)
        pictures = [
            Picture("photo, enlarged", data_uri(before_PQC, _QUALITY)),
            Picture("result", data_uri(after_PQC, _QUALITY)),
        ]
        tiles = "".join(_tile_section(tile, plain, photo, result) for tile in report.suspicious[:SHOWN_TILES])
        source = f"{photo.info.width} × {photo.info.height}"
    shape = before_PQC.shape[1], before_PQC.shape[0]
    flagged = report.suspicious
    verdict = (
        f'<p class="label">{_count(len(flagged), "tile stands", "tiles stand")} out: '
        f"{', '.join(str(tile.index) for tile in flagged[:20])}{' …' if len(flagged) > 20 else ''}</p>"
        if flagged
        else "<p>No tile stands out.</p>"
    )
    body = (
        f'<h1>{text(report.output.name)}</h1><p class="soft">from {text(report.input.name)}, {source} → {width} × '
        f"{height} pixels, {_count(len(report.tiles), 'tile', 'tiles')} of {report.tile[0]} × {report.tile[1]}, "
        f"overlap {report.overlap}</p>{_facts(report)}{verdict}"
        f'<section id="slider"><h2>Before and after</h2><p class="soft">Drag the bar, or focus it and use the arrow '
        f"keys.</p>{slider('before-after', pictures, shape, 0, 1)}</section>"
        f"{_map_section(report, shape)}"
        f'<section id="suspicious"><h2>Tiles to look at</h2>{tiles or "<p>None.</p>"}</section>'
        f"{_tile_table(report)}{_border_table(report)}{_EXPLAINED}"
    )
    parts = [
        ("slider", "Before and after"),
        ("map", "Map"),
        ("suspicious", "Tiles to look at"),
        ("tiles", "All tiles"),
        ("borders", "Borders"),
        ("explained", "Explained"),
    ]
    return save(path, page(f"{report.output.name} · fidelity", body, parts))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _score(value: float | None, decimals: int = 2) -> str:
    return "–" if value is None else f"{value:.{decimals}f}".replace("-", "−")


def _chance(mean: float, deviation: float) -> str:
    return f"{_score(mean, 3)} ± {_score(deviation, 3)}"


def _facts(report: FidelityReport) -> str:
    facts = (
        ("ΔE mean", _score(report.delta_e_mean)),
        ("ΔE 95th percentile", _score(report.delta_e_p95)),
        ("ΔE largest", _score(report.delta_e_max)),
        ("seam score", _score(report.seam, 3)),
        *([("where no border is", _chance(*report.seam_elsewhere))] if report.seam_elsewhere else []),
        ("lattice score", _score(report.lattice, 3)),
        ("suspicious tiles", f"{len(report.suspicious)} of {len(report.tiles)}"),
    )
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>"


def _map_section(report: FidelityReport, shape: tuple[int, int]) -> str:
    """The map, bright where the result differs, under the tile grid."""
    top = max(5.0, min(20.0, 2 * report.delta_e_p95))
    uri = data_uri(heat_map(report.map_PQ, top), 90)
    rects, labels = [], []
    size = max(0.12 * min(report.tile), 0.022 * max(report.width, report.height))
    for tile in sorted(report.tiles, key=lambda tile: bool(tile.suspicious)):
        left, upper, right, lower = tile.box
        kind = ' class="bad"' if tile.suspicious else ""
        words = text(f"tile {tile.index}: ΔE {tile.delta_e:.1f}. {'; '.join(tile.suspicious)}")
        rects.append(
            f'<rect{kind} x="{left}" y="{upper}" width="{right - left}" height="{lower - upper}">'
            f"<title>{words}</title></rect>"
        )
        if tile.suspicious or len(report.tiles) <= _NUMBERS_FIT:
            labels.append(
                f'<text x="{(left + right) / 2}" y="{(upper + lower) / 2 + size * 0.35}" text-anchor="middle" '
                f'stroke-width="{size / 8:.1f}" style="font-size:{size:.0f}px">{tile.index}</text>'
            )
    colours = ",".join(f"rgb({r} {g} {b})" for r, g, b in HEAT)
    return (
        '<section id="map"><h2>Where the result differs from the photo</h2><p class="soft">The result, shrunk to the '
        "photo's size, against the photo: CIEDE2000, dark where they agree. About 1 is hardly seen; 5 is plain. "
        "Thick frames: suspicious tiles.</p>"
        f'<div class="legend">0 <span class="bar" style="background:linear-gradient(90deg,{colours})"></span> ΔE '
        f'{top:.0f} and more</div><div class="map" style="{frame(shape)}"><img src="{uri}" alt="Map of differences">'
        f'<svg viewBox="0 0 {report.width} {report.height}" preserveAspectRatio="none" role="img" '
        f'aria-label="Tile grid">{"".join(rects)}{"".join(labels)}</svg></div></section>'
    )


def _tile_section(tile: TileScore, plain: LanczosPhoto, photo: Photo, result: Photo) -> str:
    width, height = tile.box[2] - tile.box[0], tile.box[3] - tile.box[1]
    before_PQC = crop(plain.read_rows, photo.info.icc, tile.box, _TILE_SIDE)
    after_PQC = crop(result.read_rows, result.info.icc, tile.box, _TILE_SIDE)
    pictures = [
        Picture("photo, enlarged", data_uri(before_PQC, _QUALITY)),
        Picture("result", data_uri(after_PQC, _QUALITY)),
    ]
    shape = after_PQC.shape[1], after_PQC.shape[0]
    return (
        f'<section class="photo"><h3>Tile {tile.index} <span class="soft">row {tile.row}, column {tile.column}, '
        f"{width} × {height} pixels at {tile.box[0]}, {tile.box[1]}</span></h3>"
        f'<ul class="label">{"".join(f"<li>{text(why)}</li>" for why in tile.suspicious)}</ul>'
        f"{slider(f'tile-{tile.index}', pictures, shape, 0, 1)}</section>"
    )


def _tile_table(report: FidelityReport) -> str:
    ordered = [*report.suspicious, *(tile for tile in report.tiles if not tile.suspicious)]
    names = ("tile", "row", "column", "ΔE", "colour shift", "texture", "seam")
    heads = "".join(sortable(name, "number") for name in names) + sortable("why it stands out", "text")
    rows = []
    for tile in ordered[:LISTED_TILES]:
        numbers = [(tile.index, 0), (tile.row, 0), (tile.column, 0), (tile.delta_e, 2), (tile.shift, 2)]
        cells = "".join(
            f'<td data-value="{"" if value is None else value}">{_score(value, decimals)}</td>'
            for value, decimals in [*numbers, (tile.texture, 2), (tile.seam, 3)]
        )
        why = text("; ".join(tile.suspicious))
        rows.append(f'<tr>{cells}<td class="words" data-value="{why}">{why}</td></tr>')
    rest = len(ordered) - len(rows)
    more = f'<p class="soft">The other {rest} tiles are not listed.</p>' if rest else ""
    return (
        f'<section id="tiles"><h2>All tiles</h2><p class="soft">Suspicious ones first; click a head to sort.</p>'
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="Scores of tiles"><table><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}</section>"
    )


def _border_table(report: FidelityReport) -> str:
    if not report.borders:
        return '<section id="borders"><h2>Borders</h2><p>No tile border to score lies inside the picture.</p></section>'
    rows = "".join(
        f"<tr><td>{'vertical' if seam.axis == 'column' else 'horizontal'}</td><td>{seam.position}</td>"
        f"<td>{_score(seam.score, 3)}</td></tr>"
        for seam in report.borders[:20]
    )
    return (
        '<section id="borders"><h2>Borders</h2><p class="soft">The tile borders with the highest seam scores, at most '
        "20; position in pixels from the left or the top.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">line</th><th scope="col">position</th>'
        f'<th scope="col">seam</th></tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


_EXPLAINED = f"""<section id="explained"><h2>Explained</h2><dl class="list">
<dt>ΔE</dt><dd>CIEDE2000 between the photo and the result shrunk to its size by the antialiased cubic: does the result
still show the same colours in the same places? New fine detail alone hardly changes it.</dd>
<dt>colour shift</dt><dd>Distance in CIELab between the mean colours of photo and result within a tile.</dd>
<dt>texture</dt><dd>log2 of fine detail (mean second difference of luma) over that of the photo enlarged by Lanczos:
0 as much, 1 twice as much.</dd>
<dt>seam</dt><dd>Second difference of luma across tile borders over that across parallel lines at least 32 pixels away,
minus the same in the photo enlarged by Lanczos, plus 1. About 1: no seam.</dd>
<dt>where no border is</dt><dd>Mean and standard deviation of the same score with the borders moved, at least 32 pixels
away from all of them: what this picture's own texture makes of it.</dd>
<dt>lattice</dt><dd>The same for lines at multiples of 16 pixels, away from tile borders, against all other lines there:
a faint pattern of 16 pixels, which networks that work on patches may leave. About 1: none.</dd>
<dt>suspicious</dt><dd>A tile that lies further from the median of all tiles than {CUT} robust standard deviations and
than what a person would notice. With fewer than {FEWEST} tiles: one beyond ΔE 8, colour shift 5 or seam 1.5.
It is a place to look at, not a proof of a fault.</dd>
</dl></section>"""
