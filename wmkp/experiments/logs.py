"""A run's numbers: CSV files that a resumed run goes on with, and TensorBoard scalars."""

import csv
import io
import math
import os
from pathlib import Path
from typing import Any

from wmkp.experiments.outputs import write_atomically


class Log:
    """One CSV file, a row at a time, first of all its step; the same numbers to TensorBoard where there is a writer.

    The columns are those of the first row. Values that are not finite are left empty.
    """

    def __init__(self, path: Path, step: int, writer: Any = None, prefix: str = ""):
        """Opens the file, its rows after ``step`` taken away: they come anew."""
        self._path, self._writer, self._prefix = path, writer, prefix
        self.rows = [row for row in read(path) if row["step"] <= step] if path.exists() else []
        write_atomically({path: _to_text(self.rows).encode()})
        self._file = path.open("a", newline="")

    def write(self, row: dict[str, float]) -> None:
        """Adds a row, on disk when this returns."""
        self._file.write(_to_text([row], header=not self.rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self._writer.add_scalar(f"{self._prefix}/{name}", value, int(row["step"]))
            self._writer.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file; NaN for an empty cell. A last line that was cut off is left out."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [
        {name: float(value) if value else math.nan for name, value in row.items()}
        for row in csv.DictReader(io.StringIO(whole))
    ]


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
    """TensorBoard's writer; what an earlier run wrote there after ``step`` is taken back."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1)
