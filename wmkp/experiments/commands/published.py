"""The NumPy experiments published with Akrout et al. (2019), with their quirks, and variants without them."""

import contextlib
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import wmkp
from wmkp.experiments.config import InputError
from wmkp.experiments.data import datasets as data
from wmkp.experiments.data import records
from wmkp.experiments.data.datasets import Dataset
from wmkp.experiments.runs import checkpoints

BATCH = 128
HIDDEN = {"mnist": 500, "cifar10": 1000}
EPOCHS = 400
NOISE = 0.05  # the mirror's noise is uniform in [-NOISE, NOISE]
MIRROR_RATE = 0.01  # eta_B, for the sum over a batch
EXAMPLES = 128  # the number of examples whose delta angles are measured one by one
EVERY_UNTIL, EVERY = 20, 10  # evaluations: after each of the first epochs, then after every tenth


class Variant(NamedTuple):
    """One of the published experiments, or a variant of one.

    Attributes:
      rule: its key in ``config.RULES``.
      learning_rate: of W; a bias gets a 128th of it (its gradient is divided by the batch twice).
      title: what the variant changes.
      mirror: "published": uniform noise, sigmoid response, bias kept, no decay of B; "decay": the same, with the decay
        at which B settles at W^T; "linear": Gaussian noise, a linear response, as many samples, rate 0.1; "default": 2,383 samples; "exact":
        orthogonal noise, B is the estimate.
      shuffled: whether each epoch has its own order, instead of the dataset's.
      weight_decay: lambda of W and B.
      jpeg: the quality at which ``through_jpeg`` first compresses all images, or None.
    """

    rule: str
    learning_rate: float
    title: str = "as published"
    mirror: str = "published"
    shuffled: bool = False
    weight_decay: float = 0.0
    jpeg: int | None = None


PUBLISHED = {
    "bp": Variant("bp", 0.2),
    "fa": Variant("fa", 0.2),
    "wm": Variant("wm", 0.05),
    "kp": Variant("kp", 0.3),
}
MENDED = {
    "bp": PUBLISHED["bp"],
    "bp-shuffled": PUBLISHED["bp"]._replace(title="shuffled", shuffled=True),
    "kp": PUBLISHED["kp"],
    "kp-shuffled": PUBLISHED["kp"]._replace(title="shuffled", shuffled=True),
    "kp-decay": PUBLISHED["kp"]._replace(title="weight decay 1e-4 of W and B", weight_decay=1e-4),
    "kpm": PUBLISHED["kp"]._replace(title="B from an exact mirror", rule="kpm"),
    "wm": PUBLISHED["wm"],
    "wm-shuffled": PUBLISHED["wm"]._replace(title="shuffled", shuffled=True),
    "wm-decay": PUBLISHED["wm"]._replace(title="B decays, calibrated to settle at W^T", mirror="decay"),
    "wm-linear": PUBLISHED["wm"]._replace(title="Gaussian noise, 128 samples, rate 0.1", mirror="linear"),
    "wm-default": PUBLISHED["wm"]._replace(title="Gaussian noise, 2,383 samples, rate 0.1", mirror="default"),
    "wm-exact": PUBLISHED["wm"]._replace(title="orthogonal noise: exact", mirror="exact"),
}
JPEG = {
    "bp": PUBLISHED["bp"],
    **{
        f"bp-jpeg{quality}": PUBLISHED["bp"]._replace(title=f"through JPEG once more, quality {quality}", jpeg=quality)
        for quality in (75, 50, 25)
    },
}


class Epoch(NamedTuple):
    """A line of a curve, with the published names of columns; NaN where there is no B.

    A delta angle is that of one example: the first of the training set, then the mean and the standard deviation over
    the first ``EXAMPLES``.
    """

    epoch: int
    train_loss: float
    test_accuracy_percent: float
    delta_angle_hidden_deg: float
    delta_angle_hidden_mean_deg: float
    delta_angle_hidden_sd_deg: float
    matrix_angle_W2_deg: float


def load(name: str, data_dir: Path | None) -> Dataset:
    """A dataset in its published order, if that can be recovered.

    TFDS sorts examples by an MD5 of their split and number. This undoes the sorting. A copy of CIFAR-10 whose ids show
    another order stays in that order.
    """
    dataset = data.load(name, data_dir, max_bad=0.0)  # leaving out one example would shift all others
    if name == "cifar10" and not as_tfds_has_it(data.builder(name, data_dir)):
        return dataset
    return dataset._replace(train=unhashed(dataset.train, "train"), test=unhashed(dataset.test, "test"))


def as_tfds_has_it(opened: Any) -> bool:
    """Whether a copy of CIFAR-10 begins with the same example as TFDS's, by its number in the published order."""
    first = records.open_split(opened, "train")[0]
    return first.get("id") == f"train_{_hashed('train', opened.info.splits['train'].num_examples)[0]:05d}".encode()


def unhashed(examples: data.Examples, split: str) -> data.Examples:
    """Undoes TFDS's order of examples."""
    places = np.argsort(_hashed(split, len(examples["label"])))
    return {key: x[places] for key, x in examples.items()}


def _hashed(split: str, examples: int) -> list[int]:
    """The numbers of a split's examples in the order in which TFDS keeps them."""
    from tensorflow_datasets.core.hashing import Hasher

    return sorted(range(examples), key=Hasher(split).hash_key)


def through_jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Images, uint8 (examples, height, width, 3), saved as JPEG of this quality and read again.

    The blocks of 8 begin 4 pixels outside the image. With blocks at the edge, images that have been through the same
    JPEG before would not change.
    """

    def once(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(np.pad(image, ((4, 4), (4, 4), (0, 0)), "edge")).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))[4:-4, 4:-4]

    return np.stack([once(image) for image in images])


def make_rule(variant: Variant, fan_in: int, fan_out: int) -> wmkp.Rule:
    """The rule, with B's initial variance 1 / (fan_in + fan_out), as W's."""
    scale = math.sqrt(fan_in / (fan_in + fan_out))
    if variant.rule == "wm" and variant.mirror in ("linear", "default"):
        samples = BATCH if variant.mirror == "linear" else None
        return wmkp.weight_mirror("gaussian", num_samples=samples, target_angle=6.0, rate=0.1, scale=scale)
    if variant.rule == "wm" and variant.mirror == "exact":
        return wmkp.weight_mirror(scale=scale)
    rules: dict[str, Callable[[], wmkp.Rule]] = {
        "bp": wmkp.backprop,
        "fa": lambda: wmkp.feedback_alignment(scale),
        "kp": lambda: wmkp.kolen_pollack(scale),
        "kpm": lambda: wmkp.kolen_pollack(scale, start="mirror"),
        "wm": lambda: wmkp.weight_mirror("uniform", NOISE / math.sqrt(3), BATCH, jax.nn.sigmoid, "kept", scale=scale),
    }
    return rules[variant.rule]()


def mirror_optimizer(variant: Variant, rule: wmkp.Rule) -> optax.GradientTransformation | None:
    """The published mirror's optimizer, which adds x y^T summed over the batch; None for the library's default."""
    if variant.rule != "wm" or variant.mirror not in ("published", "decay"):
        return None
    decay = wmkp.mirror_gain(rule) if variant.mirror == "decay" else 0.0
    return wmkp.updates.weight_mirror(MIRROR_RATE * BATCH, decay)


def forward(params: Any, images: jax.Array) -> jax.Array:
    """Logits (batch, classes) of images, uint8 (batch, ...): pixels over 255, one sigmoid layer."""
    x = images.reshape(len(images), -1) / jnp.float32(255)
    y = jax.nn.sigmoid(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return y @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """Sigmoid cross entropy of each output by itself, summed over outputs, averaged over the batch."""
    logits = forward(params, batch["image"])
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1).mean(), (model_state, {})


def initial(key: jax.Array, sizes: tuple[int, int, int]) -> Any:
    """W and b, Gaussian with variance 1 / (fan_in + fan_out)."""
    params = {}
    for name, fan_in, fan_out in (("hidden", *sizes[:2]), ("output", *sizes[1:])):
        key, w_key, b_key = jax.random.split(key, 3)
        std = 1 / math.sqrt(fan_in + fan_out)
        params[name] = {
            "kernel": std * jax.random.normal(w_key, (fan_in, fan_out)),
            "bias": std * jax.random.normal(b_key, (fan_out,)),
        }
    return params


def lit(batches: np.ndarray) -> np.ndarray:
    """The pixels of each batch (steps, batch, pixels) that move weights: sorted indices (steps, most).

    A pixel that is zero in all images of a batch gives its weights no gradient, so the hidden layer's two products can
    skip it. A batch with fewer such pixels than the most gets some zero pixels too.
    """
    shines = batches.any(1)
    return np.sort(np.argsort(~shines, 1, kind="stable")[:, : int(shines.sum(1).max())], 1)


def with_kernel(state: wmkp.TrainState, kernel: jax.Array) -> wmkp.TrainState:
    """The state with another hidden kernel."""
    return state._replace(params={**state.params, "hidden": {**state.params["hidden"], "kernel": kernel}})


class Trial(NamedTuple):
    """A variant in training.

    Attributes:
      state: the TrainState. B has been mirrored if there is a mirror.
      train: the training set, on the device. If all epochs have the same batches: in batches, with only the pixels that
        move weights, and their indices.
      run_epoch: ``(state, train, epoch) -> (state, mean loss)``, an epoch in one compiled call; donates the state.
      measure: ``(state, examples, test) -> (test accuracy, delta angle, its mean, its deviation, matrix angle)``, percent
        and degrees; the delta angle is the first example's, the mean and the deviation all examples'.
    """

    state: wmkp.TrainState
    train: Any
    run_epoch: Callable[..., tuple[wmkp.TrainState, jax.Array]]
    measure: Callable[..., tuple[jax.Array, ...]]


def run(
    variant: Variant,
    dataset: Dataset,
    hidden: int,
    epochs: int,
    seed: int = 0,
    report: Callable[[list[Epoch]], None] = lambda rows: None,
    directory: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Epoch]:
    """Trains one variant and returns its curve, one line for each evaluation.

    Args:
      variant, dataset, hidden, seed: as ``start``.
      epochs: how many.
      report: called with all lines so far after each evaluation.
      directory: for checkpoints, one every ``EVERY`` epochs. The curve resumes from its last checkpoint.
      stopped: called after each epoch. If it returns True, the curve is saved and ends.

    Raises:
      InputError: ``directory`` is of another run, or as ``checkpoints`` says.
    """
    if variant.jpeg is not None:
        train, test = (
            {**split, "image": through_jpeg(split["image"], variant.jpeg)} for split in (dataset.train, dataset.test)
        )
        dataset = dataset._replace(train=train, test=test)
    some, test = jax.device_put((jax.tree.map(lambda x: x[:EXAMPLES], dataset.train), dataset.test))
    state, train, run_epoch, measure = start(variant, dataset, hidden, seed)
    rows: list[Epoch] = []
    made = {"variant": variant._asdict(), "seed": seed}
    with contextlib.ExitStack() as stack:
        manager = None if directory is None else stack.enter_context(checkpoints.opened(directory, keep=1))
        if manager is not None and manager.latest_step() is not None:
            state, kept = checkpoints.restore(manager, state)
            there: dict[str, Any] = {**kept["variant"], "seed": kept["seed"]}
            here: dict[str, Any] = {**variant._asdict(), "seed": seed}
            if changed := [f"{key} was {there.get(key)} and is {x}" for key, x in here.items() if there.get(key) != x]:
                said = "; ".join(changed)
                raise InputError(f"{directory} was started with other settings: {said}; use another --out")
            rows = [Epoch(*row) for row in kept["rows"] if row[0] < epochs]
        for epoch in range(int(state.step) // (len(dataset.train["label"]) // BATCH), epochs):
            state, loss = jax.block_until_ready(run_epoch(state, train, epoch))
            last = epoch == epochs - 1
            if epoch < EVERY_UNTIL or (epoch + 1) % EVERY == 0 or last:
                rows.append(Epoch(epoch, *(float(x) for x in jax.device_get((loss, *measure(state, some, test))))))
                report(rows)
            stop = stopped()
            if manager is not None and ((epoch + 1) % EVERY == 0 or last or stop):
                checkpoints.save_in_turn(manager, state, {**made, "rows": [list(row) for row in rows]})
            if stop:
                break
    return rows


def start(variant: Variant, dataset: Dataset, hidden: int, seed: int = 0) -> Trial:
    """A variant before its first epoch.

    Args:
      variant: what to train.
      dataset: images, uint8, and labels, in the order that they are trained in.
      hidden: the width of the hidden layer.
      seed: of W, B, the mirror's noise and the shuffled order.
    """
    steps, pixels = len(dataset.train["label"]) // BATCH, dataset.train["image"][0].size

    def batches(train: Any) -> Any:
        return jax.tree.map(lambda x: x[: steps * BATCH].reshape(steps, BATCH, *x.shape[1:]), train)

    train = {"image": dataset.train["image"].reshape(-1, pixels), "label": dataset.train["label"]}
    if not variant.shuffled:
        train = batches(train)
        # Batches of CIFAR-10 use every pixel, so nothing is picked out.
        if not variant.weight_decay and (places := lit(train["image"])).shape[1] < pixels:
            train["pixels"] = places
            train["image"] = np.take_along_axis(train["image"], places[:, None], 2)
    train = jax.device_put(train)
    rule = make_rule(variant, hidden, dataset.num_classes)
    params_key, state_key, order_key = jax.random.split(jax.random.key(seed), 3)
    params = initial(params_key, (pixels, hidden, dataset.num_classes))
    slow_biases = optax.masked(optax.scale(1 / BATCH), lambda tree: jax.tree.map(lambda x: x.ndim == 1, tree))
    decay = optax.add_decayed_weights(variant.weight_decay, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    optimizer = optax.chain(slow_biases, decay, optax.sgd(variant.learning_rate))
    kernel = params["hidden"]["kernel"]
    params["hidden"]["kernel"] = kernel[: train["image"].shape[-1]]
    some = {"image": np.zeros((BATCH, train["image"].shape[-1]), np.uint8), "label": np.zeros(BATCH, np.int32)}
    made = wmkp.make_steps(loss_fn, rule, optimizer, params, some, mirror_optimizer=mirror_optimizer(variant, rule))
    mirrors = rule.mirror is not None and rule.mirror.each_step
    period = 1 if variant.mirror == "exact" else steps  # one epoch of mirror batches before the first of training
    state = with_kernel(made.init(state_key, params, mirror_steps=period if mirrors else None), kernel)

    def step(state: wmkp.TrainState, batch: Any) -> tuple[wmkp.TrainState, jax.Array]:
        kernel, some = state.params["hidden"]["kernel"], batch.get("pixels")
        batch = {"image": batch["image"], "label": batch["label"]}
        if some is not None:
            state = with_kernel(state, kernel[some])
        state, metrics = made.engaged_step(state, batch)
        if mirrors:
            state, _ = made.mirror_step(state)
        if some is not None:
            moved = kernel.at[some].set(state.params["hidden"]["kernel"], unique_indices=True)
            state = with_kernel(state, moved)
        return state, metrics["loss"]

    @partial(jax.jit, donate_argnums=0)
    def run_epoch(state: wmkp.TrainState, train: Any, epoch: jax.Array) -> tuple[wmkp.TrainState, jax.Array]:
        if variant.shuffled:
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(train["label"]))
            train = batches(jax.tree.map(lambda x: x[order], train))
        state, losses = jax.lax.scan(step, state, train)
        return state, losses.mean()

    def delta_angle(state: wmkp.TrainState, one: Any) -> jax.Array:
        one = jax.tree.map(lambda x: x[None], one)
        angles = wmkp.delta_angles(loss_fn, rule, state.params, state.feedback, None, one, state.key, has_aux=True)
        return angles["hidden/kernel"]

    @jax.jit
    def measure(state: wmkp.TrainState, some: Any, test: Any) -> tuple[jax.Array, ...]:
        right = forward(state.params, test["image"]).argmax(-1) == test["label"]
        delta = mean = deviation = matrix = jnp.full((), jnp.nan)
        if rule.backward is not None:
            each = jax.vmap(lambda one: delta_angle(state, one))(some)
            delta, mean, deviation = each[0], jnp.nanmean(each), jnp.nanstd(each)
            matrix = wmkp.matrix_angles(state.params, state.feedback)["output/kernel"]
        return 100 * right.mean(), delta, mean, deviation, matrix

    return Trial(state, train, run_epoch, measure)
