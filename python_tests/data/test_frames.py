"""Static images and pairs from dynamic series."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import expected as dicom_frames
from dicom_cases import make_series
from volume_cases import ras_affine

from petite_fast.data import (
    Timing,
    Volume,
    frame_pair,
    read_volume,
    require_static,
    select_frames,
    to_static,
    to_suv,
    write_like,
    write_volume,
)
from petite_fast.data.dicom_write import write_dicom
from petite_fast.errors import InputError

C11 = 1221.8
START, DURATION = (0.0, 60.0, 360.0), (60.0, 300.0, 600.0)


def dynamic(folder: Path, array: np.ndarray, **changes: object) -> Volume:
    """A NIfTI series [T, X, Y, Z] with sidecar; keywords change or (None) remove a field."""
    grid = read_volume(write_volume(array[0], ras_affine(), folder / "grid.nii"))
    header = grid.header.copy()
    header.set_data_shape((*array.shape[1:], len(array)))
    series = replace(grid, shape=array.shape, header=header)
    path = write_like(series, array, folder / "sub-01_pet.nii.gz")
    content = {
        "Units": "Bq/mL",
        "TracerRadionuclide": "C11",
        "TimeZero": "10:00:00",
        "ScanStart": 0,
        "InjectionStart": 0,
        "FrameTimesStart": list(START),
        "FrameDuration": list(DURATION),
        "ImageDecayCorrected": True,
        "ImageDecayCorrectionTime": 0,
        "InjectedRadioactivity": 350,
        "InjectedRadioactivityUnits": "MBq",
        "PatientWeight": 70,
        **changes,
    }
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "sub-01_pet.json").write_text(json.dumps(kept))
    return read_volume(path)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).random((3, 4, 3, 5), np.float32) * 1000


def test_series_and_sidecar(tmp_path: Path, frames: np.ndarray) -> None:
    volume = dynamic(tmp_path, frames)
    np.testing.assert_array_equal(volume.array, frames)
    assert volume.timing == Timing(START, DURATION, (0.0,) * 3)
    with pytest.raises(InputError, match="dynamic series of 3 frames"):
        require_static(volume)
    np.testing.assert_allclose(to_suv(volume).array, frames * 70_000 / 3.5e8, rtol=1e-6)


def test_duration_weighted_mean(tmp_path: Path, frames: np.ndarray) -> None:
    static = to_static(dynamic(tmp_path, frames))
    weights = np.array(DURATION) / sum(DURATION)
    exact = np.tensordot(weights, frames.astype(np.float64), 1)
    np.testing.assert_allclose(static.array, exact, rtol=1e-6)
    assert static.timing == Timing((0.0,), (960.0,), (0.0,)) and static.units == "Bq/mL"
    assert not np.allclose(exact, frames.mean(0), rtol=1e-3)  # not the plain mean
    part = to_static(dynamic(tmp_path, frames), [1, 2])
    exact = (frames[1] * 300.0 + frames[2] * 600.0) / 900
    np.testing.assert_allclose(part.array, exact, rtol=1e-5)
    again = read_volume(write_like(static, static.array, tmp_path / "static.nii.gz"))
    np.testing.assert_array_equal(again.array, static.array)


def counts_of(activity: np.ndarray, rate: float) -> np.ndarray:
    """Decays in each frame of an activity that is constant but for decay, per unit of it."""
    start, end = np.array(START), np.array(START) + np.array(DURATION)
    return (np.exp(-rate * start) - np.exp(-rate * end)) / rate * activity


@pytest.mark.parametrize("reference", [0.0, -500.0])
def test_counts_are_those_of_one_long_acquisition(
    tmp_path: Path, frames: np.ndarray, reference: float
) -> None:
    rate = np.log(2) / C11
    volume = dynamic(tmp_path, frames, ImageDecayCorrectionTime=reference)
    static = to_static(volume, average="counts")
    # frame t of value a at `reference` saw a * w_t decays
    decays = counts_of(np.exp(rate * reference) * np.ones(3), rate)
    exact = np.tensordot(decays, frames.astype(np.float64), 1) / decays.sum()
    np.testing.assert_allclose(static.array, exact, rtol=1e-6)
    constant = dynamic(tmp_path, np.full_like(frames, 7))
    np.testing.assert_allclose(to_static(constant, average="counts").array, 7, rtol=1e-6)


@pytest.mark.parametrize("average", ["activity", "counts"])
def test_frames_corrected_to_their_own_starts(
    tmp_path: Path, frames: np.ndarray, average: str
) -> None:
    rate = np.log(2) / C11
    common = dynamic(tmp_path, frames)
    own = frames * np.exp(-rate * np.array(START))[:, None, None, None]
    volume = dynamic(tmp_path, own.astype(np.float32))
    assert volume.timing is not None
    volume = replace(volume, timing=replace(volume.timing, reference_s=START))
    np.testing.assert_allclose(
        to_static(volume, average=average).array,  # type: ignore[arg-type]
        to_static(replace(common, reader=_Array(frames)), average=average).array,  # type: ignore[arg-type]
        rtol=1e-5,
    )


class _Array:
    def __init__(self, frames: np.ndarray) -> None:
        self.stored = frames

    def frames(self, indices):
        return (self.stored[k] for k in indices)


def test_uncorrected_frames(tmp_path: Path) -> None:
    """A constant activity, uncorrected: static and frames give one SUV at injection."""
    rate = np.log(2) / C11
    means = counts_of(np.full(3, 5000.0), rate) / np.array(DURATION)
    array = np.broadcast_to(means[:, None, None, None], (3, 2, 2, 2)).astype(np.float32)
    volume = dynamic(tmp_path, array, ImageDecayCorrected=False, ImageDecayCorrectionTime=None)
    expected = 5000 * 70_000 / 3.5e8
    np.testing.assert_allclose(to_suv(volume).array, expected, rtol=1e-5)
    static = to_static(volume)
    assert static.timing is not None and static.timing.reference_s is None
    np.testing.assert_allclose(to_suv(static).array, expected, rtol=1e-5)


def test_short_and_standard_pair(tmp_path: Path, frames: np.ndarray) -> None:
    short, standard = frame_pair(dynamic(tmp_path, frames), 1, [0, 1, 2])
    np.testing.assert_array_equal(short.array, frames[1])
    assert short.shape == standard.shape == frames.shape[1:]
    assert short.timing == Timing((60.0,), (300.0,), (0.0,))
    with pytest.raises(InputError, match="not among"):
        frame_pair(dynamic(tmp_path, frames), 0, [1, 2])
    for chosen in ([3], [], [1, 0], [1, 1], [-1]):
        with pytest.raises(InputError, match="expected ascending numbers from 0 to 2"):
            select_frames(dynamic(tmp_path, frames), chosen)


def test_frame_of_a_dicom_series_can_be_written_as_dicom(tmp_path: Path) -> None:
    volume = read_volume(make_series(tmp_path / "s", frames=3))
    frame = select_frames(volume, [1])
    again = read_volume(write_dicom(frame, frame.array, tmp_path / "out"))
    np.testing.assert_allclose(again.array, dicom_frames(3)[1], atol=0.01)
    with pytest.raises(InputError, match="not a DICOM series"):
        static = to_static(volume)
        write_dicom(static, static.array, tmp_path / "other")


def test_what_is_missing(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(InputError, match="frame times are not given"):
        to_static(dynamic(tmp_path, frames, FrameDuration=None))
    unknown = dynamic(tmp_path, frames, TracerRadionuclide="Xx7")
    to_static(unknown)  # one reference: no half-life is needed
    with pytest.raises(InputError, match="half-life is not given"):
        to_static(unknown, average="counts")
    with pytest.raises(ValueError, match="average is 'sum'"):
        to_static(unknown, average="sum")  # type: ignore[arg-type]
