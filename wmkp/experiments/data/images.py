"""Encoded images to pixels: whole images, random resized crops for training, centre crops for testing."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image

AREA = (0.08, 1.0)  # share of the image that a random crop covers
ASPECT = (3 / 4, 4 / 3)  # its width over its height


def whole(encoded: bytes, channels: int) -> np.ndarray:
    """The whole image, grey for one channel and RGB for three: (height, width, channels) uint8."""
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(_in_mode(image, "L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels


def random_crop(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random resized crop, flipped or not: (size, size, 3) uint8.

    A JPEG from which the crop is taken at less than half its size is decoded at 1/2, 1/4 or 1/8, never below ``size``.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        left, top, width, height = random_box(*image.size, rng)
        flip = rng.random() < 0.5
        scales = _decode_smaller(image, min(width, height) // size)
        box = (left / scales[0], top / scales[1], (left + width) / scales[0], (top + height) / scales[1])
        pixels = np.asarray(_in_mode(image, "RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))
    return pixels[:, ::-1] if flip else pixels


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop: its area uniform in AREA, its aspect log-uniform in ASPECT.

    An image too narrow for ten such draws gets the largest centre crop whose aspect is within ASPECT.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*AREA), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def centre_crop(encoded: bytes, size: int) -> np.ndarray:
    """The centre of the image after its shorter side is resized to 256/224 of ``size``: (size, size, 3) uint8."""
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        short = round(size * 256 / 224)
        scale = short / min(width, height)
        resized = (max(short, round(width * scale)), max(short, round(height * scale)))
        image = _in_mode(image, "RGB").resize(resized, Image.Resampling.BILINEAR)
        left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))


def _decode_smaller(image: Any, factor: int) -> tuple[float, float]:
    """Sets a JPEG's decoding scale, at least 1/factor; returns the factors by which width and height shrink."""
    width, height = image.size
    if factor >= 2:
        image.draft(None, (width // factor, height // factor))
    return width / image.size[0], height / image.size[1]


def _in_mode(image: Any, mode: str) -> Any:
    return image if image.mode == mode else image.convert(mode)
