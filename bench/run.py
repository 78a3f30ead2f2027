"""Measure petite_fast beside plain PyTorch and HF PEFT, in one process, interleaved.

    python bench/run.py [--suite kernels|ops|memory|all] [--device cpu|cuda] [--quick] [--threads N]

Prints a table per suite and writes bench/results/SUITE-DEVICE.json and .png; with --threads N
SUITE-DEVICE-tN.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft must not look for the network
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler must not talk
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from cases import gpu_kernels, kernels, memory, ops  # noqa: E402
from measure import DeviceLost, machine  # noqa: E402
from report import figure, table  # noqa: E402

from petite_fast.files import atomic_write  # noqa: E402

SUITES = {
    "kernels": {"cpu": kernels.run, "cuda": gpu_kernels.run},
    "ops": {"cpu": ops.run, "cuda": ops.gpu_run},
    "memory": {"cpu": memory.run, "cuda": memory.gpu_run},
}


def main() -> int:
    """0: measured; 1: the GPU was lost, and what was measured before is written; 2: no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, the same cases")
    parser.add_argument("--threads", type=int, help="default: torch's; gives the results a name")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but torch finds no CUDA device", file=sys.stderr)
        return 2
    kind = arguments.device
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        kind += f"-t{arguments.threads}"
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.disable(logging.WARNING)
    about = machine(arguments.device)
    names = list(SUITES) if arguments.suite == "all" else [arguments.suite]
    for name in names:
        result = {
            "suite": name,
            "device": arguments.device,
            "quick": arguments.quick,
            "machine": about,
            "cases": [],
        }
        if not measure(result, arguments.out / f"{name}-{kind}"):
            return 1
    return 0


def measure(result: dict[str, Any], stem: Path) -> bool:
    """Run the suite of `result`, print and write it; False if the GPU was lost on the way."""
    json_path, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    try:
        for record in SUITES[result["suite"]][result["device"]](result["quick"]):
            result["cases"].append(record)
            if result["device"] == "cuda":  # a kernel may hang: what there is stays
                write(json_path, result)
    except DeviceLost as lost:
        result["ended"] = str(lost)
    write(json_path, result)
    print(table(result))
    if "ended" in result:
        print(f"written: {json_path}; the GPU was lost: {result['ended']}", file=sys.stderr)
        return False
    figure(result, picture)
    print(f"written: {json_path}, {picture}\n")
    return True


def write(path: Path, result: dict[str, Any]) -> None:
    """The JSON of a result."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
