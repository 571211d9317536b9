"""wmkp reproduce: published figures, run anew and held against what was published."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from wmkp import checks
from wmkp.experiments.commands import published, recipes, train
from wmkp.experiments.config import MACHINES, RULES, InputError, Reproduce, Train, flag
from wmkp.experiments.runs import devices, figures, logs, outputs
from wmkp.experiments.runs.provenance import provenance
from wmkp.training import batch_sharding

IMAGENET_EXAMPLES = 1_281_167

# Top-1 test error in percent, LeNet on MNIST, as BioTorch's own README has it; it has neither KP nor WM.
BIOTORCH = {"bp": 0.91, "fa": 1.7, "dfa": 1.61, "ss": 0.94, "brsf": 0.91, "frsf": 0.97}


class Battery(NamedTuple):
    """Runs of ``wmkp train`` that make one figure.

    Attributes:
      runs: recipes, by name.
      changes: of the recipes' settings.
      published: the test error in percent that was published, by rule.
    """

    runs: tuple[str, ...]
    changes: dict[str, Any]
    published: dict[str, float] = {}  # noqa: RUF012


def _runs(base: str, rules: str) -> tuple[str, ...]:
    return tuple(f"{base}-{rule}" for rule in rules.split())


# Long enough for Kolen-Pollack's clock, without the steps that would stop it early; WM with room below 6 degrees.
_ALIGNING = {
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "drop_epochs": (),
    "epochs": 60.0,
    "mirror_every": 1,
    "mirror_angle": 5.0,
}

# The paper's figures: how near BP's test error, in points, and under how many degrees every layer's matrix angle is to come.
NEAR = 1.0
UNDER = {"wm": 6.0, "kp": 1.0, "kpm": 1.0}
ALIGNED = ("akrout-resnet20", "akrout-tiny")

BATTERIES = {
    "akrout-resnet20": Battery(_runs("resnet20-cifar10", "bp wm kp kpm ss fa"), _ALIGNING),
    "akrout-tiny": Battery(_runs("resnet18-tiny", "bp wm kp kpm ss fa"), _ALIGNING),
    "akrout-imagenet": Battery(
        _runs("resnet18-imagenet", "bp wm kp ss fa") + _runs("resnet50-imagenet", "bp wm kp ss fa"), {}
    ),
    # Unclipped, FA and DFA run away at this learning rate.
    "biotorch-lenet": Battery(_runs("lenet-mnist", "bp fa dfa ss brsf frsf kp kpm wm"), {"clip_norm": 1.0}, BIOTORCH),
}
ORDERS, ORDERS_EPOCHS = 8, 3  # how many fixed orders of the data are compared, and for how long
# How near a curve's last epoch is to come to the published one: in what, and how near.
BOUNDS = {"accuracy": ("points", 0.3), "matrix_angle": ("degrees", 3.0), "delta_angle": ("degrees", 3.0)}
CURVES = {  # dataset, variants
    "akrout-mnist": ("mnist", published.PUBLISHED),
    "akrout-cifar10": ("cifar10", published.PUBLISHED),
    "akrout-mended": ("mnist", published.MENDED),
    "akrout-jpeg": ("cifar10", published.JPEG),
}


def reproduce(config: Reproduce) -> None:
    """Runs ``wmkp reproduce``.

    Writes to the output directory ``run.json`` (command, settings, commit, machine, date), each run's own CSV files,
    ``summary.csv`` (the table that is printed) and pictures.

    Raises:
      InputError: the config asks for what cannot be done.
    """
    config.check()
    figure = config.figure
    names, make = _parts(figure)
    if unknown := [name for name in config.only if name not in names]:
        raise InputError(f"--only: {config.figure} has no {unknown[0]!r}; choose from {', '.join(names)}")
    config = dataclasses.replace(
        config, only=config.only or tuple(names), out=config.out or Path("runs") / config.figure
    )
    assert config.out is not None
    if config.distributed:
        devices.start(settings(config, config.only[0]))
    with outputs.claim(config.out) if devices.is_first() else contextlib.nullcontext():
        _check_out(config.out, figure)
        summary = make(config, config.out)
        if devices.is_first():
            write(config.out / "summary.csv", summary)
            _print(config, summary)


def _check_out(out: Path, figure: str) -> None:
    """Raises InputError if another figure is in the directory, or what says which one is cannot be read."""
    path = out / "run.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())["figure"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({checks.first_line(error)}); move it away, or give another --out"
        ) from None
    if there != figure:
        raise InputError(f"{out} has {there} in it; give another --out")


def _parts(figure: str) -> tuple[Sequence[str], Callable[[Reproduce, Path], list[dict[str, Any]]]]:
    """The names of a figure's runs, and what makes it."""
    if figure in CURVES:
        return list(CURVES[figure][1]), _curves
    if figure in BATTERIES:
        return BATTERIES[figure].runs, _battery
    return list(published.HIDDEN), _orders


def _check_unchanged(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError if what is in the directory was made with other settings, or is longer: nothing was written yet."""
    now = json.loads(json.dumps(now, default=str))
    pairs = [("seed", before.get("seed", now.get("seed")), now.get("seed"))]
    if now.get("epochs", math.inf) < before.get("epochs", 0):
        pairs.append(("epochs", before["epochs"], now["epochs"]))
    for name, run in now.get("runs", {}).items():
        there = before.get("runs", {}).get(name, run)
        pairs += [(key, there.get(key), x) for key, x in run.items()]
    changed = dict.fromkeys(f"{flag(key)} was {old} and is {new}" for key, old, new in pairs if old != new)
    if changed:
        raise InputError(f"{out} was started with other settings: {'; '.join(changed)}; give another --out")


def _started(config: Reproduce, out: Path, **settings: Any) -> None:
    """Leaves in ``run.json`` what was run, and what else went before it in the same directory."""
    written = {"command": shlex.join(["wmkp", *sys.argv[1:]]), **provenance(), "figure": config.figure, **settings}
    path = out / "run.json"
    there = written
    if path.exists():
        there = json.loads(path.read_text())
        _check_unchanged(out, there, settings)
    before = [*there.get("before", []), {name: there.get(name) for name in ("commit", "date")}]
    if before := [record for record in before if record["commit"] != written["commit"]]:
        written["before"] = before
    if devices.is_first():
        outputs.write_atomically({path: (json.dumps(written, indent=1, default=str) + "\n").encode()})


def _curves(config: Reproduce, out: Path) -> list[dict[str, Any]]:
    """The published NumPy experiments: trained two at a time on CPUs, whose matrix products here are small.

    What is there already goes on from its last checkpoint, or is done.
    """
    name, variants = CURVES[config.figure]
    dataset = published.load(name, config.data_dir)
    epochs = published.EPOCHS if config.epochs is None else round(config.epochs)
    theirs = {key: _reference(config.reference, name, key, epochs) for key in config.only} if config.reference else {}
    fresh = not any((out / key).exists() for key in config.only)
    about = {"epochs": epochs, "seed": config.seed, "variants": {k: variants[k]._asdict() for k in config.only}}
    _started(config, out, **about)
    console, begin, stopped = Console(soft_wrap=True), time.perf_counter(), threading.Event()

    def one(key: str) -> list[dict[str, float]]:
        def report(rows: list[published.Epoch]) -> None:
            write(out / f"{key}.csv", [row._asdict() for row in rows])
            if len(rows) % 20 == 0:
                last, seconds = rows[-1], time.perf_counter() - begin
                console.print(f"{key}: epoch {last.epoch}, {last.test_accuracy_percent:.2f} %, {seconds:.0f} s")

        hidden = published.HIDDEN[name]
        rows = published.run(variants[key], dataset, hidden, epochs, config.seed, report, out / key, stopped.is_set)
        report(rows)
        return [row._asdict() for row in rows]

    at_a_time = min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(at_a_time) as pool:
        made = [pool.submit(one, key) for key in config.only]
        try:
            wait(made, return_when=FIRST_EXCEPTION)
        finally:  # one of them cannot go on, or Ctrl-C: the others end too, which the pool waits for
            stopped.set()
            for curve in made:
                curve.cancel()
        curves = {key: curve.result() for key, curve in zip(config.only, made, strict=True)}
    if fresh:  # all of it, and nothing that was there already
        seconds = round(time.perf_counter() - begin)
        console.print(f"All trained in {seconds} s.")
        _started(config, out, **about, seconds=seconds)
    title = f"{name}, {epochs} epochs" + (": ours, and pale the published" if theirs else "")
    outputs.write_atomically({out / "curves.png": figures.published(curves, theirs, title)})
    return [
        {
            **_compared(key, variants[key].title, curves[key], theirs.get(key)),
            **_pixels(variants[key], dataset),
            "dataset": name,
        }
        for key in config.only
    ]


def _pixels(variant: published.Variant, dataset: published.Dataset) -> dict[str, float]:
    """How far JPEG moves a pixel of the test images, of 255: the root of the mean square; nothing without JPEG."""
    if variant.jpeg is None:
        return {}
    images = dataset.test["image"]
    moved = published.through_jpeg(images, variant.jpeg).astype(np.float32) - images
    return {"pixels_moved": float(np.sqrt(np.mean(np.square(moved))))}


def _orders(config: Reproduce, out: Path) -> list[dict[str, Any]]:
    """BP's first epochs in the dataset's own order (0) and in others (1, 2, ...), each kept from epoch to epoch."""
    epochs = ORDERS_EPOCHS if config.epochs is None else round(config.epochs)
    _started(config, out, epochs=epochs, orders=ORDERS, seed=config.seed)
    variant, summary = published.PUBLISHED["bp"], []
    for name in config.only:
        dataset = published.load(name, config.data_dir)
        theirs = _reference(config.reference, name, "bp", epochs) if config.reference else None
        curves = []
        for order in range(1 + ORDERS):
            places = np.arange(len(dataset.train["label"]))
            if order:
                places = np.random.default_rng((config.seed, order)).permutation(places)
            ordered = dataset._replace(train={key: x[places] for key, x in dataset.train.items()})
            curves.append(published.run(variant, ordered, published.HIDDEN[name], epochs, config.seed))
            rows = [{"order": i, **row._asdict()} for i, curve in enumerate(curves) for row in curve]
            write(out / f"{name}.csv", rows)
        for own, *others in zip(*curves, strict=True):
            found = [row.test_accuracy_percent for row in others]
            line = {
                "run": name,
                "what": f"BP, {ORDERS} orders",
                "epoch": own.epoch + 1,
                "train_loss": sum(row.train_loss for row in others) / ORDERS,
                "accuracy_least": min(found),
                "accuracy_mean": sum(found) / ORDERS,
                "accuracy_most": max(found),
                "accuracy_own": own.test_accuracy_percent,
            }
            if theirs:
                line["train_loss_published"] = theirs[own.epoch]["train_loss"]
                line["accuracy_published"] = theirs[own.epoch]["test_accuracy_percent"]
            summary.append(line)
    return summary


COMPARED = {
    "train_loss": "train_loss",
    "accuracy": "test_accuracy_percent",
    "matrix_angle": "matrix_angle_W2_deg",
    "delta_angle": "delta_angle_hidden_deg",
}
QUARTERED = ("train_loss", "accuracy")  # their differences are also taken over each quarter of the epochs


def _compared(key: str, title: str, ours: list[dict[str, float]], theirs: dict[int, dict[str, float]] | None) -> Any:
    """A variant's line: each quantity at the last epoch, the published one there, and the largest difference so far."""
    last = ours[-1]
    line: dict[str, Any] = {"run": key, "what": title, "epoch": int(last["epoch"]) + 1}
    line |= {f"delta_angle_{what}": last[f"delta_angle_hidden_{what}_deg"] for what in ("mean", "sd")}
    for name, column in COMPARED.items():
        line[name] = last[column]
        if theirs:
            line[f"{name}_published"] = theirs[int(last["epoch"])][column]
            far = [abs(row[column] - theirs[int(row["epoch"])][column]) for row in ours if int(row["epoch"]) in theirs]
            line[f"{name}_largest_difference"] = max(far, default=math.nan)
            if name in QUARTERED:
                for i, (mean, error) in enumerate(_quarters(ours, list(theirs.values()), column), 1):
                    line |= {f"{name}_quarter_{i}": mean, f"{name}_quarter_{i}_error": error}
    return line


def _quarters(ours: figures.Curve, theirs: figures.Curve, column: str) -> list[tuple[float, float]]:
    """By how much a curve is off another where both were evaluated, over each quarter of the epochs: mean, standard error.

    The first epochs, which are evaluated one by one, count like later ones, every ``EVERY``-th of them, if there are as many
    in each quarter.
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
    """Means and their standard errors as they are printed."""
    one = lambda mean, error: f"{mean:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
    return ", ".join(one(mean, error) for mean, error in values) or "-"


def _reference(directory: Path, dataset: str, rule: str, epochs: int) -> dict[int, dict[str, float]] | None:
    """A published curve, by epoch, or None where none was published. Raises InputError if it lacks an epoch or a column."""
    path = directory / f"akrout2019_{dataset}_{rule}.csv"
    if not path.exists():
        if rule in published.PUBLISHED:
            raise InputError(f"--reference: {path} is not there")
        return None
    try:
        curve = {row["epoch"]: row for row in logs.read(path, ("epoch", *COMPARED.values()))}
    except InputError as error:
        raise InputError(f"--reference: {error}") from None
    if lacking := [epoch for epoch in range(epochs) if epoch not in curve]:
        raise InputError(
            f"--reference: {path} has no epoch {lacking[0]}; leave --reference out, or train fewer --epochs"
        )
    return {epoch: curve[epoch] for epoch in range(epochs)}


def settings(config: Reproduce, name: str) -> Train:
    """The config of one run of a battery: its recipe, shortened as asked for, its schedule with it."""
    recipe = dataclasses.replace(recipes.RECIPES[name], **BATTERIES[config.figure].changes)
    epochs = config.epochs or recipe.epochs
    share = epochs / recipe.epochs
    assert config.out is not None
    if config.steps:  # to measure throughput, step by step
        mirror_steps = min(recipe.mirror_steps, config.steps)
        recipe = dataclasses.replace(recipe, log_every=1, mirror_steps=mirror_steps)
    return dataclasses.replace(
        recipe,
        out=config.out / name,
        resume=True,
        data_dir=config.data_dir,
        image_size=config.image_size or recipe.image_size,
        batch_size=config.batch_size or recipe.batch_size,
        dtype=config.dtype or recipe.dtype,
        steps=config.steps,
        epochs=epochs,
        drop_epochs=tuple(share * epoch for epoch in recipe.drop_epochs),
        warmup_epochs=share * recipe.warmup_epochs,
        seed=config.seed,
        **{name: getattr(config, name) for name in MACHINES},
    )


def _battery(config: Reproduce, out: Path) -> list[dict[str, Any]]:
    """Runs of ``wmkp train``, one after another; a run that is there already goes on, or is done."""
    battery = BATTERIES[config.figure]
    runs = {name: settings(config, name) for name in config.only}
    kept = {
        name: {k: v for k, v in dataclasses.asdict(run).items() if k not in train.FREE} for name, run in runs.items()
    }
    _started(config, out, runs=kept)
    lines = []
    for name, run in runs.items():
        begin = time.perf_counter()
        if not train.train(run):  # by SIGTERM or Ctrl-C, which are meant for all of them
            raise KeyboardInterrupt
        seconds = time.perf_counter() - begin
        # Of the recipe's batch, however small those were that were run: so many of them, which devices divide as well.
        whole = run.batch_size * math.ceil(recipes.RECIPES[name].batch_size / run.batch_size)
        needed = memory(run, whole) if "imagenet" in config.figure else {}  # compiled by all processes together
        if not devices.is_first():
            continue
        last = _rows(run.out / "test.csv", "epoch", "test_error_percent", *figures.ANGLES)[-1]
        rates = [row["examples_per_second"] for row in _rows(run.out / "train.csv", "examples_per_second")]
        rates = rates[run.mirror_every * run.accumulate :] or rates  # the first steps of either kind compile them
        rate = len(rates) / sum(1 / rate for rate in rates)
        line = {"run": name, "what": RULES[run.rule], "epoch": last["epoch"], "test_error": last["test_error_percent"]}
        if battery.published:
            line["test_error_published"] = battery.published.get(run.rule, math.nan)
        for kind in ("matrix", "delta"):
            line |= {f"{kind}_{which}": last[f"{kind}_angle_{which}_deg"] for which in ("mean", "worst")}
        line |= {"examples_per_second": rate, "seconds": seconds}
        if "imagenet" in config.figure:
            line["hours_for_90_epochs"] = 90 * IMAGENET_EXAMPLES / rate / 3600
            line |= {f"{part}_GB": size / 1e9 for part, size in needed.items()} | {"memory_batch": whole}
        lines.append(line)
    if devices.is_first():
        tests = {name: logs.read(run.out / "test.csv") for name, run in runs.items()}
        for name, rows in tests.items():
            write(out / f"{name}.csv", rows)
        draw(out, tests, {name: run.rule for name, run in runs.items()})
    return lines


def draw(out: Path, tests: Mapping[str, figures.Curve], rules: Mapping[str, str]) -> None:
    """A battery's pictures, of its runs' evaluations."""
    pictures = {"curves": figures.curves(tests, rules), "layers": figures.layers(tests, rules)}
    outputs.write_atomically({out / f"{name}.png": png for name, png in pictures.items() if png is not None})


def _rows(path: Path, *columns: str) -> list[dict[str, float]]:
    """The rows of a finished run's CSV file. Raises InputError if there are none."""
    if rows := logs.read(path, columns):
        return rows
    raise InputError(f"{path} is empty; move {path.parent} away, and it is trained anew")


def memory(config: Train, batch_size: int) -> dict[str, int]:
    """Bytes on each device in an engaged step of a batch of any size, by the compiler's own account.

    The state (W, B, the optimizer's) with the batch, and what the step needs besides.
    """
    run = train.build(config)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype, sharding=batch_sharding(run.mesh)),
        run.feed.probe,
    )
    advance: Any = run.advance  # jitted
    found = advance.lower(train.like(config, run), run.tally, batch).compile().memory_analysis()
    return {"state": found.argument_size_in_bytes, "step": found.temp_size_in_bytes}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows to a CSV file, their columns those of all of them; what is not a number is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v, "{:.6g}") for k, v in row.items()})
    outputs.write_atomically({path: text.getvalue().encode()})


def _cell(x: Any, form: str) -> Any:
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
    "error %": lambda line: _numbers(line, "test_error", "test_error_published"),
    "matrix angle, mean, worst": lambda line: _numbers(line, "matrix_mean", "matrix_worst"),
    "delta angle, mean, worst": lambda line: _numbers(line, "delta_mean", "delta_worst"),
    "examples/s": lambda line: _numbers(line, "examples_per_second"),
    "hours, 90 epochs": lambda line: _numbers(line, "hours_for_90_epochs", form="{:,.0f}"),
    "GB: state, step": lambda line: _numbers(line, "state_GB", "step_GB"),
    "of a batch of": lambda line: _numbers(line, "memory_batch", form="{:.0f}"),
}


def _numbers(line: dict[str, Any], *names: str, form: str = "{:.2f}") -> str:
    return ", ".join(_cell(float(line[name]), form) or "-" for name in names if name in line)


def _held_against(line: dict[str, Any], name: str, form: str = "{:.2f}") -> str:
    if name not in line:
        return ""
    return _numbers(line, name, f"{name}_published", f"{name}_largest_difference", form=form)


def _in_sd(line: dict[str, Any]) -> dict[str, Any]:
    """The line, and where the published delta angle lies from our mean, in standard deviations of single examples.

    MNIST's is of the same example as ours, and its place among others says nothing of the run.
    """
    if line.get("dataset") == "mnist":
        return line
    off = line.get("delta_angle_published", math.nan) - line.get("delta_angle_mean", math.nan)
    sd = line.get("delta_angle_sd", math.nan)
    return line if math.isnan(off) else {**line, "published_in_sd": off / sd if sd else math.nan}


def table(summary: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table that is printed, its headings first, columns without a number left out."""
    columns = [[heading, *map(fill, summary)] for heading, fill in COLUMNS.items()]
    return [list(row) for row in zip(*(c for c in columns if set("".join(c[1:])) - set("-, ")), strict=True)]


def caption(summary: Sequence[dict[str, Any]]) -> str:
    """What the table's numbers are."""
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
    """How far the figure in a directory is from the published, and whether that is within BOUNDS; "" if none was published."""
    if figure in ALIGNED:
        claims = _claims({line["run"]: logs.read(directory / f"{line['run']}.csv") for line in summary})
        done, whole = min(line["epoch"] for line in summary), BATTERIES[figure].changes["epochs"]
        return (
            f"After {done:.3g} of {whole:g} epochs, too early to judge. {claims}" if claims and done < whole else claims
        )
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
    """What the paper claims of test errors and matrix angles, and what became of it; "" of backprop alone."""
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


def _by_jpeg(summary: Sequence[dict[str, Any]], directory: Path) -> str:
    """What JPEG does to backprop's test accuracy and training loss; "" without the run that it is held against."""
    curves = {line["run"]: logs.read(directory / f"{line['run']}.csv") for line in summary}
    plain = curves.pop("bp", None)
    if not (plain and curves):
        return ""
    said = [
        f"{what}: "
        + "; ".join(
            f"{name} {quartered(_quarters(rows, plain, COMPARED[column]), digits)}" for name, rows in curves.items()
        )
        for what, column, digits in (("test accuracy, in points", "accuracy", 2), ("train loss", "train_loss", 3))
    ]
    return f"Beside bp's, the differences by quarters of the epochs, mean ± standard error: {'. '.join(said)}."


def _by_rule(points: Mapping[str, float]) -> str:
    return ", ".join(f"{rule.upper()} {x:+.2f}" for rule, x in points.items())


def _place(summary: Sequence[dict[str, Any]]) -> str:
    """How far the published accuracies are from those in the dataset's own order, and from other orders'."""
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


def _print(config: Reproduce, summary: list[dict[str, Any]]) -> None:
    headings, *lines = table(summary)
    shown = Table(title=config.figure, caption=caption(summary), box=box.SIMPLE_HEAD)
    for heading in headings:
        shown.add_column(heading.replace(", ", ",\n"), justify="left" if heading == "run" else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    console = Console()
    if not console.is_terminal:  # a log or a notebook: nothing is cut off
        console = Console(width=max(console.width, 160))
    console.print(shown)
    assert config.out is not None
    if said := verdict(config.figure, summary, config.out):
        print(said)
    print(f"Written: {config.out}")
