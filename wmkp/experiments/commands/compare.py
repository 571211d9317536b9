"""wmkp compare: the rules side by side. All rules of a seed share initial weights and the order of the data."""

import csv
import dataclasses
import io
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import wmkp
from wmkp.experiments.config import LAG, MIRROR_EVERY, RULES, Compare, InputError, refusals
from wmkp.experiments.data import datasets as data
from wmkp.experiments.models import tasks
from wmkp.experiments.models.convnet import ConvNet
from wmkp.experiments.models.mlp import MLP
from wmkp.experiments.runs import figures, outputs
from wmkp.program import compat

LAST_EPOCHS = 5  # the table's test error is a mean over these (half of a shorter run)
PROBE = 64  # training examples for delta angles and norms
READOUT = "output/kernel"  # here delta comes from the loss itself, under any rule
# Each network's defaults: the learning rate, and the least number of steps.
RATES = {"conv": 0.05, "mlp": 0.02}
STEPS = {"conv": 444, "mlp": 6000}


class Row(NamedTuple):
    """One rule and seed after one epoch: a line of comparison.csv. NaN marks a measure that a rule does not have.

    ``layers`` holds the norms of ``wmkp.delta_norms``, one column for each layer.
    """

    rule: str
    seed: int
    epoch: int
    train_loss: float
    test_error_percent: float
    matrix_angle_mean_deg: float = math.nan
    matrix_angle_worst_deg: float = math.nan
    delta_angle_mean_deg: float = math.nan
    delta_angle_worst_deg: float = math.nan
    delta_norm_ratio_least: float = math.nan
    delta_norm_ratio_most: float = math.nan
    rounding_layers: float = math.nan
    mirror_lag_mean_deg: float = math.nan
    layers: dict[str, float] = {}  # noqa: RUF012


class Trial(NamedTuple):
    """A rule, ready to train from any seed.

    Attributes:
      init: ``key -> TrainState``.
      run_epoch: ``(state, train, order) -> (state, mean loss, mean lag)``; donates the state. The lag is the worst
        layer's, in degrees.
      measure: ``(state, train, test) -> (test error, matrix angles, delta norms)``, compiled; percent and degrees.
    """

    init: Callable[[jax.Array], wmkp.TrainState]
    run_epoch: Callable[..., tuple[wmkp.TrainState, jax.Array, jax.Array]]
    measure: Callable[..., tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]]


def compare(config: Compare) -> None:
    """Runs ``wmkp compare``: trains, prints the table, writes comparison.png and comparison.csv.

    Raises:
      InputError: the command cannot run this config. Nothing has been trained or written then.
    """
    if config.rules == ("all",):
        config = dataclasses.replace(config, rules=tuple(RULES))
    config.check()
    if config.dataset == "characters":
        raise InputError("wmkp compare needs images; for --dataset characters use wmkp train decoder-characters-kp")
    dataset = data.load(config.dataset, config.data_dir)
    examples = len(dataset.train["label"])
    if config.batch_size > examples:
        raise InputError(f"--batch-size must be at most the {examples} training examples; got {config.batch_size}")
    outputs.make_directory(config.out)
    steps = examples // config.batch_size
    epochs = config.epochs or max(10, math.ceil(STEPS[config.model] / steps))
    _warn_of_short_runs(config, epochs * steps)

    rows, memory = train(config, dataset, epochs)
    network = f"layers {dataset.train['image'][0].size}-{layers(config.hidden)}-{dataset.num_classes}"
    if config.model == "conv":
        network = "five 3x3 convolutions"
    title = f"{config.dataset}, {network}, {epochs} epochs, {config.seeds} seed{'s' * (config.seeds > 1)}"
    _warn_of_lag(rows)
    lines = summary(config, rows, memory)
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
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)


def _warn_of_short_runs(config: Compare, steps: int) -> None:
    """Eq. 14: W - B^T shrinks by exp(-shrinkage) over the run."""
    rates = jax.vmap(schedule(config, steps))(jnp.arange(steps))
    shrinkage = float(rates.sum()) * config.weight_decay / (1 - config.momentum)
    if "kp" in config.rules and shrinkage < 3:
        print(
            f"wmkp: warning: this run is too short for Kolen-Pollack to align: W - B^T shrinks only by exp(-{shrinkage:.2g}), "
            "where the exponent is steps x learning rate x weight decay / (1 - momentum). Train longer, or use --rules kpm mkp",
            file=sys.stderr,
        )


def _warn_of_lag(rows: list[Row]) -> None:
    """Warns of rules whose B lagged far behind W when it was mirrored, as a mean over an epoch."""
    for rule in dict.fromkeys(row.rule for row in rows):
        lags = [row.mirror_lag_mean_deg for row in rows if row.rule == rule]
        if (worst := max((lag for lag in lags if not math.isnan(lag)), default=0.0)) > LAG:
            print(
                f"wmkp: warning: under {rule} B lagged {worst:.1f} degrees behind W when it was mirrored, in its worst layer and "
                "epoch. Mirror at every step (--mirror-every 1), or use mkp, which does not lag",
                file=sys.stderr,
            )


def train(config: Compare, dataset: data.Dataset, epochs: int) -> tuple[list[Row], dict[str, float]]:
    """Trains every rule from every seed. On CPUs two rules train at a time, because the convolutions are small.

    Returns:
      The rows, rule by rule and seed by seed, and by rule the bytes of B and its optimizer's state over those of the
      parameters and theirs.
    """
    dataset = dataset._replace(train=jax.device_put(dataset.train), test=jax.device_put(dataset.test))
    seeds = range(config.seed, config.seed + config.seeds)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True, force_jupyter=False)) as progress:
        total = config.seeds * epochs
        bars = {name: progress.add_task(RULES[name], total=total, note="") for name in config.rules}
        # Errors of any rule come before the first one trains.
        trials = {name: start(name, config, epochs, dataset) for name in config.rules}

        def one(name: str) -> tuple[list[Row], float]:
            progress.update(bars[name], note="compiling")
            rows: list[Row] = []
            ratio = 0.0
            for seed in seeds:
                order_key, trial_key = jax.random.split(jax.random.key(seed))
                state = trials[name].init(trial_key)
                extra, own = ((state.feedback, state.feedback_opt_state), (state.params, state.opt_state))
                ratio = sum(x.nbytes for x in jax.tree.leaves(extra)) / sum(x.nbytes for x in jax.tree.leaves(own))
                for row in _run(name, seed, trials[name], state, order_key, config.batch_size, dataset, epochs):
                    rows.append(row)
                    note = f"seed {seed}: test error {row.test_error_percent:.1f}%"
                    progress.update(bars[name], advance=int(row.epoch > 0), note=note)
            return rows, ratio

        at_a_time = min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
        with ThreadPoolExecutor(at_a_time) as pool:
            mirroring_first = sorted(config.rules, key=lambda name: name not in MIRROR_EVERY)  # these take longest
            begun = {name: pool.submit(one, name) for name in mirroring_first}
            found = {name: begun[name].result() for name in config.rules}
    rows = [row for mine, _ in found.values() for row in mine]
    return rows, {name: ratio for name, (_, ratio) in found.items()}


def _run(
    name: str,
    seed: int,
    trial: Trial,
    state: wmkp.TrainState,
    order_key: jax.Array,
    batch_size: int,
    dataset: data.Dataset,
    epochs: int,
) -> Iterator[Row]:
    """A row before training, and one after each epoch."""
    examples = len(dataset.train["label"])
    steps = examples // batch_size
    for epoch in range(epochs + 1):
        loss = lag = math.nan
        if epoch:
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), examples)
            order = order[: steps * batch_size].reshape(steps, batch_size)
            state, mean_loss, mean_lag = trial.run_epoch(state, dataset.train, order)
            loss, lag = float(mean_loss), float(mean_lag)
        error, matrix, delta = jax.device_get(trial.measure(state, dataset.train, dataset.test))
        deep = [norms for path, norms in delta.items() if path != READOUT]
        ratios = [float(norms.ratio) for norms in deep]
        matrix_mean, matrix_worst = mean_and_worst(list(matrix.values()))
        delta_mean, delta_worst = mean_and_worst([norms.angle for norms in deep])
        layered = {f"delta_norm_ratio/{path}": float(norms.ratio) for path, norms in delta.items()}
        layered |= {f"delta_reference/{path}": float(norms.reference) for path, norms in delta.items()}
        yield Row(
            name,
            seed,
            epoch,
            loss,
            float(error),
            matrix_mean,
            matrix_worst,
            delta_mean,
            delta_worst,
            min(ratios, default=math.nan),
            max(ratios, default=math.nan),
            float(sum(norms.is_rounding for norms in delta.values())) if delta else math.nan,
            lag,
            layered,
        )


def start(name: str, config: Compare, epochs: int, dataset: data.Dataset) -> Trial:
    """A rule's trial. From the same key every rule starts from the same weights."""
    model: nn.Module = ConvNet(dataset.num_classes)
    if config.model == "mlp":
        model = MLP(config.hidden, dataset.num_classes)
    network = (model, float(dataset.train["image"].mean()), float(dataset.train["image"].std()))
    _, loss_fn = _functions(*network)
    initial = partial(_initial(model), image=dataset.train["image"][:1])
    rule = make_rule(name, config)
    rate = schedule(config, epochs * (len(dataset.train["label"]) // config.batch_size))
    learns = tasks.is_readout if name == "frozen" else None
    optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay, learns), optax.sgd(rate, config.momentum))
    mirrors = rule.mirror is not None and rule.mirror.each_step
    every = config.mirror_every or MIRROR_EVERY.get(name, 1)
    trained = tasks.frozen(loss_fn) if name == "frozen" else loss_fn
    with refusals(f"--rules {name} cannot train this network"):
        steps = wmkp.make_steps(
            trained,
            rule,
            optimizer,
            jax.eval_shape(model.init, jax.random.key(0), dataset.train["image"][:1])["params"],
            first(config.batch_size, dataset.train),
        )

    mirror_steps = config.mirror_steps if mirrors else None
    first_state = jax.jit(partial(steps.init, mirror_steps=mirror_steps), compiler_options=_quick())

    def init(key: jax.Array) -> wmkp.TrainState:
        params_key, state_key = jax.random.split(key)
        with refusals(f"--rules {name} cannot train this network"):
            return first_state(state_key, initial(params_key))

    # On CPUs XLA's convolutions are slow inside its loops.
    slow = config.model == "conv" and jax.default_backend() == "cpu"
    run_epoch = _looped(steps, mirrors, every) if slow else _scanned(steps, mirrors, every)
    # Rules that carry the error alike (FA, KP and weight mirrors through B) share one program.
    alike = rule._replace(name="alike", init=rule.init and _none, signal=None, optimizer=None, mirror=None)
    measured = _measurement(alike, *network)
    return Trial(init, run_epoch, lambda state, *examples: measured(state.params, state.feedback, state.key, *examples))


def _engaged(steps: wmkp.Steps, state: wmkp.TrainState, train: data.Examples, index: jax.Array) -> Any:
    """The state and the loss after a step on some of the examples."""
    state, metrics = steps.engaged_step(state, jax.tree.map(lambda x: x[index], train))
    return state, metrics["loss"]


def _mirrored(steps: wmkp.Steps, state: wmkp.TrainState) -> tuple[wmkp.TrainState, jax.Array]:
    """The state after a mirror step, and the worst layer's lag."""
    state, metrics = steps.mirror_step(state)
    return state, jnp.max(jnp.stack([jnp.zeros(()), *metrics.get("lag", {}).values()]))


def _scanned(steps: wmkp.Steps, mirrors: bool, every: int) -> Callable[..., Any]:
    """``Trial.run_epoch`` as one program."""
    unknown = jnp.full((), jnp.nan)

    def step(state: wmkp.TrainState, train: data.Examples, index: jax.Array) -> Any:
        state, loss = _engaged(steps, state, train, index)
        if not mirrors:
            return state, (loss, unknown)
        due = state.step % every == 0
        state, lag = jax.lax.cond(due, partial(_mirrored, steps), lambda s: (s, unknown), state)
        return state, (loss, lag)

    def run_epoch(state: wmkp.TrainState, train: data.Examples, order: jax.Array) -> Any:
        state, (losses, lags) = jax.lax.scan(lambda s, index: step(s, train, index), state, order)
        return state, losses.mean(), jnp.nanmean(lags)

    return jax.jit(run_epoch, donate_argnums=0)


def _looped(steps: wmkp.Steps, mirrors: bool, every: int) -> Callable[..., Any]:
    """``Trial.run_epoch`` as a program for each step."""
    compiled = partial(jax.jit, donate_argnums=0, compiler_options=compat.compiled_sooner())
    engaged, mirrored = (compiled(partial(f, steps)) for f in (_engaged, _mirrored))

    def run_epoch(state: wmkp.TrainState, train: data.Examples, order: jax.Array) -> Any:
        losses, lags, taken = [], [jnp.full((), jnp.nan)], int(state.step)
        for index in np.asarray(order):
            state, loss = engaged(state, train, index)
            losses.append(loss)
            taken += 1
            if mirrors and taken % every == 0:
                state, lag = mirrored(state)
                lags.append(lag)
        return state, jnp.stack(losses).mean(), jnp.nanmean(jnp.stack(lags))

    return run_epoch


def _quick() -> dict[str, Any]:
    """Compiler options for programs that run rarely: without optimization they compile in a fraction of the time."""
    return {"xla_backend_optimization_level": 0, **compat.compiled_sooner()}


@cache
def _initial(model: nn.Module) -> Callable[..., Any]:
    """``(key, image) -> params``, one program for all rules."""
    return jax.jit(lambda key, image: model.init(key, image)["params"], compiler_options=_quick())


def _none(*_: Any) -> None:
    """For ``Rule.init`` where B is there already."""


@cache
def _functions(model: nn.Module, mean: float, std: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``(params, images) -> logits``, and the loss as ``wmkp.make_steps`` takes it."""

    def forward(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, (images.astype(jnp.float32) - mean) / std)
        return logits

    def loss_fn(params: Any, model_state: Any, batch: data.Examples, key: jax.Array) -> Any:
        logits = forward(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), (model_state, {})

    return forward, loss_fn


@cache
def _measurement(rule: wmkp.Rule, *network: Any) -> Callable[..., Any]:
    """``(params, feedback, key, train, test) -> (test error, matrix angles, delta norms)``, compiled."""
    (forward, loss_fn), compiling = _functions(*network), threading.Lock()

    def measure(params: Any, feedback: Any, key: jax.Array, train: data.Examples, test: data.Examples) -> Any:
        wrong = forward(params, test["image"]).argmax(-1) != test["label"]
        if rule.backward is None:
            return 100 * wrong.mean(), {}, {}
        args = (params, feedback, None, first(PROBE, train), key)
        delta = wmkp.delta_norms(loss_fn, rule, *args, has_aux=True)
        return 100 * wrong.mean(), wmkp.matrix_angles(params, feedback, rule), delta

    program = jax.jit(measure, compiler_options=_quick())

    def one_at_a_time(*args: Any) -> Any:
        with compiling:  # of two rules that train side by side, one compiles
            return program(*args)

    return one_at_a_time


def make_rule(name: str, config: Compare) -> wmkp.Rule:
    """A row's rule."""
    return tasks.make_rule(name, target_angle=config.mirror_angle)


def schedule(config: Compare, steps: int) -> optax.Schedule:
    """The learning rate at each step: down to a tenth along half a cosine."""
    return optax.cosine_decay_schedule(config.learning_rate or RATES[config.model], steps, alpha=0.1)


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
    layered = list(dict.fromkeys(name for row in rows for name in row.layers))
    writer.writerow([*Row._fields[:-1], *layered])
    for row in rows:
        numbers = [*row[3:-1], *(row.layers.get(name, math.nan) for name in layered)]
        writer.writerow([*row[:3], *("" if math.isnan(x) else f"{x:.6g}" for x in numbers)])
    return text.getvalue().encode()


class Line(NamedTuple):
    """A rule in the table."""

    rule: str
    transports: str
    second_mode: str
    test_error: str
    above: str
    matrix_angle: str
    delta_angle: str
    ratio: str
    memory: str


HEADINGS = Line(
    "rule",
    "transports",
    "second mode",
    "test error %",
    "above BP, in standard errors",
    "matrix angle, mean / max",
    "delta angle, mean / max",
    "|δ| over BP's, min / max",
    "extra memory",
)
NARROW = ("rule", "test_error", "matrix_angle", "delta_angle")  # what 80 columns have room for
CAPTION = (
    "Test error: over the last epochs, mean ± standard error over seeds. Above BP: the difference from BP's mean, over "
    "its standard error. Angles (degrees) and |δ| (norm of the error that a rule carries): over the layers, "
    "mean over seeds, at the end. Extra memory: of B and its optimizer state, over that of the weights and theirs."
)


def last_errors(rows: Sequence[Row], rule: str) -> np.ndarray:
    """A rule's test error in percent, a mean over the last epochs, of each seed."""
    found = []
    for seed in dict.fromkeys(row.seed for row in rows):
        mine = [row for row in rows if row.rule == rule and row.seed == seed]
        taken = mine[-max(1, min(LAST_EPOCHS, math.ceil(mine[-1].epoch / 2))) :]
        found.append(float(np.mean([row.test_error_percent for row in taken])))
    return np.array(found)


def standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN of a single value."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def above_backprop(rows: Sequence[Row], rule: str) -> float:
    """How far a rule's mean test error is above backprop's, in standard errors of the difference (Welch's)."""
    ours, theirs = last_errors(rows, rule), last_errors(rows, "bp")
    error = math.hypot(standard_error(ours), standard_error(theirs))
    return float(ours.mean() - theirs.mean()) / error if error > 0 else math.nan


def summary(config: Compare, rows: list[Row], memory: dict[str, float]) -> list[Line]:
    """A line for each rule, over seeds: test error over the last epochs, angles and norms after the last one."""
    lines = []
    for name, extra in memory.items():
        mine, rule = [row for row in rows if row.rule == name], make_rule(name, config)
        ends = [row for row in mine if row.epoch == mine[-1].epoch]
        errors = last_errors(rows, name)
        spread = standard_error(errors)
        above = above_backprop(rows, name) if "bp" in memory and name != "bp" else math.nan
        mode = "-" if rule.mirror is None else "yes" if rule.mirror.each_step else "once"
        mean = lambda field, ends=ends: float(np.mean([getattr(row, field) for row in ends]))
        lines.append(
            Line(
                f"{name.upper()}  {RULES[name]}",
                rule.transports if name != "frozen" else "nothing",
                mode,
                f"{errors.mean():.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}"),
                "-" if math.isnan(above) else f"{above:+.1f}",
                pair(mean("matrix_angle_mean_deg"), mean("matrix_angle_worst_deg")),
                pair(mean("delta_angle_mean_deg"), mean("delta_angle_worst_deg")),
                pair(mean("delta_norm_ratio_least"), mean("delta_norm_ratio_most"), "{:.2g}"),
                f"{extra:.2f}",
            )
        )
    return lines


def to_table(lines: list[Line], title: str, columns: Sequence[str]) -> Table:
    """The summary for a terminal, with the fields of Line in ``columns``."""
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
    headings = [heading.replace("|", "\\|") for heading in HEADINGS]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, bar, *lines))
    return f"{text}\n\n{CAPTION}\n".encode()


def pair(one: float, other: float, form: str = "{:.1f}") -> str:
    return "-" if math.isnan(one) else f"{form.format(one)} / {form.format(other)}"
