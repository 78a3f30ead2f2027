"""Tables and pictures of a result, and README's table from the committed JSON.

python bench/report.py        rewrites the tables between README's bench markers
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HEADER = ("case", "provider", "ms", "spread", "x floor", "x PEFT", "kept units", "peak MB", "GF/s")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per case and provider, as text."""
    lines = []
    for record in result["cases"]:
        figures = record["providers"]
        floor, peft = figures["floor"]["ms"], figures["peft"].get("ms")
        for name, value in figures.items():
            if "why_not" in value:
                lines.append((record["case"], name, f"cannot: {value['why_not'][:50]}", *[""] * 6))
                continue
            low, high = value["ms_quartiles"]
            rate = value["gflops_per_s"]
            lines.append(
                (
                    record["case"],
                    name,
                    f"{value['ms']:.1f}",
                    f"{low:.1f}-{high:.1f}",
                    f"{value['ms'] / floor:.2f}",
                    f"{value['ms'] / peft:.2f}" if peft else "",
                    f"{value['saved_bytes'] / record['unit_bytes']:.2f}",
                    f"{value['peak_bytes'] / 1e6:.1f}",
                    f"{rate:.0f}" if rate else "",
                )
            )
    return lines


def table(result: dict[str, Any]) -> str:
    """The result as a text table."""
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
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch"
        f" {about['versions']['torch']}; matmul {ceilings['matmul_gflops_per_s']:.0f} GFLOP/s,"
        f" copy {ceilings['copy_gb_per_s']:.0f} GB/s; median and quartiles, interleaved"
    )
    return "\n".join(text)


def markdown(result: dict[str, Any]) -> str:
    """README's table: one row per case, times and kept units by provider."""
    names: list[str] = []
    for record in result["cases"]:
        names += [n for n in record["providers"] if n not in names]
    head = "| case | " + " | ".join(f"{n} ms (kept)" for n in names) + " |"
    lines = [head, "|---" * (len(names) + 1) + "|"]
    for record in result["cases"]:
        cells = []
        for name in names:
            value = record["providers"].get(name)
            if value is None:
                cells.append("")
            elif "why_not" in value:
                cells.append("cannot")
            else:
                units = value["saved_bytes"] / record["unit_bytes"]
                cells.append(f"{value['ms']:.1f} ({units:.2f})")
        lines.append(f"| {record['case']} | " + " | ".join(cells) + " |")
    about = result["machine"]
    lines.append("")
    lines.append(
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch"
        f" {about['versions']['torch']}, {about['date']}; median of interleaved runs; kept ="
        " what autograd saves, in units of one input of the case."
    )
    return "\n".join(lines)


def figure(result: dict[str, Any], path: Path) -> None:
    """Bars: time of each provider as a multiple of the frozen floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result["cases"]
    names: list[str] = []
    for record in cases:
        names += [n for n in record["providers"] if n not in names and n != "floor"]
    size = (1.2 * len(cases) * len(names) / 4 + 4, 4.5)
    drawing, axes = pyplot.subplots(figsize=size, layout="constrained")
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [
            r["providers"].get(name, {}).get("ms", 0.0) / r["providers"]["floor"]["ms"]
            for r in cases
        ]
        axes.bar([i + k * width for i in range(len(cases))], heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))])
    axes.set_xticklabels([r["case"] for r in cases], rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("time / frozen floor")
    axes.set_title(f"{result['suite']} on {result['machine']['gpu'] or result['machine']['cpu']}")
    axes.legend(fontsize=8)
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
    """Put the committed results between the markers of README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="a demo's summary.json, to be committed as well")
    demo = parser.parse_args().demo
    results = HERE / "results"
    if demo is not None:
        (results / "demo.json").write_text(demo.read_text())
    readme = HERE.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        body = demo_markdown(result) if path.stem == "demo" else markdown(result)
        pattern = rf"(<!-- bench:{path.stem} -->\n).*?(<!-- /bench:{path.stem} -->)"
        text = re.sub(pattern, lambda m, b=body: m[1] + b + "\n" + m[2], text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
