"""Builds a run from a config: the model, its steps, its data and its measures."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import wmkp
from wmkp import checks
from wmkp.experiments import devices
from wmkp.experiments.config import InputError, Train, refusals
from wmkp.experiments.data import feeds
from wmkp.experiments.models import tasks
from wmkp.training import state_sharding


class Tally(NamedTuple):
    """Sums on the devices between two lines of train.csv.

    Attributes:
      loss, error: sums over steps, float32.
      count: the number of these steps, float32.
      skipped: steps of the whole run that were left out because they were not finite, int32.
      halted: whether training has stopped because a step was not finite.
      finite: which numbers were finite in that step (or the last one left out), as in ``wmkp.make_steps``.
    """

    loss: Any
    error: Any
    count: Any
    skipped: Any
    halted: Any
    finite: Any


class Score(NamedTuple):
    """Loss and error (percent) on the test set, and the error of always giving the most frequent answer."""

    loss: float
    error: float
    chance: float

    def shown(self) -> str:
        """The error as text, marked if nothing was learned."""
        mark = f" (no better than one answer to everything, {self.chance:.2f} %)" if self.error >= self.chance else ""
        return f"{self.error:.2f} %{mark}"


class Run(NamedTuple):
    """A run that is ready to train.

    Attributes:
      rule: the learning rule.
      steps: from ``wmkp.make_steps``.
      init: ``() -> TrainState``, at the beginning.
      advance: ``(state, tally, batch) -> (state, tally)``, an engaged step, jitted; both are donated.
      measure: ``(state, batch) -> {name: number}``: for each projection angles in degrees, |B| over |W| and the norms of
        ``wmkp.delta_norms``; for each residual block the size of its output.
      evaluate: ``state -> Score``, on the test set.
      tally: an empty tally.
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
    evaluate: Callable[[wmkp.TrainState], Score]
    tally: Tally
    total: int
    schedule: Callable[[Any], Any]
    mesh: Mesh
    feed: feeds.Feed


def build(config: Train) -> Run:
    """Builds a run without training it.

    Raises:
      InputError: the config, its dataset and its devices do not fit together.
    """
    config.check()
    mesh = devices.make_mesh(config.batch_size)
    feed = feeds.open_feed(config, mesh)
    task = tasks.make_task(config, feed.shape, feed.num_classes, feed.mean, feed.std)
    rule = tasks.make_rule(
        config.rule,
        noise=config.mirror_noise,
        num_samples=config.mirror_samples,
        target_angle=config.mirror_angle,
        rate=config.mirror_rate,
    )
    total = config.steps or max(1, round(config.epochs * feed.epoch_steps))
    if total < config.accumulate:
        raise InputError(
            f"--accumulate {config.accumulate} is more than the run's {total} steps, so W would never change; accumulate fewer"
        )
    schedule = tasks.make_schedule(config, max(1, feed.epoch_steps // config.accumulate), total // config.accumulate)

    params_key, state_key = jax.random.split(jax.random.key(config.seed))
    params, model_state = task.init(params_key, feed.probe)
    loss_fn = tasks.frozen(task.loss_fn) if config.rule == "frozen" else task.loss_fn
    with refusals(f"--rule {config.rule} cannot train --model {config.model}"):
        steps = wmkp.make_steps(
            loss_fn,
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
    zero, none = np.float32(0), np.int32(0)
    finite = {name: np.bool_(True) for name in ("loss", *checks.named_leaves(params))}
    return Run(
        rule,
        steps,
        partial(steps.init, state_key, params, model_state, config.mirror_steps if mirrors else None),
        _advance(steps, config.on_nan),
        _measure(rule, task),
        _evaluate(task, feed, mesh),
        Tally(zero, zero, zero, none, np.bool_(False), finite),
        total,
        schedule,
        mesh,
        feed,
    )


def like(config: Train, run: Run) -> Any:
    """The shapes and shardings of a run's state, without making it."""
    shapes = jax.eval_shape(run.init)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, run.mesh, config.fsdp),
    )


def _advance(steps: wmkp.Steps, on_nan: str) -> Callable[..., tuple[wmkp.TrainState, Tally]]:
    """An engaged step that is undone if a number is not finite. Then training stops or skips the step."""

    def advance(state: wmkp.TrainState, tally: Tally, batch: Any) -> tuple[wmkp.TrainState, Tally]:
        after, metrics = steps.engaged_step(state, batch)
        finite: Any = metrics["finite"]
        good = jnp.stack(list(finite.values())).all()
        taken = good & ~tally.halted
        kept = jax.tree.map(partial(jnp.where, taken), after, state)
        if on_nan == "skip":  # the next step has other random numbers
            kept = kept._replace(step=after.step, key=after.key)
        failed = ~good & ~tally.halted
        tally = Tally(
            loss=tally.loss + jnp.where(taken, metrics["loss"], 0),
            error=tally.error + jnp.where(taken, metrics["error"], 0),
            count=tally.count + taken,
            skipped=tally.skipped + failed,
            halted=tally.halted | (failed & (on_nan == "stop")),
            finite=jax.tree.map(partial(jnp.where, failed), finite, tally.finite),
        )
        return kept, tally

    return jax.jit(advance, donate_argnums=(0, 1))


def _measure(rule: wmkp.Rule, task: tasks.Task) -> Callable[..., dict[str, jax.Array]]:
    @jax.jit
    def measure(state: wmkp.TrainState, batch: Any) -> dict[str, jax.Array]:
        args = (state.params, state.feedback, state.model_state, batch, jax.random.key(0))
        delta = wmkp.delta_norms(task.loss_fn, rule, *args, has_aux=True)
        found = {f"delta_reference/{path}": x.reference for path, x in delta.items()}
        found |= {f"delta_rounding_deg/{path}": x.rounding for path, x in delta.items()}
        found["rounding_layers"] = jnp.stack([x.is_rounding for x in delta.values()]).sum()
        stream = task.stream(state.params, state.model_state, batch)
        found |= {f"stream_rms/{block}": x for block, x in stream.items()}
        if stream:
            found["stream_growth"] = [*stream.values()][-1] / next(iter(stream.values()))
        if rule.backward is None:
            return found
        matrix = wmkp.matrix_angles(state.params, state.feedback, rule)
        found |= {f"matrix_angle_deg/{path}": x for path, x in matrix.items()}
        found |= {f"delta_angle_deg/{path}": x.angle for path, x in delta.items()}
        found |= {f"delta_norm_ratio/{path}": x.ratio for path, x in delta.items()}
        weights = checks.named_leaves(state.params)
        for path, b in jax.tree_util.tree_leaves_with_path(state.feedback):
            name = checks.path_name(path)
            if name in matrix:
                found[f"norm_ratio/{name}"] = jnp.linalg.norm(b) / jnp.linalg.norm(weights[name])
        return found

    return measure


def _evaluate(task: tasks.Task, feed: feeds.Feed, mesh: Mesh) -> Callable[[wmkp.TrainState], Score]:
    @partial(jax.jit, donate_argnums=0)
    def add_score(sums: Any, params: Any, model_state: Any, batch: Any) -> Any:
        return jax.tree.map(jnp.add, sums, task.score(params, model_state, batch))

    def evaluate(state: wmkp.TrainState) -> Score:
        empty = np.float32(0), np.int32(0), np.zeros(feed.num_classes, np.int32)
        sums = devices.put_everywhere(empty, mesh)
        for batch in feed.tests():
            sums = add_score(sums, state.params, state.model_state, batch)
        loss, wrong, labels = jax.device_get(sums)
        count = labels.sum()
        return Score(float(loss / count), float(100 * wrong / count), float(100 * (1 - labels.max() / count)))

    return evaluate
