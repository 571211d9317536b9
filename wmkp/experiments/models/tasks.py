"""A config's model, loss, rule and optimizer, as pure functions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import wmkp
from wmkp.experiments.config import InputError, Train
from wmkp.experiments.data.datasets import IGNORED
from wmkp.experiments.models.lenet import LeNet
from wmkp.experiments.models.mlp import MLP
from wmkp.experiments.models.residual import ResidualBlock, ResidualMLP
from wmkp.experiments.models.resnet import BasicBlock, Bottleneck, ResNet, ResNet18, ResNet20, ResNet50, ResNet56
from wmkp.experiments.models.transformer import Block, Decoder, ViT

RESNETS = {"resnet18": ResNet18, "resnet20": ResNet20, "resnet50": ResNet50, "resnet56": ResNet56}
BLOCKS = (Block, ResidualBlock, BasicBlock, Bottleneck)  # modules that add to a residual stream
READOUT = "output"  # the name of every model's last layer


class Task(NamedTuple):
    """A model and its loss.

    Attributes:
      init: ``(key, batch) -> (params, model_state)``, model_state a dict of Flax's other collections.
      loss_fn: as ``wmkp.make_steps`` takes it; its metrics have "error", the percentage of wrong answers.
      score: ``(params, model_state, batch) -> (loss, wrong, labels)``, sums over a batch in evaluation, without label
        smoothing, and the count of each label. Examples labelled ``IGNORED`` are left out.
      stream: ``(params, model_state, batch) -> {block: rms}``, the root mean square of each residual block's output;
        empty for a model without such blocks.
    """

    init: Callable[[jax.Array, Any], tuple[Any, Any]]
    loss_fn: Callable[..., Any]
    score: Callable[[Any, Any, Any], tuple[jax.Array, jax.Array, jax.Array]]
    stream: Callable[[Any, Any, Any], dict[str, jax.Array]]


def make_task(config: Train, shape: tuple[int, ...], num_classes: int, mean: Any, std: Any) -> Task:
    """The task of a config.

    Args:
      shape: of an example, (height, width, channels) or (length,).
      num_classes: of labels, or the size of the vocabulary.
      mean, std: of the pixels, by channel.
    """
    model = make_model(config, shape, num_classes)

    def inputs(batch: Any) -> jax.Array:
        if "tokens" in batch:
            return jnp.maximum(batch["tokens"][:, :-1], 0)
        return (batch["image"].astype(jnp.float32) - mean) / std

    def apply(params: Any, model_state: Any, batch: Any, train: bool) -> tuple[jax.Array, Any]:
        x = inputs(batch)
        mode: dict[str, Any] = {"train": train} if isinstance(model, ResNet) else {}
        variables = {"params": params, **model_state}
        if not train:
            logits: Any = model.apply(variables, x, **mode)
            return logits, model_state
        logits, model_state = model.apply(variables, x, **mode, mutable=list(model_state))
        return logits, model_state

    def labels_of(batch: Any) -> jax.Array:
        labels: jax.Array = batch["tokens"][:, 1:] if "tokens" in batch else batch["label"]
        return labels

    def init(key: jax.Array, batch: Any) -> tuple[Any, Any]:
        x = batch["tokens"][:1, :-1] if "tokens" in batch else jnp.zeros((1, *batch["image"].shape[1:]))
        variables = dict(jax.jit(model.init)(key, x))
        return variables.pop("params"), variables

    def loss_fn(params: Any, model_state: Any, batch: Any, key: jax.Array) -> Any:
        logits, model_state = apply(params, model_state, batch, train=True)
        labels = labels_of(batch)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), config.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        error = 100 * (logits.argmax(-1) != labels).mean()
        return loss, (model_state, {"error": error})

    def score(params: Any, model_state: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, _ = apply(params, model_state, batch, train=False)
        labels = labels_of(batch)
        counts = labels != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        wrong = (logits.argmax(-1) != labels) & counts
        often = jnp.zeros(num_classes, jnp.int32).at[jnp.maximum(labels, 0)].add(counts)
        return jnp.where(counts, losses, 0).sum(), wrong.sum(), often

    def stream(params: Any, model_state: Any, batch: Any) -> dict[str, jax.Array]:
        mode: dict[str, Any] = {"train": True} if isinstance(model, ResNet) else {}
        _, found = model.apply(
            {"params": params, **model_state},
            inputs(batch),
            **mode,
            capture_intermediates=lambda module, method: isinstance(module, BLOCKS) and method == "__call__",
            mutable=[*model_state, "intermediates"],
        )
        blocks: Any = found.get("intermediates", {})
        return {name: jnp.sqrt(jnp.mean(jnp.square(kept["__call__"][0]))) for name, kept in blocks.items()}

    return Task(init, loss_fn, score, stream)


def make_model(config: Train, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The Flax model of a config.

    Raises:
      InputError: the model cannot take examples of this shape.
    """
    if (config.model == "decoder") != (len(shape) == 1):
        raise InputError(
            f"--model {config.model} cannot read --dataset {config.dataset}: decoder is for text (characters), all others are for images"
        )
    if config.model == "lenet" and shape[:2] != (32, 32):
        raise InputError(
            f"--model lenet needs images of 32x32, and these are {shape[0]}x{shape[1]}; add --image-size 32"
        )
    if config.model == "vit-ti" and (shape[0] % config.patch or shape[1] % config.patch):
        raise InputError(f"--patch must divide the image size, {shape[0]}x{shape[1]}; got {config.patch}")
    dtype = jnp.dtype(config.dtype)
    size = {name: x for name in ("width", "depth") if (x := getattr(config, name)) is not None}
    if config.model in RESNETS:
        features = {} if config.width is None else {"features": config.width}
        return RESNETS[config.model](num_classes, norm_last=config.norm_last, dtype=dtype, **features)
    models: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLP(config.hidden, num_classes, dtype),
        "lenet": lambda: LeNet(num_classes, dtype),
        "vit-ti": lambda: ViT(num_classes, patch=config.patch, dtype=dtype),
        "decoder": lambda: Decoder(num_classes, shape[0], dtype=dtype, **size),
        "residual-mlp": lambda: ResidualMLP(num_classes, dtype=dtype, **size),
    }
    return models[config.model]()


def make_rule(name: str, **mirror: Any) -> wmkp.Rule:
    """The rule of a key of ``RULES``.

    Args:
      name: the key.
      **mirror: arguments of ``weight_mirror``, or of ``mirrored_kolen_pollack``; None leaves the rule's own.
    """
    told = {key: x for key, x in mirror.items() if x is not None}
    rules: dict[str, Callable[[], wmkp.Rule]] = {
        "bp": wmkp.backprop,
        "frozen": wmkp.backprop,  # ``frozen`` stops the gradients of the other layers
        "fa": wmkp.feedback_alignment,
        "ss": wmkp.sign_symmetry,
        "kp": wmkp.kolen_pollack,
        "kpm": partial(wmkp.kolen_pollack, start="mirror"),
        "mkp": partial(wmkp.mirrored_kolen_pollack, **told),
        "wm": partial(wmkp.weight_mirror, **told),
        "frsf": partial(wmkp.sign_symmetry, "fixed"),
        "brsf": partial(wmkp.sign_symmetry, "batch"),
        "kpt": wmkp.kolen_pollack_transported,
        "pfa": wmkp.product_feedback_alignment,
        "dfa": wmkp.direct_feedback_alignment,
        "dkp": wmkp.direct_kolen_pollack,
        "ia": wmkp.information_alignment,
        "sa": wmkp.symmetric_alignment,
        "aa": wmkp.activation_alignment,
        "am": wmkp.activity_mirror,
        "amw": partial(wmkp.activity_mirror, whiten=True),
    }
    return rules[name]()


def is_readout(params: Any) -> Any:
    """Marks the parameters of the readout, in params' structure."""
    return jax.tree_util.tree_map_with_path(lambda path, x: getattr(path[0], "key", None) == READOUT, params)


def frozen(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss with only the readout's parameters free, for an optimizer that decays nothing else."""

    def readout_alone(params: Any, *args: Any) -> Any:
        learns = is_readout(params)
        held = jax.tree.map(lambda yes, x: x if yes else jax.lax.stop_gradient(x), learns, params)
        return loss_fn(held, *args)

    return readout_alone


def make_schedule(config: Train, epoch_steps: int, steps: int) -> optax.Schedule:
    """The learning rate at each update of the weights.

    Args:
      epoch_steps: updates in an epoch.
      steps: updates in the run.
    """
    warmup = round(config.warmup_epochs * epoch_steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1), config.final_rate)
    elif config.schedule == "step":
        drops = {round(epoch * epoch_steps) - warmup: 0.1 for epoch in config.drop_epochs}
        after = optax.piecewise_constant_schedule(config.learning_rate, drops)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: Train, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of W, and of a B that learns. Decay acts on the same entries of both."""
    mask: Any = None if config.decay_all else partial(jax.tree.map, lambda x: x.ndim > 1)
    if config.rule == "frozen":
        mask = is_readout
    if config.optimizer == "adamw":
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=mask)
    else:
        sgd = optax.sgd(schedule, config.momentum or None)
        optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay, mask), sgd)
    if config.accumulate > 1:
        return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def forgotten(config: Train, schedule: optax.Schedule, steps: int) -> float:
    """The share of W - B^T that remains after ``steps`` updates of Kolen-Pollack (eq. 14): prod (1 - eta lambda).

    With momentum mu the rate is eta lambda / (1 - mu).
    """
    rates = jax.vmap(schedule)(jnp.arange(steps))
    momentum = config.momentum if config.optimizer == "sgd" else 0.0
    return math.exp(-float(jnp.sum(rates)) * config.weight_decay / (1 - momentum))
