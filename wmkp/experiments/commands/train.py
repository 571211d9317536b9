"""wmkp train: one run, from its config to its last checkpoint."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wmkp.experiments import devices
from wmkp.experiments.config import LAG, RULES, InputError, Train, first_line, refusals
from wmkp.experiments.models import tasks
from wmkp.experiments.runs import checkpoints, logs, settings
from wmkp.experiments.runs.build import Run, Score, Tally, build, like

SHOWN = 6  # parameters named in an error, at most
RUNAWAY = 100.0  # warn if the loss is this many times its first value


def train(config: Train) -> bool:
    """Trains, or resumes, one config, and prints a line for each evaluation.

    Returns:
      Whether the run (with ``--seeds``, every run) is complete; False if SIGTERM or Ctrl-C stopped it.

    Raises:
      InputError: the config cannot be run, a step was not finite, or another process was lost.
    """
    config.check()
    if config.seeds > 1:
        return all(train(one) for one in each_seed(config))
    devices.start(config)
    with contextlib.ExitStack() as stack:
        if devices.is_first():
            stack.enter_context(settings.claim(config))
        try:
            return _train(config, stack)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            print(f"wmkp: another process of the run was lost ({first_line(error)})", file=sys.stderr)
            # A normal exit would wait for the other processes, which may never answer.
            sys.stdout.flush()
            os._exit(1)


def each_seed(config: Train) -> list[Train]:
    """The runs that ``--seeds`` asks for, each with its own directory."""
    seeds = range(config.seed, config.seed + config.seeds)
    return [dataclasses.replace(config, seed=seed, seeds=1, out=config.out / f"seed{seed}") for seed in seeds]


@dataclasses.dataclass
class _Session:
    """A run in progress.

    Attributes:
      manager: the manager of its checkpoints.
      logs: "train" and "test", in the process that writes them.
      state, tally, step: what changes from step to step.
      first_loss: the loss of its first step; NaN until it is known.
      ran_away: whether the command has warned of a diverging loss.
      lags: how far B was behind W at the last mirror step, by path.
      lagged: for how many lines in a row that was too far.
      verified: whether a checkpoint of this session was read back.
      begin, since: the time and step at which the throughput measurement began.
    """

    config: Train
    run: Run
    manager: Any
    console: Console
    state: Any
    tally: Tally
    step: int
    first_loss: float
    logs: dict[str, logs.Log]
    begin: float = 0.0
    since: int = 0
    ran_away: bool = False
    lags: dict[str, Any] = dataclasses.field(default_factory=dict)
    lagged: int = 0
    verified: bool = False

    def start_clock(self) -> None:
        self.begin, self.since = time.perf_counter(), self.step


def _train(config: Train, stack: contextlib.ExitStack) -> bool:
    run = build(config)
    if devices.is_first():
        settings.write(config)
    _warn_of_kp(config, run)
    session = _begin(config, run, stack)
    stopping = stack.enter_context(_stop_signals())
    bar, shown = _progress_bar(stack, run.total, session.step)
    batches = run.feed.batches(session.step)
    stack.callback(getattr(batches, "close", lambda: None))
    eval_steps, save_steps = (max(1, round(x * run.feed.epoch_steps)) for x in (config.eval_every, config.save_every))
    start, score = session.step, None
    session.start_clock()
    while session.step < run.total:
        _step(session, next(batches))
        bar.update(shown, completed=session.step)
        step, done, stop = session.step, session.step == run.total, stopping(session.step)
        if step == start + 1 and math.isnan(session.first_loss):
            _note_first_loss(session, _read(session))
        if step % config.log_every == 0 or done:
            bar.update(shown, rate=f"{_log(session):,.0f} examples/s")
        if step % eval_steps == 0 or done:
            score = _test(session)
        if step % save_steps == 0 or done or stop:
            _save(session, last=done or stop)
        if step == start + 1 and not done:  # the rate excludes compilation
            jax.block_until_ready(session.state)
            session.start_clock()
        if stop and not done:
            session.console.print(f"Stopped at step {step} of {run.total} and saved; continue with --resume.")
            return False
    skipped = int(jax.device_get(session.tally.skipped))
    if skipped:
        session.console.print(f"{skipped} steps were left out because a loss or gradient was not finite.")
    if score is not None and score.error >= score.chance:
        _warn(f"this run learned nothing: its test error is {score.shown()}")
    session.console.print(f"Written: {config.out}")
    return True


def _begin(config: Train, run: Run, stack: contextlib.ExitStack) -> _Session:
    """A run at its beginning, or at its last checkpoint."""
    console = Console(soft_wrap=True, quiet=not devices.is_first())
    manager = stack.enter_context(checkpoints.opened(config.out / "checkpoints", config.keep))
    tally, step, first_loss = run.tally, 0, math.nan
    if manager.latest_step() is not None:
        state, progress = checkpoints.restore(manager, like(config, run))
        step, first_loss = progress["step"], progress.get("first_loss", math.nan)
        if step > run.total:
            raise InputError(
                f"{config.out} is already at step {step}, and --epochs or --steps ask for {run.total} in all; ask for more"
            )
        sums = {name: np.float32(progress[name]) for name in ("loss", "error", "count")}
        tally = tally._replace(**sums, skipped=np.int32(progress["skipped"]))
        console.print(f"Resumed at step {step} of {run.total}.")
    else:
        if config.resume:
            console.print(f"{config.out} has no checkpoint: training starts from the beginning.")
        with refusals(f"--rule {config.rule} cannot train --model {config.model}"):
            state = run.init()
    written = {}
    if devices.is_first():
        board = logs.Board(config.out / "tensorboard", step) if config.tensorboard else None
        if board is not None:
            stack.callback(board.close)
        for name in ("train", "test"):
            written[name] = logs.Log(config.out / f"{name}.csv", step, board)
            stack.callback(written[name].close)
    tally = devices.put_everywhere(tally, run.mesh)
    return _Session(config, run, manager, console, state, tally, step, first_loss, written)


def _step(session: _Session, batch: Any) -> None:
    """An engaged step, and the mirror steps that are due after it."""
    config, run = session.config, session.run
    session.state, session.tally = run.advance(session.state, session.tally, batch)
    session.step += 1
    mirrors = run.rule.mirror is not None and run.rule.mirror.each_step
    if mirrors and session.step % (config.mirror_every * config.accumulate) == 0:
        for _ in range(config.mirror_repeat):
            session.state, mirrored = run.steps.mirror_step(session.state)
            session.lags = mirrored.get("lag", {})


def _read(session: _Session) -> Tally:
    """Waits for all steps so far and returns the tally. Raises InputError if a step was not finite and stopped the run."""
    host: Tally = jax.device_get(session.tally)
    if host.halted:
        kept = session.manager.latest_step()
        checkpoints.finish(session.manager)
        raise InputError(
            f"step {int(session.state.step) + 1} is not finite: {_not_finite(host.finite)}. "
            + (f"The checkpoint of step {kept} is kept. " if kept is not None else "")
            + "Try a lower --learning-rate or --clip-norm 1, or leave such steps out: --on-nan skip"
        )
    return host


def _note_first_loss(session: _Session, host: Tally) -> None:
    if math.isnan(session.first_loss) and host.count:
        session.first_loss = float(host.loss / host.count)


def _log(session: _Session) -> float:
    """Writes a line of train.csv, empties the tally, and returns the examples per second since the last line."""
    config, run, step = session.config, session.run, session.step
    host = _read(session)
    now = time.perf_counter()  # a mirror step may still run; it counts towards the next line
    rate = (step - session.since) * config.batch_size / (now - session.begin)
    count = max(float(host.count), 1.0)
    row = {
        "step": step,
        "epoch": step / run.feed.epoch_steps,
        "learning_rate": float(run.schedule((step - 1) // config.accumulate)),
        "train_loss": float(host.loss) / count,
        "train_error_percent": float(host.error) / count,
        "skipped": int(host.skipped),
        "examples_per_second": rate,
    }
    if "train" in session.logs:
        session.logs["train"].write(row)
    _note_first_loss(session, host)
    if not session.ran_away and row["train_loss"] > RUNAWAY * session.first_loss:
        session.ran_away = True
        _warn(
            f"the loss diverges: at step {step} the training loss is {row['train_loss']:.3g}; at first it was "
            f"{session.first_loss:.3g}. Try a lower --learning-rate or --clip-norm 1"
        )
    _warn_of_lag(session)
    zero = devices.put_everywhere((np.float32(0),) * 3, run.mesh)
    session.tally = session.tally._replace(loss=zero[0], error=zero[1], count=zero[2])
    session.begin, session.since = now, step
    return rate


def _warn_of_lag(session: _Session) -> None:
    """Warns once if B was far behind W at the last mirror steps."""
    lags = {path: float(lag) for path, lag in jax.device_get(session.lags).items()}
    path = max(lags, key=lambda p: lags[p], default="")
    if session.lagged < 2:  # noise alone rarely does this twice in a row
        session.lagged = session.lagged + 1 if lags and lags[path] > LAG else 0
        if session.lagged < 2:
            return
        _warn(
            f"B lags {lags[path]:.1f} degrees behind W at {path} when it is mirrored, beyond what noise explains. Such a lag "
            "can end learning. Mirror at every step (--mirror-every 1), or use --rule mkp, which does not lag"
        )


def _test(session: _Session) -> Score:
    """Evaluates: writes a line of test.csv, and prints one."""
    _read(session)
    run, state = session.run, session.state
    score = run.evaluate(state)
    numbers = {name: float(x) for name, x in jax.device_get(run.measure(state, run.feed.probe)).items()}
    row: dict[str, float] = {
        "step": session.step,
        "epoch": session.step / run.feed.epoch_steps,
        "test_loss": score.loss,
        "test_error_percent": score.error,
    }
    for kind in ("matrix", "delta"):
        # At the output delta comes from the loss itself, under any rule.
        own = "delta_angle_deg/output/kernel"
        angles = [x for name, x in numbers.items() if name.startswith(f"{kind}_angle_deg/") and name != own]
        row[f"{kind}_angle_mean_deg"] = float(np.mean(angles)) if angles else math.nan
        row[f"{kind}_angle_worst_deg"] = float(np.max(angles)) if angles else math.nan
    if "test" in session.logs:
        session.logs["test"].write(row | numbers)
    session.console.print(_line(row, score))
    session.start_clock()
    return score


def _save(session: _Session, last: bool) -> None:
    """Saves a checkpoint. It reads the first and the last one back, to notice a disk or path that loses them."""
    host = _read(session)
    progress: dict[str, Any] = {"step": session.step, "skipped": int(host.skipped), "first_loss": session.first_loss}
    progress |= {name: float(getattr(host, name)) for name in ("loss", "error", "count")}
    checkpoints.save(session.manager, session.state, progress)
    if last or not session.verified:
        checkpoints.verify(session.manager, session.state)
        session.verified = True


def _progress_bar(stack: contextlib.ExitStack, total: int, step: int) -> tuple[Progress, Any]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=not devices.is_first())
    bar = stack.enter_context(Progress(*columns, console=console, transient=True))
    return bar, bar.add_task("", total=total, completed=step, rate="")


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yields a function that says after each step whether SIGTERM or Ctrl-C asked the run to save and end."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:  # a second signal ends the run at once
            raise KeyboardInterrupt
        asked.append(number)

    if jax.process_count() > 1:  # JAX passes SIGTERM to all processes, and finds a step at which all can stop
        yield multihost_utils.reached_preemption_sync_point
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(row: dict[str, float], score: Score) -> str:
    """An evaluation in a line."""
    text = f"epoch {row['epoch']:.4g}  step {row['step']}  test loss {row['test_loss']:.4f}"
    text += f"  test error {score.shown()}"
    for kind in ("matrix", "delta"):
        if not math.isnan(row[f"{kind}_angle_mean_deg"]):
            text += f"  {kind} angle {row[f'{kind}_angle_mean_deg']:.2f} (worst {row[f'{kind}_angle_worst_deg']:.2f})"
    return text


def _not_finite(finite: dict[str, Any]) -> str:
    named = [name if name == "loss" else f"the gradient of {name}" for name, good in finite.items() if not good]
    named.sort(key=lambda name: name != "loss")
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return ", ".join(named[:SHOWN]) + more


def _warn_of_kp(config: Train, run: Run) -> None:
    if config.rule == "kp":
        left = tasks.forgotten(config, run.schedule, max(1, run.total // config.accumulate))
        if left > 0.1:
            _warn(
                f"{RULES['kp']} cannot align in this run: {100 * left:.0f} % of the first W - B^T will remain "
                "at its end (eq. 14). Train longer, raise --weight-decay, or start from a mirror: --rule kpm"
            )


def _warn(what: str) -> None:
    if devices.is_first():
        print(f"wmkp: warning: {what}", file=sys.stderr)
