"""What a training run leaves to read: log.csv, TensorBoard events and a progress bar."""

from __future__ import annotations

import csv
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from petite_fast.files import atomic_write


class RunLog:
    """One row of numbers per training step, to a CSV file, TensorBoard and a progress bar.

    The bar is drawn on stderr only when that is a terminal. A resumed run first drops the rows
    of steps that are trained again, so log.csv always reads like one uninterrupted run.

    Args:
        folder: run folder; gets ``log.csv`` and ``tensorboard/``. None logs nothing (a worker
            other than rank 0).
        first_step: number of steps already done.
        steps: number of steps in all.
        title: words before the bar.
    """

    def __init__(self, folder: Path | None, first_step: int, steps: int, title: str) -> None:
        self._folder, self._first_step, self._steps, self._title = folder, first_step, steps, title
        self._stack = ExitStack()
        self._csv: Any = None
        self._tensorboard: Any = None
        self._progress: Any = None

    def __enter__(self) -> RunLog:
        if self._folder is None:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "log.csv"
        _drop_rows_after(path, self._first_step)
        self._file = self._stack.enter_context(path.open("a", newline="", encoding="utf-8"))
        self._tensorboard = SummaryWriter(
            str(self._folder / "tensorboard"), purge_step=self._first_step + 1
        )
        self._stack.callback(self._tensorboard.close)
        if sys.stderr.isatty():
            self._progress = self._stack.enter_context(_progress_bar())
            self._task = self._progress.add_task(
                self._title, total=self._steps, completed=self._first_step, loss="-"
            )
        return self

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log `row` as the numbers of `step` (counted from 1)."""
        if self._folder is None:
            return
        if self._csv is None:
            self._csv = csv.DictWriter(self._file, ["step", *row])
            if self._file.tell() == 0:
                self._csv.writeheader()
        self._csv.writerow({"step": step, **row})
        self._file.flush()
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, loss=f"{row['loss']:.4g}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def _drop_rows_after(path: Path, step: int) -> None:
    """Rewrite the log without rows after `step`; a log of another run (step 0) is removed."""
    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = rows[:1] + [row for row in rows[1:] if row and int(row[0]) <= step]
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(kept)


def _progress_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
