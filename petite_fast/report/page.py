"""The HTML page of a report: sections in reading order, everything inline, nothing fetched."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import NamedTuple

from petite_fast._version import __version__
from petite_fast.files import atomic_write
from petite_fast.report.paper import write_figures
from petite_fast.report.run import COLOURS, Run, read_run, title_of
from petite_fast.report.svg import agreement_limits, bland_altman, box_plot, loss_curve
from petite_fast.report.volumes import Shown, choose, difference_maps, viewer_data
from petite_fast.training.evaluate import METRICS
from petite_fast.training.record import INPUT, TARGET, View


class _Column(NamedTuple):
    """A number per subject: its key in `Run.values`, heading, format, and what is best."""

    key: str
    heading: str
    form: str
    best: str

    def text(self, value: float) -> str:
        """The number as the tables show it, zero without a minus."""
        return f"{round(value, int(self.form[-2])) + 0.0:{self.form}}"


_MAPS = 3  # subjects with difference maps
_REGIONS = {"body": "in the body", "mask": "in the masks"}


def write_report(run: Path, out: Path | None = None, *, keep_ids: bool = False) -> Path:
    """Write the report of a run folder, and its figures as PNG to RUN/figures.

    Args:
        run: what `demo`, `pretrain`, `finetune` or `evaluate --out` wrote to.
        out: the HTML file; report.html in the run folder without it.
        keep_ids: call subjects what the dataset does; else sub-001, sub-002, ...

    Returns:
        The HTML file.

    Raises:
        InputError: see `read_run`.
        OSError: a file cannot be written.
    """
    content = read_run(run, keep_ids=keep_ids)
    shown = choose(content) if content.methods else []
    page = _page(content, shown, keep_ids)
    path = out or run / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_figures(content, shown)
    return path


def _page(run: Run, shown: list[Shown], keep_ids: bool) -> str:
    sections = []
    if run.methods:
        sections = [
            _summary(run),
            _viewer(run, shown),
            _difference_maps(run, shown),
            _distributions(run),
            _agreement(run),
        ]
    if run.logs:
        sections.append(_training(run))
    if run.methods:
        sections += [_subjects(run), _definitions(run)]
    else:
        sections.append(
            '<section><h2>No evaluation yet</h2><p class="lead">petite-fast evaluate '
            "PREDICTIONS --data dataset.json --out RUN adds volumes and numbers.</p></section>"
        )
    facts = {**run.facts, **({"subjects": str(len(run.subjects))} if run.subjects else {})}
    return _template("page.html").substitute(
        css=_text("page.css"),
        facts="".join(
            f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()
        ),
        sections="\n".join(sections),
        version=escape(__version__),
        naming="the dataset's names" if keep_ids else "number",
        script=f"<script>\n{_text('viewer.js')}</script>" if shown else "",
    )


def _columns(run: Run) -> list[_Column]:
    where = _REGIONS[run.region]
    peak = where if run.region == "mask" else "in hot voxels"
    return [
        _Column("psnr", "PSNR [dB]", ".2f", "high"),
        _Column("ssim", "SSIM", ".4f", "high"),
        _Column("nrmse", "NRMSE", ".4f", "low"),
        _Column("mean", f"SUVmean bias {where} [%]", "+.1f", "zero"),
        _Column("max", f"SUVmax bias {peak} [%]", "+.1f", "zero"),
        _Column("peak", f"SUVpeak bias {peak} [%]", "+.1f", "zero"),
    ]


def _summary(run: Run) -> str:
    """Mean and standard deviation of each method; the best mean in bold."""
    columns = _columns(run)
    best = {c.key: _best(run, c) for c in columns}
    rows = []
    for method in run.methods:
        cells = [f'<th scope="row" class="name">{_key(method)}{escape(title_of(method))}</th>']
        for column in columns:
            values = _finite(run.values(method, column.key))
            text = "inf"
            if values:
                text = column.text(statistics.fmean(values))
                if len(values) > 1:
                    spread = f"{statistics.stdev(values):{column.form.lstrip('+')}}"
                    text += f" <small>± {spread}</small>"
            cells.append(_cell(column.heading, text, best[column.key] == method))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    count = len(run.subjects)
    what = f"Mean ± standard deviation over {count} subjects" if count > 1 else "One subject"
    return _section(
        "Summary",
        f"{what}; every output is compared with the standard scan (target). Best in bold.",
        _table(["", *(c.heading for c in columns)], rows),
    )


def _best(run: Run, column: _Column) -> str:
    """The method with the best mean, if there is a choice."""
    means = {
        m: statistics.fmean(values)
        for m in run.methods
        if (values := _finite(run.values(m, column.key)))
    }
    if len(means) < 2:
        return ""
    if column.best == "zero":
        return min(means, key=lambda m: abs(means[m]))
    return (max if column.best == "high" else min)(means, key=means.__getitem__)


def _viewer(run: Run, shown: list[Shown]) -> str:
    count, total = len(shown), len(run.subjects)
    lead = "Input, output, target and their difference share one window."
    if count < total:
        lead += f" {count} of {total} subjects, those with the largest NRMSE."
    data = json.dumps(viewer_data(run, shown), separators=(",", ":"))
    # no "</script>" may stand inside a script element
    return _template("viewer.html").substitute(
        lead=lead, data=data.replace("<", "\\u003c").replace("&", "\\u0026")
    )


def _difference_maps(run: Run, shown: list[Shown]) -> str:
    parts = []
    columns = f'style="--columns:{len(run.methods)}"'
    for position, view in shown[:_MAPS]:
        parts.append(f'<h3>{escape(run.subjects[position])}</h3><div class="maps" {columns}>')
        for method, uri in difference_maps(view).items():
            name = f"{title_of(method)} − target"
            parts.append(
                f'<figure><img src="{uri}" alt="{escape(name)}" {_shape(view)}>'
                f"<figcaption>{_key(method)}{escape(name)}</figcaption></figure>"
            )
        parts.append("</div>")
    bar = (
        '<p class="bars">−25 % <i class="bar error" aria-hidden="true"></i> +25 % of the window; '
        "red is too much</p>"
    )
    lead = "Axial slice with the most activity."
    if len(run.subjects) > 1:
        lead += " Subjects with the largest NRMSE first."
    return _section("Difference maps", lead, "".join(parts) + bar)


def _shape(view: View) -> str:
    """Aspect ratio in mm, since pixels need not be square."""
    (x, y, _), (nx, ny, _) = view.spacing, view.volumes[TARGET].shape
    return f'style="aspect-ratio:{nx * x:.4g}/{ny * y:.4g}"'


def _distributions(run: Run) -> str:
    plots = []
    for column in _columns(run):
        kept = [
            i for i in range(len(run.subjects))
            if all(run.values(m, column.key)[i] is not None for m in run.methods)
        ]  # fmt: skip
        if not kept:
            continue
        groups = [
            (title_of(m), _colour(m), _finite([run.values(m, column.key)[i] for i in kept]))
            for m in run.methods
        ]
        plots.append(box_plot(column.heading, groups, [run.subjects[i] for i in kept]))
    lead = "Median, quartiles, whiskers to the last subject within 1.5 quartile distances."
    return _section("Distribution over subjects", lead, _plots([("", p) for p in plots]))


def _agreement(run: Run) -> str:
    pairs = {m: run.mean_uptake(m) for m in run.methods}
    limits = agreement_limits(list(pairs.values()))
    plots = [
        (m, bland_altman(title_of(m), _colour(m), p, run.subjects, limits, run.units))
        for m, p in pairs.items()
    ]
    lead = (
        f"Bland-Altman: mean uptake {_REGIONS[run.region]}, a point per subject; solid: bias, "
        "dashed: limits of agreement (bias ± 1.96 standard deviations, from three subjects on)."
    )
    return _section("Agreement of SUVmean", lead, _plots(plots))


def _training(run: Run) -> str:
    names = (("loss", "generator", COLOURS["output"]), ("loss_d", "discriminator", COLOURS["none"]))
    plots = []
    for title, log in run.logs.items():
        columns = [(name, colour, log[key]) for key, name, colour in names if key in log]
        plots.append((title, loss_curve(title, columns)))
    return _section("Training", "Loss by step.", _plots(plots))


def _subjects(run: Run) -> str:
    columns, rows = _columns(run), []
    for i, subject in enumerate(run.subjects):
        for j, method in enumerate(run.methods):
            first = f'<th scope="row">{escape(subject)}</th>'
            cells = [first, f'<td class="name">{_key(method)}{escape(title_of(method))}</td>']
            for column in columns:
                value = run.values(method, column.key)[i]
                text = "inf" if value is None else column.text(value)
                cells.append(_cell(column.heading, text))
            rows.append(f'<tr class="{"first" if j == 0 else ""}">{"".join(cells)}</tr>')
    table = _table(["Subject", "", *(c.heading for c in columns)], rows)
    scroll = '<div class="tall" tabindex="0" role="region" aria-label="Per subject">'
    return _section("Per subject", "", f"{scroll}{table}</div>")


def _definitions(run: Run) -> str:
    terms = next(iter(run.methods.values()))["definitions"]
    rows = {**terms, "units": run.units, "input": "the short scan, as it came"}
    if INPUT not in run.methods:
        del rows["input"]
    body = "".join(
        f"<dt>{escape(k.upper() if k in METRICS else k)}</dt><dd>{escape(v)}</dd>"
        for k, v in rows.items()
    )
    return _section("How the numbers are defined", "", f'<dl class="terms">{body}</dl>')


def _section(title: str, lead: str, body: str) -> str:
    said = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _plots(plots: Sequence[tuple[str, str]]) -> str:
    made = (
        f"<figure>{f'<h3>{_key(n)}{escape(title_of(n))}</h3>' if n else ''}{svg}</figure>"
        for n, svg in plots
    )
    columns = 4 if len(plots) % 4 == 0 else 3
    return f'<div class="plots" style="--columns:{columns}">{"".join(made)}</div>'


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(heading: str, html: str, best: bool = False) -> str:
    kind = ' class="best"' if best else ""
    return f'<td{kind} data-label="{escape(heading)}"><span>{html}</span></td>'


def _key(method: str) -> str:
    """A spot in the method's colour."""
    if method not in COLOURS:
        return ""
    return f'<i class="key" style="background:{COLOURS[method]}" aria-hidden="true"></i>'


def _colour(method: str) -> str:
    return COLOURS.get(method, COLOURS["output"])


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _text(name: str) -> str:
    return (files("petite_fast.report") / name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    return Template(_text(name))
