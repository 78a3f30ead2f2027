"""What tuning found on a device, in a file of the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from petite_fast import settings
from petite_fast.files import write_json

Config = dict[str, int]

# Times closer than this are equal: the library keeps a geometry, an earlier configuration its rank.
TIE = 0.97

logger = logging.getLogger("petite_fast")


class Entry(NamedTuple):
    """What was measured for one geometry.

    Attributes:
        library_ms: the library's time.
        triton_ms: that of the best configuration; None if none ran and gave the library's result.
        config: that configuration.
    """

    library_ms: float
    triton_ms: float | None
    config: Config

    @property
    def triton_wins(self) -> bool:
        """Whether Triton is faster by more than a tie."""
        return self.triton_ms is not None and self.triton_ms < TIE * self.library_ms

    @property
    def text(self) -> str:
        """The times, in words."""
        if self.triton_ms is None:
            return "no configuration gave the library's result"
        return f"measured {self.triton_ms:.3g} ms, the library {self.library_ms:.3g} ms"


class Cache:
    """The entries of one device, also in a file.

    A file that cannot be read or is of another kind is ignored with a warning, and is written anew.
    """

    def __init__(self, about: dict[str, str]) -> None:
        self.about = about
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self.path = settings.cache_folder() / f"tune-{name}.json"
        self.entries = self._read()
        self.passed_over: set[str] = set()  # what cannot be measured now is not tried again

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry, beside those that other processes have written meanwhile."""
        self.entries = {**self._read(quiet=True), **self.entries, key: entry}
        rows = {k: e._asdict() for k, e in sorted(self.entries.items())}
        try:
            write_json(self.path, {"about": self.about, "entries": rows})
        except OSError as error:
            _warn_once(self.path, f"cannot be written ({error.strerror}): tuning is not kept")

    def _read(self, quiet: bool = False) -> dict[str, Entry]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["about"] != self.about:
                raise ValueError("of another device")
            return {key: _parse(row) for key, row in found["entries"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if not quiet:
                _warn_once(self.path, "is no tuning file of this device: ignored")
            return {}


def _parse(row: dict[str, Any]) -> Entry:
    triton_ms, config = row["triton_ms"], row["config"]
    return Entry(
        float(row["library_ms"]),
        None if triton_ms is None else float(triton_ms),
        {str(name): int(value) for name, value in config.items()},
    )


@functools.cache
def _warn_once(path: Path, text: str) -> None:
    logger.warning("%s %s", path, text)


def describe(device: int) -> dict[str, str]:
    """What an entry holds for: the device, versions, and a hash of the kernels' source."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": importlib.import_module("triton").__version__,
        "source": source.hexdigest()[:16],
    }
