"""The numbers of a run: CSV files, which a resumed run continues, and TensorBoard scalars."""

import contextlib
import csv
import io
import itertools
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmkp.experiments.config import InputError, first_line
from wmkp.experiments.runs.outputs import make_directory, write_atomically


class Log:
    """One CSV file, written row by row, with the step in the first column. A ``board`` gets the same numbers.

    The columns are those of the first row. Values that are not finite are left empty.
    """

    def __init__(self, path: Path, step: int, board: "Board | None" = None):
        """Opens the file and removes its rows after ``step``, which will be written again.

        Raises:
          InputError: the file is damaged, or cannot be written.
        """
        self._path, self._board = path, board
        rows = read(path) if path.exists() else []
        steps = [row.get("step", math.nan) for row in rows]
        for number, (before, after) in enumerate(itertools.pairwise([0, *steps]), 2):
            if not before < after:
                raise _damaged(path, f"the steps do not increase in line {number}")
        rows = [row for row in rows if row["step"] <= step]
        write_atomically({path: _to_text(rows).encode()})
        self._columns = list(rows[0]) if rows else []
        self._file = path.open(
            "ab", buffering=0
        )  # a buffer would try to write again at closing after the disk was full

    def write(self, row: dict[str, float]) -> None:
        """Adds a row, on disk when this returns.

        Raises:
          InputError: it has other columns than earlier rows, or cannot be written.
        """
        if self._columns and self._columns != list(row):
            raise _damaged(self._path, "its columns are not this run's")
        text = _to_text([row], header=not self._columns).encode()
        try:
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write to {self._path}: {error.strerror}") from None
        self._columns = list(row)
        if self._board is not None:
            self._board.write(row)

    def close(self) -> None:
        self._file.close()


class Board:
    """TensorBoard scalars of a run. The first one starts the file, so that no file is empty."""

    def __init__(self, directory: Path, step: int):
        """Discards what an earlier run wrote to ``directory`` after ``step``. Raises InputError."""
        make_directory(directory)
        self._directory, self._step = directory, step
        self._writer: Any = None

    def write(self, row: dict[str, float]) -> None:
        """Adds a row of a CSV file, on disk when this returns. Raises InputError."""
        from tensorboardX.summary import scalar

        values = {tag(name): value for name, value in row.items() if name != "step" and math.isfinite(value)}
        try:
            self._open()
            for name, value in values.items():
                self._event(step=int(row["step"]), summary=scalar(name, value))
            self._writer.flush()
        except OSError as error:
            raise InputError(f"cannot write to {self._directory}: {error.strerror}") from None

    def _open(self) -> None:
        if self._writer is not None:
            return
        # Not SummaryWriter: on a full disk its thread dies and prints a traceback.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import custom_scalars

        self._writer = EventsWriter(str(self._directory / "events"), f".{self._step}")
        self._event(step=self._step + 1, session_log=SessionLog(status=SessionLog.START))
        both = {name: ["Multiline", [f"{name}/train", f"{name}/test"]] for name in ("loss", "error_percent")}
        self._event(summary=custom_scalars({"train and test": both}))

    def _event(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), **content))

    def close(self) -> None:
        """Closes. Every row is on disk already, so an error here loses nothing."""
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()


def tag(column: str) -> str:
    """The TensorBoard tag of a column. Columns of one chart share the part before the slash."""
    if split := re.fullmatch("(train|test)_(.*)", column):
        return f"{split[2]}/{split[1]}"
    return re.sub(r"(\w+_angle)_(mean|worst)$", r"\1/\2", column.replace("_deg", "", 1))


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
    return InputError(f"{path} is damaged ({reason}); repair it, or move it away: training does not read it")


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
