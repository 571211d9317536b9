"""optax gradient transformations for feedback weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wmkp import checks
from wmkp.law import mirror_gain
from wmkp.rule import Rule, is_float, learning_part, overlay

__all__ = ["calibrated_mirror", "clip_together", "kolen_pollack", "same_hyperparams", "weight_mirror"]


def kolen_pollack(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for B under Kolen-Pollack, made from W's: W - B^T shrinks by (1 - eta lambda) a step.

    W and B receive the same changes, so only weight decay acts on their difference (eq. 14). This holds for SGD with
    momentum and weight decay in its gradient, for AdamW, and for every optimizer that treats each element alone and
    decays linearly. Optimizers for which it cannot hold are tried and refused when B's state is made:

    - a weight's size scales its update (LAMB, LARS, Adafactor's parameter scale);
    - decay is divided by a gradient's moments (Adam with L2 in its gradient);
    - the arrays of a tree influence each other: clipping by the global norm (use ``clip_together``), or skipping steps
      that are not finite (``optax.apply_if_finite``).

    To skip steps, wrap both: ``optax.apply_if_finite(optax.partition({"W": optimizer, "B": kolen_pollack(optimizer)},
    ("W", "B")), 5)`` is an optimizer of the pair (params, feedback).

    Args:
      optimizer: the transformation that updates W, with the same learning rate, decay and momentum.

    Returns:
      A GradientTransformation for the tree of B. Give it ``feedback_signal``. ``Fixed`` parts and constants do not
      change; a random key has None for its change.

    Raises:
      TypeError: ``optimizer`` is no optax transformation; from ``init`` and ``update``, a leaf that is no array.
      ValueError: from ``init``, eq. 14 cannot hold under ``optimizer``, and why; from ``update``, a signal that does
        not match feedback, or a state that is not the optimizer's.

    Example:
      >>> optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
      >>> feedback = {"W": jnp.ones((4, 2))}
      >>> feedback_optimizer = wmkp.updates.kolen_pollack(optimizer)
      >>> state = feedback_optimizer.init(feedback)
      >>> updates, state = feedback_optimizer.update({"W": jnp.ones((4, 2))}, state, feedback)
      >>> feedback = optax.apply_updates(feedback, updates)
    """

    checks.transformation("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def init(feedback: Any) -> Any:
        _check_arrays("feedback", feedback)
        learning = learning_part(feedback)
        with jax.ensure_compile_time_eval():
            _check_holds(optimizer, learning)
        return optimizer.init(learning)

    def update(signal: Any, state: Any, feedback: Any = None, **extra: Any) -> tuple[Any, Any]:
        _check_arrays("signal", signal, floats=True)
        towards, mine = learning_part(signal), None
        if feedback is not None:
            mine = learning_part(feedback)
            checks.alike("signal", towards, mine, "feedback", dtypes=False)
        what, cause = "nothing, but made another structure of its state", None
        try:
            change, after = inner.update(towards, state, mine, **extra)
        except Exception as error:
            what, cause = checks.first_line(error), error
        else:
            given: Any = jax.tree.structure(state)
            if given == jax.tree.structure(after):  # optax 0.2.5 accepts the moments of another tree
                return overlay(_still(signal if feedback is None else feedback), change), after
        raise ValueError(
            f"optimizer raised {what}; call update(signal, state, feedback) with the state that init(feedback) returned"
        ) from cause

    return optax.GradientTransformationExtraArgs(init, update)


def same_hyperparams(opt_state: Any, feedback_opt_state: Any) -> Any:
    """B's optimizer state with W's hyperparameters, as ``optax.inject_hyperparams`` keeps them.

    The engaged step of ``make_steps`` calls it. So a learning rate that you set in ``state.opt_state`` also applies to
    B, and one set only in ``state.feedback_opt_state`` is ignored.

    Args:
      opt_state: W's.
      feedback_opt_state: B's, of the same optimizer by ``kolen_pollack``.
    """
    if type(opt_state) is not type(feedback_opt_state):  # B has several arrays where W has one
        return feedback_opt_state
    if hasattr(feedback_opt_state, "hyperparams"):
        inner = same_hyperparams(opt_state.inner_state, feedback_opt_state.inner_state)
        return opt_state._replace(inner_state=inner)
    if isinstance(feedback_opt_state, dict):
        return {k: same_hyperparams(opt_state[k], b) for k, b in feedback_opt_state.items()}
    if isinstance(feedback_opt_state, tuple):
        parts = [same_hyperparams(w, b) for w, b in zip(opt_state, feedback_opt_state, strict=True)]
        kind = type(feedback_opt_state)
        return kind(*parts) if hasattr(feedback_opt_state, "_fields") else kind(parts)
    return feedback_opt_state


def _still(tree: Any) -> Any:
    """Changes of nothing. A random key has none: nothing can be added to it."""
    no_key = lambda x: not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jnp.zeros_like(x) if no_key(x) else None, tree)


def _check_arrays(name: str, tree: Any, floats: bool = False) -> None:
    """TypeError unless all leaves are arrays (of floating-point numbers)."""
    for where, x in checks.places(name, tree):
        if not checks.is_array(x) or (floats and not is_float(x)):
            kind = "floating-point arrays" if floats else "arrays"
            raise TypeError(f"{where} is {checks.shape(x)}; it must hold only {kind} (or None)")


_TRIALS = 1024  # most steps tried: a warm-up may start at a rate of zero, and MultiSteps waits


def _check_holds(optimizer: optax.GradientTransformation, tree: Any) -> None:
    """Tries the optimizer on small arrays in the tree's structure: the difference of W and B may only shrink."""
    if not jax.tree.leaves(tree):
        return
    try:
        _try(optimizer, tree, jnp.float32)
    except ValueError:  # perhaps only rounding, as when a change is a small difference of large averages
        with jax.enable_x64(True):
            _try(optimizer, tree, jnp.float64)


def _try(optimizer: optax.GradientTransformation, tree: Any, dtype: Any) -> None:
    update: Any = jax.jit(optimizer.update)  # without jit a branch (as in MultiSteps) would be compiled at every step
    random = np.random.default_rng(0)
    small = lambda offset: _small(random, tree, offset, dtype)
    start, b = small(0.0), small(1.0)
    try:
        state_w, state_b = optimizer.init(start), optimizer.init(b)
        try:
            update(start, state_w, start)
        except jax.errors.ConcretizationTypeError:  # it reads values in Python, as a schedule may
            update = optimizer.update
            update(start, state_w, start)
        except TypeError:  # it needs the loss
            update = jax.jit(partial(optimizer.update, value=jnp.ones((), dtype)))
            update(start, state_w, start)
        u, _ = update(start, state_w, start)
        if _traced(u):
            return
        if [x.shape for x in jax.tree.leaves(u)] != [x.shape for x in jax.tree.leaves(start)]:
            raise ValueError(
                "its updates have other shapes than the gradients (one for each example?); use another optimizer"
            )
    except Exception as error:
        raise ValueError(
            "optimizer cannot train Kolen-Pollack's B: tried on small arrays in the structure of B's tree, it raised "
            f"{checks.first_line(error)}. It may use only gradients, parameters and the loss (as value), and must accept "
            "a tree with None where W has no B."
        ) from error
    w, steps, seen = start, [], 0
    for step in range(_TRIALS):
        gradient = small(0.5)
        if step % 2:  # a large one, to make clipping visible
            gradient = jax.tree.map(lambda g: 100 * g, gradient)
        (u, state_w), (v, state_b) = update(gradient, state_w, w), update(gradient, state_b, b)
        u, v = jax.device_get((u, v))
        _check_is_finite(u)
        steps.append((gradient, u))
        moved = False
        for x, y, p, q in zip(*(jax.tree.leaves(t) for t in (u, v, w, b)), strict=True):
            change, difference, size = x - y, p - q, np.max(np.abs(x))
            if size == 0:
                continue
            moved = True
            shrink = float(np.vdot(change, difference)) / max(float(np.vdot(difference, difference)), 1e-30)
            if np.max(np.abs(change - shrink * difference)) > 1e-5 * size:  # well above rounding
                raise ValueError(
                    "optimizer cannot train Kolen-Pollack's B: given the same signal, it changes W and B differently by more than "
                    "a common decay, so W - B^T does not shrink (eq. 14). LAMB, LARS and others scale updates by the size of "
                    "the weights; L2 inside Adam divides the decay by a gradient's moments. Use SGD, momentum, Adam or AdamW."
                )
            if shrink * np.max(np.abs(difference)) > 1e-5 * size or shrink < -2:
                raise ValueError(
                    f"optimizer cannot train Kolen-Pollack's B: a step multiplies W - B^T by {1 + shrink:.6g}, but eq. 14 "
                    "needs it to shrink. Use a learning rate and a weight decay whose product lies between 0 and 2."
                )
        seen += moved
        if seen >= 4:
            break
        w, b = _updated(w, u), _updated(b, v)
    _check_others_do_not_matter(optimizer.init, update, start, steps)


def _check_others_do_not_matter(init: Any, update: Any, start: Any, steps: list[tuple[Any, Any]]) -> None:
    """Checks that an array's updates do not depend on the other arrays of the tree."""
    first = lambda tree: jax.tree.leaves(tree)[0]
    tree, place = {"a": np.zeros_like(first(start)), "w": first(start)}, 1  # at another place in the tree
    try:
        update(tree, init(tree), tree)
    except Exception:  # made only for B's structure (labels, masks)
        tree, place = start, 0
    leaves = jax.tree.leaves(tree)
    for other in (0.0, 1e15, np.nan):  # zero, above any threshold (its square fits float32), not finite
        params, state = tree, init(tree)
        for gradient, expected in steps:
            gradients = [np.full_like(x, other) for x in leaves]
            gradients[place] = first(gradient)
            u, state = update(jax.tree.unflatten(jax.tree.structure(tree), gradients), state, params)
            u = jax.device_get(u)
            params = _updated(params, u)
            _compare_alone(first(expected), jax.tree.leaves(u)[place])


def _updated(params: Any, updates: Any) -> Any:
    """``optax.apply_updates`` for NumPy arrays, which it would turn into JAX's: each keeps its dtype."""
    return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)


def _small(random: np.random.Generator, tree: Any, offset: float, dtype: Any = jnp.float32) -> Any:
    """Small arrays around ``offset``, in the tree's structure."""
    draw = lambda x: random.normal(offset, 1, (3, 4) if x.ndim >= 2 else (4,) * x.ndim)
    return jax.tree.map(lambda x: np.asarray(draw(x), dtype), tree)


def check_usable(optimizer: optax.GradientTransformation, params: Any) -> None:
    """ValueError if the optimizer cannot update params from gradients alone."""
    try:
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    except Exception as error:
        raise ValueError(
            f"optimizer cannot be used here: given gradients and params alone, it raised {checks.first_line(error)}; "
            "make_steps gives it nothing else"
        ) from error


def check_finite(optimizer: optax.GradientTransformation, params: Any) -> None:
    """ValueError if the optimizer's first update is not finite, tried on small arrays in params' structure."""
    random = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        w, gradient = _small(random, params, 0.0), _small(random, params, 0.5)
        try:
            update, _ = optimizer.update(gradient, optimizer.init(w), w)
        except Exception:  # it needs arrays of one size and cannot be tried on others
            return
        if not _traced(update):
            _check_is_finite(update)


def _traced(updates: Any) -> bool:
    """Whether updates of known arrays are traced. Then the learning rate is traced, and the optimizer cannot be tried."""
    return any(isinstance(u, jax.core.Tracer) for u in jax.tree.leaves(updates))


def _check_is_finite(update: Any) -> None:
    if not all(np.isfinite(u).all() for u in jax.tree.leaves(update)):
        raise ValueError(
            "optimizer makes infinite or NaN updates from finite gradients; check its learning rate or schedule"
        )


def _compare_alone(together: np.ndarray, alone: np.ndarray) -> None:
    if not np.allclose(together, alone, rtol=1e-4, atol=1e-7 * float(np.max(np.abs(together)) + 1e-30)):
        raise ValueError(
            "optimizer cannot train Kolen-Pollack's B: the arrays of a tree influence each other's updates (as when it "
            "clips by the global norm, skips a step in which one array is not finite or too large, or draws noise over the "
            "tree). W's tree is not B's, so the same signal would change W and B differently. Take that part out of the "
            "optimizer. To clip both alike, use make_steps(..., clip_norm=...) or wmkp.updates.clip_together."
        )


def clip_together(max_norm: float) -> optax.GradientTransformation:
    """Clips ``(grads, feedback_signal)`` by the global norm of ``grads``: W moves as without B, and B moves like W.

    Args:
      max_norm: the largest norm of ``grads``. Larger ones are scaled down.

    Returns:
      A stateless GradientTransformation of pairs, ``update((grads, feedback_signal), state)``.

    Raises:
      ValueError: ``max_norm`` is not positive.
      TypeError, ValueError: from ``update``, its argument is no pair, or holds something else than arrays, or deleted
        ones.

    Example:
      >>> clip = wmkp.updates.clip_together(1.0)
      >>> (grads, signal), _ = clip.update(({"W": jnp.ones(4)}, {"W": jnp.ones(4)}), clip.init(None))
      >>> grads["W"].tolist()
      [0.5, 0.5, 0.5, 0.5]
    """
    checks.positive("max_norm", max_norm)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not (isinstance(updates, tuple) and len(updates) == 2):
            raise TypeError(f"updates must be the pair (grads, feedback_signal); got {type(updates).__name__}")
        _check_arrays("updates", updates, floats=True)
        checks.values("updates", updates)
        norm = optax.tree.norm(updates[0])
        scale = jnp.minimum(1.0, max_norm / norm)  # 1 for zero gradients
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def weight_mirror(learning_rate: Any, decay: Any) -> optax.GradientTransformation:
    """The weight mirror's update: ``B <- B + eta_B (signal - decay B)``.

    This is eq. 7 with decay. While W stands still, B settles at (sigma^2 E[phi'] / decay) W^T. With
    ``mirror_gain(rule)`` as the decay this is W^T itself: see ``calibrated_mirror``.

    Args:
      learning_rate: eta_B, a number or a scalar array.
      decay: the share of B that is removed, in units of the signal's.

    Returns:
      A stateless GradientTransformation for the tree of B. Give it ``mirror_signals``, which it adds: they are no
      gradient.

    Raises:
      ValueError, TypeError: a negative number, or no number; a product of the two of 2 or more, under which B grows
        without end; from ``update``, a signal that does not match feedback.
    """
    checks.scalar("learning_rate", learning_rate)
    checks.scalar("decay", decay)
    checks.stable("learning_rate * decay", learning_rate * decay)

    def update(signal: Any, state: Any, feedback: Any = None) -> tuple[Any, Any]:
        if feedback is None:
            raise ValueError("the weight mirror's update needs feedback: call update(signal, state, feedback)")
        checks.alike("signal", signal, feedback, "feedback", dtypes=False)
        return jax.tree.map(lambda s, b: (learning_rate * (s - decay * b)).astype(b.dtype), signal, feedback), state

    return optax.GradientTransformation(lambda feedback: optax.EmptyState(), update)


def calibrated_mirror(rule: Rule, rate: Any = None) -> optax.GradientTransformation:
    """The weight mirror's update that settles at W^T itself: its decay is sigma^2 E[phi'].

    One step replaces a share ``rate`` of B by the estimate of W^T.

    Args:
      rule: a rule with a mirror mode.
      rate: a; None: the rule's own. For the t-th estimate of a mean over all (``rule.mirror.rate`` is None), give
        ``1 / t``.

    Raises:
      ValueError, TypeError: the rule has no mirror mode; ``rate`` is negative, 2 or more, or no number; or neither the
        rule nor you give a rate.

    Example:
      >>> mirror = wmkp.updates.calibrated_mirror(wmkp.weight_mirror())
      >>> signal, feedback = {"W": 2 * jnp.ones(3)}, {"W": jnp.zeros(3)}
      >>> updates, _ = mirror.update(signal, mirror.init(feedback), feedback)
      >>> optax.apply_updates(feedback, updates)["W"].tolist()
      [2.0, 2.0, 2.0]
    """
    gain = mirror_gain(rule)
    if rate is not None:
        checks.scalar("rate", rate)
        checks.stable("rate", rate)
    rate = rule.mirror.rate if rate is None and rule.mirror is not None else rate
    if rate is None:
        raise ValueError(
            f"{rule.name} averages over all of its mirror steps, so its rate changes from step to step: use "
            "calibrated_mirror(rule, rate=1 / t) for the t-th"
        )
    return weight_mirror(rate / gain, gain)


def check_mirror_optimizer(mirror_optimizer: Any) -> None:
    """ValueError unless it keeps no state and adds the signal."""
    checks.transformation("mirror_optimizer", mirror_optimizer)
    use = "wmkp.updates.weight_mirror or wmkp.updates.calibrated_mirror"
    with jax.ensure_compile_time_eval():
        b, signal = jnp.zeros((3, 4)), jnp.ones((3, 4))
        try:
            state = mirror_optimizer.init(b)
            change = float(mirror_optimizer.update(signal, state, b)[0].sum())
        except Exception as error:
            raise ValueError(
                f"mirror_optimizer must take one B at a time; tried on a matrix, it raised {checks.first_line(error)}; use {use}"
            ) from error
        if jax.tree.leaves(state):
            raise ValueError(f"mirror_optimizer must keep no state (no momentum, no schedule); use {use}")
    if not 0 <= change < float("inf"):
        raise ValueError(
            f"mirror_optimizer must add the signal, which is not a gradient; it changes a B of zeros by {change / 12:g} "
            f"for a signal of 1; use {use}"
        )
