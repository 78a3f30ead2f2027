"""The one place that reads environment variables.

=======================  =======================================================================
variable                 meaning
=======================  =======================================================================
PETITE_FAST_BACKEND      eager | native | triton: that backend or an error; it leaves to eager
                         what it has no kernel for (default: the fastest)
PETITE_FAST_CPU_ISA      avx512 | avx2 | baseline: instruction set of the native CPU kernels
XDG_CACHE_HOME           where the user's cached files are (default: ~/.cache)
=======================  =======================================================================

PETITE_FAST_CUDA (auto | on | off) is read by setup.py, when the package is built.
"""

from __future__ import annotations

import os
from pathlib import Path

from petite_fast.errors import InputError

BACKENDS = ("eager", "native", "triton")
CPU_ISAS = ("avx512", "avx2", "baseline")


def backend() -> str | None:
    """The forced backend, or None.

    Raises:
        InputError: PETITE_FAST_BACKEND names no backend.
    """
    return _choice("PETITE_FAST_BACKEND", BACKENDS)


def cpu_isa() -> str | None:
    """The forced instruction set, or None.

    Raises:
        InputError: PETITE_FAST_CPU_ISA names no instruction set.
    """
    return _choice("PETITE_FAST_CPU_ISA", CPU_ISAS)


def cache_folder() -> Path:
    """Where what this library measured on a machine is kept; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "petite_fast"


def _choice(name: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(name)
    if not value:
        return None
    if value not in allowed:
        raise InputError(f"{name}: got {value!r}, wanted one of {', '.join(allowed)}")
    return value
