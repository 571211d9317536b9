"""Figures, drawn without a display: each function returns a PNG's bytes."""

import io
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from wmkp.experiments import logs
from wmkp.experiments.config import RULES, InputError

if TYPE_CHECKING:
    from wmkp.experiments.compare import Row

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes besides, for print in grey.
STYLES: dict[str, dict[str, Any]] = {
    "bp": {"color": "#000000", "linestyle": "-"},
    "fa": {"color": "#D55E00", "linestyle": (0, (1, 1))},
    "ss": {"color": "#E69F00", "linestyle": (0, (5, 1.5))},
    "kp": {"color": "#0072B2", "linestyle": "-"},
    "kpm": {"color": "#56B4E9", "linestyle": (0, (3, 1))},
    "wm": {"color": "#009E73", "linestyle": (0, (6, 1.5, 1.5, 1.5))},
}
# The other rules take these in turn.
OTHERS = [
    {"color": color, "linestyle": dashes}
    for dashes in ("-", (0, (4, 1.2)), (0, (1, 1)))
    for color in ("#CC79A7", "#7F7F7F", "#8C6D31", "#393B79")
]
TEXT = "#333333"


def comparison(rows: Sequence["Row"], title: str) -> bytes:
    """Test error, matrix angles and delta angles against the epoch, a line a rule."""
    others = iter(OTHERS)
    lines = []
    for rule in dict.fromkeys(row.rule for row in rows):
        mine = [row for row in rows if row.rule == rule]
        values = [
            {
                "epoch": row.epoch,
                "test_error_percent": row.test_error_percent
                if row.epoch
                else math.nan,  # before training, off the scale
                **{name: getattr(row, name) for name in ANGLES},
            }
            for row in mine
        ]
        lines.append((f"{rule.upper()}  {RULES[rule]}", STYLES[rule] if rule in STYLES else next(others), values))
    return _curves(lines, title)


def runs(directories: Sequence[Path]) -> bytes:
    """Runs of ``wmkp train`` on one picture, as ``comparison`` draws rules.

    Raises:
      InputError: one of them is not a run, or has no evaluation yet.
    """
    if not directories:
        raise InputError("name at least one run's directory")
    others = iter(itertools.cycle(OTHERS))
    taken: set[str] = set()
    lines = []
    for directory in directories:
        path = directory / "test.csv"
        rows = logs.read(path) if path.exists() else []
        if not rows:
            raise InputError(f"{directory} has no evaluation: {path.name} is not there, or empty")
        rule = json.loads((directory / "config.json").read_text())["rule"]
        style = next(others) if rule in taken or rule not in STYLES else STYLES[rule]
        taken.add(rule)
        lines.append((str(directory), style, rows))
    return _curves(lines, "")


ANGLES = tuple(f"{kind}_angle_{which}_deg" for kind in ("matrix", "delta") for which in ("mean", "worst"))


def _curves(lines: Sequence[tuple[str, dict[str, Any], list[dict[str, float]]]], title: str) -> bytes:
    """Lines of (label, style, rows) on three axes."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11, color=TEXT)
    error, matrix, delta = figure.subplots(1, 3)
    for label, style, rows in lines:
        style = {"linewidth": 1.8, **style}
        marker = {"marker": "o", "markersize": 4} if len(rows) < 3 else {}
        epochs = [row["epoch"] for row in rows]
        errors = [row["test_error_percent"] for row in rows]
        error.plot(epochs, errors, label=label, **style | {"linewidth": 1.2}, **marker)
        for axes, kind in ((matrix, "matrix"), (delta, "delta")):
            mean, worst = ([row[f"{kind}_angle_{which}_deg"] for row in rows] for which in ("mean", "worst"))
            axes.plot(epochs, mean, **style, **marker)
            axes.fill_between(epochs, mean, worst, color=style["color"], alpha=0.15, linewidth=0)

    error.set(title="Test error", ylabel="%", yscale="log")
    error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error.yaxis.set_major_formatter("{x:g}")
    error.yaxis.set_minor_locator(NullLocator())
    matrix.set(title="Matrix angles: W to B", ylabel="degrees: mean, shaded to the worst layer")
    delta.set(title="Delta angles: δ to backprop's δ", ylabel="degrees: mean, shaded to the worst layer")
    for axes in (matrix, delta):
        axes.set(ylim=(-2, 95), yticks=range(0, 91, 15))  # a line at zero shows
    for axes in (error, matrix, delta):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT)
    figure.legend(loc="outside lower center", ncols=min(len(lines), 4), frameon=False, handlelength=3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
