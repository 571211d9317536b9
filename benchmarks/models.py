"""The models of the speed benchmarks, each with a loss, an optimizer and a batch of random data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from wmkp.experiments.models.lenet import LeNet
from wmkp.experiments.models.resnet import ResNet18, ResNet20, ResNet50
from wmkp.experiments.models.transformer import ViT


class Dense(nn.Module):
    """784-500-10, ReLU."""

    hidden: int = 500
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes, name="output")(x)


class Case(NamedTuple):
    """A model to train, with its loss, optimizer and data.

    Attributes:
      loss_fn, params, model_state, optimizer: the arguments of ``wmkp.make_steps``.
      batch: images and labels, or other data for the loss.
    """

    loss_fn: Callable[..., Any]
    params: Any
    model_state: Any
    optimizer: optax.GradientTransformation
    batch: Any


def sgd(rate: Any = 0.1) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and weight decay 1e-4."""
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def adamw(rate: Any = 1e-3) -> optax.GradientTransformation:
    """AdamW with weight decay 0.05."""
    return optax.adamw(rate, weight_decay=0.05)


ADAMW, SGD = adamw(), sgd()

# Model (a function of classes and dtype), image side, channels, classes, optimizer; whether it takes a training flag.
MODELS: dict[str, tuple[Callable[..., nn.Module], int, int, int, Any, bool]] = {
    "MLP 784-500-10": (lambda classes, dtype: Dense(num_classes=classes), 28, 1, 10, SGD, False),
    "LeNet": (lambda classes, dtype: LeNet(classes, dtype), 32, 1, 10, SGD, False),
    "ResNet-20": (lambda classes, dtype: ResNet20(classes, dtype=dtype), 32, 3, 10, SGD, True),
    "ResNet-18": (lambda classes, dtype: ResNet18(classes, dtype=dtype), 224, 3, 1000, SGD, True),
    "ResNet-50": (lambda classes, dtype: ResNet50(classes, dtype=dtype), 224, 3, 1000, SGD, True),
    "ViT-Ti": (lambda classes, dtype: ViT(classes, dtype=dtype), 224, 3, 1000, ADAMW, False),
    "ViT-Ti, patches of 7": (lambda classes, dtype: ViT(classes, patch=7, dtype=dtype), 28, 1, 10, ADAMW, False),
}


def make(
    name: str,
    batch_size: int,
    dtype: Any = jnp.float32,
    size: int | None = None,
    channels: int | None = None,
    classes: int | None = None,
) -> Case:
    """Makes a case of ``MODELS``. The arguments can change the image size and the number of classes."""
    build, own_side, own_channels, own_classes, optimizer, normalized = MODELS[name]
    side, channels, classes = size or own_side, channels or own_channels, classes or own_classes
    model, mode = build(classes, dtype), {"train": True} if normalized else {}
    x_key, label_key, init_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (batch_size, side, side, channels))
    batch = {"image": x, "label": jax.random.randint(label_key, (batch_size,), 0, classes)}
    variables = dict(jax.jit(lambda key: model.init(key, x[:1], **mode))(init_key))
    return Case(loss_of(model, mode), variables.pop("params"), variables, optimizer, batch)


def loss_of(model: nn.Module, mode: dict[str, bool]) -> Callable[..., Any]:
    """Returns the cross-entropy loss in the form that ``wmkp.make_steps`` takes."""

    def loss_fn(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(variables, batch["image"], **mode, mutable=list(model_state))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), (model_state, {})

    return loss_fn


class Plain(NamedTuple):
    """The training state of backprop."""

    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array


def start(case: Case) -> Plain:
    """Returns backprop's initial state, which shares no array with the case."""
    params, model_state = jax.tree.map(jnp.copy, (case.params, case.model_state))
    return Plain(params, model_state, case.optimizer.init(params), jax.random.key(0))


def backprop_step(case: Case) -> tuple[Callable[[Plain, Any], tuple[Plain, jax.Array]], Plain]:
    """Returns the reference step (``jax.value_and_grad`` and the optimizer), not yet compiled, and an initial state.

    The loss takes a random key, so the step splits one, as an engaged step does.
    """

    def step(state: Plain, batch: Any) -> tuple[Plain, jax.Array]:
        key, loss_key = jax.random.split(state.key)
        gradient = jax.value_and_grad(case.loss_fn, has_aux=True)
        (loss, (model_state, _)), grads = gradient(state.params, state.model_state, batch, loss_key)
        updates, opt_state = case.optimizer.update(grads, state.opt_state, state.params)
        return Plain(optax.apply_updates(state.params, updates), model_state, opt_state, key), loss

    return step, start(case)


def chained(step: Callable[..., tuple[Any, Any]], state: Any, *args: Any) -> Callable[[], Any]:
    """Returns a function that takes one step and waits for it.

    Each call starts from the last state, so the state can be donated.
    """
    box = [state]

    def call() -> Any:
        box[0], out = jax.block_until_ready(step(box[0], *args))
        return out

    return call
