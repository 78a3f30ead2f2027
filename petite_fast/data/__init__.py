"""PET volumes: files, scanners, simulated scan pairs, normalisation, patches.

`petite_fast.data.simulate` is imported by itself, because it needs scipy (extra ``app``).
"""

from petite_fast.data.cases import Pair
from petite_fast.data.collection import read_collection, read_pairs
from petite_fast.data.datalist import read_datalist
from petite_fast.data.dataset import PairDataset, PatchDataset, load_pair
from petite_fast.data.normalise import Normaliser, ScaleRecord
from petite_fast.data.scanners import SCANNERS, Scanner, get_scanner
from petite_fast.data.thinning import thin
from petite_fast.data.volume import Volume, read_volume, write_like, write_volume

__all__ = [
    "SCANNERS",
    "Normaliser",
    "Pair",
    "PairDataset",
    "PatchDataset",
    "ScaleRecord",
    "Scanner",
    "Volume",
    "get_scanner",
    "load_pair",
    "read_collection",
    "read_datalist",
    "read_pairs",
    "read_volume",
    "thin",
    "write_like",
    "write_volume",
]
