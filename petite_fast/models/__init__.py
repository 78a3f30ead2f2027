"""The networks, and reading and writing their checkpoints."""

from petite_fast.models.checkpoints import (
    LoadedNetwork,
    identify,
    load_network,
    load_published,
    save_network,
)
from petite_fast.models.cvtgan import CVTGANDiscriminator, CVTGANGenerator

__all__ = [
    "CVTGANDiscriminator",
    "CVTGANGenerator",
    "LoadedNetwork",
    "identify",
    "load_network",
    "load_published",
    "save_network",
]
