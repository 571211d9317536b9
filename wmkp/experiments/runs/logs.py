"""A run's numbers: CSV files that a resumed run goes on with, and TensorBoard scalars."""

import csv
import io
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmkp.experiments.config import InputError, first_line
from wmkp.experiments.runs.outputs import write_atomically


class Log:
    """One CSV file, a row at a time, first of all its step; the same numbers to TensorBoard where there is a writer.

    The columns are those of the first row. Values that are not finite are left empty.
    """

    def __init__(self, path: Path, step: int, writer: Any = None, prefix: str = ""):
        """Opens the file, its rows after ``step`` taken away: they come anew.

        Raises:
          InputError: the file is damaged.
        """
        self._path, self._writer, self._prefix = path, writer, prefix
        rows = read(path) if path.exists() else []
        steps = [row.get("step", math.nan) for row in rows]
        for number, (before, after) in enumerate(itertools.pairwise([0, *steps]), 2):
            if not before < after:
                raise _damaged(path, f"the steps do not rise in line {number}")
        rows = [row for row in rows if row["step"] <= step]
        write_atomically({path: _to_text(rows).encode()})
        self._columns = list(rows[0]) if rows else []
        self._file = path.open("a", newline="")

    def write(self, row: dict[str, float]) -> None:
        """Adds a row, on disk when this returns. Raises InputError if it has other columns than those before it."""
        if self._columns and self._columns != list(row):
            raise _damaged(self._path, "its columns are not this run's")
        self._file.write(_to_text([row], header=not self._columns))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._columns = list(row)
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self._writer.add_scalar(f"{self._prefix}/{name}", value, int(row["step"]))
            self._writer.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path, columns: Sequence[str] = ()) -> list[dict[str, float]]:
    """The rows of a CSV file; NaN for an empty cell. A last line that was cut off is left out.

    Raises:
      InputError: the file is damaged, or has rows that lack one of ``columns``.
    """
    try:
        text = path.read_text()
        header, *lines = [*csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise _damaged(path, first_line(error)) from None
    if lines and (lacking := [name for name in columns if name not in header]):
        raise _damaged(path, f"it has no column {lacking[0]}")
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append({n: float(x) if x else math.nan for n, x in zip(header, line, strict=True)})
        except ValueError as error:
            raise _damaged(path, f"line {number}: {first_line(error)}") from None
    return rows


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged ({reason}); mend it, or move it away: no weight depends on it")


def _to_text(rows: list[dict[str, float]], header: bool = True) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.9g}" if math.isfinite(value) else "" for name, value in row.items()})
    return text.getvalue()


def tensorboard_writer(directory: Path, step: int) -> Any:
    """TensorBoard's writer; what an earlier run wrote there after ``step`` is taken back. Raises InputError."""
    from tensorboardX import SummaryWriter

    try:
        return SummaryWriter(str(directory), purge_step=step + 1)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}") from None
