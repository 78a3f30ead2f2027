"""Everything a report writes, figures too: which files, and nobody's name in them."""

from __future__ import annotations

import json

from petite_fast.report import write_report

PATIENT = "DOE-JANE-4711"


def test_no_patient_gets_into_any_file(make_run) -> None:
    run = make_run()
    write_report(run)
    files = [p for p in run.rglob("*") if p.is_file()]
    names = [p.relative_to(run).as_posix() for p in files]
    assert {"report.html", "figures/losses.png", "figures/metrics.png"} < set(names)
    assert {"figures/bland_altman.png", "figures/differences_001.png"} < set(names)
    assert not [n for n in names if PATIENT in n]
    # the evaluation keeps the dataset's own names of subjects, and nothing else of the files
    record = json.loads((run / "evaluation/metrics.json").read_text())
    for report in record["methods"].values():
        for row in report["subjects"]:
            del row["subject"]
    assert PATIENT not in json.dumps(record)
    for file in files:
        if file.name != "metrics.json":
            content = file.read_bytes()
            assert PATIENT.encode() not in content and str(run).encode() not in content, file


def test_a_training_alone_is_reported(make_run, tmp_path) -> None:
    run = tmp_path / "training"
    run.mkdir()
    (run / "log.csv").write_bytes((make_run(1) / "log.csv").read_bytes())
    page = write_report(run).read_text(encoding="utf-8")
    assert "No evaluation yet" in page and 'id="volumes"' not in page
    assert "generator from 5 to 0.25" in page
    assert sorted(p.name for p in (run / "figures").iterdir()) == ["losses.png"]
