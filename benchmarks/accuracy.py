"""Time to accuracy: 98 % on MNIST on a CPU, and 90 % and 94 % on CIFAR-10 on a GPU, under Kolen-Pollack and weight mirrors.

The time is that of training, mirror steps included. It starts with the data on the device. It ends with the first epoch that
reaches the test accuracy. It excludes compilation (reported separately), testing, initialization, and the mirror step before
training.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import wmkp
from benchmarks import Part, Row, Settings, arrays, models


class SpeedNet(nn.Module):
    """A ResNet-9: a convolution, then three stages.

    Each stage doubles the features and pools. The first and the third also have a residual block.
    """

    width: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv(x: jax.Array, features: int) -> jax.Array:
            x = nn.Conv(features, (3, 3), use_bias=False, dtype=self.dtype)(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8, dtype=self.dtype)(x))

        x = conv(x.astype(self.dtype), self.width)
        for stage in range(1, 4):
            x = nn.max_pool(conv(x, self.width * 2**stage), (2, 2), (2, 2))
            if stage != 2:
                x = x + conv(conv(x, x.shape[-1]), x.shape[-1])
        x = x.max(axis=(1, 2))
        return nn.Dense(10, use_bias=False, dtype=self.dtype)(x).astype(jnp.float32) / 8


class Recipe(NamedTuple):
    """The settings of a training.

    Attributes:
      dataset, model: the data and the network.
      mode: the keyword arguments of the model in training, and those in tests.
      goals: test accuracies, percent.
      epochs, batch_size: the length of the training, and the images of a step.
      peak, decay, momentum: settings of SGD with Nesterov's momentum. The learning rate rises to ``peak``, then falls to
        almost zero.
      smoothing: label smoothing.
      augment: whether images are flipped and shifted.
      seeds: the number of trainings of each rule.
    """

    dataset: str
    model: nn.Module
    mode: tuple[dict[str, bool], dict[str, bool]]
    goals: tuple[float, ...]
    epochs: int
    batch_size: int
    peak: float
    decay: float
    momentum: float = 0.9
    smoothing: float = 0.0
    augment: bool = False
    seeds: int = 3


MNIST = Recipe("mnist", models.Dense(), ({}, {}), (98.0,), 4, 128, 0.2, 0.0, seeds=3)
CIFAR = Recipe(
    "cifar10", SpeedNet(), ({"train": True}, {"train": False}), (90.0, 94.0), 18, 512, 0.4, 5e-4,
    smoothing=0.2, augment=True, seeds=2,
)  # fmt: skip
RULES: dict[str, Callable[[], wmkp.Rule]] = {
    "BP": wmkp.backprop,
    "KP": partial(wmkp.kolen_pollack, start="mirror"),
    "WM": wmkp.weight_mirror,
}


def parts(settings: Settings) -> dict[str, Part]:
    """MNIST runs wherever there is data. CIFAR-10 runs only on a GPU."""
    return {
        "MNIST to 98%": partial(to_goals, MNIST, settings, True),
        "CIFAR-10 to 90% and 94%": partial(to_goals, CIFAR, settings, jax.default_backend() == "gpu"),
    }


def to_goals(recipe: Recipe, settings: Settings, possible: bool) -> Iterator[Row]:
    """Trains under each rule, and yields the median over seeds of the seconds to each goal."""
    names = {(rule, goal): f"{recipe.dataset} to {goal:g}%, {rule}: seconds" for rule in RULES for goal in recipe.goals}
    if settings.quick:
        recipe = recipe._replace(epochs=1, batch_size=16, seeds=1, goals=(1.0,))
        if recipe.augment:
            recipe = recipe._replace(model=SpeedNet(2))
    elif not possible or settings.data_dir is None:
        for name in names.values():
            yield Row(name, note="no GPU here" if not possible else "needs --data-dir")
        return
    train, test = arrays.load(recipe.dataset, None if settings.quick else settings.data_dir, 64)
    data, held_out = jax.device_put((train, test or train))
    for rule in RULES:
        runs = [reach(recipe, RULES[rule](), data, held_out, seed) for seed in range(recipe.seeds)]
        for goal in recipe.goals:
            times = [t for run in runs if (t := run["seconds_to"].get(goal)) is not None]
            reached = f"{len(times)} of {len(runs)} seeds"
            ends = ", ".join(f"{run['accuracies'][-1]:.2f}" for run in runs)
            yield Row(
                names.get((rule, goal), rule),
                statistics.median(times) if times else None,
                (min(times), max(times)) if times else None,
                note=f"{reached}; after {recipe.epochs} epochs {ends}%; compiling {runs[0]['compiling']:.1f} s",
                detail={"runs": runs, "recipe": {k: str(v) for k, v in recipe._asdict().items()}},
            )


def reach(recipe: Recipe, rule: wmkp.Rule, data: Any, held_out: Any, seed: int) -> dict[str, Any]:
    """Trains once. Returns the seconds to each goal, the accuracy after each epoch, and the seconds of compilation."""
    images, _ = data
    count = len(images) // recipe.batch_size
    total = recipe.epochs * count
    rate = optax.piecewise_interpolate_schedule("linear", recipe.peak / 5, {max(1, total // 5): 5.0, total: 1e-3})
    optimizer = optax.chain(
        optax.add_decayed_weights(recipe.decay), optax.sgd(rate, momentum=recipe.momentum, nesterov=True)
    )
    model = recipe.model
    key = jax.random.key(seed)
    variables = dict(model.init(key, images[:2], **recipe.mode[1]))
    params = variables.pop("params")

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        x, y = batch
        logits, model_state = model.apply(
            {"params": params, **model_state}, x, **recipe.mode[0], mutable=list(model_state)
        )
        targets = optax.smooth_labels(jax.nn.one_hot(y, 10), recipe.smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean(), (model_state, {})

    batch = jax.tree.map(lambda a: a[: recipe.batch_size], data)
    steps = wmkp.make_steps(loss_fn, rule, optimizer, params, batch, model_state=variables)
    mirrors = rule.mirror is not None and rule.mirror.each_step
    state = steps.init(key, params, variables, mirror_steps=None if rule.mirror is None else 1)

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: Any, key: jax.Array, data: Any) -> Any:
        order_key, flip_key, shift_key = jax.random.split(key, 3)
        x, y = data
        if recipe.augment:
            flip = jax.random.bernoulli(flip_key, shape=(len(x), 1, 1, 1))
            x = jnp.where(flip, x[:, :, ::-1], x)
            padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
            corner = jax.random.randint(shift_key, (len(x), 2), 0, 5)
            cut = lambda image, c: jax.lax.dynamic_slice(image, (c[0], c[1], 0), x.shape[1:])
            x = jax.vmap(cut)(padded, corner)
        order = jax.random.permutation(order_key, len(x))[: count * recipe.batch_size].reshape(count, -1)

        def step(state: Any, rows: jax.Array) -> Any:
            state, metrics = steps.engaged_step(state, (x[rows], y[rows]))
            if mirrors:  # after every step: W changes fast at these rates, and a B that lags costs accuracy
                state, _ = steps.mirror_step(state)
            return state, metrics["loss"]

        return jax.lax.scan(step, state, order)

    @jax.jit
    def accuracy(state: Any, data: Any) -> jax.Array:
        def right(batch: Any) -> jax.Array:
            x, y = batch
            logits = model.apply({"params": state.params, **state.model_state}, x[None], **recipe.mode[1])
            return logits[0].argmax(-1) == y

        return 100 * jax.lax.map(right, data, batch_size=500).mean()

    start = time.perf_counter()
    compiled = epoch.lower(state, key, data).compile()
    test = accuracy.lower(state, held_out).compile()
    compiling, seconds, accuracies = time.perf_counter() - start, 0.0, []
    seconds_to: dict[float, float] = {}
    for i in range(recipe.epochs):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, jax.random.fold_in(key, i), data))
        seconds += time.perf_counter() - start
        accuracies.append(float(test(state, held_out)))
        for goal in recipe.goals:
            if accuracies[-1] >= goal:
                seconds_to.setdefault(goal, seconds)
    return {"seconds_to": seconds_to, "seconds": seconds, "accuracies": accuracies, "compiling": compiling}
