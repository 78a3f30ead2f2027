"""Damaged headers and sidecars of every format end in a Volume or in InputError.

The number of files per format is PETITE_FAST_MUTATIONS (300 by default).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import SECRET, make_enhanced, make_series
from ecat_cases import make_ecat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_cases import BIDS
from volume_cases import save, voxels

from petite_fast.data import Volume, read_volume, to_static, to_suv
from petite_fast.errors import InputError

FILES = int(os.environ.get("PETITE_FAST_MUTATIONS", "300"))


def checked(share: int) -> settings:
    """Settings of a test that has one part in `share` of its format's files."""
    return settings(
        max_examples=max(FILES // share, 1),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Where to write, as a part of the file: few places hit few fields, so headers come first.
places = st.one_of(st.floats(0, 0.999), st.floats(0, 0.05))
written = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x00\x00\xc0\x7f", b"-1"]),
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that overwrites, inserts and deletes bytes, or cuts the end off."""
    edits = draw(st.lists(st.tuples(places, written, st.sampled_from("oooid")), max_size=4))
    cut = draw(st.floats(0, 1)) if draw(st.integers(0, 5)) == 5 else None

    def mutate(content: bytes) -> bytes:
        data = bytearray(content)
        for place, new, kind in edits:
            at = int(place * len(data))
            end = at + (0 if kind == "i" else len(new))
            data[at:end] = b"" if kind == "d" else new
        return bytes(data if cut is None else data[: int(cut * len(data))])

    return mutate


def is_volume_or_input_error(path: Path) -> None:
    """Reading headers, voxels, SUV and a static image, each as far as it goes."""
    try:
        volume = read_volume(path)
        assert isinstance(volume, Volume)
        assert volume.array.shape == volume.shape and volume.array.dtype == np.float32
        assert np.isfinite(volume.array).all() and np.isfinite(volume.affine).all()
        for use in (to_suv, to_static):
            try:
                result: Any = use(volume)
                assert result.shape[-3:] == volume.shape[-3:]
            except InputError as error:
                assert_clean(error)
    except InputError as error:
        assert_clean(error)


def assert_clean(error: InputError) -> None:
    message = str(error)
    assert "expected" in message and "\n" not in message
    assert SECRET not in message and "ID-4711" not in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("mutated")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("zipped", [False, True])
def test_nifti(folder: Path, kind: type, zipped: bool) -> None:
    array = np.stack([voxels(), voxels() * 2], axis=3)
    nib.save(kind(array, np.diag([2, 2, 3, 1])), folder / "whole.nii")
    whole, path = (folder / "whole.nii").read_bytes(), folder / f"a.nii{'.gz' * zipped}"

    @checked(4)
    @given(mutations(), mutations())
    def check(mutate: Callable[[bytes], bytes], outer: Callable[[bytes], bytes]) -> None:
        content = mutate(whole)
        # half of the gzip files are sound and hold a damaged NIfTI
        if zipped and len(content) % 2:
            content = gzip.compress(content, 1)
        elif zipped:
            content = outer(gzip.compress(whole, 1))
        path.write_bytes(content)
        is_volume_or_input_error(path)

    check()


def test_ecat(folder: Path) -> None:
    whole, path = make_ecat(folder / "whole.v", 2).read_bytes(), folder / "a.v"

    @checked(1)
    @given(mutations())
    def check(mutate: Callable[[bytes], bytes]) -> None:
        path.write_bytes(mutate(whole))
        is_volume_or_input_error(path)

    check()


@pytest.mark.parametrize("enhanced", [False, True])
def test_dicom(folder: Path, enhanced: bool) -> None:
    source = folder / f"series{enhanced}"
    if enhanced:
        make_enhanced(source / "0-0.dcm", 2)
    else:
        make_series(source)
    target = source / "0-0.dcm"
    whole = target.read_bytes()

    @checked(2)
    @given(mutations())
    def check(mutate: Callable[[bytes], bytes]) -> None:
        target.write_bytes(mutate(whole))
        is_volume_or_input_error(source)

    check()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
numbers = st.integers(-100, 4000) | st.floats(-1e9, 1e9)
likely = st.one_of(
    values,
    numbers,
    st.lists(numbers, min_size=1, max_size=3),
    st.sampled_from(["START", "NONE", "ADMIN", "12:00:00", "F18", "MBq", "Bq/mL", True, False]),
)
FIELDS = [*BIDS, "SeriesTime", "AcquisitionTime", "RadiopharmaceuticalStartTime", "PatientWeight"]
FIELDS += ["DecayCorrection", "RadionuclideHalfLife", "PatientSize", "PatientSex"]


def test_sidecar(folder: Path) -> None:
    image = save(folder / "sub-01_pet.nii.gz", np.stack([voxels()] * 3, axis=3))
    sidecar = folder / "sub-01_pet.json"

    @checked(1)
    @given(st.dictionaries(st.sampled_from(FIELDS), likely, max_size=6), mutations(), st.booleans())
    def check(changes: dict, mutate: Callable[[bytes], bytes], raw: bool) -> None:
        content = json.dumps({**BIDS, **changes}).encode()
        sidecar.write_bytes(mutate(content) if raw else content)
        is_volume_or_input_error(image)

    check()


def test_mutations_are_not_all_refused(folder: Path) -> None:
    """The search above means something only where some files are still read."""
    seen = {"read": 0, "refused": 0}
    whole = save(folder / "whole.nii", voxels()).read_bytes()

    @settings(checked(1), max_examples=100)
    @given(mutations())
    def check(mutate: Callable[[bytes], bytes]) -> None:
        content = mutate(whole)
        (folder / "b.nii").write_bytes(content)
        try:
            read_volume(folder / "b.nii").array  # noqa: B018
            seen["read"] += zlib.crc32(content) != zlib.crc32(whole)
        except InputError:
            seen["refused"] += 1

    check()
    assert seen["read"] > 5 and seen["refused"] > 5
