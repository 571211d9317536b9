"""TrainState, and the two steps that train it: engaged and mirror mode, each compiled on its own."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wmkp import checks, mirror, updates
from wmkp.engaged import check_loss, value_and_grad
from wmkp.feedback import feedback_leaves, initial_feedback
from wmkp.program import compat
from wmkp.program.projections import Analysis, analyse, check_traceable, named_leaves
from wmkp.rules import Mirror, Rule, RuleOrRules, learning_part, resolve


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      step: number of engaged steps taken, int32.
      params: the forward weights W and all other parameters.
      feedback: the feedback weights B; None where there is no feedback path.
      model_state: what the model keeps besides its parameters (BatchNorm statistics), or None.
      opt_state: the optimizer's state for params.
      feedback_opt_state: the optimizers' states for those B that learn in engaged mode, a tuple: W's optimizer, and
        each that a rule has of its own, in the order of the parameters.
      mirrored: number of mirror steps taken, including those before training, int32.
      key: the random key, split at every step.
    """

    step: jax.Array
    params: Any
    feedback: Any
    model_state: Any
    opt_state: Any
    feedback_opt_state: Any
    mirrored: jax.Array
    key: jax.Array


class CompiledStep:
    """A jitted step that explains why a call failed. Its other attributes are those of the jitted function."""

    def __init__(self, step: Callable[..., Any], explain: Callable[..., None]):
        self._step, self._explain = step, explain

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The step."""
        try:
            return self._step(*args, **named)
        except Exception as error:
            self._explain(error, *args, **named)
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "_step":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._step, name)


class Steps(NamedTuple):
    """What ``make_steps`` returns.

    Attributes:
      init: ``(key, params, model_state=None, mirror_steps=None) -> TrainState``. ``mirror_steps`` is the number of
        mirror steps before training, while W stands still. B is then the plain mean of that many estimates. With a
        ``mirror_optimizer``, or a signal of the rule's own, B takes that many of its steps. None: the largest
        ``mirror.start`` of the rules, and only for rules that have one.
      engaged_step: ``(state, batch) -> (state, metrics)``. It is jitted, and takes over the memory of the state.
      mirror_step: ``state -> (state, metrics)``, jitted in the same way. It changes only B, and only under rules that
        mirror at each step. ``metrics["lag"]`` holds by path how many degrees B was behind W, beyond what noise
        explains. Above 3 degrees, mirror more often or use ``mirrored_kolen_pollack``. It does not read W.

    Raises:
      ValueError, TypeError: a state or batch that does not match the examples given to ``make_steps``; a state that was
        passed to a step before. The message names it.
    """

    init: Callable[..., TrainState]
    engaged_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    mirror_step: Callable[[TrainState], tuple[TrainState, dict[str, Any]]]


def make_steps(
    loss_fn: Callable[..., Any],
    rule: RuleOrRules,
    optimizer: optax.GradientTransformation,
    params: Any,
    batch: Any,
    *,
    model_state: Any = None,
    mirror_optimizer: optax.GradientTransformation | None = None,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    clip_norm: float | None = None,
    check_finite: bool = False,
) -> Steps:
    """Builds the compiled steps that train a loss under a rule: ``init``, ``engaged_step`` and ``mirror_step``.

    There are three ways to use many devices. Give ``mesh``, and JAX divides the steps: put batches with
    ``batch_sharding(mesh)``. Or give ``axis_name``, and call the steps inside your own ``jax.pmap`` or
    ``jax.shard_map``. Or put params and batches on a mesh of explicit axes, under ``jax.set_mesh``, and give neither.
    Losses and weights are those of one device, up to the rounding of sums in another order.

    Args:
      loss_fn: ``(params, model_state, batch, key) -> (loss, (model_state, metrics))``, where ``metrics`` is a dict of
        scalars.
      rule: a rule, or a mapping from path patterns to rules.
      optimizer: for params. Under Kolen-Pollack it also trains B (``updates.kolen_pollack``).
      params, batch, model_state: examples. Only their shapes and dtypes are read, so ShapeDtypeStructs are enough.
      mirror_optimizer: for B in mirror mode, stateless. None: ``updates.calibrated_mirror`` of each projection's rule.
      axis_name: the axis of a ``jax.pmap`` or ``jax.shard_map`` around the steps. Gradients, signals, metrics and
        model_state's floating-point arrays are averaged over it. Counters and random keys in model_state stay alike on
        all devices. Each device draws its own part of the mirror's noise.
      mesh: the devices that train together, with Auto axes. Each draws its own part of the mirror's noise, so a mirror
        step gets cheaper with more devices. The whole state is on every device.
      fsdp: with ``mesh``, divides W, B and the optimizers' states among the devices too, each array along its longest
        axis that divides.
      clip_norm: the largest global norm of the gradients. Larger gradients and B's signals are scaled down alike
        (``updates.clip_together``). Clipping inside ``optimizer`` could not do this.
      check_finite: adds ``metrics["finite"]``, ``{"loss": bool, path: bool, ...}``: whether the loss, and each
        parameter's gradient and signal, are finite. It costs a pass over the gradients.

    Returns:
      ``Steps``.

    Raises:
      ValueError, TypeError, WeightTransportError: as ``init_feedback``; an optimizer under which the rule cannot hold;
        both ``axis_name`` and ``mesh``; ``fsdp`` without a mesh; another argument that is out of range.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> def loss_fn(params, model_state, x, key):
      ...     y = jnp.tanh(x @ params["W1"]) @ params["W2"]
      ...     return jnp.mean((y - 1) ** 2), (model_state, {"output": y.mean()})
      >>> x = jnp.ones((16, 4))
      >>> steps = wmkp.make_steps(loss_fn, wmkp.mirrored_kolen_pollack(), optax.sgd(0.1), params, x)
      >>> state = steps.init(jax.random.key(0), params)
      >>> state, metrics = steps.engaged_step(state, x)  # {"loss": ..., "output": ...}
      >>> state, metrics = steps.mirror_step(state)  # {"lag": {"W2": degrees}}
    """
    checks.function("loss_fn", loss_fn, "loss_fn(params, model_state, batch, key)")
    checks.transformation("optimizer", optimizer)
    if mirror_optimizer is not None:
        _check_mirror_optimizer(mirror_optimizer)
    if axis_name is not None and not isinstance(axis_name, str | tuple):
        raise TypeError(f"axis_name must be the name of an axis of pmap or shard_map; got {checks.shown(axis_name)}")
    if mesh is not None:
        _check_mesh(mesh)
    checks.flag("fsdp", fsdp)
    checks.flag("check_finite", check_finite)
    if clip_norm is not None:
        checks.positive("clip_norm", clip_norm)
    if mesh is not None and axis_name is not None:
        raise ValueError("give axis_name (inside a pmap or shard_map of your own) or mesh, not both")
    if fsdp and mesh is None:
        raise ValueError("fsdp divides the state over a mesh: give mesh")
    key_aval = jax.eval_shape(lambda: jax.random.key(0))
    analysis = analyse(loss_fn, params, model_state, batch, key_aval)
    _check_output(analysis, model_state, check_finite)
    rules = resolve(rule, analysis)
    mirror.targets(rules, analysis)
    mirrors = {path: r.mirror for path, r in rules.items() if r.mirror is not None}
    # B's optimizers: W's (None), and those that rules have of their own.
    trainers = list(dict.fromkeys(r.optimizer for r in rules.values() if r.signal is not None))
    feedback_optimizers = [updates.kolen_pollack(optimizer) if own is None else own for own in trainers]
    clip = None if clip_norm is None else updates.clip_together(clip_norm)
    engaged_gradient = value_and_grad(loss_fn, rule, has_aux=True)
    tree: Any = jax.tree.structure(params)
    examples = checks.avals({"params": params, "model_state": model_state, "batch": batch})

    def check_as_given(name: str, value: Any, shapes: bool = True) -> None:
        given = name.removeprefix("state.")
        checks.alike(name, value, examples[given], f"the {given} that make_steps was given", shapes=shapes)

    def check_state(state: TrainState) -> None:
        """While a step is traced: the state is one of these steps'."""
        if not isinstance(state, TrainState):
            raise TypeError(f"state must be a TrainState, as steps.init returns it; got {type(state).__name__}")
        for name in ("step", "mirrored"):
            number = jax.ShapeDtypeStruct((), jnp.int32)
            checks.alike(f"state.{name}", getattr(state, name), number, "the one that steps.init makes")
        check_as_given("state.params", state.params)
        feedback_leaves(state.params, state.feedback)
        check_as_given("state.model_state", state.model_state)
        checks.key(state.key, "state.key")
        expected = jax.eval_shape(optimizer.init, state.params)
        checks.alike("state.opt_state", state.opt_state, expected, "what optimizer.init returns", dtypes=False)
        makers = [(optimizer if own is None else own).init for own in trainers]
        expected = tuple(jax.eval_shape(make, learning(state.feedback, i)) for i, make in enumerate(makers))
        checks.alike("state.feedback_opt_state", state.feedback_opt_state, expected, "what init returns", dtypes=False)

    def learning(feedback: Any, trainer: int) -> Any:
        """Feedback with None in place of what one optimizer does not train."""
        leaves = tree.flatten_up_to(feedback)
        for i, path in enumerate(analysis.paths):
            rule = rules.get(path)
            mine = rule is not None and rule.signal is not None and rule.optimizer == trainers[trainer]
            leaves[i] = learning_part(leaves[i]) if mine else None
        return tree.unflatten(leaves)

    def redrawn(key: jax.Array, params: Any, feedback: Any) -> Any:
        """Feedback with a new B under those rules that draw one for each batch."""
        again = {path: rule for path, rule in rules.items() if rule.redrawn}
        return _overlay(feedback, initial_feedback(key, again, analysis, params)) if again else feedback

    def mean(x: Any) -> Any:
        return x if axis_name is None else jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name), x)

    def place(state: Any) -> Any:
        """The state where it belongs on the mesh."""
        if mesh is None:
            return state
        return jax.tree.map(jax.lax.with_sharding_constraint, state, state_sharding(state, mesh, fsdp))

    spread = None
    if mesh is not None and mesh.size > 1:  # noise (K, N, fan_in), its samples divided among the devices
        samples = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names, None))
        spread = functools.partial(jax.lax.with_sharding_constraint, shardings=samples)

    def own(x: Any) -> Any:
        """A replicated value as each device's own, so that what is derived from it is not yet summed over devices."""
        if axis_name is None:
            return x
        return jax.tree.map(lambda leaf: compat.vary(leaf, axis_name), x)

    def floats(f: Callable[[Any], Any], tree: Any) -> Any:
        """``f`` of the floating-point leaves; counters and random keys are the same on every device."""
        return jax.tree.map(lambda x: f(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def own_key(key: jax.Array) -> jax.Array:
        return key if axis_name is None else jax.random.fold_in(own(key), jax.lax.axis_index(axis_name))

    def engaged_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        check_state(state)
        check_as_given("batch", batch, shapes=False)
        key, loss_key, draw_key = jax.random.split(state.key, 3)
        feedback = redrawn(draw_key, state.params, state.feedback)
        (loss, (model_state, metrics)), (grads, signal) = engaged_gradient(
            own(state.params),
            own(feedback),
            floats(own, state.model_state),
            batch,
            own_key(loss_key),
            key=own_key(jax.random.fold_in(draw_key, len(analysis.paths))),
        )
        metrics = {"loss": loss, **metrics}
        # Signals that nothing reads cost nothing to average: the compiler leaves them out.
        grads, signal, metrics = mean((grads, signal, metrics))
        model_state = floats(mean, model_state)
        if check_finite:
            pairs = zip(tree.flatten_up_to(grads), tree.flatten_up_to(signal), strict=True)
            finite = {path: _all_finite(pair) for path, pair in zip(analysis.paths, pairs, strict=True)}
            metrics["finite"] = {"loss": jnp.isfinite(metrics["loss"]), **finite}
        clipped = signal
        if clip is not None:
            (grads, clipped), _ = clip.update((grads, signal), optax.EmptyState())
        change, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, change)
        feedback_opt_state = list(state.feedback_opt_state)
        for i, trainer in enumerate(feedback_optimizers):
            mine, towards = learning(feedback, i), learning(clipped if trainers[i] is None else signal, i)
            if trainers[i] is None:
                feedback_opt_state[i] = updates.same_hyperparams(state.opt_state, feedback_opt_state[i])
            change, feedback_opt_state[i] = trainer.update(towards, feedback_opt_state[i], mine)
            feedback = _overlay(feedback, optax.apply_updates(mine, change))
        state = TrainState(
            state.step + 1, params, feedback, model_state, opt_state, tuple(feedback_opt_state), state.mirrored, key
        )
        return place(state), metrics

    def mirrored(
        key: jax.Array, chosen: dict[str, Rule], leaves: list[Any], entries: list[Any], count: jax.Array, before: bool
    ) -> tuple[list[Any], list[Any]]:
        """B after the mirror step number ``count`` (from 1) of these rules, and its signals."""
        if before and not compat.is_bound(axis_name):  # ``init`` outside of the devices' map: one draw for all
            signals = mirror.signals(key, chosen, analysis, leaves, entries, spread)
        else:
            signals = mean(mirror.signals(own_key(key), chosen, analysis, own(leaves), own(entries), spread))
        after = mirror.averaged(chosen, analysis, entries, signals, count, before)
        for i, (path, signal, b) in enumerate(zip(analysis.paths, signals, entries, strict=True)):
            if signal is not None and b is not None and by_hand(mirrors[path]):
                assert mirror_optimizer is not None
                change, _ = mirror_optimizer.update(signal, mirror_optimizer.init(b), b)
                after[i] = b + change
        return after, signals

    def by_hand(mirror: Mirror) -> bool:
        return mirror_optimizer is not None and mirror.each_step and mirror.signal is None

    def mirror_step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        check_state(state)
        key, noise_key = jax.random.split(state.key)
        count, chosen = state.mirrored + 1, mirror.only(rules, lambda mirror: mirror.each_step)
        leaves, entries = jax.tree.leaves(state.params), tree.flatten_up_to(state.feedback)
        after, signals = mirrored(noise_key, chosen, leaves, entries, count, False)
        metrics: dict[str, Any] = {}
        watched = mirror.only(chosen, lambda mirror: not by_hand(mirror))
        parts = 1 if axis_name is None else jax.lax.psum(1, axis_name)
        if lags := mirror.lags(watched, analysis, leaves, entries, signals, count, parts):
            metrics["lag"] = lags
            # B is read for the lag before it is overwritten; otherwise it would be copied.
            waits = zip(analysis.paths, after, strict=True)
            after = [compat.after(b, lags[path]) if path in lags else b for path, b in waits]
        return place(state._replace(feedback=tree.unflatten(after), mirrored=count, key=key)), metrics

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def period(key: jax.Array, steps: int, own: bool, leaves: list[Any], entries: list[Any]) -> list[Any]:
        """Mirroring before training; ``own``: of those rules alone that ask for some."""
        chosen = mirror.at_start(rules)[0] if own else rules
        step = lambda key, leaves, entries, count: mirrored(key, chosen, leaves, entries, count, True)[0]
        return mirror.period(step, key, steps, leaves, entries)

    def init(key: jax.Array, params: Any, model_state: Any = None, mirror_steps: int | None = None) -> TrainState:
        own = mirror_steps is None
        if mirror_steps is None:
            mirror_steps = mirror.at_start(rules)[1]
        checks.key(key)
        check_as_given("params", params)
        named_leaves(params)
        check_as_given("model_state", model_state)
        must = "not be negative, nor 2^31 or more"
        checks.number("mirror_steps", mirror_steps, must, lambda n: 0 <= n < 2**31, numbers.Integral)
        updates.check_usable(optimizer, params)
        updates.check_finite(optimizer, params)
        if mirror_steps and not mirrors:
            raise ValueError(
                "mirror_steps asks for a mirror period, but no rule here has a mirror mode; weight_mirror() has"
            )
        # The state is donated by the steps, so it must share no buffer with what the caller keeps.
        # (Weakly typed it would be another after a step, which would then be compiled again.)
        params, model_state, key = jax.tree.map(_own_copy, (params, model_state, key))
        key, feedback_key, noise_key = jax.random.split(key, 3)
        feedback = initial_feedback(feedback_key, rules, analysis, params)
        if mirror_steps:
            entries = tree.flatten_up_to(feedback)
            feedback = tree.unflatten(period(noise_key, mirror_steps, own, jax.tree.leaves(params), entries))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            feedback=feedback,
            model_state=model_state,
            opt_state=optimizer.init(params),
            feedback_opt_state=tuple(o.init(learning(feedback, i)) for i, o in enumerate(feedback_optimizers)),
            mirrored=jnp.asarray(mirror_steps, jnp.int32),
            key=key,
        )
        return state if mesh is None else jax.jit(place)(state)

    def explain(error: Exception, state: Any = None, batch: Any = None, *more: Any, **named: Any) -> None:
        """Raises what was wrong with a step's arguments, if it is one of the mistakes that JAX sees before the step does."""
        for name, value in (("state", state), ("batch", batch)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(value):
                if checks.aval(leaf) is None:
                    raise TypeError(
                        f"{name}[{checks.path_name(path)!r}] is {checks.shape(leaf)}; a step takes arrays alone"
                    ) from error
            check_traceable(name, value)
            if "deleted" in str(error) or "not a valid JAX type" in str(error):
                checks.values(name, value)
        if "donate the same buffer twice" in str(error):
            raise ValueError(
                "state holds an array twice, and a step takes over the memory of each (it is donated): give copies, "
                "jax.tree.map(jnp.copy, state)"
            ) from error
        if "incompatible devices" in str(error):
            raise ValueError(
                "state or batch is not on the devices of the step: take the state from its own steps.init, and put batches "
                f"where it is, over a mesh by batch_sharding(mesh) ({checks.first_line(error)})"
            ) from error
        if isinstance(error, NameError | AssertionError) and axis_name is not None:
            raise ValueError(
                f"axis_name={axis_name!r} is the axis of no jax.pmap or jax.shard_map around the step; call it inside "
                "one, or leave axis_name out"
            ) from error

    compiled = (jax.jit(step, donate_argnums=0) for step in (engaged_step, mirror_step))
    return Steps(init, *(CompiledStep(step, explain) for step in compiled))


def _check_output(analysis: Analysis, model_state: Any, check_finite: bool) -> None:
    """What loss_fn returns is ``(loss, (model_state, metrics))``."""
    out = jax.tree.unflatten(analysis.out_tree, [v.aval for v in analysis.plan.jaxpr.outvars])
    pair = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple) and len(out[1]) == 2
    if not pair or not isinstance(out[1][1], dict):
        raise ValueError(
            "loss_fn must return (loss, (model_state, metrics)), metrics a dict; got "
            f"{checks.short(checks.shapes(out))}"
        )
    check_loss(lambda: out, True)()
    if odd := [name for name in out[1][1] if not isinstance(name, str)]:
        raise TypeError(f"loss_fn's metrics must have strings for names, as the loss beside them has; got {odd[0]!r}")
    if taken := {"loss", *(["finite"] if check_finite else [])} & set(out[1][1]):
        raise ValueError(
            f"loss_fn's metrics must not hold {min(taken)!r}, which a step reports itself; give it another name"
        )
    checks.alike("the model_state that loss_fn returns", out[1][0], model_state, "the model_state that it is given")


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh) or not mesh.size:
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, such as Mesh(jax.devices(), ('d',)); got {checks.shown(mesh)}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has axes of other types than Auto ({checks.shown(mesh)}), and the steps are whole programs that JAX divides: "
            "give jax.sharding.Mesh(jax.devices(), ('d',)), or jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,)); or "
            "leave mesh out, and put params and batches on the explicit mesh, under jax.set_mesh"
        )


def _check_mirror_optimizer(mirror_optimizer: Any) -> None:
    """It keeps no state, and follows the signal uphill."""
    checks.transformation("mirror_optimizer", mirror_optimizer)
    use = "use wmkp.updates.weight_mirror or wmkp.updates.calibrated_mirror"
    with jax.ensure_compile_time_eval():
        b, signal = jnp.zeros((3, 4)), jnp.ones((3, 4))
        try:
            state = mirror_optimizer.init(b)
            change = float(mirror_optimizer.update(signal, state, b)[0].sum())
        except Exception as error:
            raise ValueError(
                f"mirror_optimizer must take one B at a time; tried on a matrix, it raised {checks.first_line(error)}; {use}"
            ) from error
        if jax.tree.leaves(state):
            raise ValueError(f"mirror_optimizer must keep no state, as momentum or a schedule would; {use}")
    if not 0 <= change < float("inf"):
        raise ValueError(
            f"mirror_optimizer must go along the signal (which is no gradient); it changes a B of zeros by {change / 12:g} "
            f"for a signal of 1; {use}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch belongs on ``mesh``: its first axis, of examples, divided among all devices."""
    _check_mesh(mesh)
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_sharding(state: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Where each array of a ``TrainState`` belongs when ``make_steps`` trains over ``mesh``.

    Args:
      state: the state, or its shapes.
      mesh, fsdp: as in ``make_steps``.

    Returns:
      A pytree of NamedSharding, in state's structure.
    """

    _check_mesh(mesh)
    checks.flag("fsdp", fsdp)

    def sharding(x: Any) -> NamedSharding:
        if (aval := checks.aval(x)) is None:
            raise TypeError(f"state must hold arrays (or their shapes) alone; got {checks.shape(x)}")
        # W, B and their moments are divided alike, since all that counts is the shape.
        fits = [size if size % mesh.size == 0 else 0 for size in aval.shape]
        if not fsdp or not any(fits):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * fits.index(max(fits)), mesh.axis_names))

    return jax.tree.map(sharding, state)


def _own_copy(x: Any) -> jax.Array:
    copy = jnp.copy(x)
    return copy.astype(copy.dtype) if copy.aval.weak_type else copy


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _overlay(below: Any, above: Any) -> Any:
    """``above`` where it has an entry, ``below`` elsewhere."""
    return jax.tree.map(lambda a, b: b if a is None else a, above, below, is_leaf=lambda x: x is None)
