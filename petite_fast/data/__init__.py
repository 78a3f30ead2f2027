"""PET volumes: files, scanners, simulated scan pairs, normalisation, patches.

`petite_fast.data.simulate` (scipy) and `petite_fast.data.dicom_write` (pydicom) are imported by
themselves, because they need the extra ``app``.
"""

from petite_fast.data.acquisition import Timing, Tracer
from petite_fast.data.cases import Pair
from petite_fast.data.collection import read_collection, read_pairs
from petite_fast.data.datalist import read_datalist
from petite_fast.data.dataset import PairDataset, PatchDataset, load_pair
from petite_fast.data.frames import frame_pair, select_frames, to_static
from petite_fast.data.normalise import Normaliser, ScaleRecord
from petite_fast.data.scanners import SCANNERS, Scanner, get_scanner
from petite_fast.data.suv import to_suv
from petite_fast.data.thinning import DOSE_REDUCTIONS, thin, thin_nested
from petite_fast.data.volume import (
    Volume,
    read_volume,
    require_static,
    same_grid,
    write_like,
    write_volume,
)

__all__ = [
    "DOSE_REDUCTIONS",
    "SCANNERS",
    "Normaliser",
    "Pair",
    "PairDataset",
    "PatchDataset",
    "ScaleRecord",
    "Scanner",
    "Timing",
    "Tracer",
    "Volume",
    "frame_pair",
    "get_scanner",
    "load_pair",
    "read_collection",
    "read_datalist",
    "read_pairs",
    "read_volume",
    "require_static",
    "same_grid",
    "select_frames",
    "thin",
    "thin_nested",
    "to_static",
    "to_suv",
    "write_like",
    "write_volume",
]
