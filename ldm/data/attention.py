"""Which part of a picture is worth keeping, when not all of it is."""

import numpy as np
from PIL import Image, ImageFilter

# Pixels of the short side at which pictures are judged, grey levels that are told apart, and places that are tried.
SHORT_SIDE, LEVELS, PLACES = 64, 32, 17


def offset_of_interest(pixels: np.ndarray, target: tuple[int, int], *, measure: str) -> tuple[int, int]:
    """Return (left, top) of the cut of `target` (width, height) out of uint8 (H, W, 3) that has most of a measure.

    `saliency` is the sum of the distances of a smoothed picture's colours from its mean colour (Achanta et al. 2009);
    `entropy` is that of the cut's grey levels. Of equals the one nearest to the centre is taken.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, SHORT_SIDE / min(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BOX)
    part = min(size[0], max(1, round(target[0] * scale))), min(size[1], max(1, round(target[1] * scale)))
    score = _saliency(small) if measure == "saliency" else np.asarray(small.convert("L"))
    lefts, tops = (_places(side - cut) for side, cut in zip((width, height), target, strict=True))
    best, found = -np.inf, (0, 0)
    for left in lefts:
        for top in tops:
            x, y = min(round(left * scale), size[0] - part[0]), min(round(top * scale), size[1] - part[1])
            window = score[y : y + part[1], x : x + part[0]]
            value = float(window.sum()) if measure == "saliency" else _entropy(window)
            if value > best * (1 + 1e-9) + 1e-9:
                best, found = value, (left, top)
    return found


def _places(rest: int) -> list[int]:
    """Return the offsets from 0 to `rest` that are tried, from the centre outwards."""
    centre = rest // 2
    return sorted({round(place) for place in np.linspace(0, rest, PLACES)} | {centre}, key=lambda at: abs(at - centre))


def _saliency(image: Image.Image) -> np.ndarray:
    smooth = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float64)
    return np.asarray(np.linalg.norm(smooth - smooth.mean(axis=(0, 1)), axis=2))


def _entropy(grey: np.ndarray) -> float:
    counts = np.bincount(grey.ravel() // (256 // LEVELS), minlength=LEVELS)
    shares = counts[counts > 0] / grey.size
    return float(-(shares * np.log2(shares)).sum())
