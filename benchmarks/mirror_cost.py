"""The cost of mirror mode: a mirror step relative to its two products, and the cheapest schedule for 6 degrees.

A schedule is a kind of noise, the samples N of each projection, a rate a, and a mirror step after every k engaged steps.
The law of angles and the path of W under backprop predict its angle. (B is a leaky average of past W. So its lag follows from
inner products of W at different steps.) A schedule holds 6 degrees if the worst projection stays below them at every step.
The benchmark trains with the cheapest schedule that is predicted to hold. The angle is that between W and B in an engaged
step. The benchmark also reports the larger angle just before the next mirror step.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import benchmarks
import wmkp
from benchmarks import Part, Row, Settings, arrays, models, programs
from wmkp import checks
from wmkp.noise import draw_noise

ANGLE = 6.0  # degrees: the largest angle allowed, for every projection at every step
MARGIN = 0.85  # a schedule's predicted angle may be at most this share of ANGLE
EVERY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# The kind of noise, the degrees that noise alone leaves, and the rate. N follows from the law of angles. Orthogonal noise at
# rate 1 leaves 0 degrees if N >= fan_in.
ESTIMATES = [
    *(
        (noise, degrees, rate)
        for noise in ("gaussian", "rademacher")
        for degrees in (2.0, 4.0)
        for rate in (0.1, 0.3, 1.0)
    ),
    *(("orthogonal", degrees, rate) for degrees in (0.01, 4.0) for rate in (0.3, 1.0)),
]


class Run(NamedTuple):
    """A training for which the benchmark searches a schedule.

    Attributes:
      dataset: a name in ``arrays.SHAPES``.
      batch_size, steps: the batch size and the number of steps of the training.
      large: the batch size to time on 224x224 images as well, or 0.
      warm: the optimizer, and the learning rate that it reaches within the run, if the recipe warms up. (The recipe itself
        warms up over far more steps.) None if the rate is constant.
    """

    dataset: str
    batch_size: int
    steps: int
    large: int = 0
    warm: tuple[Callable[[Any], Any], float] | None = None


RUNS = {
    "MLP 784-500-10": Run("mnist", 128, 300),
    "ResNet-20": Run("cifar10", 128, 40),
    "ResNet-18": Run("tiny_imagenet100", 32, 24, large=8, warm=(models.sgd, 0.1)),
    "ResNet-50": Run("tiny_imagenet100", 32, 24, large=4, warm=(models.sgd, 0.1)),
    "ViT-Ti, patches of 7": Run("mnist", 64, 64, warm=(models.adamw, 5e-4)),
}


def parts(settings: Settings) -> dict[str, Part]:
    """Default mirror steps against Kolen-Pollack steps, then mirror steps against their products, then the schedules."""
    runs = {name: run._replace(batch_size=2, steps=4) if settings.quick else run for name, run in RUNS.items()}
    every: dict[str, Part] = {"MLP: Kolen-Pollack": partial(against_kolen_pollack, settings)}
    every |= {f"{name}: products": partial(against_products, name, settings) for name in runs}
    return every | {f"{name}: schedule": partial(schedules, name, run, settings) for name, run in runs.items()}


def case_of(name: str, batch_size: int, dataset: str) -> models.Case:
    """A model for a dataset's images."""
    side, channels, classes = arrays.SHAPES[dataset]
    return models.make(name, batch_size, size=side, channels=channels, classes=classes)


def mirror_steps(case: models.Case, rule: wmkp.Rule, first: int = 0) -> tuple[wmkp.Steps, wmkp.TrainState]:
    """Returns the steps under a rule, and a state after this many mirror steps at the start."""
    steps = wmkp.make_steps(case.loss_fn, rule, case.optimizer, case.params, case.batch, model_state=case.model_state)
    return steps, steps.init(jax.random.key(1), case.params, case.model_state, mirror_steps=first)


def projections(case: models.Case) -> dict[str, tuple[int, int]]:
    """The (fan_in, fan_out) of each projection that is mirrored."""
    found = wmkp.projections(case.loss_fn, case.params, case.model_state, case.batch, jax.random.key(0))
    return {path: (p.fan_in, p.fan_out) for path, p in found.items() if p.feedback}


# --- a default mirror step against a Kolen-Pollack step ---------------------------------------------------------------


def against_kolen_pollack(settings: Settings) -> Iterator[Row]:
    """Times a mirror step of the default weight mirror in a wide MLP, where the batch is small compared with fan_in.

    The signals of the mirror step take two products of N = fan_in samples with W: 4 N |W| operations (transforms take fewer).
    The mirror step also reports a lag. The lag takes a third, smaller product (``2 * 64 * 64 * fan_in`` operations for each
    weight), and two passes over B.
    """
    case, batch_size = wide_mlp(settings.quick)
    steps, state = mirror_steps(case, wmkp.weight_mirror())
    kp = wmkp.make_steps(case.loss_fn, wmkp.kolen_pollack(), case.optimizer, case.params, case.batch)
    calls = {
        "mirror": models.chained(steps.mirror_step, state),
        "KP": models.chained(kp.engaged_step, kp.init(jax.random.key(0), case.params), case.batch),
    }
    taken = benchmarks.in_turns(calls, 0 if settings.quick else 10, least=3)
    name = "MLP 2048-1024-1024-1024-10: default mirror step over a Kolen-Pollack step"
    yield benchmarks.ratio(name, taken, "mirror", "KP", f"batch {batch_size}")


def wide_mlp(quick: bool) -> tuple[models.Case, int]:
    """Returns the MLP and its batch size. With ``quick`` the MLP is an eighth as wide."""
    sizes, batch_size = ([256, 128, 128, 128, 10], 16) if quick else ([2048, 1024, 1024, 1024, 10], 256)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    pairs = zip(keys, itertools.pairwise(sizes), strict=False)
    params = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in pairs]
    x = jax.random.normal(keys[-1], (batch_size, sizes[0]))

    def loss_fn(params: Any, model_state: Any, x: jax.Array, key: Any) -> Any:
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return jnp.mean((x @ params[-1]) ** 2), (model_state, {})

    return models.Case(loss_fn, params, None, models.SGD, x), batch_size


# --- a mirror step against its products -------------------------------------------------------------------------------


def against_products(name: str, settings: Settings) -> Iterator[Row]:
    """Times a mirror step of N = fan_in samples in all projections, relative to its two products on given noise.

    Also times the noise alone, and the rest alone (reading and writing B, and passing the state on). Also measures the memory of a
    mirror step with Gaussian noise at 6 degrees.
    """
    run = RUNS[name]
    case = case_of(name, 2, run.dataset)
    shapes = list(projections(case).values())
    weights = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    products = jax.jit(lambda noise, weights: [x.T @ (x @ w) for x, w in zip(noise, weights, strict=True)])
    update = jax.jit(without_signals, donate_argnums=0)
    # By the law of angles, N = fan_in Gaussian samples leave 45 degrees, and orthogonal samples leave 0.
    for noise, degrees in (("orthogonal", 1e-3), ("rademacher", 45.0), ("gaussian", 45.0)):
        rule = wmkp.weight_mirror(noise, target_angle=degrees, rate=1.0)
        steps, state = mirror_steps(case, rule)
        keys = jax.random.split(jax.random.key(0), len(shapes))

        def draw(keys: jax.Array, mirror: Any = rule.mirror) -> list[jax.Array]:
            return [draw_noise(k, mirror, (1, n, n), jnp.float32)[0] for k, (n, _) in zip(keys, shapes, strict=True)]

        drawn = jax.jit(draw)
        x = drawn(keys)
        calls = {
            "mirror step": models.chained(steps.mirror_step, state),
            "all else": models.chained(update, jax.tree.map(jnp.copy, state)),
            "products": lambda x=x: jax.block_until_ready(products(x, weights)),
            "noise": lambda drawn=drawn, keys=keys: jax.block_until_ready(drawn(keys)),
        }
        taken = benchmarks.in_turns(calls, 0 if settings.quick else 2, least=3)
        about = f"{name}, {noise}"
        yield benchmarks.ratio(
            f"{about}: mirror step over its products", taken, "mirror step", "products", "N = fan_in", at_most=1.2
        )
        note = "N = fan_in" + ("; drawn apart: a mirror step does not write it down" if noise == "orthogonal" else "")
        yield benchmarks.ratio(f"{about}: noise over the products", taken, "noise", "products", note)
        yield benchmarks.ratio(f"{about}: all else over the products", taken, "all else", "products", "N = fan_in")
    rule = wmkp.weight_mirror("gaussian", target_angle=6.0, rate=0.1)
    steps, state = mirror_steps(case, rule)
    memory = steps.mirror_step.lower(state).compile().memory_analysis().temp_size_in_bytes / 1e6
    samples = sum(wmkp.samples_for_angle(6.0, n, rule) * n for n, _ in shapes)
    about = f"of Gaussian noise for 6 degrees: its noise at once would be {4 * samples / 1e6:,.0f} MB"
    yield Row(f"{name}: temporary memory of a mirror step, MB", memory, note=about)


def without_signals(state: wmkp.TrainState) -> tuple[wmkp.TrainState, dict[str, jax.Array]]:
    """A mirror step with W instead of its signals."""
    nowhere = lambda b: b is None
    feedback = jax.tree.map(lambda b, w: b if b is None else (b + w) / 2, state.feedback, state.params, is_leaf=nowhere)
    return state._replace(feedback=feedback), {}


# --- schedules --------------------------------------------------------------------------------------------------------


def paths_gram(case: models.Case, batches: list[Any]) -> dict[str, np.ndarray]:
    """Trains by backprop, and returns the inner products of W at all pairs of steps.

    Each projection has a float64 array of shape (steps + 1, steps + 1).
    """
    step, state = models.backprop_step(case)
    compiled = jax.jit(step)
    wanted = projections(case)
    past: dict[str, list[np.ndarray]] = {path: [] for path in wanted}

    def note(params: Any) -> None:
        for path, w in jax.tree_util.tree_leaves_with_path(params):
            name = checks.path_name(path)
            if name in past:
                past[name].append(np.array(w).ravel())

    note(state.params)
    for batch in batches:
        state, _ = compiled(state, batch)
        note(state.params)
    grams = {}
    for name, ws in past.items():
        w = np.stack(ws)
        parts = [w[:, i : i + 2**18].astype(np.float64) for i in range(0, w.shape[1], 2**18)]
        grams[name] = sum(p @ p.T for p in parts)
    return grams


def predicted(grams: dict[str, np.ndarray], rate: float, every: int, noise_degrees: float) -> float:
    """Predicts the largest angle between B and W over projections and engaged steps, in degrees. B starts exact."""
    worst = 0.0
    for gram in grams.values():
        b = np.zeros(len(gram))  # B as a combination of W at its past steps
        b[0] = 1.0
        for t in range(1, len(gram) - 1):  # no error passes through B after the last step
            if t % every == 0:
                b *= 1 - rate
                b[t] += rate
            cosine = gram[t] @ b / math.sqrt(gram[t, t] * (b @ gram @ b))
            worst = max(worst, 1 / min(max(cosine, 1e-9), 1.0) ** 2 - 1)
    return math.degrees(math.atan(math.sqrt(worst + math.tan(math.radians(noise_degrees)) ** 2)))


def mirror_operations(shapes: dict[str, tuple[int, int]], rule: wmkp.Rule) -> float:
    """The operations of a mirror step, 4 N |W| summed over projections.

    They are a product of the noise with W, and a product of the response with the noise.
    """
    mirror = rule.mirror
    assert mirror is not None
    return sum(
        4.0 * wmkp.samples_for_angle(mirror.target_angle, fan_in, rule) * fan_in * fan_out
        for fan_in, fan_out in shapes.values()
    )


def cheapest(case: models.Case, grams: dict[str, np.ndarray]) -> tuple[Any, list[dict[str, Any]]]:
    """Returns the cheapest schedule that is predicted to hold, and the best one for each kind of noise.

    If none is predicted to hold, it returns the one that comes nearest.
    """
    tried, shapes = [], projections(case)
    for noise, degrees, rate in ESTIMATES:
        rule = wmkp.weight_mirror(noise, target_angle=degrees, rate=rate)
        cost = mirror_operations(shapes, rule)
        for every in EVERY:
            if every > (len(next(iter(grams.values()))) - 1) // 4:  # the run must contain a few mirror steps
                break
            angle = predicted(grams, rate, every, degrees)
            about = {"noise": noise, "noise_degrees": degrees, "rate": rate, "every": every}
            tried.append({**about, "operations": cost / every, "predicted_degrees": angle})
    holding = [s for s in tried if s["predicted_degrees"] <= MARGIN * ANGLE]
    chosen = (
        min(holding, key=lambda s: s["operations"]) if holding else min(tried, key=lambda s: s["predicted_degrees"])
    )
    best = [min(of, key=lambda s: s["operations"]) for noise in ("gaussian", "rademacher", "orthogonal")
            if (of := [s for s in holding if s["noise"] == noise])]  # fmt: skip
    return chosen, best


def schedules(name: str, run: Run, settings: Settings) -> Iterator[Row]:
    """Finds a model's schedule, trains with it, and reports its angles and its cost."""
    case = case_of(name, run.batch_size, run.dataset)
    if run.warm is not None:
        make, rate = run.warm
        case = case._replace(optimizer=make(optax.linear_schedule(0.0, rate, run.steps)))
    train, test = arrays.load(run.dataset, settings.data_dir, 16 * run.batch_size)
    batches = [jax.device_put(b) for b in arrays.batches(train, run.batch_size, run.steps)]
    grams = paths_gram(case, batches)
    chosen, best = cheapest(case, grams)
    rule = wmkp.weight_mirror(chosen["noise"], target_angle=chosen["noise_degrees"], rate=chosen["rate"])
    every = chosen["every"]
    worst, between, engaged, mirror = trained(case, rule, every, batches)
    step, state = models.backprop_step(case)
    operations = programs.operations(jax.jit(step).lower(state, case.batch))
    data = run.dataset if test else f"random data of {run.dataset}'s shape"
    about = f"{name}: {chosen['noise']}, rate {chosen['rate']:g}, every {chosen['every']}"
    detail = {"chosen": chosen, "best_of_each_noise": best, "data": data, "warm": run.warm is not None}
    drift = {k: predicted(grams, 1.0, k + 1, 0.0) for k in EVERY if k < len(batches) - 1}
    yield Row(
        f"{about}: worst angle at an engaged step",
        worst,
        at_most=ANGLE,
        note=f"{run.steps} steps of {run.batch_size}{', rate rising' if run.warm else ''}, {data}; "
        f"predicted {chosen['predicted_degrees']:.1f}; before mirroring {between:.1f}",
        detail={**detail, "drift_degrees_of_W_in_k_steps": drift},
    )
    yield Row(
        f"{about}: average cost, operations",
        chosen["operations"] / operations,
        note=f"of an engaged step's; batch {run.batch_size}, {run.dataset}'s size",
        detail={"engaged_operations": operations},
    )
    taken = {"mirror": mirror, "engaged": engaged[every - 1 :: every]}  # each with the engaged step before it
    once = benchmarks.ratio("", taken, "mirror", "engaged", detail={"every": every})
    assert once.value is not None and once.spread is not None
    low, high = once.spread
    yield once._replace(
        name=f"{about}: average cost, time",
        value=once.value / every,
        spread=(low / every, high / every),
        note=f"of an engaged step's; one mirror step takes {once.value:.2f} of one",
    )
    if run.large:
        yield from at_224(name, run.large, rule, every, settings)


def trained(
    case: models.Case, rule: wmkp.Rule, every: int, batches: list[Any]
) -> tuple[float, float, list[float], list[float]]:
    """Trains with a mirror step after every k engaged steps.

    Returns the worst angles at and after an engaged step, and the seconds of both kinds of steps.
    """
    assert rule.mirror is not None
    # The mean over this many mirror steps at the start has as much noise as a leaky average of this rate in the long run.
    steps, state = mirror_steps(case, rule, math.ceil((2 - rule.mirror.rate) / rule.mirror.rate))
    angles = jax.jit(lambda params, feedback: jnp.stack([*wmkp.matrix_angles(params, feedback).values()]).max())
    engaged_step = steps.engaged_step.lower(state, batches[0]).compile()
    mirror_step = steps.mirror_step.lower(state).compile()
    at, after, engaged, mirror = 0.0, 0.0, [], []
    for i, batch in enumerate(batches, 1):
        at = max(at, float(angles(state.params, state.feedback)))
        state = timed(engaged, lambda state=state, batch=batch: engaged_step(state, batch))
        after = max(after, float(angles(state.params, state.feedback)))
        if i % every == 0:
            state = timed(mirror, lambda state=state: mirror_step(state))
    return at, after, engaged, mirror


def timed(seconds: list[float], step: Callable[[], tuple[Any, Any]]) -> Any:
    """Runs a step, appends its seconds to a list, and returns the new state."""
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step())
    seconds.append(time.perf_counter() - start)
    return state


def at_224(name: str, batch_size: int, rule: wmkp.Rule, every: int, settings: Settings) -> Iterator[Row]:
    """The cost of a mirror step relative to ``every`` engaged steps of 256 images of 224x224."""
    target = 0.05
    case = models.make(name, 1 if settings.quick else batch_size, size=32 if settings.quick else None)
    steps, state = mirror_steps(case, rule)
    engaged_step = steps.engaged_step.lower(state, case.batch).compile()
    mirror_step = steps.mirror_step.lower(state).compile()
    box = [state]

    def take(step: Callable[[Any], tuple[Any, Any]]) -> Callable[[], None]:
        def call() -> None:
            box[0], out = step(box[0])
            jax.block_until_ready((box[0].params, box[0].feedback, out))

        return call

    calls = {"engaged": take(lambda s: engaged_step(s, case.batch)), "mirror": take(mirror_step)}
    taken = benchmarks.in_turns(calls, 0 if settings.quick else 10, least=3)
    one = benchmarks.ratio("", taken, "mirror", "engaged")
    assert one.value is not None and one.spread is not None
    share = batch_size / 256 / every
    yield one._replace(
        name=f"{name} at 224, batch 256: mirror over engaged, time",
        value=one.value * share,
        spread=(one.spread[0] * share, one.spread[1] * share),
        at_most=target,
        note=f"average, every {every}; engaged at batch {batch_size}, taken 256/{batch_size} times",
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((256, *x.shape[1:]), x.dtype), case.batch)
    operations = programs.operations(steps.engaged_step.lower(box[0], batch))
    cost = mirror_operations(projections(case), rule)
    yield Row(
        f"{name} at 224, batch 256: mirror over engaged, operations",
        cost / operations / every,
        at_most=target,
        note=f"average, every {every}; one mirror step is {cost / operations:.3f} of an engaged step",
        detail={"mirror": cost, "engaged": operations, "every": every},
    )
    low = statistics.median(taken["mirror"])
    print(
        f"# {name}: a mirror step took {low:.2f} s, as its products would at {cost / low / 1e9:.0f} GFLOP/s", flush=True
    )
