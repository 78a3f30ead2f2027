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
from cases import kernels, memory, ops  # noqa: E402
from measure import machine  # noqa: E402
from report import figure, table  # noqa: E402

SUITES = {"kernels": kernels.run, "ops": ops.run, "memory": memory.run}


def main() -> int:
    """Run the chosen suites."""
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
        records = SUITES[name](arguments.device, arguments.quick)
        result: dict[str, Any] = {
            "suite": name,
            "device": arguments.device,
            "quick": arguments.quick,
            "machine": about,
            "cases": records,
        }
        print(table(result))
        arguments.out.mkdir(parents=True, exist_ok=True)
        stem = arguments.out / f"{name}-{kind}"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        figure(result, stem.with_suffix(".png"))
        print(f"written: {stem}.json, {stem}.png\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
