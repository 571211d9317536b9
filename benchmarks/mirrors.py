"""Compares weight mirrors and mirrored Kolen-Pollack, at default settings, with backprop at the same learning rate.

``python -m benchmarks.mirrors --data-dir DIR`` trains each task under each rule from several seeds. It skips the runs
that ``benchmarks/results/mirrors.json`` already holds. It then prints the table of docs/mirror.md. With ``--print`` it
only prints the table.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

import benchmarks
import wmkp
from wmkp.experiments.config import Train
from wmkp.experiments.data import datasets
from wmkp.experiments.models.tasks import make_task


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares weight mirrors and mirrored Kolen-Pollack, at their defaults, with backprop."""

    tasks: tuple[str, ...] = ()
    """Some of the tasks, by name; all by default."""
    rules: tuple[str, ...] = ("BP", "WM", "MKP")
    """Some of the rules."""
    seeds: int = 3
    """Seeds of each; a task may take fewer."""
    data_dir: Path | None = None
    """Where TFDS has mnist and cifar10."""
    print: bool = False
    """Print the table of what is there, and train nothing."""
    quick: bool = False
    """Two steps of each, to try the script out; nothing is written."""


class Task(NamedTuple):
    """A model, its data and its training settings.

    Attributes:
      init: ``key -> (params, model_state)``.
      loss_fn: as ``wmkp.make_steps`` takes it.
      score: ``(params, model_state, batch) -> (loss, wrong, count)``, each a sum over the batch or an array to sum.
      data: the training and test examples.
      steps: the number of engaged steps.
      batch: the number of examples in a step.
      optimizer: the optimizer of W.
      unit: the unit of the result, "% wrong" or "nats".
      seeds: the largest number of seeds.
      about: the description in the table.
    """

    init: Callable[..., Any]
    loss_fn: Callable[..., Any]
    score: Callable[..., Any]
    data: datasets.Dataset
    steps: int
    batch: int
    optimizer: optax.GradientTransformation
    unit: str
    seeds: int
    about: str


# Each rule, and the number of engaged steps between its mirror steps.
RULES: dict[str, tuple[Callable[[], wmkp.Rule], int]] = {
    "BP": (wmkp.backprop, 0),
    "WM": (wmkp.weight_mirror, 1),
    "MKP": (wmkp.mirrored_kolen_pollack, 16),
    "MKP, Gaussian noise": (partial(wmkp.mirrored_kolen_pollack, "gaussian"), 16),
    "WM, Gaussian noise": (partial(wmkp.weight_mirror, "gaussian"), 1),
}


class FiveConvolutions(nn.Module):
    """Five 3x3 convolutions, a mean over positions and a dense readout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (32, 1)):
            x = nn.relu(nn.Conv(width, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class TutorialsNet(nn.Module):
    """The tutorial's network."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def sgd(rate: Any, decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


def on_digits(model: nn.Module, epochs: int, batch: int, rate: float, decay: float, final: float, about: str) -> Task:
    """A Flax model on scikit-learn's digits. A cosine schedule lowers its learning rate to the fraction ``final``."""
    data = datasets.digits()
    steps = epochs * (len(data.train["label"]) // batch)
    apply = lambda params, x: model.apply({"params": params}, x / 16)

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        logits = apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), (model_state, {})

    def score(params: Any, model_state: Any, batch: Any) -> Any:
        wrong = apply(params, batch["image"]).argmax(-1) != batch["label"]
        return jnp.zeros(()), wrong.sum(), wrong.size

    init = lambda key: (model.init(key, jnp.zeros((1, 8, 8, 1)))["params"], None)
    schedule = optax.cosine_decay_schedule(rate, steps, final)
    return Task(init, loss_fn, score, data, steps, batch, sgd(schedule, decay), "% wrong", 3, about)


def of_experiments(config: Train, optimizer: optax.GradientTransformation, unit: str, seeds: int, about: str) -> Task:
    """A task with a model and loss of ``wmkp train``."""
    data = datasets.load(config.dataset, config.data_dir)
    text = "tokens" in data.train
    example = data.train["tokens" if text else "image"][:1]
    shape = (example.shape[1] - 1,) if text else example.shape[1:]
    images = np.zeros(1) if text else data.train["image"]
    axes = tuple(range(images.ndim - 1))
    mean, std = (np.float32(f(images, axis=axes)) for f in (np.mean, np.std))
    task = make_task(config, shape, data.num_classes, mean, std)
    first = jax.tree.map(lambda x: x[: config.batch_size], data.train)
    init = lambda key: task.init(key, first)
    assert config.steps is not None
    return Task(
        init, task.loss_fn, task.score, data, config.steps, config.batch_size, optimizer, unit, seeds, about
    )  # fmt: skip


def decoder(data_dir: Path | None) -> Task:
    config = Train(dataset="characters", model="decoder", steps=400, batch_size=8)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, 400))
    about = "3-layer Transformer, width 128, characters; batch 8, AdamW at 2e-3, 400 steps"
    return of_experiments(config, optimizer, "nats", 3, about)


def vit(data_dir: Path | None) -> Task:
    config = Train(dataset="mnist", data_dir=data_dir, model="vit-ti", patch=7, steps=400, batch_size=32)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-4, 40, 400)
    about = "ViT-Ti, patches of 7x7, MNIST; batch 32, AdamW at 5e-4, 400 steps"
    return of_experiments(config, optax.adamw(schedule, weight_decay=0.05), "% wrong", 3, about)


def resnet(data_dir: Path | None) -> Task:
    config = Train(dataset="cifar10", data_dir=data_dir, model="resnet20", steps=782, batch_size=128)
    optimizer = sgd(optax.cosine_decay_schedule(0.1, 782), 1e-4)
    return of_experiments(config, optimizer, "% wrong", 1, "ResNet-20, CIFAR-10; batch 128, SGD at 0.1, 2 epochs")


def tanh_mlp(data_dir: Path | None) -> Task:
    config = Train(dataset="digits", model="mlp", hidden=(128,) * 12, steps=40 * 37, batch_size=32)
    optimizer = sgd(optax.cosine_decay_schedule(0.02, 40 * 37, 0.1), 5e-3)
    about = "tanh MLP of 12 layers of 128, digits; batch 32, SGD at 0.02, 40 epochs"
    return of_experiments(config, optimizer, "% wrong", 3, about)


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "conv net": lambda _: on_digits(
        FiveConvolutions(), 15, 32, 0.05, 5e-3, 0.1, "five 3x3 convolutions, digits; batch 32, SGD at 0.05, 15 epochs"
    ),
    "MLP": tanh_mlp,
    "tutorial": lambda _: on_digits(
        TutorialsNet(), 10, 64, 0.05, 0.0, 1.0, "the tutorial's CNN, digits; batch 64, SGD at 0.05, 10 epochs"
    ),
    "Transformer": decoder,
    "ViT-Ti": vit,
    "ResNet-20": resnet,
}


def train(task: Task, rule: wmkp.Rule, every: int, seeds: list[int], steps: int) -> Iterator[dict[str, float]]:
    """Yields the result of each seed. All seeds share one compiled step."""
    examples = jax.tree.map(jnp.asarray, task.data.train)
    count = len(jax.tree.leaves(examples)[0])
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[: task.batch], x), examples)
    made = wmkp.make_steps(task.loss_fn, rule, task.optimizer, params, batch, model_state=model_state)

    @partial(jax.jit, donate_argnums=0)
    def step(state: wmkp.TrainState, examples: Any, rows: jax.Array) -> Any:
        state, metrics = made.engaged_step(state, jax.tree.map(lambda x: x[rows], examples))
        return state, metrics["loss"]

    score = jax.jit(task.score)
    for seed in seeds:
        key, order = jax.random.key(seed), np.random.default_rng(seed)
        state = made.init(jax.random.fold_in(key, 1), *task.init(key))
        begin, rows = time.perf_counter(), np.zeros(0, np.int64)
        for i in range(steps):
            if len(rows) < task.batch:
                rows = order.permutation(count)
            state, loss = step(state, examples, rows[: task.batch])
            rows = rows[task.batch :]
            if every and (i + 1) % every == 0:
                state, _ = made.mirror_step(state)
        result = {"seed": seed, "train_loss": float(loss), "seconds": time.perf_counter() - begin}
        yield result | test(task, score, state, rule)


def test(task: Task, score: Any, state: wmkp.TrainState, rule: wmkp.Rule) -> dict[str, float]:
    """Returns the result on the test set, and the largest matrix angle."""
    size, sums = 256, np.zeros(3)
    total = len(jax.tree.leaves(task.data.test)[0])
    for start in range(0, total, size):
        part = jax.tree.map(lambda x, start=start: x[start : start + size], task.data.test)
        sums += np.array([float(x.sum()) for x in score(state.params, state.model_state, part)])
    value = sums[0] / sums[2] if task.unit == "nats" else 100 * sums[1] / sums[2]
    if rule.backward is None:
        return {"value": float(value)}
    angles = wmkp.matrix_angles(state.params, state.feedback)
    return {"value": float(value), "worst_angle": float(max(angles.values()))}


PATH = benchmarks.RESULTS / "mirrors.json"


def stored() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.exists() else {"tasks": {}}


def run(args: Args) -> None:
    """Trains the missing runs, one seed after another, and stores each result."""
    for name in args.tasks or TASKS:
        task = None
        for rule in args.rules:
            there = [r["seed"] for r in stored()["tasks"].get(name, {}).get("rules", {}).get(rule, [])]
            seeds = [seed for seed in range(args.seeds) if args.quick or seed not in there]
            if not seeds:
                continue
            task = task or TASKS[name](args.data_dir)
            make, every = RULES[rule]
            seeds = [seed for seed in seeds if seed < task.seeds]
            for result in train(task, make(), every, seeds, 2 if args.quick else task.steps):
                print(name, rule, result, flush=True)
                if not args.quick:
                    keep(name, task, rule, result)


def keep(name: str, task: Task, rule: str, result: dict[str, float]) -> None:
    """Adds a result to the file, with the versions and the machine of this run."""
    tasks = stored()["tasks"]
    entry = tasks.setdefault(name, {"about": task.about, "unit": task.unit, "rules": {}})
    entry["rules"].setdefault(rule, []).append(result)
    benchmarks.save("mirrors", {"tasks": tasks})


MARGIN = {"% wrong": 1.0, "nats": 0.03}


def verdict(unit: str, bp: list[float], ours: list[float]) -> bool:
    """Whether the mean over seeds is at most the result of BP's worst seed plus the margin."""
    return statistics.fmean(ours) <= max(bp) + MARGIN[unit]


def table() -> str:
    """The stored results as a Markdown table."""
    tasks = stored()["tasks"]
    rules = [rule for rule in RULES if any(rule in task["rules"] for task in tasks.values())]
    lines = [["task", *rules], ["---", *["---:"] * len(rules)]]
    for name in TASKS:
        if name not in tasks:
            continue
        task, cells = tasks[name], []
        bp = [r["value"] for r in task["rules"].get("BP", [])]
        for rule in rules:
            found = sorted(task["rules"].get(rule, []), key=lambda r: r["seed"])
            values = [r["value"] for r in found]
            digits = 3 if task["unit"] == "nats" else 1
            cell = ", ".join(f"{v:.{digits}f}" for v in values) or "-"
            cells.append(cell + ("" if not values or not bp or verdict(task["unit"], bp, values) else " (behind)"))
        lines.append([f"{task['about']} ({task['unit']})", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(args: Args) -> None:
    if not args.print:
        run(args)
    print(table())


if __name__ == "__main__":
    main(tyro.cli(Args))
