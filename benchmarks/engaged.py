"""Compares an engaged step with a backprop step: time, peak memory, products and copies of the compiled programs.

Backprop is ``jax.value_and_grad`` with the same model, optimizer and batch. Both are compiled with a donated state. On CPUs
wmkp computes some convolutions' weight gradients by patches, but XLA's backprop does not. So convolutional networks are also
compared with backprop by patches: an engaged step with B = W.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import benchmarks
import wmkp
from benchmarks import Part, Row, Settings, models, programs

# A weight mirror's engaged step is the same program as feedback alignment's. Kolen-Pollack's does not depend on its start.
RULES = {"FA, WM": wmkp.feedback_alignment, "SS": wmkp.sign_symmetry, "KP": wmkp.kolen_pollack}

# Batch, seconds of measurement, and rules. Last: the side of the images when the scripts are tried out.
SIZES: dict[str, tuple[int, float, tuple[str, ...], int]] = {
    "MLP 784-500-10": (128, 12, tuple(RULES), 28),
    "ResNet-50": (4, 60, ("FA, WM", "KP"), 32),
    "ResNet-20": (128, 40, tuple(RULES), 32),
    "ViT-Ti": (32, 120, tuple(RULES), 32),
    "ResNet-18": (32, 160, tuple(RULES), 32),
}


def parts(settings: Settings) -> dict[str, Part]:
    """One part for each model."""
    return {name: partial(measure, name, settings) for name in SIZES}


def measure(name: str, settings: Settings) -> Iterator[Row]:
    """Times all rules of a model, in turns with backprop."""
    batch_size, seconds, rules, side = SIZES[name]
    case = models.make(name, batch_size)
    if settings.quick:
        case, seconds = models.make(name, 2, size=side), 0.0
    step, plain_state = models.backprop_step(case)
    plain = jax.jit(step, donate_argnums=0).lower(plain_state, case.batch).compile()
    plain_bytes = programs.tree_bytes(plain_state)
    calls = {"BP": models.chained(plain, plain_state, case.batch)}
    compiled, own_bytes, b_bytes = {}, {}, {}
    for rule in rules:
        steps = wmkp.make_steps(
            case.loss_fn, RULES[rule](), case.optimizer, case.params, case.batch, model_state=case.model_state
        )
        state = steps.init(jax.random.key(0), case.params, case.model_state)
        compiled[rule] = steps.engaged_step.lower(state, case.batch).compile()
        b_bytes[rule] = programs.tree_bytes(state.feedback)
        own_bytes[rule] = programs.tree_bytes(state) - plain_bytes
        calls[rule] = models.chained(compiled[rule], state, case.batch)
    convolutions = name.startswith("ResNet") and jax.default_backend() == "cpu"
    if convolutions:
        transported, state = with_patches(case)
        by_patches = jax.jit(transported, donate_argnums=0).lower(state, case.batch).compile()
        calls["BP by patches"] = models.chained(by_patches, state, case.batch)
    taken = benchmarks.in_turns(calls, seconds, most=200)
    rate = pass_rate(2**20 if settings.quick else 2**26)
    for rule in rules:
        at = f"batch {batch_size}"
        if rule == "KP":  # each step reads and writes B and its optimizer's state, and reads B's learning signal
            moved = 2 * own_bytes[rule] + b_bytes[rule]
            share = moved / rate / statistics.median(taken["BP"])
            at += f"; B's update moves {moved / 1e6:.0f} MB, {share:.3f} of BP's step at the speed of a pass"
        yield benchmarks.ratio(f"{name}: {rule} over BP, time", taken, rule, "BP", at, at_most=1.02)
        if convolutions:
            note = "B = W in an engaged step: the same weight gradients"
            yield benchmarks.ratio(
                f"{name}: {rule} over BP by patches, time", taken, rule, "BP by patches", note, at_most=1.02
            )
        ours, theirs = programs.peak_bytes(compiled[rule]), programs.peak_bytes(plain)
        held = ""
        if convolutions:
            held = f"over BP by patches' and B's {ours / (programs.peak_bytes(by_patches) + own_bytes[rule]):.4f}"
        yield Row(
            f"{name}: {rule}, peak bytes over BP's and B's",
            ours / (theirs + own_bytes[rule]),
            at_most=1.001,  # allows a few hundred bytes for the table of result addresses and for alignment
            note=held,
            detail={"bytes": ours, "backprop": theirs, "B and its optimizer state": own_bytes[rule]},
        )
        mine, its = programs.products(compiled[rule]), programs.products(plain)
        yield Row(
            f"{name}: {rule}, products over BP's",
            sum(mine.values()) / sum(its.values()),
            at_most=1.0,
            detail={"products": mine, "backprop": its},
        )
        mine_copies, its_copies = (programs.weight_copies(c, case.params) for c in (compiled[rule], plain))
        yield Row(
            f"{name}: {rule}, copies of W or B beyond BP's",
            mine_copies - its_copies,
            at_most=0,
            detail={"copies": mine_copies, "backprop": its_copies},
        )


def pass_rate(entries: int) -> float:
    """Bytes per second, read and written, of an in-place pass over this many float32 numbers."""
    add = models.chained(jax.jit(lambda x: (x + 1, 0), donate_argnums=0), jnp.ones(entries))
    (seconds,) = benchmarks.in_turns({"pass": add}, 0, least=5).values()
    return 8 * entries / statistics.median(seconds)


def with_patches(case: models.Case) -> tuple[Any, models.Plain]:
    """Backprop as an engaged step with B = W. Returns the step, not compiled, and its state."""
    rule = wmkp.feedback_alignment()
    key = jax.random.key(0)
    feedback = wmkp.init_feedback(key, rule, case.loss_fn, case.params, case.model_state, case.batch, key)
    first = [b is None for b in jax.tree.leaves(feedback, is_leaf=lambda b: b is None)]
    structure = jax.tree.structure(case.params)

    def step(state: models.Plain, batch: Any) -> tuple[models.Plain, jax.Array]:
        leaves = jax.tree.leaves(state.params)
        back = structure.unflatten([None if skip else w for skip, w in zip(first, leaves, strict=True)])
        key, loss_key = jax.random.split(state.key)
        gradient = wmkp.value_and_grad(case.loss_fn, rule, has_aux=True)
        (loss, (model_state, _)), (grads, _) = gradient(state.params, back, state.model_state, batch, loss_key)
        updates, opt_state = case.optimizer.update(grads, state.opt_state, state.params)
        return models.Plain(optax.apply_updates(state.params, updates), model_state, opt_state, key), loss

    return step, models.start(case)
