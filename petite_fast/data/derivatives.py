"""Results of BIDS-PET images as a BIDS derivative data set.

    OUT/dataset_description.json
    OUT/sub-01[/ses-02]/pet/sub-01_..._desc-petite_pet.nii.gz
    OUT/sub-01[/ses-02]/pet/sub-01_..._desc-petite_pet.json     how it was made

OUT is best ``derivatives/petite_fast`` in the tree of the images. Of a sidecar only what
`petite_fast.data.bids_sidecar.KEPT_FIELDS` lists goes along; subject labels, which are pseudonyms,
stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petite_fast._version import __version__
from petite_fast.data.acquisition import Timing
from petite_fast.data.inheritance import (
    entities_of,
    inherited_sidecar,
    tree_root,
    visit_folders,
)
from petite_fast.files import write_json

BIDS_VERSION = "1.10.0"
DESCRIPTION = "dataset_description.json"
LABEL = "petite"


def derivative_path(image: Path, out: Path) -> Path | None:
    """Where the result of `image` goes in the derivative data set `out`; None for another name."""
    entities = entities_of(image)
    if entities is None:
        return None
    name = image.name.partition("_pet.nii")[0]
    return out.joinpath(*visit_folders(entities)) / f"{name}_desc-{LABEL}_pet.nii.gz"


def write_provenance(
    image: Path,
    result: Path,
    out: Path,
    provenance: Mapping[str, Any],
    timing: Timing | None = None,
) -> None:
    """Write the sidecar of `result`, and dataset_description.json if `out` has none.

    Args:
        image: the short scan.
        result: `derivative_path` of it.
        out: the derivative data set.
        provenance: JSON-able: hashes, adapter, normalisation, version.
        timing: of the short scan, where it is not all of `image`.

    Raises:
        OSError: a file cannot be written.
    """
    folders, root = visit_folders(entities_of(image) or {}), tree_root(image)
    info, _ = inherited_sidecar(root, image)
    sidecar = {
        "Description": "Standard scan, estimated from the short scan named in Sources",
        "Sources": [f"bids:raw:{'/'.join((*folders, image.name))}"],
        "SkullStripped": False,  # asked for by BIDS; the network sets no voxel to zero
        **info.shareable(),
        "PetiteFast": dict(provenance),
    }
    if timing is not None:
        sidecar["FrameTimesStart"] = list(timing.start_s)
        sidecar["FrameDuration"] = list(timing.duration_s)
    write_json(result.with_name(f"{result.name.removesuffix('.nii.gz')}.json"), sidecar)
    if not (out / DESCRIPTION).is_file():
        write_json(out / DESCRIPTION, _description(root, out))


def _description(root: Path, out: Path) -> dict[str, Any]:
    content: dict[str, Any] = {
        "Name": "petite_fast reconstructions",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "petite_fast", "Version": __version__}],
    }
    # A path that climbs only ("../..") tells nothing; any other may name a person or a machine.
    link = os.path.relpath(root.resolve(), out.resolve())
    if set(Path(link).parts) == {".."}:
        content["DatasetLinks"] = {"raw": Path(link).as_posix()}
    return content
