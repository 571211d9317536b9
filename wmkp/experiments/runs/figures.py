"""Figures, drawn without a display: each function returns a PNG's bytes."""

import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from wmkp.experiments.config import RULES, InputError, first_line
from wmkp.experiments.runs import logs

if TYPE_CHECKING:
    from wmkp.experiments.commands.compare import Row

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

Curve = Sequence[Mapping[str, float]]


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
    tests, rules = {}, {}
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    for name, directory in zip(names, directories, strict=True):
        path = directory / "test.csv"
        rows = logs.read(path, ("epoch", "test_error_percent", *ANGLES)) if path.exists() else []
        if not rows:
            raise InputError(f"{directory} has no evaluation: {path.name} is not there, or empty")
        try:
            rules[name] = str(json.loads((directory / "config.json").read_text())["rule"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{directory / 'config.json'} is damaged: {first_line(error)}") from None
        tests[name] = rows
    return curves(tests, rules)


def curves(tests: Mapping[str, Curve], rules: Mapping[str, str]) -> bytes:
    """Runs' evaluations on one picture: the first of a rule in the rule's own colour."""
    others = iter(itertools.cycle(OTHERS))
    taken: set[str] = set()
    lines = []
    for name, rows in tests.items():
        rule = rules[name]
        style = next(others) if rule in taken or rule not in STYLES else STYLES[rule]
        taken.add(rule)
        lines.append((name, style, rows))
    return _curves(lines, "")


ANGLES = tuple(f"{kind}_angle_{which}_deg" for kind in ("matrix", "delta") for which in ("mean", "worst"))


def _curves(lines: Sequence[tuple[str, dict[str, Any], Curve]], title: str) -> bytes:
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
    error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    error.yaxis.set_major_formatter("{x:g}")
    error.yaxis.set_minor_locator(NullLocator())
    matrix.set(title="Matrix angles: W to B", ylabel="degrees: mean, shaded to the worst layer")
    delta.set(title="Delta angles: δ to backprop's δ", ylabel="degrees: mean, shaded to the worst layer")
    for axes in (matrix, delta):
        axes.set(ylim=(-2, 95), yticks=range(0, 91, 15))  # a line at zero shows
    for axes in (error, matrix, delta):
        _plain(axes)
    figure.legend(loc="outside lower center", ncols=min(len(lines), 4), frameon=False, handlelength=3)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _plain(axes: Any) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT)


def published(
    ours: Mapping[str, Curve],
    theirs: Mapping[str, Mapping[int, Mapping[str, float]] | None],
    title: str,
) -> bytes:
    """Curves of one hidden layer: training loss, test accuracy, and where there is a B matrix and delta angle; the published
    pale and dotted.

    A band is the mean over examples and their standard deviation to each side.
    """
    settings = {
        "train_loss": {"title": "Training loss", "yscale": "log"},
        "test_accuracy_percent": {"title": "Test accuracy", "ylabel": "%"},
        "matrix_angle_W2_deg": {"title": "Matrix angle: W to B", "ylabel": "degrees"},
        "delta_angle_hidden_deg": {
            "title": "Delta angle: δ to backprop's δ", "ylabel": "degrees; band: mean ± sd of 128"
        },
    }  # fmt: skip
    columns = [c for c in settings if not all(math.isnan(row[c]) for rows in ours.values() for row in rows)]
    figure = Figure(figsize=(3.5 * len(columns), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11, color=TEXT)
    panels = figure.subplots(1, len(columns), sharex=True)
    others, taken = itertools.cycle(OTHERS), set()
    for name, rows in ours.items():
        rule = name.split("-")[0]
        style = STYLES[rule] if rule not in taken else next(others)
        taken.add(rule)
        for axes, column in zip(panels, columns, strict=True):
            axes.plot(
                [r["epoch"] + 1 for r in rows], [r[column] for r in rows], linewidth=1.4, label=name.upper(), **style
            )
            mean, spread = (f"{column.removesuffix('_deg')}_{what}_deg" for what in ("mean", "sd"))
            if spread in rows[0]:
                low, high = ([r[mean] + sign * r[spread] for r in rows] for sign in (-1, 1))
                axes.fill_between([r["epoch"] + 1 for r in rows], low, high, color=style["color"], alpha=0.12, lw=0)
            if curve := theirs.get(name):
                epochs = range(1 + int(rows[-1]["epoch"]))
                shown = [curve[epoch][column] for epoch in epochs]
                axes.plot(
                    [e + 1 for e in epochs], shown, color=style["color"], linewidth=2.6, linestyle=":", alpha=0.45
                )
    for axes, column in zip(panels, columns, strict=True):
        axes.set(**settings[column])
        _plain(axes)
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels[2:]:
        axes.set_ylim(-1, None)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(ours), 6), frameon=False, handlelength=3)
    return _png(figure)


def layers(tests: Mapping[str, Curve], rules: Mapping[str, str]) -> bytes | None:
    """The angles of every layer of runs, as the paper's figure has them: a column a run, matrix above delta.

    Backprop has none and is left out; None where that leaves nothing.
    """
    shown = {name: rows for name, rows in tests.items() if any(_paths(rows, kind) for kind in ("matrix", "delta"))}
    if not shown:
        return None
    figure = Figure(figsize=(2.6 * len(shown) + 1, 5.4), layout="constrained")
    panels = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    colours = colormaps["viridis"]
    for (name, rows), column in zip(shown.items(), panels.T, strict=True):
        for axes, kind in zip(column, ("matrix", "delta"), strict=True):
            paths = _paths(rows, kind)
            for i, path in enumerate(paths):
                marker = {"marker": "o", "markersize": 3} if len(rows) < 3 else {}
                colour = colours(i / max(len(paths) - 1, 1))
                axes.plot([r["epoch"] for r in rows], [r[path] for r in rows], color=colour, linewidth=1.1, **marker)
            _plain(axes)
            axes.set(ylim=(-2, 95), yticks=range(0, 91, 15))
        column[0].set_title(RULES[rules[name]], fontsize=9.5, color=TEXT)
        column[0].set_xlabel("")
    panels[0, 0].set_ylabel("matrix angle, degrees")
    panels[1, 0].set_ylabel("delta angle, degrees")
    bar = figure.colorbar(ScalarMappable(cmap=colours), ax=panels, ticks=[0, 1], aspect=40, pad=0.01)
    bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
    return _png(figure)


def _paths(rows: Curve, kind: str) -> list[str]:
    """The columns of a kind of angle, from the first layer on; the output's delta is the loss's own, whatever the rule."""
    names = [
        name for name in rows[-1] if name.startswith(f"{kind}_angle_deg/") and name != "delta_angle_deg/output/kernel"
    ]
    return sorted(names, key=_depth)


def _depth(path: str) -> tuple[Any, ...]:
    """A key that puts a model's layers in their order: numbers as numbers, a flat net's dense layers behind its convolutions
    (LeNet's), the output last."""
    name = path.split("/", 1)[1]
    parts = re.split(r"(\d+)", name)
    return (path.endswith("output/kernel"), name.startswith("Dense_"), [int(p) for p in parts[1::2]], parts)
