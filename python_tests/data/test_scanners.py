"""The five published scanners."""

from __future__ import annotations

import pytest

from petite_fast.data import SCANNERS, get_scanner
from petite_fast.errors import InputError

PUBLISHED = {
    "136": ((192, 192, 136), (1.21875, 1.21875, 1.21875), (64, 64, 64)),
    "192": ((192, 192, 128), (1.21875, 1.21875, 1.21875), (64, 64, 64)),
    "224": ((224, 224, 81), (1.01821, 1.01821, 2.0269988), (64, 64, 64)),
    "90": ((128, 128, 90), (2.0, 2.0, 2.0), (64, 64, 64)),
    "63": ((128, 128, 63), (2.05941, 2.05941, 2.4250016), (64, 64, 32)),
}


def test_published_numbers() -> None:
    assert {s.tag: (s.matrix, s.spacing, s.roi) for s in SCANNERS.values()} == PUBLISHED


def test_scanners_differ_and_are_plausible() -> None:
    widths = [scanner.psf_fwhm_mm for scanner in SCANNERS.values()]
    assert all(3 <= width <= 8 for width in widths) and len(set(widths)) == 5


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
@pytest.mark.parametrize("tag", SCANNERS)
def test_reduced_keeps_the_field_of_view(tag: str, factor: int) -> None:
    full, coarse = SCANNERS[tag], SCANNERS[tag].reduced(factor)
    assert coarse.field_of_view == pytest.approx(full.field_of_view)
    for fine, few in zip(full.matrix, coarse.matrix, strict=True):
        assert abs(few - fine / factor) <= 0.5
    assert all(side % 16 == 0 and side >= 16 for side in coarse.roi)
    assert coarse.counts == full.counts and coarse.psf_fwhm_mm == full.psf_fwhm_mm


def test_reduced_example() -> None:
    assert SCANNERS["136"].reduced(3).matrix == (64, 64, 45)
    assert SCANNERS["136"].reduced(1) is SCANNERS["136"]


@pytest.mark.parametrize("factor", [0, -1, 1.5, 20])
def test_bad_factor(factor: float) -> None:
    with pytest.raises(InputError, match="reduce is .*expected"):
        SCANNERS["63"].reduced(factor)  # type: ignore[arg-type]


def test_unknown_tag() -> None:
    with pytest.raises(InputError, match="scanner is '7'; expected one of 136, 192, 224, 90, 63"):
        get_scanner("7")
