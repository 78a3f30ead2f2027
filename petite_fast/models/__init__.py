"""The networks, and reading and writing their checkpoints.

`UNETR` is MONAI's network: MONAI (extra ``app``) is imported when that name is first used.
"""

from typing import TYPE_CHECKING, Any

from petite_fast.models.checkpoints import (
    LoadedNetwork,
    build_network,
    load_network,
    load_published,
    save_network,
)
from petite_fast.models.cvtgan import CVTGANDiscriminator, CVTGANGenerator
from petite_fast.models.published import identify, load_published_adapter

if TYPE_CHECKING:
    from petite_fast.models.unetr import UNETR

__all__ = [
    "CVTGANDiscriminator",
    "CVTGANGenerator",
    "LoadedNetwork",
    "UNETR",
    "build_network",
    "identify",
    "load_network",
    "load_published",
    "load_published_adapter",
    "save_network",
]


def __getattr__(name: str) -> Any:
    if name == "UNETR":
        from petite_fast.models.unetr import UNETR

        return UNETR
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
