"""Benchmarks of wmkp. ``python -m benchmarks`` measures speed and prints a table.

Other benchmarks are separate modules, for example ``python -m benchmarks.drift``. This module times calls and saves results.
"""

import json
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from wmkp.experiments.runs.provenance import installed as installed
from wmkp.experiments.runs.provenance import provenance

RESULTS = pathlib.Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> pathlib.Path:
    """Writes ``results/<name>.json``: provenance, then the result."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n")
    return path


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Times each call in seconds: the median, least and most over rounds.

    In each round all calls take turns. The first call of each is not counted. A call must wait for its result.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {n: {"median": statistics.median(s), "least": min(s), "most": max(s)} for n, s in seconds.items()}


# --- rows with a target, for python -m benchmarks ---------------------------------------------------------------------


class Row(NamedTuple):
    """A measured number and its target.

    Attributes:
      name: what was measured.
      value: the number; None if it was not measured (``note`` says why).
      spread: for a ratio of medians, the quartiles of the ratios of single rounds.
      at_most, at_least: the target, if there is one.
      note: what a reader must know about the number.
      detail: further numbers, for the JSON file.
    """

    name: str
    value: float | None = None
    spread: tuple[float, float] | None = None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""
    detail: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @property
    def verdict(self) -> str:
        """``"pass"``, ``"fail"``, ``"not run"``, or ``""`` where there is no target."""
        if self.value is None:
            return "not run"
        if self.at_most is None and self.at_least is None:
            return ""
        low, high = self.at_least, self.at_most
        return "pass" if (low is None or self.value >= low) and (high is None or self.value <= high) else "fail"

    @property
    def target(self) -> str:
        parts = [
            f"{sign} {bound:g}" for sign, bound in (("<=", self.at_most), (">=", self.at_least)) if bound is not None
        ]
        return ", ".join(parts)

    def line(self) -> str:
        """The row of the printed table."""
        value = "-" if self.value is None else f"{self.value:.4g}"
        spread = "" if self.spread is None else "({:.3g}-{:.3g})".format(*self.spread)
        return f"{self.name:58} {value:>9} {spread:15} {self.target:8} {self.verdict:8} {self.note}".rstrip()


class Settings(NamedTuple):
    """The options of a group.

    Attributes:
      quick: use tiny sizes to try out the scripts. The numbers then mean nothing.
      data_dir: where TFDS keeps its datasets, or None.
    """

    quick: bool = False
    data_dir: pathlib.Path | None = None


Part = Callable[[], Iterable[Row]]


def run_parts(name: str, parts: dict[str, Part], settings: Settings, seconds: float, where: pathlib.Path) -> None:
    """Runs a group's parts one after another, and writes ``where/<name>.json`` after each row.

    A part is skipped if it would start after ``seconds``. A part that fails or is skipped gets a row "not run" that says why.
    If the run is killed, the parts that it did not reach have such a row too.
    """
    deadline = time.monotonic() + seconds
    rows = {part: [Row(part, note="not reached")] for part in parts}
    about = provenance()

    def keep() -> None:
        every = [row for found in rows.values() for row in found]
        as_json = [{**row._asdict(), "target": row.target, "verdict": row.verdict} for row in every]
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{name}.json").write_text(
            json.dumps({**about, "quick": settings.quick, "rows": as_json}, indent=1) + "\n"
        )

    keep()
    for part, measure in parts.items():
        if time.monotonic() > deadline:
            rows[part] = [Row(part, note=f"the group's {seconds:.0f} s were over")]
            continue
        found: list[Row] = []
        start = time.monotonic()
        try:
            for row in measure():
                found.append(row)
                rows[part] = [*found, Row(part, note="not finished")]
                keep()
                print(row.line(), flush=True)
            rows[part] = found
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            rows[part] = [*found, Row(part, note=f"{type(error).__name__}: {first}"[:200])]
            print(rows[part][-1].line(), flush=True)
            traceback.print_exc()
        keep()
        print(f"# {part}: {time.monotonic() - start:.0f} s", flush=True)


def in_turns(
    calls: dict[str, Callable[[], Any]], seconds: float, least: int = 3, most: int = 100, each: float = 0.05
) -> dict[str, list[float]]:
    """Times every call in each round, in seconds. All calls take turns, and each round reverses the order.

    Args:
      calls: each must wait for its result. The first call of each, which may compile, is not counted.
      seconds: how long to measure, within ``least`` to ``most`` rounds.
      each: seconds that a turn takes at least. A shorter call is repeated within its turn.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(each / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    deadline = time.perf_counter() + seconds
    while len(taken[order[0]]) < most and (len(taken[order[0]]) < least or time.perf_counter() < deadline):
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            taken[name].append((time.perf_counter() - start) / repeats[name])
        order.reverse()
    return taken


def ratio(name: str, seconds: dict[str, list[float]], over: str, under: str, note: str = "", **row: Any) -> Row:
    """Divides the median times of two calls that took turns. The spread is the quartiles of the ratios of single rounds."""
    above, below = seconds[over], seconds[under]
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    a, b = statistics.median(above), statistics.median(below)
    detail = {"seconds": {over: a, under: b}, "rounds": len(rounds), **row.pop("detail", {})}
    return Row(name, a / b, (low, high), note=note, detail=detail, **row)


def read(path: pathlib.Path) -> list[Row]:
    """Reads the rows that ``run_parts`` wrote."""
    rows = json.loads(path.read_text())["rows"]
    return [Row(**{name: row[name] for name in Row._fields}) for row in rows]
