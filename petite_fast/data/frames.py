"""Dynamic series: static images from frames, and short/standard pairs of one acquisition."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import nibabel as nib
import numpy as np

from petite_fast.data.acquisition import Timing, mean_rate_time
from petite_fast.data.lazy import Reader, Volume
from petite_fast.errors import InputError

Average = Literal["activity", "counts"]


def parse_frames(text: str) -> tuple[int, ...]:
    """Ascending frame numbers, from 0, of "2", "0-5" or "0-2,5".

    Raises:
        InputError: other text, or numbers that do not ascend.
    """
    frames: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None:
            raise InputError(f"frames are {text!r}; expected numbers from 0, such as 2 or 0-5")
        frames += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not frames or frames != sorted(set(frames)):
        raise InputError(f"frames are {text!r}; expected ascending numbers, such as 0-2,5")
    return tuple(frames)


def select_frames(volume: Volume, indices: Sequence[int]) -> Volume:
    """Frames `indices` (ascending) of a dynamic series; one frame becomes a 3-D volume.

    Raises:
        InputError: no frame is chosen, or one that the series does not have.
    """
    chosen = _chosen(volume, indices)
    timing, tracer = volume.timing, volume.tracer
    if timing is not None:
        reference = timing.reference_s
        timing = Timing(
            tuple(timing.start_s[k] for k in chosen),
            tuple(timing.duration_s[k] for k in chosen),
            None if reference is None else tuple(reference[k] for k in chosen),
        )
    if tracer is not None and tracer.elapsed_s is not None:
        tracer = replace(tracer, elapsed_s=tuple(tracer.elapsed_s[k] for k in chosen))
    series = volume.dicom
    if series is not None:
        series = replace(series, slices=tuple(series.slices[k] for k in chosen))
    return replace(
        volume,
        shape=volume.shape[-3:] if len(chosen) == 1 else (len(chosen), *volume.shape[-3:]),
        reader=_Chosen(volume.reader, chosen),
        header=_header(volume, len(chosen)),
        timing=timing,
        tracer=tracer,
        dicom=series,
    )


def to_static(
    volume: Volume, indices: Sequence[int] | None = None, average: Average = "activity"
) -> Volume:
    """One image from frames of a dynamic series; decoded frame by frame when it is asked for.

    "activity", the duration-weighted mean (what ADNI's 30-minute images are):

        static = sum_t d_t a_t / sum_t d_t

    with a_t brought to one moment, r, first where frames are decay-corrected to different ones
    (r_t, e.g. each to its own start): a_t * 2^((r_t - r) / half-life), r = the first frame's.

    "counts", what one long acquisition would have given: the decay correction of each frame is
    undone, counts are added, and the sum is corrected once for all frames together:

        static = sum_t w_t a_t / sum_t w_t,   w_t = int_t 2^(-(s - r) / half-life) ds

    The two differ where uptake changes over a time that is long for the nuclide (11C, 15O, 82Rb).
    Frames that are not decay-corrected are averaged as they are, which adds their counts too.

    Args:
        volume: a dynamic series with timing.
        indices: ascending frame numbers, from 0; None for all.
        average: "activity" or "counts".

    Raises:
        InputError: frame times are not given, frames do not exist, or the half-life is needed and
            not given.
        ValueError: an unknown `average`.
    """
    if average not in ("activity", "counts"):
        raise ValueError(f"average is {average!r}, wanted 'activity' or 'counts'")
    part = select_frames(volume, range(volume.frame_count) if indices is None else indices)
    timing = part.timing
    if timing is None:
        raise InputError(
            f"{volume.source}: frame times are not given; expected FrameTimesStart and"
            " FrameDuration in a sidecar, or times in the header"
        )
    factors = _weights(part, timing, average)
    first, length = timing.start_s[0], sum(timing.duration_s)
    reference = None if timing.reference_s is None else timing.reference_s[:1]
    tracer = part.tracer
    if tracer is not None and tracer.elapsed_s is not None:
        elapsed = tracer.elapsed_s[0]
        if timing.reference_s is None:
            half_life = _half_life(part)
            # From injection to the mean rate of the whole, instead of that of the first frame.
            elapsed += mean_rate_time(timing.end_s[-1] - first, half_life)
            elapsed -= mean_rate_time(timing.duration_s[0], half_life)
        tracer = replace(tracer, elapsed_s=(elapsed,))
    return replace(
        part,
        shape=part.shape[-3:],
        reader=_Sum(part.reader, tuple(factors)),
        header=_header(part, 1),
        timing=Timing((first,), (length,), reference),
        tracer=tracer,
        dicom=part.dicom if part.frame_count == 1 else None,
    )


def frame_pair(volume: Volume, short: int, standard: Sequence[int]) -> tuple[Volume, Volume]:
    """Short and standard scan of one acquisition: frame `short`, and the mean of `standard`.

    The protocol of PETITE: one 5-minute frame against the mean of the six of 30 minutes.

    Raises:
        InputError: as `to_static`, or `short` is not among `standard`.
    """
    if short not in standard:
        raise InputError(
            f"frame {short} is not among the standard scan's {list(standard)}; expected one of them"
        )
    return select_frames(volume, [short]), to_static(volume, standard)


def _weights(part: Volume, timing: Timing, average: Average) -> list[float]:
    """Factor of each frame in the sum."""
    lengths = timing.duration_s
    total = sum(lengths)
    reference = timing.reference_s
    if reference is None:
        return [d / total for d in lengths]
    shared = max(reference) - min(reference) < 1e-3
    if average == "activity" and shared:
        return [d / total for d in lengths]
    half_life = _half_life(part)
    rate = math.log(2) / half_life
    to_first = [math.exp(rate * (r - reference[0])) for r in reference]
    if average == "activity":
        return [d / total * f for d, f in zip(lengths, to_first, strict=True)]
    spans = zip(timing.start_s, timing.end_s, strict=True)
    decays = [
        (math.exp(-rate * (s - reference[0])) - math.exp(-rate * (e - reference[0]))) / rate
        for s, e in spans
    ]
    return [w / sum(decays) * f for w, f in zip(decays, to_first, strict=True)]


def _half_life(volume: Volume) -> float:
    half_life = volume.tracer.half_life_s if volume.tracer is not None else None
    if half_life is None or not (math.isfinite(half_life) and half_life > 0):
        raise InputError(
            f"{volume.source}: the half-life is not given, and frames have to be brought to one"
            " moment; expected a radionuclide in the header or sidecar"
        )
    return half_life


def _chosen(volume: Volume, indices: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(indices)
    if (
        not chosen
        or list(chosen) != sorted(set(chosen))
        or not (0 <= chosen[0] <= chosen[-1] < volume.frame_count)
    ):
        raise InputError(
            f"{volume.source}: frames {list(chosen)} of {volume.frame_count}; expected ascending"
            f" numbers from 0 to {volume.frame_count - 1}"
        )
    return chosen


def _header(volume: Volume, frames: int) -> nib.Nifti1Header:
    header = volume.header.copy()
    spatial = header.get_data_shape()[:3]
    header.set_data_shape(spatial if frames == 1 else (*spatial, frames))
    return header


@dataclass(frozen=True)
class _Chosen:
    reader: Reader
    chosen: tuple[int, ...]

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return self.reader.frames([self.chosen[k] for k in indices])


@dataclass(frozen=True)
class _Sum:
    """One frame, sum_k factors[k] * frame k; two frames are in memory."""

    reader: Reader
    factors: tuple[float, ...]

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for _ in indices:
            total: np.ndarray | None = None
            decoded = self.reader.frames(range(len(self.factors)))
            for factor, frame in zip(self.factors, decoded, strict=True):
                part = factor * frame.astype(np.float64)
                total = part if total is None else np.add(total, part, out=total)
            yield np.asarray(total, np.float32)
