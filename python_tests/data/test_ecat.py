"""ECAT7 images: calibration, axes, frames; and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ecat_cases import SHAPE, expected, make_ecat
from volume_cases import patched, refused

from petite_fast.data import read_volume, same_grid, to_suv, write_like
from petite_fast.errors import InputError


def test_calibration_axes_and_times(tmp_path: Path) -> None:
    volume = read_volume(make_ecat(tmp_path / "a.v"))
    np.testing.assert_array_equal(volume.array, expected())
    np.testing.assert_allclose(volume.spacing, (2, 2.5, 3), rtol=1e-6)
    centre = volume.affine @ [*(np.array(SHAPE) - 1) / 2, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-5)
    assert volume.units == "Bq/mL" and volume.tracer is not None
    assert volume.tracer.elapsed_s == (3600.0,) and volume.tracer.nuclide == "F18"
    again = read_volume(write_like(volume, volume.array, tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(again.array, volume.array)
    assert same_grid(again, volume)
    assert "DOE" not in repr(volume)


def test_feet_first(tmp_path: Path) -> None:
    volume = read_volume(make_ecat(tmp_path / "a.v", main={"patient_orientation": 2}))
    np.testing.assert_array_equal(volume.array, expected()[::-1])


def test_unknown_orientation_counts_as_head_first(tmp_path: Path) -> None:
    volume = read_volume(make_ecat(tmp_path / "a.v", main={"patient_orientation": 8}))
    np.testing.assert_array_equal(volume.array, expected())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_frames_in_the_order_of_time(tmp_path: Path, order: tuple[int, ...]) -> None:
    volume = read_volume(make_ecat(tmp_path / "a.v", 3, order=order, sub={"x_offset": 0}))
    assert volume.shape == (3, *SHAPE)
    for frame, array in enumerate(volume.array):
        np.testing.assert_array_equal(array, expected(frame))
    assert volume.timing is not None and volume.timing.start_s == (0, 300, 600)
    np.testing.assert_array_equal(next(volume.frames([1])), expected(1))


def test_dose_is_not_guessed(tmp_path: Path) -> None:
    volume = read_volume(make_ecat(tmp_path / "a.v", main={"dosage": 350}))
    with pytest.raises(InputError, match="dose is not given"):
        to_suv(volume)


def test_units_that_are_not_known(tmp_path: Path) -> None:
    other = make_ecat(tmp_path / "a.v", main={"data_units": b"uCi/cc"})
    assert read_volume(other).units is None
    none = make_ecat(tmp_path / "b.v", main={"data_units": b"", "calibration_unitS": 0})
    assert read_volume(none).units is None


def test_file_of_a_scanner() -> None:
    """The file that nibabel ships, against nibabel's own reading of it."""
    path = Path(nib.__file__).parent / "tests" / "data" / "tinypet.v"
    if not path.is_file():
        pytest.skip("nibabel was installed without its test data")
    volume = read_volume(path)
    theirs = nib.ecat.load(path).get_frame(0, "neurological")
    np.testing.assert_allclose(volume.array, theirs, rtol=1e-6)
    assert volume.shape == (10, 10, 3) and volume.units == "Bq/mL"


def test_not_an_ecat_image(tmp_path: Path) -> None:
    (tmp_path / "a.v").write_bytes(b"<html>" * 200)
    refused(tmp_path / "a.v", "not an ECAT7 file")
    (tmp_path / "b.v").write_bytes(b"x")
    refused(tmp_path / "b.v", "not an ECAT7 file")
    refused(make_ecat(tmp_path / "c.v", main={"file_type": 11}), "type 11", "expected an image")


def test_damaged(tmp_path: Path) -> None:
    path = make_ecat(tmp_path / "a.v", 2)
    path.write_bytes(path.read_bytes()[:-512])
    refused(path, "truncated")
    circle = patched(make_ecat(tmp_path / "b.v"), 516, struct.pack(">i", 3))
    refused(circle, "list of frames")
    patched(circle, 2 * 512, struct.pack(">4i", 30, 3, 0, 1))  # block 3 points to itself
    refused(circle, "circle")
    refused(make_ecat(tmp_path / "c.v", sub={"data_type": 99}), "damaged")
    refused(make_ecat(tmp_path / "d.v", sub={"scale_factor": np.nan}), "24 voxels are NaN")
    refused(make_ecat(tmp_path / "e.v", sub={"x_pixel_size": 0}), "voxel size")
    refused(make_ecat(tmp_path / "h.v", sub={"x_pixel_size": -1}), "voxel size")
    refused(make_ecat(tmp_path / "f.v", 2, main={"num_gates": 2}), "gates")
    refused(make_ecat(tmp_path / "g.v", sub={"x_dimension": 60000}), "truncated")
