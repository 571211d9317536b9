"""The texts of wmkp reproduce: a figure's table, and how far it is from the published numbers."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmkp.experiments.commands import published, recipes
from wmkp.experiments.runs import figures, logs

# Bounds for the paper's figures: points from BP's test error, and degrees of every layer's matrix angle.
NEAR = 1.0
UNDER = {"wm": 6.0, "kp": 1.0, "kpm": 1.0}
ALIGNED = ("akrout-resnet20", "akrout-tiny")
BESIDE_BP = ("residual", "hundred-classes")  # figures without such bounds, or with runs too short for them
EPOCHS = 60.0  # the length of the runs to which these bounds apply

# Bounds on the difference from the published curve at the last epoch, by quantity.
BOUNDS = {"accuracy": ("points", 0.3), "matrix_angle": ("degrees", 3.0), "delta_angle": ("degrees", 3.0)}
COMPARED = {
    "train_loss": "train_loss",
    "accuracy": "test_accuracy_percent",
    "matrix_angle": "matrix_angle_W2_deg",
    "delta_angle": "delta_angle_hidden_deg",
}
QUARTERED = ("train_loss", "accuracy")  # their differences are also taken over each quarter of the epochs


def quarters(ours: figures.Curve, theirs: figures.Curve, column: str) -> list[tuple[float, float]]:
    """The difference of two curves over each quarter of the epochs, where both were evaluated: mean, standard error.

    The first epochs are evaluated one by one. Only every ``EVERY``-th of them counts, if each quarter has that many.
    """
    other = {row["epoch"]: row[column] for row in theirs}
    epochs = int(ours[-1]["epoch"]) + 1
    every = published.EVERY if epochs >= 4 * published.EVERY else 1
    off = [(row["epoch"], row[column] - other[row["epoch"]]) for row in ours if row["epoch"] in other]
    found = []
    for span in np.array_split(np.arange(epochs), 4):
        inside = [x for epoch, x in off if epoch in span and (epoch + 1) % every == 0]
        if inside:
            error = float(np.std(inside, ddof=1)) / math.sqrt(len(inside)) if len(inside) > 1 else math.nan
            found.append((float(np.mean(inside)), error))
    return found


def quartered(values: Sequence[tuple[float, float]], digits: int) -> str:
    """Means and their standard errors, as printed."""
    one = lambda mean, error: f"{mean:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
    return ", ".join(one(mean, error) for mean, error in values) or "-"


def cell(x: Any, form: str) -> Any:
    return ("" if math.isnan(x) else form.format(x)) if isinstance(x, float) else x


# The printed table's columns: heading, and how a line fills it.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda line: line["run"],
    "epoch": lambda line: f"{line['epoch']:.4g}",
    "train loss": lambda line: _held_against(line, "train_loss", "{:.3g}"),
    "accuracy %": lambda line: _held_against(line, "accuracy"),
    "accuracy %, least, mean, most": lambda line: _numbers(line, "accuracy_least", "accuracy_mean", "accuracy_most"),
    "the dataset's order": lambda line: _numbers(line, "accuracy_own"),
    "published": lambda line: _numbers(line, "accuracy_published") if "accuracy_least" in line else "",
    "pixels moved, of 255": lambda line: _numbers(line, "pixels_moved"),
    "matrix angle": lambda line: _held_against(line, "matrix_angle"),
    "delta angle": lambda line: _held_against(line, "delta_angle"),
    f"delta angle of {published.EXAMPLES}: mean, sd": lambda line: _numbers(line, "delta_angle_mean", "delta_angle_sd"),
    "published, in sd from the mean": lambda line: _numbers(_in_sd(line), "published_in_sd") or "-",
    "seeds": lambda line: _numbers(line, "seeds", form="{:.0f}"),
    "test loss, nats": lambda line: _with_error(line, "test_loss", "{:.3f}"),
    "error %": lambda line: _with_error(line, "test_error"),
    "published error %": lambda line: _numbers(line, "test_error_published"),
    "matrix angle, mean, worst": lambda line: _numbers(line, "matrix_mean", "matrix_worst"),
    "delta angle, mean, worst": lambda line: _numbers(line, "delta_mean", "delta_worst"),
    "|δ| / BP's |δ|, least, most": lambda line: _numbers(line, "ratio_least", "ratio_most", form="{:.2g}"),
    "layers of rounding": lambda line: _numbers(line, "rounding_layers", form="{:.2g}"),
    "stream's growth": lambda line: _numbers(line, "stream_growth"),
    "examples/s": lambda line: _numbers(line, "examples_per_second"),
    "hours, 90 epochs": lambda line: _numbers(line, "hours_for_90_epochs", form="{:,.0f}"),
    "GB: state, step": lambda line: _numbers(line, "state_GB", "step_GB"),
    "of a batch of": lambda line: _numbers(line, "memory_batch", form="{:.0f}"),
}


def _numbers(line: dict[str, Any], *names: str, form: str = "{:.2f}") -> str:
    return ", ".join(cell(float(line[name]), form) or "-" for name in names if name in line)


def _with_error(line: dict[str, Any], name: str, form: str = "{:.2f}") -> str:
    """A mean over seeds, with its standard error if there is one."""
    return " ± ".join(_numbers(line, key, form=form) for key in (name, f"{name}_se") if key in line)


def _held_against(line: dict[str, Any], name: str, form: str = "{:.2f}") -> str:
    if name not in line:
        return ""
    return _numbers(line, name, f"{name}_published", f"{name}_largest_difference", form=form)


def _in_sd(line: dict[str, Any]) -> dict[str, Any]:
    """The line, and the distance of the published delta angle from our mean, in standard deviations of single examples.

    On MNIST both are of the same example, so the distance says nothing about the run.
    """
    if line.get("dataset") == "mnist":
        return line
    off = line.get("delta_angle_published", math.nan) - line.get("delta_angle_mean", math.nan)
    sd = line.get("delta_angle_sd", math.nan)
    return line if math.isnan(off) else {**line, "published_in_sd": off / sd if sd else math.nan}


def table(summary: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The printed table: headings first, without columns that have no number."""
    columns = [[heading, *map(fill, summary)] for heading, fill in COLUMNS.items()]
    return [list(row) for row in zip(*(c for c in columns if set("".join(c[1:])) - set("-, ")), strict=True)]


def caption(summary: Sequence[dict[str, Any]]) -> str:
    """What the numbers of the table mean."""
    if "accuracy_least" in summary[0]:
        return "Train loss: the mean over the drawn orders, and the published. Accuracy: on the test set, over those orders."
    examples = ""
    if not all(math.isnan(line.get("delta_angle_sd", math.nan)) for line in summary):
        examples = f" A delta angle is that of the first training example; then over {published.EXAMPLES} of them"
        held = any("published_in_sd" in _in_sd(line) for line in summary)
        examples += ", and how far from their mean the published one lies." if held else "."
    if "accuracy_published" in summary[0]:
        return (
            f"Ours, the published, and the largest difference over the epochs at which ours was evaluated: the first "
            f"{published.EVERY_UNTIL}, then every {published.EVERY}th. Angles in degrees.{examples}"
        )
    if "accuracy" in summary[0]:
        return f"Accuracy: on the test set. Angles in degrees. At the end.{examples}"
    return "Error: on the test set, ours, and the published where there is one. Angles: degrees, over the layers, at the end."


def verdict(figure: str, summary: Sequence[dict[str, Any]], directory: Path) -> str:
    """The distance of a directory's figure from the published one, and whether it is within BOUNDS; "" if none is published."""
    if figure in ALIGNED:
        claims = _claims({line["run"]: logs.read(directory / f"{line['run']}.csv") for line in summary})
        done, whole = min(line["epoch"] for line in summary), EPOCHS
        return (
            f"After {done:.3g} of {whole:g} epochs, too early to judge. {claims}" if claims and done < whole else claims
        )
    if figure in BESIDE_BP:
        return _over_backprop(summary)
    if "accuracy_least" in summary[0]:
        return _place(summary)
    if figure == "akrout-jpeg":
        return _by_jpeg(summary, directory)
    said = []
    for name, (unit, bound) in BOUNDS.items():
        off = {line["run"]: abs(line.get(name, math.nan) - line.get(f"{name}_published", math.nan)) for line in summary}
        if off := {run: x for run, x in off.items() if not math.isnan(x)}:
            far, run = max((x, run) for run, x in off.items())
            met = "met"
            if missed := sorted((x, run) for run, x in off.items() if x > bound):
                met = "missed" + "".join(f", by {other} too with {x:.2f}" for x, other in missed[-2::-1])
            said.append(f"{name.replace('_', ' ')} {far:.2f} {unit} ({run}; bound {bound:g}, {met})")
    if not said:
        return ""
    found = [abs(_in_sd(line).get("published_in_sd", math.nan)) for line in summary]
    if found := [x for x in found if not math.isnan(x)]:
        said[-1] += f", and at most {max(found):.1f} standard deviations from the mean over examples"
    return f"Farthest from the published at epoch {summary[0]['epoch']:g}: {'; '.join(said)}."


def _claims(tests: Mapping[str, figures.Curve]) -> str:
    """The paper's claims on test errors and matrix angles, and whether they hold here; "" for backprop alone."""
    ends = {recipes.RECIPES[name].rule: rows for name, rows in tests.items()}
    said = []
    if (bp := ends.pop("bp", None)) and ends:
        over = {rule: rows[-1]["test_error_percent"] - bp[-1]["test_error_percent"] for rule, rows in ends.items()}
        parts = []
        if near := {rule: x for rule, x in over.items() if rule in UNDER}:
            met = "met" if max(near.values()) <= NEAR else "missed"
            parts.append(f"{_by_rule(near)} (bound {NEAR:g}, {met})")
        if behind := {rule: x for rule, x in over.items() if rule not in UNDER}:
            parts.append(f"{_by_rule(behind)} (published as behind)")
        said.append(f"Test error over BP's, in points: {'; '.join(parts)}.")
    angles = []
    for rule, bound in UNDER.items():
        if rule in ends:
            worst = [row["matrix_angle_worst_deg"] for row in ends[rule]]
            under = max((i for i, x in enumerate(worst, 1) if not x < bound), default=0)
            when = f"under it from epoch {ends[rule][under]['epoch']:g} on" if under < len(worst) else "missed"
            angles.append(f"{rule.upper()} {worst[-1]:.2f} (bound {bound:g}, {when})")
    if angles:
        said.append(f"Matrix angle of the worst layer, in degrees: {', '.join(angles)}.")
    return " ".join(said)


def _over_backprop(summary: Sequence[dict[str, Any]]) -> str:
    """Test errors less backprop's, with the standard error of the difference if there are several seeds."""
    ends = {recipes.RECIPES[line["run"]].rule: line for line in summary}
    if (bp := ends.pop("bp", None)) is None or not ends:
        return ""
    said = []
    for rule, line in ends.items():
        error = math.hypot(*(x.get("test_error_se", math.nan) for x in (bp, line)))
        spread = "" if math.isnan(error) else f" ± {error:.2f}"
        said.append(f"{rule.upper()} {line['test_error'] - bp['test_error']:+.2f}{spread}")
    return f"Test error over BP's, in points: {', '.join(said)}."


def _by_jpeg(summary: Sequence[dict[str, Any]], directory: Path) -> str:
    """The effect of JPEG on backprop's test accuracy and training loss; "" without the run to compare with."""
    curves = {line["run"]: logs.read(directory / f"{line['run']}.csv") for line in summary}
    plain = curves.pop("bp", None)
    if not (plain and curves):
        return ""
    said = [
        f"{what}: "
        + "; ".join(
            f"{name} {quartered(quarters(rows, plain, COMPARED[column]), digits)}" for name, rows in curves.items()
        )
        for what, column, digits in (("test accuracy, in points", "accuracy", 2), ("train loss", "train_loss", 3))
    ]
    return f"Beside bp's, the differences by quarters of the epochs, mean ± standard error: {'. '.join(said)}."


def _by_rule(points: Mapping[str, float]) -> str:
    return ", ".join(f"{rule.upper()} {x:+.2f}" for rule, x in points.items())


def _place(summary: Sequence[dict[str, Any]]) -> str:
    """The distance of the published accuracies from those in the dataset's own order and in other orders."""
    said = []
    for name, lines in itertools.groupby(
        (line for line in summary if "accuracy_published" in line), lambda line: line["run"]
    ):
        own, others = [], []
        for line in lines:
            theirs = line["accuracy_published"]
            own.append(abs(theirs - line["accuracy_own"]))
            others.append(max(line["accuracy_least"] - theirs, theirs - line["accuracy_most"], 0.0))
        said.append(
            f"{name}: the published accuracies are up to {max(own):.2f} points from those in the dataset's own order, and "
            f"{sum(x > 0 for x in others)} of {len(others)} outside the other orders' (by up to {max(others):.2f})."
        )
    return " ".join(said)
