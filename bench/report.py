"""Tables and pictures of a result, and the READMEs' tables from the committed JSON.

python bench/report.py        rewrites the tables between the bench markers of both READMEs
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = ("torch", "torch-ndhwc")  # a kernel's providers that are not ours
HEADER = (
    "case", "provider", "ms", "spread", "x floor", "x PEFT", "kept units", "kept MiB", "peak MiB",
    "GF/s",
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per case and provider, as text."""
    lines = []
    for record in result["cases"]:
        figures = record["providers"]
        floor, peft = _least(figures, "ms", "floor"), _least(figures, "ms", "peft", "peft-ndhwc")
        digits = _digits(result)
        for name, value in figures.items():
            if "why_not" in value:
                reason, kind = value["why_not"], _why_not(value)
                text = reason if reason.startswith(kind) else f"{kind}: {reason}"
                lines.append((record["case"], name, text[:58], *[""] * 7))
                continue
            low, high = value["ms_quartiles"]
            rate = value["gflops_per_s"]
            lines.append(
                (
                    record["case"],
                    name,
                    f"{value['ms']:.{digits}f}",
                    f"{low:.{digits}f}-{high:.{digits}f}",
                    f"{value['ms'] / floor:.2f}" if floor else "",
                    f"{value['ms'] / peft:.2f}" if peft else "",
                    f"{value['saved_bytes'] / record['unit_bytes']:.2f}",
                    f"{value['saved_bytes'] / 2**20:.1f}",
                    f"{value['peak_bytes'] / 2**20:.1f}",
                    f"{rate:.0f}" if rate else "",
                )
            )
    return lines


def table(result: dict[str, Any]) -> str:
    """The result as a text table."""
    if result["suite"] == "kernels":
        return markdown(result)
    lines = [HEADER, *rows(result)]
    widths = [max(len(line[k]) for line in lines if line[3] or k < 2) for k in range(len(HEADER))]
    text, last = [], None
    for line in lines:
        first = line[0] if line[0] != last else ""
        last = line[0]
        cells = [first.ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(cells).rstrip())
    about = result["machine"]
    ceilings = about["ceilings"]
    text.append(
        f"{_machine(about)}, torch {about['versions']['torch']};"
        f" products {ceilings['product_gflops_per_s']:.0f} GFLOP/s,"
        f" copy {ceilings['copy_gb_per_s']:.0f} GB/s; median and quartiles, interleaved"
    )
    return "\n".join(text)


def markdown(result: dict[str, Any]) -> str:
    """README's table of a suite."""
    lines, kept = _LINES[result["suite"]]
    about = result["machine"]
    versions = f"torch {about['versions']['torch']}, {about['date']}"
    note = f"{_machine(about)}, {versions}; median of interleaved runs; {kept}"
    return "\n".join([*lines(result), "", f"{note}."])


def _machine(about: dict[str, Any]) -> str:
    """The device, and what the figures on a GPU are of."""
    if about["gpu"]:
        return f"{about['gpu']}, bfloat16"
    return f"{about['cpu']}, {about['threads']} threads"


def _digits(result: dict[str, Any]) -> int:
    """Of milliseconds, behind the point."""
    return 3 if result["machine"]["gpu"] else 1


def _least(figures: dict[str, dict[str, Any]], quantity: str, *names: str) -> float | None:
    """The least of some providers' figures, of those that have one."""
    found = [figures[n][quantity] for n in names if quantity in figures.get(n, {})]
    return min(found, default=None)


def _names(result: dict[str, Any]) -> list[str]:
    """Providers of all cases, in the order in which they appear."""
    return list(dict.fromkeys(name for record in result["cases"] for name in record["providers"]))


def _time_lines(result: dict[str, Any]) -> list[str]:
    """One row per case: times and kept units by provider."""
    names, digits = _names(result), _digits(result)
    lines = ["| case | " + " | ".join(f"{n} ms (kept)" for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for record in result["cases"]:
        unit = record["unit_bytes"]
        cells = [
            _cell(
                record["providers"].get(name),
                lambda v, u=unit: f"{v['ms']:.{digits}f} ({v['saved_bytes'] / u:.2f})",
            )
            for name in names
        ]
        lines.append(f"| {record['case']} | " + " | ".join(cells) + " |")
    return lines


def _memory_lines(result: dict[str, Any]) -> list[str]:
    """One row per provider: MiB kept and at the peak, and times, by case."""
    cases = result["cases"]
    lines = ["| kept / peak (ms) | " + " | ".join(record["case"] for record in cases) + " |"]
    lines.append("|---" * (len(cases) + 1) + "|")
    for name in _names(result):
        if name == "floor":  # which is the frozen network
            continue
        cells = [_cell(record["providers"].get(name), _memory_text) for record in cases]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _kernel_lines(result: dict[str, Any]) -> list[str]:
    """One row per kernel: milliseconds; the floor is its flops or bytes at the machine's rates."""
    if result["machine"]["gpu"]:
        return _gpu_kernel_lines(result)
    names = ("torch", "ours-eager", "ours", "product")
    lines = [
        "| kernel | torch | eager | ours | product alone | floor | torch / ours | ours / floor |"
    ]
    lines.append("|---" * 8 + "|")
    rates = result["machine"]["ceilings"]
    for record in result["cases"]:
        floor = _floor(record, rates)
        figures = {name: value["ms"] for name, value in record["providers"].items()}
        ours = figures["ours"]
        cells = [f"{figures[n]:.2f}" if n in figures else "" for n in names]
        cells += [f"{floor:.2f}", f"{figures['torch'] / ours:.1f}", f"{ours / floor:.1f}"]
        lines.append(f"| {record['case']} | " + " | ".join(cells) + " |")
    return [*lines, "", _rates(rates)]


def _gpu_kernel_lines(result: dict[str, Any]) -> list[str]:
    """The same on a GPU: the faster of torch's layouts, and each of ours, which may be missing."""
    mine = [name for name in _names(result) if name.startswith("ours")]
    heads = ["kernel", "best torch", *mine, "floor", "best torch / best of ours",
             "best of ours / floor"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    rates = result["machine"]["ceilings"]
    for record in result["cases"]:
        figures, floor = record["providers"], _floor(record, rates)
        theirs, ours = _least(figures, "ms", *TORCH), _least(figures, "ms", *mine)
        cells = [f"{theirs:.3f}" if theirs else "cannot"]
        cells += [_cell(figures.get(name), lambda v: f"{v['ms']:.3f}") for name in mine]
        cells += [f"{floor:.3f}", f"{theirs / ours:.2f}" if theirs and ours else ""]
        cells.append(f"{ours / floor:.1f}" if ours else "")
        lines.append(f"| {record['case']} | " + " | ".join(cells) + " |")
    return [*lines, "", _rates(rates)]


def _floor(record: dict[str, Any], rates: dict[str, float]) -> float:
    """Milliseconds of a kernel's flops or of its bytes, whichever take longer."""
    compute = record["flops"] / rates["product_gflops_per_s"] / 1e6
    return max(compute, record["bytes"] / rates["copy_gb_per_s"] / 1e6)


def _rates(rates: dict[str, float]) -> str:
    return "Floor: {product_gflops_per_s:.0f} GFLOP/s, {copy_gb_per_s:.0f} GB/s.".format(**rates)


def _memory_text(value: dict[str, Any]) -> str:
    kept, peak = value["saved_bytes"] / 2**20, value["peak_bytes"] / 2**20
    return f"{kept:.1f} / {peak:.1f} ({value['ms']:.0f})"


def _cell(value: dict[str, Any] | None, text: Callable[[dict[str, Any]], str]) -> str:
    """`text` of a provider's figures, if it has a part in the case and can do it."""
    if value is None:
        return ""
    return _why_not(value) if "why_not" in value else text(value)


def _why_not(value: dict[str, Any]) -> str:
    """The kind of a reason."""
    kind = value["why_not"].split(":")[0]
    return kind if kind in ("no kernel", "wrong") else "cannot"


_LINES = {
    "kernels": (_kernel_lines, "ms"),
    "memory": (_memory_lines, "kept = MiB that autograd keeps / MiB at the peak of a step"),
    "ops": (_time_lines, "kept = what autograd saves, in units of one input of the case"),
}


def figure(result: dict[str, Any], path: Path) -> None:
    """Bars: time as a multiple of the frozen floor; for memory what is kept, of full tuning's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result["cases"]
    names = [name for name in _names(result) if name != "floor"]
    memory = result["suite"] == "memory"
    bases = {
        "memory": ("saved_bytes", "full"), "ops": ("ms", "floor"), "kernels": ("ms", *TORCH),
    }  # fmt: skip
    quantity, base, *_ = bases[result["suite"]]
    units = [_least(r["providers"], *bases[result["suite"]]) or math.inf for r in cases]
    size = (min(0.3 * len(cases) * len(names) + 4, 18), 4.5)
    colours = pyplot.get_cmap("tab20").colors
    drawing, axes = pyplot.subplots(figsize=size, layout="constrained")
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [
            r["providers"].get(name, {}).get(quantity, 0.0) / unit
            for r, unit in zip(cases, units, strict=True)
        ]
        axes.bar(
            [i + k * width for i in range(len(cases))], heights, width, label=name, color=colours[k]
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))])
    axes.set_xticklabels([r["case"] for r in cases], rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(f"{'kept' if memory else 'time'} / {base}")
    axes.set_title(f"{result['suite']} on {result['machine']['gpu'] or result['machine']['cpu']}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def demo_markdown(summary: dict[str, Any]) -> str:
    """The demo's table: one row per way of tuning."""
    names = {"none": "no tuning", "petite": "PETITE", "full": "full fine-tuning"}
    lines = [
        "| | PSNR dB | SSIM | NRMSE | trained % | step s | kept MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        value = summary[key]
        trained = "" if key == "none" else f"{value['trainable_percent']:.2f}"
        step = "" if key == "none" else f"{value['step_seconds']:.3f}"
        kept = "" if key == "none" else f"{value['saved_bytes'] / 1e6:.1f}"
        lines.append(
            f"| {name} | {value['psnr']:.2f} | {value['ssim']:.4f} | {value['nrmse']:.4f} |"
            f" {trained} | {step} | {kept} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Put the committed results between the markers of the two READMEs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="a demo's summary.json, to be committed as well")
    demo = parser.parse_args().demo
    results = HERE / "results"
    if demo is not None:
        (results / "demo.json").write_text(demo.read_text())
    for readme in (HERE.parent / "README.md", HERE / "README.md"):
        text = readme.read_text(encoding="utf-8")
        for path in sorted(results.glob("*.json")):
            result = json.loads(path.read_text())
            if path.stem != "demo" and "suite" not in result:
                continue  # what gpu_check.py writes beside them
            body = demo_markdown(result) if path.stem == "demo" else markdown(result)
            pattern = rf"(<!-- bench:{path.stem} -->\n).*?(<!-- /bench:{path.stem} -->)"
            text = re.sub(pattern, lambda m, b=body: m[1] + b + "\n" + m[2], text, flags=re.DOTALL)
        readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
