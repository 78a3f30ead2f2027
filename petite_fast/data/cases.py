"""What a data set consists of, whatever its layout on disk: cases, pairs, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from petite_fast.data.bids_sidecar import PetInfo


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set.

    Attributes:
        where: the file, or the part of a listing.
        what: what is wrong and what was expected; of a sidecar, with the field's name.
        fatal: False for what this package can do without.
    """

    where: str
    what: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Pair:
    """One short scan (`image`), its standard scan (`label`), and a name that is safe to log.

    Attributes:
        image: the short scan.
        label: the standard scan.
        subject: splits are made of subjects, so all visits of one share it.
        session: the visit, "" if the subject has one.
    """

    image: Path
    label: Path
    subject: str
    session: str = ""

    @property
    def name(self) -> str:
        """Subject and visit, for reports."""
        return f"{self.subject}_{self.session}" if self.session else self.subject


@dataclass(frozen=True)
class Case:
    """One visit: a short scan and its standard scan, of which one may be missing.

    Attributes:
        image: the short scan.
        label: the standard scan.
        subject, session: see `Pair`.
        scanner: cases of one scanner should share a voxel size.
        units: of the voxels, None where nothing says so.
        infos: what the BIDS sidecars of image and label say, by "image" and "label".
    """

    image: Path | None
    label: Path | None
    subject: str
    session: str = ""
    scanner: str = "unknown"
    units: str | None = None
    infos: Mapping[str, PetInfo] = field(default_factory=dict, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """Image and label, those that there are."""
        return tuple(file for file in (self.image, self.label) if file is not None)

    @property
    def pair(self) -> Pair | None:
        """The pair, if both are there."""
        if self.image is None or self.label is None:
            return None
        return Pair(self.image, self.label, self.subject, self.session)
