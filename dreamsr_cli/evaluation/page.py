"""One HTML page that needs nothing but itself: style, script and pictures inside, the network forbidden by its policy.

Everything that comes from outside (names, reasons) goes through `text`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dreamsr_cli.errors import OutputError

SMALL = 640
"""Pictures are shown at least about this wide, in CSS pixels."""


def text(value: object) -> str:
    """`value` as HTML text or attribute, every special character escaped; bytes of names that are no text as ?."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def page(title: str, body: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document. `body`: HTML of <main>; `sections`: (id, name) of the parts to jump to."""
    style = _resource("page.css")
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{text(id)}">{text(name)}</a>' for id, name in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="dreamsr">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<nav class="top" aria-label="Parts of this page">{links}<button type="button" id="theme">Dark / light</button></nav>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """One of the pictures that a slider can show."""

    name: str
    uri: str
    """data: URI."""


def slider(id: str, pictures: Sequence[Picture], size: tuple[int, int], left: int, right: int) -> str:
    """Before and after: two of `pictures`, chosen by their number, of which a bar shows more or less.

    `size`: their (width, height) in pixels; `id`: unique in the page.
    """
    choices = []
    for side, words, chosen in (("left", "Left", left), ("right", "Right", right)):
        options = "".join(
            f'<option value="{number}"{" selected" if number == chosen else ""}>{text(picture.name)}</option>'
            for number, picture in enumerate(pictures)
        )
        choices.append(
            f'<label>{words} <select data-for="{text(id)}" data-side="{side}" autocomplete="off">{options}</select>'
            "</label>"
        )
    images = []
    for number, picture in enumerate(pictures):
        sides = " ".join(side for side, chosen in (("left", left), ("right", right)) if number == chosen)
        images.append(
            f'<img src="{picture.uri}" data-picture="{number}" class="{sides}" alt="{text(picture.name)}" '
            f'width="{size[0]}" height="{size[1]}" draggable="false" loading="lazy" decoding="async">'
        )
    tools = f'<div class="tools">{"".join(choices)}</div>' if len(pictures) > 2 else ""
    return (
        f'{tools}<div class="compare" id="{text(id)}" style="{frame(size)}">{"".join(images)}<span class="bar"></span>'
        f'<span class="name first">{text(pictures[left].name)}</span>'
        f'<span class="name second">{text(pictures[right].name)}</span>'
        f'<input type="range" min="0" max="100" step="0.5" value="50" autocomplete="off" '
        f'aria-label="How much of the left picture is shown"></div>'
    )


def frame(size: tuple[int, int]) -> str:
    """CSS of a box for a picture of (width, height): small ones grow by whole factors, none beyond the screen."""
    width = size[0] * max(1, math.ceil(SMALL / size[0]))
    return f"aspect-ratio:{size[0]}/{size[1]};max-width:min({width}px,calc(80vh*{size[0] / size[1]:.4f}))"


def sortable(name: str, kind: str) -> str:
    """A head cell that sorts its column. `kind`: "number" or "text"; cells carry data-value, "" for none."""
    side = ' class="name"' if kind == "text" else ""
    return f'<th{side} scope="col" aria-sort="none" data-kind="{kind}"><button type="button">{text(name)}</button></th>'


def save(path: Path, document: str) -> Path:
    """Write the page, whole or not at all. `OutputError` if its folder can't be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".report-", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(document)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}", "choose another folder with -o") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def _resource(name: str) -> str:
    return resources.files("dreamsr_cli.evaluation").joinpath(name).read_text(encoding="utf-8")
