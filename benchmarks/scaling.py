"""Measures how a Kolen-Pollack step scales with batch, depth and width relative to backprop, and how tracing scales."""

import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import benchmarks
import wmkp
from benchmarks import Part, Row, Settings, models
from wmkp.training import batch_sharding

BASE = {"batch": 128, "depth": 4, "width": 512}
VARIED = {"batch": (16, 64, 256, 1024), "depth": (2, 8, 32), "width": (64, 256, 1024)}
LAYERS = (125, 250, 500, 1000)


def parts(settings: Settings) -> dict[str, Part]:
    """The parts: batch, depth, width and tracing."""
    return {
        **{name: partial(grows, name, values, settings) for name, values in VARIED.items()},
        "tracing": partial(traced, settings),
    }


def chain(batch: int, depth: int, width: int) -> models.Case:
    """Makes ``depth`` dense layers of one width, with tanh between them."""
    key = jax.random.key(0)
    params = list(jax.random.normal(key, (depth, width, width)) / math.sqrt(width))
    x = jax.random.normal(jax.random.fold_in(key, 1), (batch, width))

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        x = batch["image"]
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - batch["label"]) ** 2), (model_state, {})

    return models.Case(loss_fn, params, None, models.SGD, {"image": x, "label": x})


def both(case: models.Case, mesh: Mesh | None = None) -> dict[str, Any]:
    """Returns a step of backprop and one of Kolen-Pollack, over the mesh if there is one."""
    step, plain = models.backprop_step(case)
    batch = case.batch
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(mesh))
        plain = jax.device_put(plain, NamedSharding(mesh, PartitionSpec()))
    steps = wmkp.make_steps(case.loss_fn, wmkp.kolen_pollack(), case.optimizer, case.params, case.batch, mesh=mesh)
    state = steps.init(jax.random.key(0), case.params)
    return {
        "BP": models.chained(jax.jit(step, donate_argnums=0), plain, batch),
        "KP": models.chained(steps.engaged_step, state, batch),
    }


def grows(name: str, values: tuple[int, ...], settings: Settings) -> Iterator[Row]:
    """The time of KP relative to BP as one size varies."""
    for value in values[:1] if settings.quick else values:
        sizes = {**BASE, name: value}
        taken = benchmarks.in_turns(both(chain(**sizes)), 0 if settings.quick else 3)
        more = 1e6 * (statistics.median(taken["KP"]) - statistics.median(taken["BP"]))
        rest = ", ".join(f"{k} {v}" for k, v in sizes.items() if k != name)
        yield benchmarks.ratio(
            f"KP over BP, dense layers, {name} {value}", taken, "KP", "BP", f"{more:+.0f} us; {rest}"
        )


def traced(settings: Settings) -> Iterator[Row]:
    """Seconds to trace an engaged gradient, and the exponent of their growth with the number of layers."""
    layers = (10, 20) if settings.quick else LAYERS
    seconds: dict[str, list[float]] = {"KP": [], "BP": []}
    key = jax.random.key(0)
    for count in layers:
        case = chain(2, count, 4)
        ours = wmkp.value_and_grad(case.loss_fn, wmkp.kolen_pollack(), has_aux=True)
        theirs = jax.value_and_grad(case.loss_fn, has_aux=True)
        feedback = [None, *case.params[1:]]
        for name, gradient, weights in (("KP", ours, (case.params, feedback)), ("BP", theirs, (case.params,))):
            start = time.perf_counter()
            jax.make_jaxpr(gradient)(*weights, None, case.batch, key)
            seconds[name].append(time.perf_counter() - start)
    detail = {"layers": layers, "seconds": seconds}
    yield Row(
        f"tracing {layers[-1]} layers, seconds", seconds["KP"][-1], at_most=10,
        note=f"backprop's own {seconds['BP'][-1]:.2f} s", detail=detail,
    )  # fmt: skip
    first = max(0, len(layers) - 3)
    power = math.log(seconds["KP"][-1] / seconds["KP"][first]) / math.log(layers[-1] / layers[first])
    yield Row("tracing: power of the number of layers", power, at_most=1.3, note="1 is linear, 2 a quadratic walk")
