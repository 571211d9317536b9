"""Figures, drawn without a display: each function returns a file's bytes."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.ticker import NullFormatter

from wmkp.experiments.config import InputError, first_line
from wmkp.experiments.runs import logs, style

if TYPE_CHECKING:
    from wmkp.experiments.commands.compare import Row

Curve = Sequence[Mapping[str, float]]
ANGLES = tuple(f"{kind}_angle_{which}_deg" for kind in ("matrix", "delta") for which in ("mean", "worst"))
OUTPUT = "/output/kernel"  # here delta comes from the loss itself, under any rule
MEASURES = {"test_error_percent": "Test error (%)", "test_loss": "Test loss (nats a character)"}
PANELS = {
    "matrix_angle_mean_deg": "Angle between W and B\n(degrees)",
    "delta_angle_mean_deg": "Angle between δ and\nbackprop's δ (degrees)",
}


@style.styled
def comparison(rows: Sequence["Row"], title: str, suffix: str = ".png") -> bytes:
    """Test error, matrix angles and delta angles by epoch: a line for each rule, with a band over its seeds."""
    lines = {}
    for rule in dict.fromkeys(row.rule for row in rows):
        mine = [row for row in rows if row.rule == rule]
        lines[rule] = [
            [row._asdict() for row in mine if row.seed == seed and row.epoch > 0]  # before training, off the scale
            for seed in dict.fromkeys(row.seed for row in mine)
        ]
    return _curves([(style.code(rule), rule, curves) for rule, curves in lines.items()], title, suffix=suffix)


def runs(directories: Sequence[Path], suffix: str = ".png") -> bytes:
    """Runs of ``wmkp train`` in one picture like ``comparison``. Runs that differ only in their seed share a line.

    A directory of ``wmkp train --seeds`` counts as all of its runs.

    Raises:
      InputError: one of them is not a run, or has no evaluation yet.
    """
    if not directories:
        raise InputError("name the directory of at least one run: wmkp plot runs/mkp")
    found: dict[str, tuple[str, list[Path], list[Curve]]] = {}
    configs = []
    for directory in [run for given in directories for run in _seeds_of(given)]:
        path = directory / "test.csv"
        rows = logs.read(path, ("epoch", *ANGLES)) if path.exists() else []
        if not rows:
            raise InputError(f"{directory} has no evaluation yet: {path.name} is missing or empty")
        try:
            config = json.loads((directory / "config.json").read_text())
            rule = str(config["rule"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{directory / 'config.json'} is damaged: {first_line(error)}") from None
        configs.append(config)
        alike = json.dumps(
            {key: x for key, x in config.items() if key not in ("seed", "out", "resume")}, sort_keys=True
        )
        found.setdefault(alike, (rule, [], []))
        found[alike][1].append(directory)
        found[alike][2].append(rows)
    lines = [(_label(rule, places, found.values()), rule, curves) for rule, places, curves in found.values()]
    text = all(config.get("dataset") == "characters" for config in configs)
    return _curves(lines, "", "test_loss" if text else "test_error_percent", suffix)


def _seeds_of(directory: Path) -> list[Path]:
    """The runs in a directory: itself, or one for each seed."""
    try:
        inside = sorted(directory.glob("seed*/test.csv"), key=lambda path: _depth(path.parent.name))
    except OSError:
        inside = []
    return [path.parent for path in inside] if inside and not (directory / "test.csv").exists() else [directory]


def _label(rule: str, places: Sequence[Path], found: Any) -> str:
    """A rule's code. If several lines have one rule, also the directory's name."""
    if sum(other == rule for other, _, _ in found) < 2:
        return style.code(rule)
    name = places[0].resolve().name
    if name.startswith("seed"):
        name = places[0].resolve().parent.name
    return f"{style.code(rule)}: {name}"


def curves(
    tests: Mapping[str, Sequence[Curve]],
    rules: Mapping[str, str],
    measure: str = "test_error_percent",
    suffix: str = ".png",
) -> bytes:
    """The evaluations of runs in one picture, with a curve for each seed."""
    counts = list(rules.values())
    lines = []
    for name, each in tests.items():
        label = style.code(rules[name]) if counts.count(rules[name]) == 1 else name
        lines.append((label, rules[name], each))
    return _curves(lines, "", measure, suffix)


@style.styled
def _curves(
    lines: Sequence[tuple[str, str, Sequence[Curve]]],
    title: str,
    measure: str = "test_error_percent",
    suffix: str = ".png",
) -> bytes:
    """Lines of (label, rule, a curve for each seed) on three axes."""
    figure = style.figure(10, 3.4, title)
    panels = figure.subplots(1, 3)
    looks = style.looks([rule for _, rule, _ in lines])
    columns = [measure, *PANELS]
    style.logarithmic(panels[0])
    for index, ((_, _, each), look) in enumerate(zip(lines, looks, strict=True)):
        length = min(len(curve) for curve in each)  # some runs are not finished
        epochs = [row["epoch"] for row in each[0][:length]]
        for axes, column in zip(panels, columns, strict=True):
            style.plot(axes, epochs, [[row[column] for row in curve[:length]] for curve in each], look, index)
    for axes, column in zip(panels, columns, strict=True):
        style.finish(axes, ylabel=(MEASURES | PANELS)[column], angles=column in PANELS)
    counts = {len(each) for _, _, each in lines}
    note = "Angles: mean over the layers."
    if max(counts) > 1:
        seeds = str(max(counts)) if len(counts) == 1 else "the"
        note = f"Lines: mean over {seeds} seeds. Bands: ± 1 standard error. {note}"
    style.legend(figure, [(label, look) for (label, _, _), look in zip(lines, looks, strict=True)], note)
    return style.save(figure, suffix)


@style.styled
def published(
    ours: Mapping[str, Curve],
    theirs: Mapping[str, Mapping[int, Mapping[str, float]] | None],
    title: str,
) -> bytes:
    """Curves of one hidden layer: training loss, test accuracy, and where there is a B matrix and delta angle; the published
    pale and dotted.
    """
    labels = {
        "train_loss": "Training loss (nats)",
        "test_accuracy_percent": "Test accuracy (%)",
        "matrix_angle_W2_deg": "Angle between W and B\n(degrees)",
        "delta_angle_hidden_deg": "Angle between δ and\nbackprop's δ (degrees)",
    }
    columns = [c for c in labels if not all(math.isnan(row[c]) for rows in ours.values() for row in rows)]
    figure = style.figure(3.4 * len(columns), 3.6, title)
    panels = figure.subplots(1, len(columns), sharex=True)
    looks = style.looks([name.split("-")[0] for name in ours])
    banded = False
    for index, ((name, rows), look) in enumerate(zip(ours.items(), looks, strict=True)):
        epochs = [r["epoch"] + 1 for r in rows]
        for axes, column in zip(panels, columns, strict=True):
            style.plot(axes, epochs, [[r[column] for r in rows]], look, index)
            mean, spread = (f"{column.removesuffix('_deg')}_{what}_deg" for what in ("mean", "sd"))
            if spread in rows[0]:
                banded = True
                low, high = ([r[mean] + sign * r[spread] for r in rows] for sign in (-1, 1))
                axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, lw=0)
            if curve := theirs.get(name):
                shown = [curve[epoch][column] for epoch in range(1 + int(rows[-1]["epoch"]))]
                there = range(1, len(shown) + 1)
                axes.plot(there, shown, color=look["color"], linewidth=2.6, linestyle=":", alpha=0.45)
    for axes, column in zip(panels, columns, strict=True):
        axes.set(xscale="log")
        if column == "train_loss":
            style.logarithmic(axes, (1, 3))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        style.finish(axes, ylabel=labels[column])
    for axes in panels[2:]:
        axes.set_ylim(-1, None)
    note = "Pale dots: the published curves. " if any(theirs.values()) else ""
    note += "Band of δ's angle: mean ± 1 standard deviation over 128 examples." if banded else ""
    style.legend(figure, [(name.upper(), look) for name, look in zip(ours, looks, strict=True)], note.strip())
    return style.save(figure)


@style.styled
def layers(tests: Mapping[str, Curve], rules: Mapping[str, str]) -> bytes | None:
    """The angles of every layer of runs, as the paper's figure has them: a column a run, matrix above delta.

    Backprop has none and is left out; None where that leaves nothing.
    """
    shown = {name: rows for name, rows in tests.items() if any(_paths(rows, kind) for kind in ("matrix", "delta"))}
    if not shown:
        return None
    figure = style.figure(1.9 * len(shown) + 1, 4.6)
    panels = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    colours = colormaps["viridis"]
    for (name, rows), column in zip(shown.items(), panels.T, strict=True):
        for axes, kind in zip(column, ("matrix", "delta"), strict=True):
            paths = _paths(rows, kind)
            for i, path in enumerate(paths):
                look = {"color": colours(0.9 * i / max(len(paths) - 1, 1)), "linestyle": "-", "linewidth": 1.1}
                style.plot(axes, [r["epoch"] for r in rows], [[r[path] for r in rows]], look, i)
            style.finish(axes, ylabel="", xlabel="Epoch" if kind == "delta" else "", angles=True)
        column[0].set_title(style.code(rules[name]))
    panels[0, 0].set_ylabel("Angle between W and B\n(degrees)")
    panels[1, 0].set_ylabel("Angle between δ and\nbackprop's δ (degrees)")
    bar = figure.colorbar(ScalarMappable(cmap=colours), ax=panels, ticks=[0, 1], aspect=40, pad=0.01)
    bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
    return style.save(figure)


def _paths(rows: Curve, kind: str) -> list[str]:
    """The columns of a kind of angle, from the first layer on, without the output's delta, which comes from the loss."""
    names = [name for name in rows[-1] if name.startswith(f"{kind}_angle_deg/") and name != f"delta_angle_deg{OUTPUT}"]
    return sorted(names, key=_depth)


def _depth(path: str) -> tuple[Any, ...]:
    """A key that puts a model's layers in their order: numbers as numbers, a flat net's dense layers behind its convolutions
    (LeNet's), the output last."""
    name = path.split("/", 1)[-1]
    parts = re.split(r"(\d+)", name)
    return (path.endswith("output/kernel"), name.startswith("Dense_"), [int(p) for p in parts[1::2]], parts)
