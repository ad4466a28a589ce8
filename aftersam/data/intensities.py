"""Whether a scan's values are Hounsfield units, judged from the values alone.

Real CT has air near −1000. Where air was cropped, fat and lung are still below 0. Padding lies below −1100. A scan
without any of these is refused. A scan with an unusual share of them gives a warning only: it may be a crop inside
the body."""

from __future__ import annotations

import warnings

import numpy as np

from aftersam.data.volume import Volume

SAMPLE = 2**20  # voxels that tell
FEWEST = 1000  # voxels below which nothing can be told
PADDING, AIR = -1100, -850  # HU: below the first is no tissue, between the two is air
RARE = 1e-3


def check_intensities(volume: Volume, *, trusted: bool = False, refuse: bool = True) -> None:
    """Raise ValueError where a scan's values cannot be Hounsfield units; warn where they are unlikely to be.

    `trusted` skips both. `refuse` False warns in both cases."""
    array = volume.array
    if trusted or array.size < FEWEST:
        return
    step = max(1, round((array.size / SAMPLE) ** (1 / 3)))
    values = np.asarray(array[::step, ::step, ::step]).ravel()
    impossible = _impossible(values)
    said = impossible or _odd(values)
    if said is None:
        return
    verdict = "is not in Hounsfield units" if impossible else "may not be in Hounsfield units"
    text = f"{volume.name} {verdict}: {said}; convert it, or use --trust-intensities"
    if impossible and refuse:
        raise ValueError(text)
    warnings.warn(text, stacklevel=2)


def _impossible(values: np.ndarray) -> str | None:
    """Why these values (V,) cannot be from a CT, or None."""
    values = values[values > PADDING]
    if not values.size or (low := float(values.min())) <= AIR:
        return None
    high = float(values.max())
    if high == low:  # an empty scan
        return None
    if high - low < 20:
        return f"its values lie between {low:.3g} and {high:.3g}, as if they were scaled"
    if low < 0:
        return None
    if (low, high) == (0, 255):
        return "its values lie between 0 and 255, as if they were scaled"
    inner = values[values > low]  # of a crop without fat or air, most of it is tissue
    if np.mean(inner > 300) > 0.5 or np.mean((inner >= 900) & (inner <= 1300)) > 0.05:
        return f"its lowest value is {low:g}, as if 1024 were added or this were no CT, where air is -1000"
    return None


def _odd(values: np.ndarray) -> str | None:
    """What is unusual about these values (V,) for a CT, or None."""

    def share(found: np.ndarray) -> float:
        return float(np.count_nonzero(found)) / max(1, body.size)

    body = values[values > PADDING]
    padded = 1 - body.size / values.size
    if share((body >= -250) & (body <= 300)) < 0.02 and (padded > 0.1 or share(body <= AIR) < RARE):
        return "hardly any of its voxels is soft tissue (-250 to 300), as if an offset were applied twice"
    if share(body > 800) > 0.25:
        return "much of it is above 800, as if 1024 were added"
    low, high = float(body.min()), float(body.max())
    if -100 < low < high:
        return f"its lowest value is {low:.3g}, where air is -1000 and fat is -100"
    if AIR < low < high and share(body == low) > 0.1:
        return f"its values are cut off at {low:g}, where air is -1000"
    tissue = body[body > AIR]
    rare = np.count_nonzero(tissue < 0) < RARE * tissue.size
    if rare and tissue.size > 0.01 * body.size and tissue.min() < tissue.max():
        return "hardly any tissue is below 0, where fat is -100"
    return None
