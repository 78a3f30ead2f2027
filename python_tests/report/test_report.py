"""The report's content: self-contained, nameless, and its numbers those of the evaluation."""

from __future__ import annotations

import base64
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petite_fast.errors import InputError
from petite_fast.report import volumes, write_report
from petite_fast.report.run import read_run
from petite_fast.report.svg import agreement, bland_altman, box_plot
from petite_fast.training.record import View, read_view, view_path

PATIENT = "DOE-JANE-4711"

pytestmark = pytest.mark.usefixtures("no_figures")


class Page(HTMLParser):
    """Elements with their attributes, and the text of the data element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or "" if tag == "script" else tag

    def handle_data(self, data) -> None:
        if self._inside == "volumes":
            self.data += data
        elif self._inside != "style":
            self.text += data

    def viewer(self) -> dict:
        return json.loads(self.data)


def page_of(run: Path, **options) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


def test_nothing_is_fetched(make_run) -> None:
    page = page_of(make_run())
    sources = [a[k] for _, a in page.elements for k in ("src", "href", "srcset") if k in a]
    assert sources and all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    policy = next(a for t, a in page.elements if t == "meta" and "http-equiv" in a)["content"]
    assert "default-src 'none'" in policy and "http" not in policy


def test_every_picture_and_plot_has_words(make_run) -> None:
    html = write_report(make_run()).read_text(encoding="utf-8")
    page = Page(html)
    assert all(a.get("alt") for t, a in page.elements if t == "img")
    plots = html.count("<svg ")
    assert plots == len(re.findall(r'<svg [^>]*role="img"><title>[^<]+</title>', html)) == 11


def test_ids_are_kept_on_request_and_escaped(make_run) -> None:
    run = make_run(2)
    path = run / "evaluation/metrics.json"
    path.write_text(path.read_text().replace(f"{PATIENT}-1", "</script><b>&x"))
    page = page_of(run, keep_ids=True)
    assert {s["name"] for s in page.viewer()["subjects"]} == {f"{PATIENT}-0", "</script><b>&x"}
    assert "b" not in {tag for tag, _ in page.elements}
    assert "</script><b>&x" in page.text and f"{PATIENT}-0" in page.text
    assert "sub-001" not in page.text


def test_viewer_holds_the_volumes_in_8_bits_with_one_window(make_run) -> None:
    run = make_run(1)
    data = page_of(run).viewer()
    (subject,) = data["subjects"]
    assert subject["shape"] == [13, 16, 11] and subject["spacing"] == [3.0, 2.0, 4.0]
    assert subject["top"] == pytest.approx(5000.0)
    scale = subject["top"] / (255 - data["zero"])
    view = read_view(view_path(run, 1))
    assert list(subject["volumes"]) == ["input", "none", "petite", "target"]
    for name, text in subject["volumes"].items():
        voxels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(subject["shape"])
        shown = (voxels.astype(float) - data["zero"]) * scale
        true = view.volumes[name].astype(float) * view.top
        inside = (true > -0.24 * subject["top"]) & (true < subject["top"])
        assert inside.mean() > 0.9
        assert np.abs(shown - true)[inside].max() <= 0.51 * scale
    assert (voxels[8:11, 9:12, 6:8] == 255).all()


def test_table_holds_the_evaluation(make_run) -> None:
    run = make_run(3)
    record = json.loads((run / "evaluation/metrics.json").read_text())["methods"]
    text = page_of(run).text
    for report in record.values():
        mean = statistics.fmean(row["psnr"] for row in report["subjects"])
        assert f"{mean:.2f}" in text
        for row in report["subjects"]:
            assert f"{row['psnr']:.2f}" in text and f"{row['nrmse']:.4f}" in text
            assert f"{row['uptake']['hot']['peak']['bias_percent']:+.1f}" in text


def test_the_worst_subjects_are_shown_when_not_all_fit(make_run, monkeypatch) -> None:
    run = make_run(5)
    read = read_run(run)
    order = read.worst_first()
    errors = read.values("petite", "nrmse")
    assert [errors[i] for i in order] == sorted(errors, reverse=True)
    voxels = 4 * 13 * 16 * 11
    monkeypatch.setattr(volumes, "_BUDGET", 2 * voxels)
    shown = volumes.choose(read)
    assert [s.position for s in shown] == order[:2]  # too small to be made coarser
    assert "2 of 5 subjects" in page_of(run).text
    monkeypatch.setattr(volumes, "_SMALLEST_SIDE", 4)
    (first, *_), all_shown = volumes.choose(read), volumes.choose(read)
    assert first.view.volumes["target"].shape == (7, 8, 11)
    assert first.view.spacing == (6.0, 4.0, 4.0) and len(all_shown) == 5


def test_a_coarser_view_keeps_the_mean() -> None:
    rng = np.random.default_rng(0)
    volume = rng.random((8, 6, 5)).astype(np.float16)
    view = View({"target": volume}, (1.0, 2.0, 3.0), 10.0).shrunk(2)
    blocks = volume.astype(np.float32).reshape(4, 2, 3, 2, 5).mean(axis=(1, 3))
    np.testing.assert_allclose(view.volumes["target"], blocks, rtol=1e-6)
    assert view.spacing == (2.0, 4.0, 3.0)


def test_difference_map_has_the_right_side_on_the_left(make_run) -> None:
    target = np.zeros((6, 8, 3), np.float16)
    target[2, 3, 1] = 0.5
    output = target.copy()
    output[5, 7, 1] = 1.0  # right, anterior: top left
    uri = volumes.difference_maps(View({"petite": output, "target": target}, (1, 1, 1), 1.0))
    png = base64.b64decode(uri["petite"].split(",")[1])
    folder = make_run(1)
    (folder / "map.png").write_bytes(png)
    pixels = np.asarray(Image.open(folder / "map.png").convert("RGB")).astype(int)
    assert pixels.shape == (8, 6, 3)
    red = np.argwhere(pixels[..., 0] - pixels[..., 2] > 60)
    assert red.tolist() == [[0, 0]]


def test_bland_altman_states_bias_and_limits() -> None:
    pairs = [(1.1, 1.0), (2.0, 2.0), (3.0, 3.3)]
    differences = np.array([200 * (o - t) / (o + t) for o, t in pairs])
    bias, spread = agreement(pairs)
    assert bias == pytest.approx(differences.mean())
    assert spread == pytest.approx(differences.std(ddof=1))
    svg = bland_altman("PETITE", "#000", pairs, ["a", "b", "c"], (-40, 40), "SUV")
    assert f"bias {bias:+.2f} %, SD {spread:.2f} %" in svg
    assert svg.count("<circle") == 3 and svg.count('class="limit"') == 2
    assert agreement(pairs[:2])[1] is None
    two = bland_altman("PETITE", "#000", pairs[:2], ["a", "b"], (-40, 40), "SUV")
    assert 'class="limit"' not in two


def test_box_plot_draws_quartiles_in_place() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 9.0]  # 9 is beyond the whisker
    svg = box_plot("x", [("a", "#000", values)], list("abcde"))
    y = {
        float(v): float(p) for p, v in re.findall(r'cy="([\d.]+)"[^>]*><title>\w, a: ([\d.]+)', svg)
    }
    box = re.search(r'class="box"[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', svg)
    assert (
        box and float(box[1]) == y[4.0] and float(box[1]) + float(box[2]) == pytest.approx(y[2.0])
    )
    whiskers = re.findall(r'class="whisker"[^>]* y2="([\d.]+)"', svg)
    assert [float(w) for w in whiskers] == [y[4.0], y[1.0]]
    assert 'class="box"' not in box_plot("x", [("a", "#000", values[:3])], list("abc"))


def test_out_names_the_file(make_run, tmp_path) -> None:
    out = tmp_path / "elsewhere" / "63.html"
    run = make_run(1)
    assert write_report(run, out) == out and out.is_file()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "evaluation/metrics.json").write_text('{"methods": {'), "metrics.json"),
        (lambda run: (run / "evaluation/metrics.json").write_text("[]"), "not a complete"),
        (lambda run: (run / "evaluation/sub-001.npz").write_bytes(b"PK\3\4 no"), "sub-001.npz"),
        (lambda run: (run / "evaluation/sub-002.npz").unlink(), "evaluate again"),
        (lambda run: (run / "log.csv").write_text("step,loss\n1,a\n"), "columns of numbers"),
        (lambda run: (run / "adapter_config.json").write_text("{"), "adapter_config.json"),
    ],
)
def test_damage_is_one_sentence(make_run, damage, message) -> None:
    run = make_run(2)
    damage(run)
    with pytest.raises(InputError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_nothing_to_report(tmp_path) -> None:
    with pytest.raises(InputError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "none")


def test_a_hot_bladder_does_not_set_the_window() -> None:
    target = np.full((20, 20, 20), 0.02, np.float16)
    target[2:5, 2:5, 2:5] = 1.0  # 0.3 % of the voxels, fifty times the rest
    assert volumes.window(View({"target": target}, (1, 1, 1), 40.0)) == pytest.approx(
        0.022, rel=0.01
    )
    target[:10] = 1.0
    assert volumes.window(View({"target": target}, (1, 1, 1), 40.0)) == 1.0
