"""wmkp train: one run, from its config to its last checkpoint. wmkp eval: what a run's checkpoint does on the test set."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import typeguard
from flax import serialization
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import wmkp
from wmkp import checks
from wmkp.experiments.commands import tasks
from wmkp.experiments.config import MACHINES, RULES, InputError, Train, first_line, flag, refusals
from wmkp.experiments.data import feeds
from wmkp.experiments.runs import checkpoints, devices, logs, outputs
from wmkp.program.projections import named_leaves
from wmkp.training import state_sharding

# What may change when a run is resumed: none of it changes what is learned.
FREE = frozenset("out resume data_dir max_bad on_nan log_every eval_every save_every keep tensorboard".split()) | {
    *MACHINES
}
SHOWN = 6  # parameters that an error names


class Tally(NamedTuple):
    """What is summed on the devices from one line of train.csv to the next.

    Attributes:
      loss, error: sums over steps; count: how many, float32.
      skipped: steps of the whole run that were left out because they were not finite, int32.
      halted: whether training stands still because a step was not finite.
      finite: of that step (or the last one left out), what was: as ``wmkp.make_steps`` has it.
    """

    loss: Any
    error: Any
    count: Any
    skipped: Any
    halted: Any
    finite: Any


class Run(NamedTuple):
    """All that a config makes, ready to train.

    Attributes:
      rule: the learning rule.
      steps: from ``wmkp.make_steps``.
      init: ``() -> TrainState``, at the beginning.
      advance: ``(state, tally, batch) -> (state, tally)``, an engaged step, jitted; both are donated.
      measure: ``(state, batch) -> {name: number}``: angles in degrees, and |B| over |W|, of each projection.
      evaluate: ``state -> (loss, error in percent)`` on the test set.
      tally: an empty one.
      total: engaged steps in the run.
      schedule: the learning rate at each update.
      mesh: the devices.
      feed: the dataset.
    """

    rule: wmkp.Rule
    steps: wmkp.Steps
    init: Callable[[], wmkp.TrainState]
    advance: Callable[[wmkp.TrainState, Tally, Any], tuple[wmkp.TrainState, Tally]]
    measure: Callable[[wmkp.TrainState, Any], dict[str, jax.Array]]
    evaluate: Callable[[wmkp.TrainState], tuple[float, float]]
    tally: Tally
    total: int
    schedule: Callable[[Any], Any]
    mesh: Mesh
    feed: feeds.Feed


def build(config: Train) -> Run:
    """Everything that a run is made of, nothing of it trained yet.

    Raises:
      InputError: the config, its dataset or its devices do not go together.
    """
    config.check()
    mesh = devices.make_mesh(config.batch_size)
    feed = feeds.open_feed(config, mesh)
    task = tasks.make_task(config, feed.shape, feed.num_classes, feed.mean, feed.std)
    mirror: dict[str, Any] = {"target_angle": config.mirror_angle, "rate": config.mirror_rate}
    if config.mirror_samples is not None:
        mirror["num_samples"] = config.mirror_samples
    rule = tasks.make_rule(config.rule, **mirror)
    total = config.steps or max(1, round(config.epochs * feed.epoch_steps))
    if total < config.accumulate:
        raise InputError(f"--accumulate {config.accumulate} is more than the run's {total} steps: W would never change")
    updates = total // config.accumulate
    schedule = tasks.make_schedule(config, max(1, feed.epoch_steps // config.accumulate), updates)

    params_key, state_key = jax.random.split(jax.random.key(config.seed))
    params, model_state = task.init(params_key, feed.probe)
    with refusals(f"--rule {config.rule} cannot train --model {config.model}"):
        steps = wmkp.make_steps(
            task.loss_fn,
            rule,
            tasks.make_optimizer(config, schedule),
            params,
            feed.probe,
            model_state=model_state,
            mesh=mesh,
            fsdp=config.fsdp,
            clip_norm=config.clip_norm,
            check_finite=True,
        )
    mirrors = rule.mirror is not None and rule.mirror.each_step
    init = partial(steps.init, state_key, params, model_state, config.mirror_steps if mirrors else None)
    names = ["loss", *named_leaves(params)]
    zero, none = np.float32(0), np.int32(0)
    tally = Tally(zero, zero, zero, none, np.bool_(False), {name: np.bool_(True) for name in names})

    def advance(state: wmkp.TrainState, tally: Tally, batch: Any) -> tuple[wmkp.TrainState, Tally]:
        after, metrics = steps.engaged_step(state, batch)
        finite: Any = metrics["finite"]
        good = jnp.stack(list(finite.values())).all()
        taken = good & ~tally.halted
        kept = jax.tree.map(partial(jnp.where, taken), after, state)
        if config.on_nan == "skip":  # the next step is another, with other random numbers
            kept = kept._replace(step=after.step, key=after.key)
        failed = ~good & ~tally.halted
        tally = Tally(
            loss=tally.loss + jnp.where(taken, metrics["loss"], 0),
            error=tally.error + jnp.where(taken, metrics["error"], 0),
            count=tally.count + taken,
            skipped=tally.skipped + failed,
            halted=tally.halted | (failed & (config.on_nan == "stop")),
            finite=jax.tree.map(partial(jnp.where, failed), finite, tally.finite),
        )
        return kept, tally

    @jax.jit
    def measure(state: wmkp.TrainState, batch: Any) -> dict[str, jax.Array]:
        if rule.backward is None:
            return {}
        matrix = wmkp.matrix_angles(state.params, state.feedback, rule)
        delta = wmkp.delta_angles(
            task.loss_fn,
            rule,
            state.params,
            state.feedback,
            state.model_state,
            batch,
            jax.random.key(0),
            has_aux=True,
        )
        found = {f"matrix_angle_deg/{path}": x for path, x in matrix.items()}
        found |= {f"delta_angle_deg/{path}": x for path, x in delta.items()}
        weights = named_leaves(state.params)
        for path, b in jax.tree_util.tree_leaves_with_path(state.feedback):
            name = checks.path_name(path)
            if name in matrix:
                found[f"norm_ratio/{name}"] = jnp.linalg.norm(b) / jnp.linalg.norm(weights[name])
        return found

    @partial(jax.jit, donate_argnums=0)
    def add_score(sums: Any, params: Any, model_state: Any, batch: Any) -> Any:
        return jax.tree.map(jnp.add, sums, task.score(params, model_state, batch))

    def evaluate(state: wmkp.TrainState) -> tuple[float, float]:
        sums = devices.put_everywhere((np.float32(0), np.int32(0), np.int32(0)), mesh)
        for batch in feed.tests():
            sums = add_score(sums, state.params, state.model_state, batch)
        loss, wrong, count = jax.device_get(sums)
        return float(loss / count), float(100 * wrong / count)

    return Run(
        rule,
        steps,
        init,
        jax.jit(advance, donate_argnums=(0, 1)),
        measure,
        evaluate,
        tally,
        total,
        schedule,
        mesh,
        feed,
    )


def train(config: Train) -> bool:
    """Runs a config, or goes on with it, and prints a line an evaluation.

    Returns:
      Whether it came to its end; False if SIGTERM or Ctrl-C stopped it.

    Raises:
      InputError: what is asked for cannot be done, a step was not finite, or another process was lost.
    """
    config.check()
    devices.start(config)
    with contextlib.ExitStack() as stack:
        if devices.is_first():
            stack.enter_context(claim(config))
        try:
            return _train(config, stack)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            print(f"wmkp: another process of the run was lost ({first_line(error)})", file=sys.stderr)
            # The others cannot be waited for: leaving by the usual way would.
            sys.stdout.flush()
            os._exit(1)


def _train(config: Train, stack: contextlib.ExitStack) -> bool:
    run = build(config)
    if devices.is_first():
        written = json.dumps(_to_json(config), indent=2) + "\n"
        outputs.write_atomically({config.out / "config.json": written.encode()})
    _warn(config, run)
    console = Console(soft_wrap=True, quiet=not devices.is_first())
    manager = checkpoints.open_manager(config.out / "checkpoints", config.keep)
    stack.callback(manager.close)
    tally, step = run.tally, 0
    if manager.latest_step() is not None:
        state, progress = checkpoints.restore(manager, like(config, run))
        sums = {name: np.float32(progress[name]) for name in ("loss", "error", "count")}
        tally = tally._replace(**sums, skipped=np.int32(progress["skipped"]))
        step = progress["step"]
        console.print(f"Resumed at step {step} of {run.total}.")
    else:
        with refusals(f"--rule {config.rule} cannot train --model {config.model}"):
            state = run.init()
    tally = devices.put_everywhere(tally, run.mesh)

    writer = None
    if config.tensorboard and devices.is_first():
        writer = logs.tensorboard_writer(config.out / "tensorboard", step)
        stack.callback(writer.close)
    train_log, test_log = (_log(config.out, name, step, writer, stack) for name in ("train", "test"))
    stopping = stack.enter_context(_stop_signals())
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = stack.enter_context(
        Progress(*columns, console=Console(stderr=True, quiet=not devices.is_first()), transient=True)
    )
    shown = bar.add_task("", total=run.total, completed=step, rate="")
    epoch_steps = run.feed.epoch_steps
    eval_steps, save_steps = (max(1, round(x * epoch_steps)) for x in (config.eval_every, config.save_every))
    mirrors = run.rule.mirror is not None and run.rule.mirror.each_step
    mirror_steps = config.mirror_every * config.accumulate
    batches = run.feed.batches(step)
    stack.callback(getattr(batches, "close", lambda: None))

    def read() -> Tally:
        """The tally, once all steps so far are done."""
        host: Tally = jax.device_get(tally)
        if host.halted:
            kept = manager.latest_step()
            checkpoints.finish(manager)
            raise InputError(
                f"step {int(state.step) + 1} is not finite: {_not_finite(host.finite)}. "
                + (f"The checkpoint of step {kept} is kept. " if kept is not None else "")
                + "A lower --learning-rate or --clip-norm may help; --on-nan skip leaves such steps out"
            )
        return host

    def test() -> dict[str, float]:
        loss, error = run.evaluate(state)
        numbers = {name: float(x) for name, x in jax.device_get(run.measure(state, run.feed.probe)).items()}
        row: dict[str, float] = {
            "step": step,
            "epoch": step / epoch_steps,
            "test_loss": loss,
            "test_error_percent": error,
        }
        for kind in ("matrix", "delta"):
            # At the output delta is the loss's own, whatever the rule.
            own = "delta_angle_deg/output/kernel"
            angles = [x for name, x in numbers.items() if name.startswith(f"{kind}_angle_deg/") and name != own]
            row[f"{kind}_angle_mean_deg"] = float(np.mean(angles)) if angles else math.nan
            row[f"{kind}_angle_worst_deg"] = float(np.max(angles)) if angles else math.nan
        return row | numbers

    def save(host: Tally) -> None:
        progress: dict[str, Any] = {"step": step, "skipped": int(host.skipped)}
        progress |= {name: float(getattr(host, name)) for name in ("loss", "error", "count")}
        checkpoints.save(manager, state, progress)

    begin, first, start = time.perf_counter(), step, step
    while step < run.total:
        state, tally = run.advance(state, tally, next(batches))
        step += 1
        if mirrors and step % mirror_steps == 0:
            for _ in range(config.mirror_repeat):
                state, _ = run.steps.mirror_step(state)
        bar.update(shown, completed=step)
        done, stop = step == run.total, stopping(step)
        if step % config.log_every == 0 or done:
            host = read()
            now = time.perf_counter()  # (a mirror step may be at work yet: it counts from here)
            rate = (step - first) * config.batch_size / (now - begin)
            bar.update(shown, rate=f"{rate:,.0f} examples/s")
            update = (step - 1) // config.accumulate
            count = max(float(host.count), 1.0)
            row = {
                "step": step,
                "epoch": step / epoch_steps,
                "learning_rate": float(run.schedule(update)),
                "train_loss": float(host.loss) / count,
                "train_error_percent": float(host.error) / count,
                "skipped": int(host.skipped),
                "examples_per_second": rate,
            }
            if train_log is not None:
                train_log.write(row)
            zero = devices.put_everywhere((np.float32(0),) * 3, run.mesh)
            tally = tally._replace(loss=zero[0], error=zero[1], count=zero[2])
            begin, first = now, step
        if step % eval_steps == 0 or done:
            read()
            row = test()
            if test_log is not None:
                test_log.write(row)
            console.print(_line(row))
            begin, first = time.perf_counter(), step
        if step % save_steps == 0 or done or stop:
            save(read())
        if step == start + 1 and not done:  # what compiling took is no part of the rate
            jax.block_until_ready(state)
            begin, first = time.perf_counter(), step
        if stop and not done:
            checkpoints.finish(manager)
            console.print(f"Stopped at step {step} of {run.total} and saved; --resume goes on from there.")
            return False
    checkpoints.finish(manager)
    if int(jax.device_get(tally.skipped)):
        console.print(f"{int(jax.device_get(tally.skipped))} steps were not finite and left out.")
    console.print(f"Written: {config.out}")
    return True


def like(config: Train, run: Run) -> Any:
    """The shapes and places of a run's state, without making it."""
    shapes = jax.eval_shape(run.init)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, run.mesh, config.fsdp),
    )


def evaluate(
    directory: Path, step: int | None = None, data_dir: Path | None = None, export: Path | None = None
) -> None:
    """Prints what a run's checkpoint does on the test set, and its angles.

    Args:
      directory: the run's.
      step: of the checkpoint; the latest by default.
      data_dir: where TFDS has its datasets, if not where the run had them.
      export: a file for the parameters, and what the model keeps besides, in Flax's msgpack format.

    Raises:
      InputError: there is no such run or checkpoint, or ``export`` cannot be written.
    """
    config = read_config(directory)
    config = dataclasses.replace(
        config, distributed=False, coordinator=None, processes=None, process=None, data_dir=data_dir or config.data_dir
    )
    with contextlib.closing(
        checkpoints.open_manager(directory / "checkpoints", config.keep, read_only=True)
    ) as manager:
        step = checkpoints.choose(manager, step)
        if export is not None:
            outputs.check_file(export)
        run = build(config)
        state, progress = checkpoints.restore(manager, like(config, run), step)
    loss, error = run.evaluate(state)
    numbers = {name: float(x) for name, x in jax.device_get(run.measure(state, run.feed.probe)).items()}
    console = Console(soft_wrap=True)
    console.print(f"step {progress['step']}: test loss {loss:.4f}, test error {error:.2f} %")
    if numbers:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("projection", "matrix angle", "delta angle", "|B| / |W|"):
            table.add_column(heading, justify="left" if heading == "projection" else "right")
        for path in dict.fromkeys(name.split("/", 1)[1] for name in numbers):
            cells = [numbers.get(f"{kind}/{path}") for kind in ("matrix_angle_deg", "delta_angle_deg", "norm_ratio")]
            table.add_row(path, *("-" if x is None else f"{x:.2f}" for x in cells))
        console.print(table)
    if export is not None:
        variables = jax.device_get({"params": state.params, **state.model_state})
        outputs.write_atomically({export: serialization.msgpack_serialize(variables)})
        console.print(f"Written: {export}")


@contextlib.contextmanager
def claim(config: Train) -> Iterator[None]:
    """Makes the run's directory, this run's alone.

    Raises:
      InputError: another run is at work there, a finished one is and --resume was not given, or it was started with
        other settings.
    """
    with outputs.claim(config.out):
        path = config.out / "config.json"
        if path.exists():
            if not config.resume:
                raise InputError(f"{config.out} has a run in it; give --resume to go on with it, or another --out")
            before, now = _to_json(read_config(config.out)), _to_json(config)
            changed = [
                f"{flag(k)} was {before[k]} and is {now[k]}" for k in now if k not in FREE and before[k] != now[k]
            ]
            if changed:
                raise InputError(f"--resume: {config.out} was started with other settings: {'; '.join(changed)}")
        yield


def _to_json(config: Train) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {
        name: str(x) if isinstance(x, Path) else list(x) if isinstance(x, tuple) else x for name, x in values.items()
    }


def read_config(directory: Path) -> Train:
    """The config of a run. Raises InputError if it is not there or not one."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{directory} is not a run: cannot read {path.name} in it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from None
    try:
        unknown = set(values) - {field.name for field in dataclasses.fields(Train)}
        if unknown:
            raise InputError(f"{path} has settings that are not known here: {', '.join(sorted(unknown))}")
        for name in ("out", "data_dir"):
            values[name] = None if values[name] is None else Path(values[name])
        for name in ("hidden", "drop_epochs"):
            values[name] = tuple(values[name])
        for name, kind in get_type_hints(Train).items():
            typeguard.check_type(values[name], kind)
        config = Train(**values)
    except (TypeError, KeyError, typeguard.TypeCheckError) as error:
        raise InputError(f"{path} is damaged: {checks.first_line(error)}") from None
    try:
        config.check()
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    return config


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[int], bool]]:
    """A function that says, after a step, whether SIGTERM or Ctrl-C asked the run to save and end."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:  # a second one does not wait
            raise KeyboardInterrupt
        asked.append(number)

    if jax.process_count() > 1:  # JAX passes SIGTERM on to all processes, and finds a step that all can still stop at
        yield multihost_utils.reached_preemption_sync_point
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(out: Path, name: str, step: int, writer: Any, stack: contextlib.ExitStack) -> logs.Log | None:
    if not devices.is_first():
        return None
    log = logs.Log(out / f"{name}.csv", step, writer, name)
    stack.callback(log.close)
    return log


def _line(row: dict[str, float]) -> str:
    """An evaluation in a line."""
    text = f"epoch {row['epoch']:.4g}  step {row['step']}  test loss {row['test_loss']:.4f}"
    text += f"  test error {row['test_error_percent']:.2f} %"
    for kind in ("matrix", "delta"):
        if not math.isnan(row[f"{kind}_angle_mean_deg"]):
            text += f"  {kind} angle {row[f'{kind}_angle_mean_deg']:.2f} (worst {row[f'{kind}_angle_worst_deg']:.2f})"
    return text


def _not_finite(finite: dict[str, Any]) -> str:
    named = [name if name == "loss" else f"the gradient of {name}" for name, good in finite.items() if not good]
    named.sort(key=lambda name: name != "loss")
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return ", ".join(named[:SHOWN]) + more


def _warn(config: Train, run: Run) -> None:
    if config.rule == "kp":
        left = tasks.forgotten(config, run.schedule, max(1, run.total // config.accumulate))
        if left > 0.1 and devices.is_first():
            print(
                f"wmkp: warning: {RULES['kp']} cannot align in this run: {100 * left:.0f} % of the first W - B^T will be "
                "left at its end (eq. 14). Train longer, raise --weight-decay, or start from a mirror: --rule kpm",
                file=sys.stderr,
            )
