"""Synthetic thorax CT with six labelled organs, painted organ by organ from shapes in mm."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from aftersam.files import renamed, write_json

LABELS = {1: "esophagus", 2: "trachea", 3: "spinal_cord", 4: "lung_left", 5: "lung_right", 6: "heart"}
ESOPHAGUS, TRACHEA, CORD, LUNG_LEFT, LUNG_RIGHT, HEART = LABELS
SIDE = 96  # pixels of a plane
SLICE_MM = 5.0
BEHIND_THE_HEART = -33.0  # mm from the spine: where the esophagus and the nodes lie

AIR, GAS, LUNG, FAT, MEDIASTINUM, WATER = -1000, -950, -840, -100, -75, 10  # HU before noise
SOFT, MUSCLE, BLOOD, LIVER, MARROW, DISC, BONE = 35, 50, 45, 60, 180, 80, 550


class Phantom(NamedTuple):
    hu: np.ndarray  # (D, H, W) int16, d to the head, h to the back, w to the patient's left
    labels: np.ndarray  # (D, H, W) uint8, values of LABELS
    spacing_mm: tuple[float, float, float]


def make_phantom(seed: int) -> Phantom:
    """The thorax of `seed`: 40 to 56 slices of 5 mm, 96 × 96 pixels of 3.5 to 4 mm."""
    rng = np.random.default_rng(seed)
    scan = _Canvas(depth=int(rng.integers(40, 57)), pixel_mm=float(rng.uniform(3.5, 4.0)))
    t = scan.z / scan.z[-1]  # 0 at the lowest slice, 1 at the highest
    half_width, half_depth = rng.uniform(132, 152), rng.uniform(92, 108)  # of the body in mm
    spine_x = _wander(rng, scan.z, 5.0, 260)
    spine_y = half_depth - 50 + _wander(rng, scan.z, 4.0, 400) + 8 * np.sin(np.pi * t)

    _body(scan, rng, t, half_width, half_depth)
    lungs = _lungs(scan, rng, t, half_width, half_depth)
    _mediastinum(scan, rng, spine_x, spine_y)
    _heart(scan, rng, t, spine_y)
    _abdomen(scan, rng, t, half_width, half_depth)
    _spine(scan, rng, spine_x, spine_y)
    carina = scan.z[-1] * rng.uniform(0.52, 0.66)
    airway_x, airway_y = spine_x + rng.uniform(-3, 3), spine_y - rng.uniform(56, 62)
    _vessels(scan, rng, t, carina, spine_x, spine_y)
    tube = _esophagus(scan, rng, spine_x, spine_y)
    _trachea(scan, rng, carina, airway_x, airway_y, lungs)
    _nodes(scan, rng, spine_x, spine_y, tube)
    return Phantom(_noisy(scan.hu, rng), scan.labels, (SLICE_MM, scan.pixel_mm, scan.pixel_mm))


class _Canvas:
    """A scan being painted: later organs cover earlier ones, edges blend over a pixel."""

    def __init__(self, depth: int, pixel_mm: float) -> None:
        self.pixel_mm = pixel_mm
        self.z = (np.arange(depth) * SLICE_MM).astype(np.float32)  # (D,) mm above the lowest slice
        across = ((np.arange(SIDE) - (SIDE - 1) / 2) * pixel_mm).astype(np.float32)
        self.y, self.x = across[:, None], across[None, :]  # (H, 1) to the back, (1, W) to the left
        self.hu = np.full((depth, SIDE, SIDE), AIR, dtype=np.float32)
        self.labels = np.zeros((depth, SIDE, SIDE), dtype=np.uint8)

    def ellipse(self, x: _Line, y: _Line, rx: _Line, ry: _Line, *, power: float = 2.0) -> np.ndarray:
        """Distance in mm to the edge, negative inside, of an ellipse whose centre and radii may change with z."""
        x, y, rx, ry = (np.asarray(v, dtype=np.float32).reshape(-1, 1, 1) for v in (x, y, rx, ry))
        rx, ry = np.maximum(rx, 1e-3), np.maximum(ry, 1e-3)
        u, v = np.abs((self.x - x) / rx), np.abs((self.y - y) / ry)
        radius = np.sqrt(u * u + v * v) if power == 2 else (u**power + v**power) ** (1 / power)
        distance: np.ndarray = (radius - 1) * np.minimum(rx, ry)
        return distance

    def paint(self, distance: np.ndarray, hu: float | np.ndarray, label: int = 0) -> None:
        """Fill where `distance` is negative; the label of what was there before is covered too."""
        share = np.clip(0.5 - distance / self.pixel_mm, 0, 1)
        self.hu += share * (hu - self.hu)
        self.labels[np.broadcast_to(distance < 0, self.labels.shape)] = label


_Line = float | np.ndarray  # one number, or one a slice


def _wander(rng: np.random.Generator, z: np.ndarray, amplitude: float, wavelength: float) -> np.ndarray:
    """A smooth random curve along z (D,), in mm."""
    curve = np.zeros_like(z)
    for part in (1.0, 0.5):
        phase, length = rng.uniform(0, 2 * np.pi), wavelength * rng.uniform(0.8, 1.3) * part
        curve += part * np.sin(2 * np.pi * z / length + phase)
    return (amplitude * curve / 1.2).astype(np.float32)


def _body(scan: _Canvas, rng: np.random.Generator, t: np.ndarray, width: float, depth: float) -> None:
    """Skin and fat, the muscular wall, ribs in it, the table, and in some scans the arms."""
    if rng.random() < 0.4:
        for side in (-1, 1):
            x, y = side * (width + rng.uniform(16, 22)), rng.uniform(-10, 40)
            scan.paint(scan.ellipse(x, y + _wander(rng, scan.z, 5, 300), 20, 24), FAT)
            scan.paint(scan.ellipse(x, y, 16, 19), MUSCLE)
            scan.paint(scan.ellipse(x, y, 7, 7), BONE)
    scan.paint(np.abs(scan.ellipse(0, depth - 60, 170, 80)) - 3 + 1e3 * (scan.y < depth + 4), -300)
    taper = 1 - 0.1 * t
    fat = rng.uniform(8, 16)
    scan.paint(scan.ellipse(0, 0, width * taper, depth, power=2.5), FAT)
    scan.paint(scan.ellipse(0, 0, width * taper - fat, depth - fat, power=2.5), MUSCLE)
    inner = scan.ellipse(0, 0, width * taper - fat - 10, depth - fat - 10, power=2.5)
    angle = np.arctan2(scan.y, np.abs(scan.x))  # ribs slope: their height changes with the angle
    phase = (scan.z[:, None, None] + 45 * angle) / 26 + rng.random()
    between = np.abs(phase - np.round(phase)) * 26 - 6
    scan.paint(np.maximum(np.abs(inner) - 4, between), rng.uniform(300, 500))
    scan.paint(np.maximum(inner + 4, -1e3), MEDIASTINUM)


def _lungs(scan: _Canvas, rng: np.random.Generator, t: np.ndarray, width: float, depth: float) -> np.ndarray:
    """Two lungs of different size over the domes of the diaphragm, with vessels; returns where they are."""
    inside = np.zeros(scan.labels.shape, dtype=bool)
    for side, label in ((1, LUNG_LEFT), (-1, LUNG_RIGHT)):
        size = rng.uniform(0.86, 1.0) * (0.95 if side > 0 else 1.0)
        base, apex = rng.uniform(-0.02, 0.1), rng.uniform(0.93, 1.12)
        height = np.clip((t - base) / (apex - base), 0, 1)
        profile = np.sqrt(np.clip(1 - np.clip((height - 0.35) / 0.65, 0, 1) ** 2.4, 0, 1)) * (height > 0)
        rx, ry = size * profile * (width * 0.36), size * profile * (depth * 0.68)
        x = side * (width * 0.44 - 6 * height) + _wander(rng, scan.z, 2, 200)
        lung = scan.ellipse(x, _wander(rng, scan.z, 3, 300), rx, ry, power=2.3)
        # the dome rises into the lung from below
        dome = scan.z[:, None, None] - scan.z[-1] * rng.uniform(0.02, 0.16)
        dome = 28 - dome - (scan.x - x[:, None, None]) ** 2 / 60 - scan.y**2 / 160
        lung = np.maximum(lung, dome)
        scan.paint(lung, rng.uniform(-30, 30) + LUNG, label)
        inside |= lung < 0
        for _ in range(14):  # vessels stay part of the lung
            vx, vy = x + rng.uniform(-0.7, 0.7) * rx, rng.uniform(-0.7, 0.7) * ry
            vessel = scan.ellipse(
                vx + _wander(rng, scan.z, 6, 90), vy + _wander(rng, scan.z, 6, 90), 2.5, 2.5
            )
            scan.paint(np.where(lung < -4, vessel, 1e3), SOFT - 100, label)
    return inside


def _mediastinum(scan: _Canvas, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> None:
    """Fat between the lungs, from the spine to the breastbone."""
    half = rng.uniform(46, 52)
    scan.paint(scan.ellipse(x, y - 46, half, 56, power=2.6), MEDIASTINUM)
    scan.paint(scan.ellipse(0, y - 118, 16, 7), BONE * 0.6)


def _heart(scan: _Canvas, rng: np.random.Generator, t: np.ndarray, spine_y: np.ndarray) -> None:
    """An ellipsoid left of the middle, in a layer of fat; the great vessels leave it with the same grey value."""
    centre, reach = rng.uniform(0.24, 0.34), rng.uniform(0.22, 0.28)
    profile = np.sqrt(np.clip(1 - ((t - centre) / reach) ** 2, 0, None))
    x, y = rng.uniform(14, 26) + 18 * (centre - t), spine_y - rng.uniform(90, 96)
    rx, ry = rng.uniform(50, 60) * profile, rng.uniform(36, 42) * profile
    alive = np.where(profile > 0, 0, 1e3)[:, None, None]
    scan.paint(scan.ellipse(x, y, rx + 6 * profile, ry + 6 * profile) + alive, FAT)
    scan.paint(scan.ellipse(x, y, rx, ry) + alive, BLOOD, HEART)


def _abdomen(scan: _Canvas, rng: np.random.Generator, t: np.ndarray, width: float, depth: float) -> None:
    """Liver and spleen below the diaphragm, alike in grey value to the heart."""
    for side, top in ((-1, rng.uniform(0.1, 0.2)), (1, rng.uniform(0.02, 0.1))):
        profile = np.sqrt(np.clip(1 - np.clip(t / top, 0, None) ** 2, 0, 1))
        organ = scan.ellipse(
            side * width * 0.42, 0, profile * width * 0.42, profile * depth * 0.66, power=2.4
        )
        scan.paint(np.where((profile > 0)[:, None, None], organ, 1e3), LIVER)


def _spine(scan: _Canvas, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> None:
    """Vertebral bodies with a bright rim, discs between them, an arch, and the cord in its canal."""
    rx, ry = rng.uniform(17, 20), rng.uniform(13, 15)
    period = rng.uniform(24, 30)
    disc = (np.abs((scan.z / period + rng.random()) % 1 - 0.5) > 0.38)[:, None, None]
    canal_y = y + ry + rng.uniform(11, 13)
    scan.paint(scan.ellipse(x, canal_y + 2, 20, 17), np.where(disc, MUSCLE, MARROW + 120))
    scan.paint(scan.ellipse(x, canal_y + 26, 4, 14), np.where(disc, MUSCLE, BONE * 0.7))
    scan.paint(scan.ellipse(x, y, rx, ry), np.where(disc, DISC, BONE))
    scan.paint(scan.ellipse(x, y, rx - 4, ry - 4), np.where(disc, DISC, MARROW))
    scan.paint(scan.ellipse(x, canal_y, 12, 11), WATER)
    wander = _wander(rng, scan.z, 1.0, 150)
    cord = rng.uniform(6.8, 7.8)
    scan.paint(scan.ellipse(x + wander, canal_y, cord + 1, cord), MUSCLE, CORD)


def _vessels(
    scan: _Canvas, rng: np.random.Generator, t: np.ndarray, carina: float, x: np.ndarray, y: np.ndarray
) -> None:
    """Aorta: down beside the spine, up in front, an arch between; branches above it. None is labelled."""
    arch = carina + rng.uniform(18, 28)
    radius = rng.uniform(11, 13)
    gone = np.where(scan.z < arch, 0, 1e3)[:, None, None]
    down_x = x + rng.uniform(22, 27) + _wander(rng, scan.z, 2, 200)
    scan.paint(scan.ellipse(down_x, y - 14, radius, radius) + gone, BLOOD)
    low = np.where(scan.z > carina - 30, 0, 1e3)[:, None, None]
    scan.paint(scan.ellipse(x - 8, y - 92, radius, radius) + gone + low, BLOOD)
    scan.paint(
        scan.ellipse(x + 12, y - 54, 14, 44) + np.where(np.abs(scan.z - arch) < 9, 0, 1e3)[:, None, None],
        BLOOD,
    )
    above = np.where(scan.z > arch, 0, 1e3)[:, None, None]
    for place in (-22.0, -2.0, 18.0):
        branch_x, branch_y = x + place + _wander(rng, scan.z, 3, 150), y - rng.uniform(82, 96)
        scan.paint(scan.ellipse(branch_x, branch_y, 6, 6) + above, BLOOD)


def _esophagus(
    scan: _Canvas, rng: np.random.Generator, spine_x: np.ndarray, spine_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A tube that wanders in front of the spine; returns its centre (x, y) a slice."""
    x = spine_x + _wander(rng, scan.z, 18.0, 220)
    y = spine_y + BEHIND_THE_HEART + _wander(rng, scan.z, 6.0, 150)
    rx, ry = rng.uniform(8.0, 9.5) + _wander(rng, scan.z, 0.8, 60), rng.uniform(6.5, 7.5)
    scan.paint(scan.ellipse(x, y, rx, ry), SOFT, ESOPHAGUS)
    return x, y


def _trachea(
    scan: _Canvas, rng: np.random.Generator, carina: float, x: np.ndarray, y: np.ndarray, lungs: np.ndarray
) -> None:
    """Air in a thin wall; below the carina two bronchi part, labelled for 25 mm as the guidelines' cut."""
    radius = rng.uniform(8.5, 10)
    above = np.where(scan.z >= carina, 0, 1e3)[:, None, None]
    scan.paint(scan.ellipse(x, y, radius + 3, radius + 2) + above, SOFT)
    scan.paint(scan.ellipse(x, y, radius, radius - 1) + above, GAS, TRACHEA)
    drop = carina - scan.z
    below = np.where((drop > 0) & (drop <= 25), 0, 1e3)[:, None, None]
    for side in (-1, 1):
        bronchus_x, bronchus_y = x + side * (7 + 1.1 * drop), y + 0.1 * drop
        scan.paint(scan.ellipse(bronchus_x, bronchus_y, radius * 0.7 + 3, radius * 0.6 + 3) + below, SOFT)
        scan.paint(scan.ellipse(bronchus_x, bronchus_y, radius * 0.75, radius * 0.65) + below, GAS, TRACHEA)


def _nodes(
    scan: _Canvas,
    rng: np.random.Generator,
    spine_x: np.ndarray,
    spine_y: np.ndarray,
    tube: tuple[np.ndarray, np.ndarray],
) -> None:
    """Lymph nodes with the esophagus's grey value, size and place, one or two slices long.

    None lies over another of a neighbouring slice, nor touches the esophagus: followed through the slices,
    only the esophagus goes on."""
    placed: list[tuple[int, float, float]] = []
    depth = len(scan.z)
    for _ in range(40 * depth):
        if len(placed) > 2.2 * depth:
            break
        first, length = int(rng.integers(-1, depth)), int(rng.integers(1, 3))
        slices = [d for d in range(first, first + length) if 0 <= d < depth]
        if not slices:
            continue
        d = slices[0]
        x, y = spine_x[d] + rng.uniform(-36, 36), spine_y[d] + BEHIND_THE_HEART + rng.uniform(-9, 9)
        if any(np.hypot((tube[0][n] - x) / 19, (tube[1][n] - y) / 15) < 1 for n in slices):
            continue
        if any(abs(p - d) <= 2 and np.hypot((px - x) / 19, (py - y) / 15) < 1 for p, px, py in placed):
            continue
        placed.append((d, x, y))
        there = np.where(np.isin(np.arange(depth), slices), 0, 1e3)[:, None, None]
        scan.paint(scan.ellipse(x, y, rng.uniform(7.5, 9.5), rng.uniform(6.3, 7.7)) + there, SOFT)


def _noisy(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(D, H, W) int16 with the blur, the grain and the slow texture of a scanner, HU from -1024 up."""
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(hu, (0, 0.45, 0.45))
    texture = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (1, 2.5, 2.5))
    grain = rng.uniform(20, 30) * rng.standard_normal(hu.shape, dtype=np.float32)
    noisy = blurred + grain + rng.uniform(8, 14) / texture.std() * texture
    rounded: np.ndarray = np.clip(np.rint(noisy), -1024, 3071)
    return rounded.astype(np.int16)


def write_dataset(output: Path | str, *, cases: int, seed: int = 0) -> Path:
    """Write the phantoms of seeds seed ... seed + cases - 1 to the folder `output` in nnU-Net's raw layout.

    Raises ValueError where the folder holds a data set already, or for no case."""
    import nibabel as nib

    output = Path(output)
    if cases < 1:
        raise ValueError(f"cases is {cases}, but must be 1 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be 0 or more")
    if (output / "dataset.json").exists():
        raise ValueError(f"{output} holds a data set already; choose another folder")
    for folder in ("imagesTr", "labelsTr"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for number in range(seed, seed + cases):
        phantom = make_phantom(number)
        d, h, w = phantom.spacing_mm
        affine = np.diag([-w, -h, d, 1.0])  # (x, y, z) = (w, h, d): towards left, back and head
        affine[:2, 3] = w * (SIDE - 1) / 2, h * (SIDE - 1) / 2
        for folder, ending, array in (("imagesTr", "_0000", phantom.hu), ("labelsTr", "", phantom.labels)):
            image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
            image.header.set_xyzt_units("mm")
            with renamed(output / folder / f"phantom_{number:05d}{ending}.nii.gz") as temporary:
                nib.save(image, temporary)
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: value for value, name in LABELS.items()}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "name": "Phantom",
    }
    write_json(output / "dataset.json", description)
    return output
