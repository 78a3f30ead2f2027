"""The five scanners of the published study, as the simulator models them.

Published (PETITE, MICCAI 2024, and its public code): tag, maker, site, matrix, voxel spacing
and training patch (roi). Ours: point-spread width, post-filter and count level. They are not
in the publication; they were chosen inside the range of clinical brain PET (3-8 mm) so that no
two scanners look alike, and the order follows what such machines do (a dedicated brain
tomograph resolves most, the oldest ring least).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from petite_fast.errors import InputError


@dataclass(frozen=True)
class Scanner:
    """One scanner model.

    Attributes:
        tag: the publication's name for it (its number of slices or columns).
        maker: manufacturer and site.
        matrix: voxels along X, Y, Z.
        spacing: voxel size in mm along X, Y, Z.
        roi: training patch in voxels.
        psf_fwhm_mm: full width at half maximum of the system's Gaussian blur.
        post_filter_fwhm_mm: width of the Gaussian applied after reconstruction; it
            correlates the noise.
        counts: noise-equivalent counts of the standard scan (see `petite_fast.data.simulate`).
    """

    tag: str
    maker: str
    matrix: tuple[int, int, int]
    spacing: tuple[float, float, float]
    roi: tuple[int, int, int]
    psf_fwhm_mm: float
    post_filter_fwhm_mm: float
    counts: float

    @property
    def field_of_view(self) -> tuple[float, float, float]:
        """Extent in mm along X, Y, Z: matrix * spacing."""
        x, y, z = (n * mm for n, mm in zip(self.matrix, self.spacing, strict=True))
        return x, y, z

    def reduced(self, factor: int) -> Scanner:
        """Return the scanner with `factor` times coarser voxels and the same field of view.

        Sides are rounded to whole voxels (they need not divide by 16, networks pad); the
        spacing takes up the rounding. The roi shrinks to a multiple of 16. Counts are of the whole
        scan and stay, as do the widths, which are in mm.

        Raises:
            InputError: `factor` is not a whole number >= 1, or leaves fewer than 8 voxels a side.
        """
        if factor != int(factor) or factor < 1:
            raise InputError(f"reduce is {factor}; expected a whole number of at least 1")
        if factor == 1:
            return self
        x, y, z = (round(n / factor) for n in self.matrix)
        if min(x, y, z) < 8:
            raise InputError(
                f"reduce is {factor}, which leaves {x}x{y}x{z} voxels; expected at least 8 a side"
            )
        fov = self.field_of_view
        rx, ry, rz = (16 * -(-n // (16 * int(factor))) for n in self.roi)
        return replace(
            self,
            matrix=(x, y, z),
            spacing=(fov[0] / x, fov[1] / y, fov[2] / z),
            roi=(rx, ry, rz),
        )


SCANNERS: dict[str, Scanner] = {
    scanner.tag: scanner
    for scanner in (
        Scanner(
            tag="136",
            maker="Siemens, University of California",
            matrix=(192, 192, 136),
            spacing=(1.21875, 1.21875, 1.21875),
            roi=(64, 64, 64),
            psf_fwhm_mm=3.0,
            post_filter_fwhm_mm=4.0,
            counts=2.0e6,
        ),
        Scanner(
            tag="192",
            maker="Siemens, University of California",
            matrix=(192, 192, 128),
            spacing=(1.21875, 1.21875, 1.21875),
            roi=(64, 64, 64),
            psf_fwhm_mm=4.0,
            post_filter_fwhm_mm=3.0,
            counts=3.0e6,
        ),
        Scanner(
            tag="224",
            maker="Siemens, University of California",
            matrix=(224, 224, 81),
            spacing=(1.01821, 1.01821, 2.0269988),
            roi=(64, 64, 64),
            psf_fwhm_mm=5.0,
            post_filter_fwhm_mm=4.0,
            counts=1.5e6,
        ),
        Scanner(
            tag="90",
            maker="Philips, Oregon Health and Science University",
            matrix=(128, 128, 90),
            spacing=(2.0, 2.0, 2.0),
            roi=(64, 64, 64),
            psf_fwhm_mm=6.0,
            post_filter_fwhm_mm=5.0,
            counts=1.0e6,
        ),
        Scanner(
            tag="63",
            maker="Siemens, University of California, San Diego",
            matrix=(128, 128, 63),
            spacing=(2.05941, 2.05941, 2.4250016),
            roi=(64, 64, 32),
            psf_fwhm_mm=7.0,
            post_filter_fwhm_mm=5.0,
            counts=0.8e6,
        ),
    )
}


def get_scanner(tag: str) -> Scanner:
    """Return the scanner with this tag.

    Raises:
        InputError: no such tag.
    """
    if tag not in SCANNERS:
        raise InputError(f"scanner is {tag!r}; expected one of {', '.join(SCANNERS)}")
    return SCANNERS[tag]
