"""Dead leaves: pictures made of overlapping shapes, endless training data whose edges and scales resemble a photo's.

Shapes of power-law size cover each other as in Lee, Mumford & Huang 2001; colours come from a photo's palette or from a
correlated walk, some shapes carry stripes, a shade or 1/f noise. Drawn at double size and halved, so that edges are
antialiased.

Axes: C channels, P Q pixel rows and columns (square here).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

SUPERSAMPLING = 2
COVERING = 2.5
"""Summed area of the shapes over the picture's: 8 % of the background stays visible."""
TEXTURED_SHARE = 0.4
TEXTURED_RADIUS = 16.0
"""Shapes with a smaller radius (supersampled pixels) stay plain."""
NOISE_TILE = 256


def dead_leaves(size: int, generator: np.random.Generator, palette: np.ndarray | None = None) -> torch.Tensor:
    """A picture of overlapping leaves, (3, size, size) float32 in [0, 1].

    `palette`: (N, 3) uint8 RGB colours to draw from, such as pixels of a photo; None: colours of a correlated walk with
    the spread of natural scenes. Equal generator states give equal pictures.
    """
    side = size * SUPERSAMPLING
    smallest = math.exp(generator.uniform(math.log(5.0), math.log(14.0)))
    radii = _radii(generator, side, smallest, 0.35 * side)
    count = len(radii)
    colours = (
        _walk(generator, count + 1) if palette is None else palette[generator.integers(len(palette), size=count + 1)]
    )
    centres = generator.uniform(0, side, (count, 2))
    shapes = generator.choice(3, size=count, p=(0.45, 0.25, 0.3))
    textured = (generator.random(count) < TEXTURED_SHARE) & (radii > TEXTURED_RADIUS)
    noise = _noise_tile(generator)
    canvas = Image.new("RGB", (side, side), tuple(int(c) for c in colours[count]))
    painter = ImageDraw.Draw(canvas)
    for i in range(count):
        outline = _outline(generator, int(shapes[i]), centres[i], float(radii[i]))
        colour = (int(colours[i, 0]), int(colours[i, 1]), int(colours[i, 2]))
        if textured[i]:
            _paint_texture(canvas, generator, outline, colour, noise)
        else:
            _fill(painter, outline, colour)
    leaves_PQC = np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255
    return torch.from_numpy(leaves_PQC).permute(2, 0, 1).contiguous()


def _radii(rng: np.random.Generator, side: int, smallest: float, largest: float) -> np.ndarray:
    """Radii with density r^-3 (scale invariance), as many as cover the square `COVERING` times."""
    low, high = smallest**-2, largest**-2
    mean_square = 2 * math.log(largest / smallest) / (low - high)
    count = max(1, round(COVERING * side**2 / (math.pi * mean_square)))
    return (low - rng.random(count) * (low - high)) ** -0.5


def _walk(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) uint8 colours, each near those before: octaves of held values (Voss), mostly brightness."""
    index = np.arange(count)
    octaves = range(max(1, count.bit_length()))
    octave_values = np.stack([rng.standard_normal(((count >> k) + 1, 3))[index >> k] for k in octaves])
    opponent = octave_values.sum(0) / math.sqrt(len(octaves)) * np.array([0.24, 0.03, 0.045])
    light, red_green, blue_yellow = opponent.T + np.array([[rng.uniform(0.3, 0.6)], [0], [0]])
    rgb = np.stack([light + red_green + blue_yellow, light - red_green + blue_yellow, light - 2 * blue_yellow], axis=1)
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


def _noise_tile(rng: np.random.Generator) -> np.ndarray:
    """A periodic field (NOISE_TILE, NOISE_TILE) float32, mean 0, variance 1, spectrum 1/f^a with a from 0.7 to 1.5."""
    n = NOISE_TILE
    spectrum = np.fft.rfft2(rng.standard_normal((n, n), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(spectrum * frequency ** -rng.uniform(0.7, 1.5), s=(n, n))
    return (field / field.std()).astype(np.float32)


def _outline(rng: np.random.Generator, shape: int, centre: np.ndarray, radius: float) -> list[float]:
    """A disc as its box (4 numbers), a turned rectangle or a polygon of 3 to 7 corners as x, y, x, y, ..."""
    x, y = float(centre[0]), float(centre[1])
    if shape == 0:
        return [x - radius, y - radius, x + radius, y + radius]
    if shape == 1:
        half = math.atan(rng.uniform(0.1, 1.0))
        turn = rng.uniform(0, math.pi)
        angles = [turn - half, turn + half, turn + math.pi - half, turn + math.pi + half]
        return [c for a in angles for c in (x + radius * math.cos(a), y + radius * math.sin(a))]
    corners = int(rng.integers(3, 8))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    reach = radius * rng.uniform(0.6, 1.0, corners)
    points = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1)
    return points.flatten().tolist()


def _fill(painter: ImageDraw.ImageDraw, outline: list[float], colour: tuple[int, int, int] | int) -> None:
    if len(outline) == 4:
        painter.ellipse(outline, fill=colour)
    else:
        painter.polygon(outline, fill=colour)


def _paint_texture(
    canvas: Image.Image,
    rng: np.random.Generator,
    outline: list[float],
    colour: tuple[int, int, int],
    noise: np.ndarray,
) -> None:
    """Fill the outline with stripes, a linear shade or 1/f noise around the colour."""
    left, top = max(0, math.floor(min(outline[0::2]))), max(0, math.floor(min(outline[1::2])))
    right, bottom = min(canvas.width, math.ceil(max(outline[0::2]))), min(canvas.height, math.ceil(max(outline[1::2])))
    if right <= left or bottom <= top:
        return
    rows, cols = np.arange(bottom - top, dtype=np.float32), np.arange(right - left, dtype=np.float32)
    kind, turn, strength = rng.integers(3), rng.uniform(0, 2 * math.pi), rng.uniform(10, 50)
    ramp = np.float32(math.sin(turn)) * rows[:, None] + np.float32(math.cos(turn)) * cols[None]
    if kind == 0:
        pattern = np.sin(ramp * np.float32(2 * math.pi / rng.uniform(6, 40)))
        if rng.random() < 0.5:
            pattern = np.sign(pattern)
    elif kind == 1:
        pattern = ramp * np.float32(2 / max(rows.size, cols.size))
    else:
        start = rng.integers(NOISE_TILE, size=2)
        across = (np.arange(rows.size) + start[0]) % NOISE_TILE
        pattern = noise[across][:, (np.arange(cols.size) + start[1]) % NOISE_TILE]
    patch = pattern[..., None] * (np.float32(strength) * rng.uniform(0.6, 1.0, 3).astype(np.float32))
    patch = (patch + np.array(colour, np.float32)).clip(0, 255).astype(np.uint8)
    mask = Image.new("L", (cols.size, rows.size), 0)
    shifted = [c - (top if i % 2 else left) for i, c in enumerate(outline)]
    _fill(ImageDraw.Draw(mask), shifted, 255)
    canvas.paste(Image.fromarray(patch), (left, top), mask)
