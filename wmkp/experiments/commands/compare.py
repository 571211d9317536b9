"""wmkp compare: the learning rules side by side, from the same initial weights, on the same data in the same order."""

import csv
import dataclasses
import io
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import wmkp
from wmkp.experiments.config import RULES, Compare, InputError, refusals
from wmkp.experiments.data import datasets as data
from wmkp.experiments.models.mlp import MLP
from wmkp.experiments.models.tasks import make_rule
from wmkp.experiments.runs import figures, outputs

LAST_EPOCHS = 5  # that the table's test error is taken over, or half of a shorter run
PROBE = 256  # training examples that delta angles are measured on


class Row(NamedTuple):
    """A rule after an epoch: a line of comparison.csv. NaN stands for what a rule does not have."""

    rule: str
    epoch: int
    train_loss: float
    test_error_percent: float
    matrix_angle_mean_deg: float
    matrix_angle_worst_deg: float
    delta_angle_mean_deg: float
    delta_angle_worst_deg: float


class Cost(NamedTuple):
    """What a rule cost.

    Attributes:
      seconds: of each epoch.
      memory: the bytes of B and its optimizer's state over those of the parameters and theirs.
    """

    seconds: list[float]
    memory: float


class Trial(NamedTuple):
    """A rule in training.

    Attributes:
      state: the TrainState.
      run_epoch: ``(state, train, order) -> (state, mean loss)``, an epoch in one compiled call; donates the state.
      measure: ``(state, train, test) -> (test error, matrix angles, delta angles)``, compiled; percent and degrees.
    """

    state: wmkp.TrainState
    run_epoch: Callable[..., tuple[wmkp.TrainState, jax.Array]]
    measure: Callable[..., tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]]


def compare(config: Compare) -> None:
    """Runs ``wmkp compare``: trains, prints the table, writes comparison.png and comparison.csv.

    Raises:
      InputError: the config asks for what cannot be done; nothing has been trained or written then.
    """
    if config.rules == ("all",):
        config = dataclasses.replace(config, rules=tuple(RULES))
    config.check()
    if config.dataset == "characters":
        raise InputError("the network here is for images: --dataset characters is for wmkp train decoder-characters-kp")
    dataset = data.load(config.dataset, config.data_dir)
    examples = len(dataset.train["label"])
    if config.batch_size > examples:
        raise InputError(f"--batch-size must be at most the {examples} training examples; got {config.batch_size}")
    outputs.make_directory(config.out)
    steps = examples // config.batch_size
    epochs = config.epochs or max(10, math.ceil(6000 / steps))
    # Eq. 14: W - B^T shrinks by exp(-shrinkage) over the run.
    rates = jax.vmap(schedule(config, epochs * steps))(jnp.arange(epochs * steps))
    shrinkage = float(rates.sum()) * config.weight_decay / (1 - config.momentum)
    if "kp" in config.rules and shrinkage < 3:
        print(
            f"wmkp: warning: too short for Kolen-Pollack to align: W - B^T will only shrink by exp(-{shrinkage:.2g}); "
            "its clock is steps x learning rate x weight decay / (1 - momentum)",
            file=sys.stderr,
        )

    rows, costs = train(config, dataset, epochs)
    title = f"{config.dataset}, layers {dataset.train['image'][0].size}-{layers(config.hidden)}-{dataset.num_classes}"
    lines = summary(config, rows, costs)
    files = {
        config.out / "comparison.png": figures.comparison(rows, title),
        config.out / "comparison.csv": to_csv(rows),
        config.out / "comparison.md": to_markdown(lines),
    }
    outputs.write_atomically(files)
    console = Console()
    wide = to_table(lines, title, HEADINGS._fields)
    fits = console.measure(wide, options=console.options.update(width=1000)).maximum <= console.width
    console.print(wide if fits else to_table(lines, title, NARROW))
    if "bp" in costs:
        console.print(f"A step of BP took {1000 * statistics.median(costs['bp'].seconds) / steps:.2g} ms.")
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)


def train(config: Compare, dataset: data.Dataset, epochs: int) -> tuple[list[Row], dict[str, Cost]]:
    """Trains every rule, an epoch of each in turn, so that what slows the machine slows all of them.

    Returns:
      The rows, and by rule what it cost.
    """
    dataset = dataset._replace(train=jax.device_put(dataset.train), test=jax.device_put(dataset.test))
    examples = len(dataset.train["label"])
    steps = examples // config.batch_size
    order_key, trial_key = jax.random.split(jax.random.key(config.seed))

    @jax.jit
    def shuffled(epoch: jax.Array) -> jax.Array:
        """The examples of each step, the same for every rule."""
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), examples)
        return order[: steps * config.batch_size].reshape(steps, config.batch_size)

    rows: list[Row] = []
    seconds: dict[str, list[float]] = {name: [] for name in config.rules}
    memory: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bars = {name: progress.add_task(RULES[name], total=epochs, note="") for name in config.rules}
        trials = {}
        for name in config.rules:
            progress.update(bars[name], note="compiling")
            trials[name] = start(name, config, epochs, dataset, shuffled(0), trial_key)
            state = trials[name].state
            extra, own = ((state.feedback, state.feedback_opt_state), (state.params, state.opt_state))
            memory[name] = sum(x.nbytes for x in jax.tree.leaves(extra)) / sum(x.nbytes for x in jax.tree.leaves(own))
        for epoch in range(epochs + 1):
            order = shuffled(epoch)
            for name, trial in trials.items():
                loss = math.nan
                if epoch > 0:
                    begin = time.perf_counter()
                    state, mean_loss = jax.block_until_ready(trial.run_epoch(trial.state, dataset.train, order))
                    seconds[name].append(time.perf_counter() - begin)
                    trial, loss = trial._replace(state=state), float(mean_loss)
                    trials[name] = trial
                error, matrix, delta = jax.device_get(trial.measure(trial.state, dataset.train, dataset.test))
                angles = (*mean_and_worst(list(matrix.values())), *mean_and_worst(list(delta.values())))
                rows.append(Row(name, epoch, loss, float(error), *angles))
                progress.update(bars[name], completed=epoch, note=f"test error {error:.1f}%")
    return rows, {name: Cost(seconds[name], memory[name]) for name in config.rules}


def start(name: str, config: Compare, epochs: int, dataset: data.Dataset, order: jax.Array, key: jax.Array) -> Trial:
    """A rule's trial, compiled. With the same ``key`` every rule starts from the same weights."""
    model = MLP(config.hidden, dataset.num_classes)
    mean, std = float(dataset.train["image"].mean()), float(dataset.train["image"].std())

    def forward(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, (images.astype(jnp.float32) - mean) / std)
        return logits

    def loss_fn(params: Any, model_state: Any, batch: data.Examples, key: jax.Array) -> Any:
        logits = forward(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), (model_state, {})

    rule = make_rule(name, target_angle=config.mirror_angle)
    params_key, state_key = jax.random.split(key)
    params = model.init(params_key, dataset.train["image"][:1])["params"]
    rate = schedule(config, epochs * len(order))
    optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, config.momentum))
    mirrors = rule.mirror is not None and rule.mirror.each_step
    with refusals(f"--rules {name} cannot train this network"):
        steps = wmkp.make_steps(loss_fn, rule, optimizer, params, first(config.batch_size, dataset.train))
        # A mirrored start is exact after one mirror step, which is what init takes by itself.
        state = steps.init(state_key, params, mirror_steps=config.mirror_steps if mirrors else None)

    def run_epoch(state: wmkp.TrainState, train: data.Examples, order: jax.Array) -> tuple[wmkp.TrainState, jax.Array]:
        def step(state: wmkp.TrainState, index: jax.Array) -> tuple[wmkp.TrainState, jax.Array]:
            state, metrics = steps.engaged_step(state, jax.tree.map(lambda x: x[index], train))
            if mirrors:
                due = state.step % config.mirror_every == 0
                state = jax.lax.cond(due, lambda s: steps.mirror_step(s)[0], lambda s: s, state)
            return state, metrics["loss"]

        state, losses = jax.lax.scan(step, state, order)
        return state, losses.mean()

    def measure(state: wmkp.TrainState, train: data.Examples, test: data.Examples) -> Any:
        wrong = forward(state.params, test["image"]).argmax(-1) != test["label"]
        matrix: dict[str, jax.Array] = {}
        delta: dict[str, jax.Array] = {}
        if rule.backward is not None:
            matrix = wmkp.matrix_angles(state.params, state.feedback, rule)
            delta = wmkp.delta_angles(
                loss_fn, rule, state.params, state.feedback, None, first(PROBE, train), state.key, has_aux=True
            )
            del delta["output/kernel"]  # at the output delta is the loss's own, whatever the rule
        return 100 * wrong.mean(), matrix, delta

    return Trial(
        state,
        jax.jit(run_epoch, donate_argnums=0).lower(state, dataset.train, order).compile(),
        jax.jit(measure).lower(state, dataset.train, dataset.test).compile(),
    )


def schedule(config: Compare, steps: int) -> optax.Schedule:
    """The learning rate at each step: down to a tenth along half a cosine."""
    return optax.cosine_decay_schedule(config.learning_rate, steps, alpha=0.1)


def layers(widths: Sequence[int]) -> str:
    """The widths of layers, "128x8-64" for eight of 128 and one of 64."""
    runs = [(width, len(list(run))) for width, run in itertools.groupby(widths)]
    return "-".join(f"{width}x{count}" if count > 1 else f"{width}" for width, count in runs)


def first(count: int, examples: data.Examples) -> data.Examples:
    return jax.tree.map(lambda x: x[:count], examples)


def mean_and_worst(angles: Sequence[float]) -> tuple[float, float]:
    return (float(np.mean(angles)), float(np.max(angles))) if angles else (math.nan, math.nan)


def to_csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        writer.writerow([row.rule, row.epoch, *("" if math.isnan(x) else f"{x:.6g}" for x in row[2:])])
    return text.getvalue().encode()


class Line(NamedTuple):
    """A rule in the table."""

    rule: str
    transports: str
    second_mode: str
    test_error: str
    matrix_angle: str
    delta_angle: str
    time: str
    memory: str


HEADINGS = Line(
    "rule",
    "transports",
    "second mode",
    "test error %",
    "matrix angle, mean, worst",
    "delta angle, mean, worst",
    "time, a step",
    "extra memory",
)
NARROW = ("rule", "test_error", "matrix_angle", "delta_angle", "time")  # what 80 columns have room for
CAPTION = (
    "Test error: mean and std over the last epochs of one run; another seed's may come in another order. Angles: degrees, over the "
    "layers, after the last. Time: over BP's. "
    "Extra memory: of B and its optimizer state, over that of the weights and theirs."
)


def summary(config: Compare, rows: list[Row], costs: dict[str, Cost]) -> list[Line]:
    """A line a rule: test error over the last epochs, angles after the last one, time and memory relative to BP's."""
    lines = []
    for name, cost in costs.items():
        mine, rule = [row for row in rows if row.rule == name], make_rule(name, target_angle=config.mirror_angle)
        last = mine[-1]
        errors = [row.test_error_percent for row in mine[-min(LAST_EPOCHS, math.ceil(last.epoch / 2)) :]]
        ratio = "-"
        if "bp" in costs:
            pairs = zip(cost.seconds, costs["bp"].seconds, strict=True)
            ratio = f"{statistics.median(t / bp for t, bp in pairs):.2f}"
        mode = "-" if rule.mirror is None else "yes" if rule.mirror.each_step else "once"
        lines.append(
            Line(
                f"{name.upper()}  {RULES[name]}",
                rule.transports,
                mode,
                f"{statistics.fmean(errors):.2f} ± {statistics.pstdev(errors):.2f}",
                degrees(last.matrix_angle_mean_deg, last.matrix_angle_worst_deg),
                degrees(last.delta_angle_mean_deg, last.delta_angle_worst_deg),
                ratio,
                f"{cost.memory:.2f}",
            )
        )
    return lines


def to_table(lines: list[Line], title: str, columns: Sequence[str]) -> Table:
    """The summary for a terminal: those of Line's fields that ``columns`` names."""
    table = Table(title=title, title_style="bold", caption=CAPTION, box=box.SIMPLE_HEAD)
    for name in columns:
        text = name in ("rule", "transports", "second_mode")
        table.add_column(
            getattr(HEADINGS, name).replace(", ", "\n", 1), justify="left" if text else "right", no_wrap=not text
        )
    for line in lines:
        table.add_row(*(getattr(line, name) for name in columns))
    return table


def to_markdown(lines: list[Line]) -> bytes:
    """The summary for a page."""
    bar = ["---"] * 3 + ["---:"] * (len(HEADINGS) - 3)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in (HEADINGS, bar, *lines))
    return f"{text}\n\n{CAPTION}\n".encode()


def degrees(mean: float, worst: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:.1f}, {worst:.1f}"
