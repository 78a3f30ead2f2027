"""Brain FDG activity of made-up subjects, from the MNI152 grey and white matter maps."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from petite_fast.data.scanners import Scanner
from petite_fast.data.volume import read_volume
from petite_fast.errors import InputError

GREY_TO_WHITE = 4.0  # FDG uptake of grey over white matter
_FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_KNOT_MM = 40.0  # distance of the control points of deformation and regional factors
_KNOTS = 9  # per axis, from -160 to 160 mm: beyond every field of view
_FINEST_MM = 2.0  # coarser grids are sampled finer than this and averaged
_SHRINK = 1.06  # the MNI152 average head is larger than a typical one, by this per axis


@dataclass(frozen=True, eq=False)
class Tissue:
    """Template in the axes of the MNI152 file (RAS+, 1 mm voxels).

    Attributes:
        activity: 4 GM + WM, float32 [X, Y, Z], 4 in pure grey matter.
        centre: voxel at the middle of the brain's bounding box.
        grey: [n, 3] voxels that are certainly grey matter.
    """

    activity: np.ndarray
    centre: np.ndarray
    grey: np.ndarray


@lru_cache(maxsize=1)
def load_tissue() -> Tissue:
    """Read the MNI152 maps that nilearn installs, as files, without importing nilearn.

    Raises:
        InputError: nilearn, or its files, are not installed.
    """
    spec = importlib.util.find_spec("nilearn")
    folder = Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else None
    if folder is None or not all((folder / _FILES.format(t)).is_file() for t in ("gm", "wm")):
        raise InputError(
            "nilearn: its MNI152 tissue maps are not installed;"
            " expected them after pip install petite_fast[app]"
        )
    grey, white = (read_volume(folder / _FILES.format(t)).array / 255 for t in ("gm", "wm"))
    inside = [
        np.flatnonzero((grey + white > 0.5).any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))
    ]
    centre = np.array([(axis[0] + axis[-1]) / 2 for axis in inside])
    return Tissue(GREY_TO_WHITE * grey + white, centre, np.argwhere(grey > 0.8))


@dataclass(frozen=True, eq=False)
class Subject:
    """One made-up subject: how its head differs from the template, and its uptake.

    All lengths are mm in the scanner's frame (RAS+, 0 at the centre of the field of view).

    Attributes:
        tissue: the template.
        affine: 3x4, scanner mm -> template mm relative to the template's centre.
        warp: [3, knots, knots, knots] B-spline coefficients, mm, added after the affine.
        regional: [knots, knots, knots] B-spline coefficients of log regional uptake.
        spots: rows (x, y, z, sigma, depth) of hypometabolism, template mm.
        uptake: Bq/mL of grey matter.
    """

    tissue: Tissue
    affine: np.ndarray
    warp: np.ndarray
    regional: np.ndarray
    spots: np.ndarray
    uptake: float

    @classmethod
    def draw(cls, tissue: Tissue, rng: np.random.Generator) -> Subject:
        """Draw a subject.

        Turned by 4 degrees, scaled by 4 %, sheared by 2 % and shifted by 3 mm (standard
        deviations, per axis); warped by a free-form deformation (Rueckert et al., 1999) with
        coefficients of 3 mm, cut at 9 mm, well below the 0.4 knot distances that keep it
        invertible; regional factors of 12 %; one or two spots of 6-12 mm that lose 25-50 %; grey
        matter uptake of 5-20 kBq/mL.
        """
        angles = np.deg2rad(rng.normal(0, 4, 3))
        stretch = np.diag(_SHRINK + np.clip(rng.normal(0, 0.04, 3), -0.1, 0.1))
        shear = np.eye(3) + np.triu(rng.normal(0, 0.02, (3, 3)), 1)
        linear = _rotation(angles) @ stretch @ shear
        knots = (_KNOTS, _KNOTS, _KNOTS)
        spots = []
        for _ in range(rng.integers(1, 3)):
            place = tissue.grey[rng.integers(len(tissue.grey))] - tissue.centre
            spots.append([*place, rng.uniform(6, 12), rng.uniform(0.25, 0.5)])
        return cls(
            tissue,
            np.column_stack([linear, rng.normal(0, 3, 3)]),
            np.clip(rng.normal(0, 6, (3, *knots)), -15, 15),
            rng.normal(0, 0.3, knots),
            np.array(spots),
            float(rng.uniform(5e3, 20e3)),
        )

    def activity(self, scanner: Scanner) -> np.ndarray:
        """Activity in Bq/mL, float32 [X, Y, Z], the mean over each voxel of the scanner."""
        fine = [int(np.ceil(mm / _FINEST_MM - 1e-6)) for mm in scanner.spacing]
        axes = [
            ((np.arange(n * f) + 0.5) / f - n / 2) * mm
            for n, f, mm in zip(scanner.matrix, fine, scanner.spacing, strict=True)
        ]
        out = self._sample(axes)
        x, y, z = scanner.matrix
        return out.reshape(x, fine[0], y, fine[1], z, fine[2]).mean(axis=(1, 3, 5))

    def template_points(self, axes: list[np.ndarray]) -> np.ndarray:
        """Template mm [3, X, Y, Z] of the scanner's grid points, float32."""
        x, y, z = (axis.astype(np.float32) for axis in axes)
        a = self.affine.astype(np.float32)
        basis = [_bspline(axis) for axis in axes]
        points = np.empty((3, len(x), len(y), len(z)), np.float32)
        for i in range(3):
            points[i] = _spline_field(self.warp[i], basis)
            points[i] += (a[i, 0] * x)[:, None, None] + (a[i, 1] * y)[:, None]
            points[i] += a[i, 2] * z + a[i, 3]
        return points

    def _sample(self, axes: list[np.ndarray]) -> np.ndarray:
        points = self.template_points(axes)
        voxels = points + self.tissue.centre.astype(np.float32)[:, None, None, None]
        out = map_coordinates(self.tissue.activity, voxels, order=1, output=np.float32)
        out *= np.exp(_spline_field(self.regional, [_bspline(axis) for axis in axes]))
        for x, y, z, sigma, depth in self.spots.astype(np.float32):
            squared = (points[0] - x) ** 2 + (points[1] - y) ** 2 + (points[2] - z) ** 2
            out *= 1 - depth * np.exp(squared / (-2 * sigma**2))
        out *= np.float32(self.uptake / GREY_TO_WHITE)
        return out


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z by `angles` in radians."""
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def _bspline(mm: np.ndarray) -> np.ndarray:
    """Cubic B-spline basis [len(mm), knots]; knot k lies at (k - (knots - 1) / 2) * 40 mm."""
    distance = np.abs(mm[:, None] / _KNOT_MM - (np.arange(_KNOTS) - (_KNOTS - 1) / 2))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _spline_field(knots: np.ndarray, basis: list[np.ndarray]) -> np.ndarray:
    """Sum over knots of coefficient * Bx * By * Bz: [X, Y, Z] float32."""
    field = np.tensordot(basis[0], knots.astype(np.float32), (1, 0))  # [X, ky, kz]
    field = np.tensordot(field, basis[1], (1, 1))  # [X, kz, Y]
    return np.ascontiguousarray(np.tensordot(field, basis[2], (1, 1)))  # [X, Y, Z]
