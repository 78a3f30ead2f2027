"""One HTML file to look at a run: `petite-fast report RUN`."""

from petite_fast.report.page import write_report

__all__ = ["write_report"]
