"""How far B drifts from W^T under Kolen-Pollack after an exact mirror step, and what further mirror steps cost and gain.

``python -m benchmarks.drift`` trains a ReLU MLP for 20,000 steps under each optimizer and precision. It measures the largest
matrix angle at every step. It writes ``benchmarks/results/drift.json``.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import benchmarks
import wmkp


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures how far Kolen-Pollack's B drifts from an exact mirror."""

    steps: int = 20_000
    """Engaged steps of each run."""
    chunk: int = 1_000
    """Steps of one compiled loop."""
    widths: tuple[int, ...] = (16, 32, 32, 32, 10)
    """Sizes of the MLP, input to output."""
    batch: int = 16
    """Samples of a batch."""
    again: tuple[int, ...] = (1_000, 100, 10)
    """Mirror again every so many steps, where drift shows."""
    seed: int = 0
    """Of weights and data."""
    save: bool = True
    """Whether to write the results."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one row of the table."""

    optimizer: str
    decay: bool
    compute: str = "float32"
    params: str = "float32"
    devices: int = 1
    again: int = 0
    learns: bool = True  # False: B stays fixed after the mirror step, for comparison


RATE = {"sgd": 0.02, "adamw": 1e-3}
DECAY = {"sgd": 5e-4, "adamw": 1e-2}


def optimizer(run: Run) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and weight decay in the gradient, or AdamW."""
    decay = DECAY[run.optimizer] if run.decay else 0.0
    if run.optimizer == "adamw":
        return optax.adamw(RATE["adamw"], weight_decay=decay)
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE["sgd"], momentum=0.9))


def loss_fn(compute: Any, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """Cross entropy of a ReLU MLP."""
    x, labels = batch
    x = x.astype(compute)
    for i, layer in enumerate(params):
        x = x @ layer["w"].astype(compute) + layer["b"].astype(compute)
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    logits = x.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (model_state, {})


def initial(args: Args, dtype: Any) -> Any:
    """He's initialisation."""
    rng = np.random.default_rng(args.seed)
    sizes = list(zip(args.widths[:-1], args.widths[1:], strict=True))
    params = [{"w": rng.normal(size=s) * math.sqrt(2 / s[0]), "b": np.zeros(s[1])} for s in sizes]
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def draw(args: Args, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws a batch of points in clusters. One label in ten is random, so that learning does not stop."""
    classes, inputs = args.widths[-1], args.widths[0]
    centres = jax.random.normal(jax.random.key(args.seed), (classes, inputs))
    keys = jax.random.split(key, 4)
    labels = jax.random.randint(keys[0], (args.batch,), 0, classes)
    x = centres[labels] + jax.random.normal(keys[1], (args.batch, inputs))
    other = jax.random.randint(keys[2], (args.batch,), 0, classes)
    return x, jnp.where(jax.random.bernoulli(keys[3], 0.1, (args.batch,)), other, labels)


def measure(args: Args, run: Run) -> dict[str, Any]:
    """Trains one run. Returns its angles, its losses and the time of a step."""
    rule = wmkp.kolen_pollack(start="mirror")
    if run.again:  # every call applies the same mirror
        rule = rule._replace(mirror=rule.mirror._replace(each_step=True))
    if not run.learns:
        rule = rule._replace(name="fixed", signal=None)
    params = initial(args, run.params)
    loss = lambda *a: loss_fn(jnp.dtype(run.compute), *a)
    steps = wmkp.make_steps(loss, rule, optimizer(run), params, draw(args, jax.random.key(0)))
    state = steps.init(jax.random.key(args.seed + 1), params, None, 1)
    place = lambda x: x
    if run.devices > 1:
        mesh = Mesh(np.array(jax.devices()[: run.devices]), ("data",))
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        place = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))

    def worst(state: Any) -> jax.Array:
        return jnp.max(jnp.stack(list(wmkp.matrix_angles(state.params, state.feedback).values())))

    def step(state: Any, key: jax.Array) -> Any:
        state, metrics = steps.engaged_step(state, jax.tree.map(place, draw(args, key)))
        if run.again:
            mirrored = lambda state: steps.mirror_step(state)[0]
            state = jax.lax.cond(state.step % run.again == 0, mirrored, lambda state: state, state)
        return state, (worst(state), metrics["loss"])

    start = float(worst(state))
    chunk = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys), donate_argnums=0)
    keys = jax.random.split(jax.random.key(args.seed + 2), (args.steps // args.chunk, args.chunk))
    compiled = chunk.lower(state, keys[0]).compile()
    angles, losses, seconds = [], [], []
    for k in keys:
        begin = time.perf_counter()
        state, (angle, value) = compiled(state, k)
        angles.append(np.asarray(angle))
        seconds.append(time.perf_counter() - begin)
        losses.append(float(value.mean()))
    every = np.concatenate(angles)
    return {
        **dataclasses.asdict(run),
        "angle_start": start,
        "angle_1000": float(every[999]) if len(every) > 999 else None,
        "angle_end": float(every[-1]),
        "angle_worst": float(every.max()),
        "angles": [float(a[-1]) for a in angles],
        "loss_start": losses[0],
        "loss_end": losses[-1],
        "microseconds_per_step": {
            "median": float(np.median(seconds)) / args.chunk * 1e6,
            "least": min(seconds) / args.chunk * 1e6,
            "most": max(seconds) / args.chunk * 1e6,
        },
    }


def cost(args: Args, run: Run, steps_each: int = 200, rounds: int = 9) -> dict[str, Any]:
    """Times a loop of engaged steps and a loop of mirror steps, in turns.

    The result is the cost of a mirror step after every k engaged steps.
    """
    rule = wmkp.kolen_pollack(start="mirror")
    rule = rule._replace(mirror=rule.mirror._replace(each_step=True))
    params = initial(args, run.params)
    batch = draw(args, jax.random.key(0))
    steps = wmkp.make_steps(lambda *a: loss_fn(jnp.dtype(run.compute), *a), rule, optimizer(run), params, batch)
    state = steps.init(jax.random.key(args.seed + 1), params, None, 1)
    loops = {
        "engaged": jax.jit(lambda s: jax.lax.fori_loop(0, steps_each, lambda i, s: steps.engaged_step(s, batch)[0], s)),
        "mirror": jax.jit(lambda s: jax.lax.fori_loop(0, steps_each, lambda i, s: steps.mirror_step(s)[0], s)),
    }
    seconds = benchmarks.interleaved(
        {name: lambda loop=loop: jax.block_until_ready(loop(state)) for name, loop in loops.items()}, rounds
    )
    micro = {name: {k: v / steps_each * 1e6 for k, v in s.items()} for name, s in seconds.items()}
    share = micro["mirror"]["median"] / micro["engaged"]["median"]
    return {"microseconds": micro, "mirror_over_engaged": share, "added": {str(k): share / k for k in args.again}}


def plan(args: Args) -> list[Run]:
    """All rows of the table.

    First the four precisions and devices under each optimizer. Then further mirror steps, for the runs with visible drift.
    """
    every = [(name, decay) for name in ("sgd", "adamw") for decay in (False, True)]
    runs = [Run(name, decay, compute) for compute in ("float32", "bfloat16") for name, decay in every]
    runs += [Run(name, decay, devices=8) for name, decay in every]
    runs += [Run(name, decay, "bfloat16", devices=8) for name, decay in every if not decay]
    runs += [Run("sgd", False, learns=False)]
    for name in ("sgd", "adamw"):
        runs += [Run(name, False, "bfloat16", "bfloat16")]
        runs += [Run(name, False, "bfloat16", "bfloat16", again=k) for k in args.again]
    runs += [Run("sgd", False, again=k) for k in args.again]
    return runs


HEADER = f"{'optimizer':9} {'decay':5} {'compute':8} {'params':8} {'devices':>7} {'B':7} {'again':>6}   " \
         f"{'start':>8} {'at 1000':>8} {'end':>8} {'worst':>8} {'loss':>7} {'us/step':>8}"  # fmt: skip


def line(r: dict[str, Any]) -> str:
    """A row of the table."""
    angles = " ".join(
        f"{r[k]:8.1g}" if r[k] is not None else " " * 8
        for k in ("angle_start", "angle_1000", "angle_end", "angle_worst")
    )
    return (
        f"{r['optimizer']:9} {'yes' if r['decay'] else 'no':5} {r['compute']:8} {r['params']:8} {r['devices']:7} "
        f"{'learns' if r['learns'] else 'fixed':7} {r['again'] or '-':>6}   {angles} {r['loss_end']:7.3f} "
        f"{r['microseconds_per_step']['median']:8.1f}"
    )


def main(args: Args) -> None:
    """Runs all rows, prints them as a table, and saves them."""
    print(f"{args.steps} steps; angles in degrees, the worst over projections\n{HEADER}")
    rows = []
    for run in plan(args):
        rows.append(measure(args, run))
        print(line(rows[-1]), flush=True)
    costs = [cost(args, Run("sgd", False)) for _ in range(2)]
    for found in costs:
        share = found["mirror_over_engaged"]
        print(f"a mirror step takes {share:.2f} of an engaged step's time: every k steps, it adds {share:.2f} / k")
    if args.save:
        settings = {"settings": dataclasses.asdict(args), "rates": RATE, "decays": DECAY}
        benchmarks.save("drift", {**settings, "runs": rows, "mirror_cost": costs})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
