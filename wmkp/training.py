"""TrainState, and the two compiled steps that train it: engaged mode and mirror mode."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wmkp import checks, mirror, updates
from wmkp.engaged import check_loss, value_and_grad
from wmkp.feedback import feedback_leaves, initial_feedback
from wmkp.program import compat
from wmkp.program.projections import Analysis, analyse
from wmkp.rule import Mirror, Rule, RuleOrRules, learning_part, overlay, resolve
from wmkp.sharding import batch_sharding as batch_sharding
from wmkp.sharding import check_devices, state_sharding


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
        if name == "_step":  # while a copy is being made
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
        axis that divides. An engaged step gathers W and B.
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
    _check_form(loss_fn)
    checks.transformation("optimizer", optimizer)
    if mirror_optimizer is not None:
        updates.check_mirror_optimizer(mirror_optimizer)
    check_devices(axis_name, mesh, fsdp)
    checks.flag("check_finite", check_finite)
    if clip_norm is not None:
        checks.positive("clip_norm", clip_norm)
    analysis = analyse(loss_fn, params, model_state, batch, jax.eval_shape(lambda: jax.random.key(0)))
    _check_output(analysis, model_state, check_finite)
    rules = resolve(rule, analysis)
    mirror.targets(rules, analysis)
    # B's optimizers: the rules' own, or None for W's.
    trainers = tuple(dict.fromkeys(r.optimizer for r in rules.values() if r.signal is not None))
    training = _Training(
        analysis=analysis,
        rules=rules,
        gradient=value_and_grad(loss_fn, rule, has_aux=True),
        optimizer=optimizer,
        trainers=trainers,
        feedback_optimizers=[updates.kolen_pollack(optimizer) if own is None else own for own in trainers],
        mirror_optimizer=mirror_optimizer,
        clip=None if clip_norm is None else updates.clip_together(clip_norm),
        axis_name=axis_name,
        mesh=mesh,
        fsdp=fsdp,
        check_finite=check_finite,
        tree=jax.tree.structure(params),
        examples=checks.avals({"params": params, "model_state": model_state, "batch": batch}),
    )

    # Functions, not bound methods: steps can be copied, and an error counts only the user's arguments.
    def engaged_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return training.engaged_step(state, batch)

    def mirror_step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return training.mirror_step(state)

    def explain(*args: Any, **named: Any) -> None:
        training.explain(*args, **named)

    compiled = (jax.jit(step, donate_argnums=0) for step in (engaged_step, mirror_step))
    return Steps(training.init, *(CompiledStep(step, explain) for step in compiled))


@dataclasses.dataclass(frozen=True, eq=False)
class _Training:
    """What the steps share: the arguments of ``make_steps``, and what was made from them.

    Attributes:
      gradient: ``value_and_grad`` of the loss.
      trainers: B's optimizers: the rules' own, or None for W's.
      feedback_optimizers: the same, with W's optimizer made fit for B.
      clip: the transformation that scales gradients and signals down together, or None.
      tree: params' structure.
      examples: the shapes of params, model_state and batch, by name.
    """

    analysis: Analysis
    rules: dict[str, Rule]
    gradient: Callable[..., Any]
    optimizer: optax.GradientTransformation
    trainers: tuple[optax.GradientTransformation | None, ...]
    feedback_optimizers: list[optax.GradientTransformation]
    mirror_optimizer: optax.GradientTransformation | None
    clip: optax.GradientTransformation | None
    axis_name: Any
    mesh: Mesh | None
    fsdp: bool
    check_finite: bool
    tree: Any
    examples: dict[str, Any]

    def check_as_given(self, name: str, value: Any, shapes: bool = True) -> None:
        """ValueError or TypeError unless the value is like the example of that name."""
        given = name.removeprefix("state.")
        checks.alike(name, value, self.examples[given], f"the {given} that make_steps was given", shapes=shapes)

    def check_state(self, state: TrainState) -> None:
        """Checks, while a step is traced, that the state belongs to these steps."""
        if not isinstance(state, TrainState):
            raise TypeError(f"state must be a TrainState, as steps.init returns it; got {type(state).__name__}")
        for name in ("step", "mirrored"):
            number = jax.ShapeDtypeStruct((), jnp.int32)
            checks.alike(f"state.{name}", getattr(state, name), number, "the one that steps.init makes")
        self.check_as_given("state.params", state.params)
        feedback_leaves(state.params, state.feedback)
        self.check_as_given("state.model_state", state.model_state)
        checks.key(state.key, "state.key")
        expected = jax.eval_shape(self.optimizer.init, state.params)
        checks.alike("state.opt_state", state.opt_state, expected, "what optimizer.init returns", dtypes=False)
        makers = [(self.optimizer if own is None else own).init for own in self.trainers]
        expected = tuple(jax.eval_shape(make, self.learning(state.feedback, i)) for i, make in enumerate(makers))
        checks.alike("state.feedback_opt_state", state.feedback_opt_state, expected, "what init returns", dtypes=False)

    def learning(self, feedback: Any, trainer: int) -> Any:
        """Feedback with None in place of what one optimizer does not train."""
        leaves = self.tree.flatten_up_to(feedback)
        for i, path in enumerate(self.analysis.paths):
            rule = self.rules.get(path)
            mine = rule is not None and rule.signal is not None and rule.optimizer == self.trainers[trainer]
            leaves[i] = learning_part(leaves[i]) if mine else None
        return self.tree.unflatten(leaves)

    def redrawn(self, key: jax.Array, params: Any, feedback: Any) -> Any:
        """Feedback with a new B for those rules that draw one for each batch."""
        again = {path: rule for path, rule in self.rules.items() if rule.redrawn}
        return overlay(feedback, initial_feedback(key, again, self.analysis, params)) if again else feedback

    def mean(self, x: Any) -> Any:
        """The mean over the devices of a map around the steps."""
        return x if self.axis_name is None else jax.tree.map(lambda leaf: jax.lax.pmean(leaf, self.axis_name), x)

    def own(self, x: Any) -> Any:
        """A replicated value as each device's own, so that its derivatives are not yet summed over devices."""
        return x if self.axis_name is None else jax.tree.map(lambda leaf: compat.vary(leaf, self.axis_name), x)

    def own_key(self, key: jax.Array) -> jax.Array:
        """Another key on each device."""
        return key if self.axis_name is None else jax.random.fold_in(self.own(key), jax.lax.axis_index(self.axis_name))

    def place(self, state: Any) -> Any:
        """The state where it belongs on the mesh."""
        if self.mesh is None:
            return state
        return jax.tree.map(jax.lax.with_sharding_constraint, state, state_sharding(state, self.mesh, self.fsdp))

    def whole(self, x: Any) -> Any:
        """Arrays that fsdp divides, gathered on every device.

        Otherwise XLA might divide a product by its neurons instead of its examples, and exchange activations.
        """
        if self.mesh is None or not self.fsdp:
            return x
        return jax.tree.map(jax.lax.with_sharding_constraint, x, state_sharding(x, self.mesh))

    @functools.cached_property
    def spread(self) -> Callable[[jax.Array], jax.Array] | None:
        """Divides the samples of noise (K, N, fan_in) among the mesh's devices."""
        if self.mesh is None or self.mesh.size == 1:
            return None
        samples = NamedSharding(self.mesh, PartitionSpec(None, self.mesh.axis_names, None))
        return functools.partial(jax.lax.with_sharding_constraint, shardings=samples)

    def engaged_step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """See ``Steps``."""
        self.check_state(state)
        self.check_as_given("batch", batch, shapes=False)
        key, loss_key, draw_key = jax.random.split(state.key, 3)
        feedback = self.redrawn(draw_key, state.params, state.feedback)
        (loss, (model_state, metrics)), (grads, signal) = self.gradient(
            self.whole(self.own(state.params)),
            self.whole(self.own(feedback)),
            _floats(self.own, state.model_state),
            batch,
            self.own_key(loss_key),
            key=self.own_key(jax.random.fold_in(draw_key, len(self.analysis.paths))),
        )
        # Averaging signals that nothing reads is free: the compiler removes it.
        grads, signal, metrics = self.mean((grads, signal, {"loss": loss, **metrics}))
        if self.check_finite:
            pairs = zip(self.tree.flatten_up_to(grads), self.tree.flatten_up_to(signal), strict=True)
            finite = {path: _all_finite(pair) for path, pair in zip(self.analysis.paths, pairs, strict=True)}
            metrics["finite"] = {"loss": jnp.isfinite(metrics["loss"]), **finite}
        state = self.updated(state._replace(feedback=feedback, key=key), grads, signal)
        return self.place(state._replace(model_state=_floats(self.mean, model_state))), metrics

    def updated(self, state: TrainState, grads: Any, signal: Any) -> TrainState:
        """The state after these gradients of W and signals of B."""
        clipped = signal
        if self.clip is not None:
            (grads, clipped), _ = self.clip.update((grads, signal), optax.EmptyState())
        change, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        feedback, feedback_opt_state = state.feedback, list(state.feedback_opt_state)
        for i, trainer in enumerate(self.feedback_optimizers):
            by_ours = self.trainers[i] is None
            mine, towards = self.learning(feedback, i), self.learning(clipped if by_ours else signal, i)
            if by_ours:
                feedback_opt_state[i] = updates.same_hyperparams(state.opt_state, feedback_opt_state[i])
            moved, feedback_opt_state[i] = trainer.update(towards, feedback_opt_state[i], mine)
            feedback = overlay(feedback, optax.apply_updates(mine, moved))
        return state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, change),
            feedback=feedback,
            opt_state=opt_state,
            feedback_opt_state=tuple(feedback_opt_state),
        )

    def mirrored(
        self,
        key: jax.Array,
        chosen: dict[str, Rule],
        leaves: list[Any],
        entries: list[Any],
        count: jax.Array,
        before: bool,
    ) -> tuple[list[Any], list[Any]]:
        """B after the mirror step number ``count`` (from 1) of these rules, and its signals."""
        if before and not compat.is_bound(self.axis_name):  # ``init`` outside of the devices' map: one draw for all
            signals = mirror.signals(key, chosen, self.analysis, leaves, entries, self.spread)
        else:
            inputs = self.own(leaves), self.own(entries)
            signals = self.mean(mirror.signals(self.own_key(key), chosen, self.analysis, *inputs, self.spread))
        after = mirror.averaged(chosen, self.analysis, entries, signals, count, before)
        for i, (path, signal, b) in enumerate(zip(self.analysis.paths, signals, entries, strict=True)):
            if signal is not None and b is not None and self.by_hand(self.rules[path].mirror):
                assert self.mirror_optimizer is not None
                change, _ = self.mirror_optimizer.update(signal, self.mirror_optimizer.init(b), b)
                after[i] = b + change
        return after, signals

    def by_hand(self, mirror: Mirror | None) -> bool:
        """Whether ``mirror_optimizer`` moves this mirror's B."""
        return self.mirror_optimizer is not None and mirror is not None and mirror.each_step and mirror.signal is None

    def mirror_step(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """See ``Steps``."""
        self.check_state(state)
        key, noise_key = jax.random.split(state.key)
        count, chosen = state.mirrored + 1, mirror.only(self.rules, lambda mirror: mirror.each_step)
        leaves, entries = jax.tree.leaves(state.params), self.tree.flatten_up_to(state.feedback)
        after, signals = self.mirrored(noise_key, chosen, leaves, entries, count, False)
        metrics: dict[str, Any] = {}
        watched = mirror.only(chosen, lambda mirror: not self.by_hand(mirror))
        parts = 1 if self.axis_name is None else jax.lax.psum(1, self.axis_name)
        if lags := mirror.lags(watched, self.analysis, leaves, entries, signals, count, parts):
            metrics["lag"] = lags
            # The lag reads B before B is overwritten. Otherwise XLA would copy B.
            waits = zip(self.analysis.paths, after, strict=True)
            after = [compat.after(b, lags[path]) if path in lags else b for path, b in waits]
        return self.place(state._replace(feedback=self.tree.unflatten(after), mirrored=count, key=key)), metrics

    @functools.cached_property
    def period(self) -> Callable[..., list[Any]]:
        """Compiled mirroring before training. ``own``: only for rules with ``mirror.start``."""

        def period(key: jax.Array, steps: int, own: bool, leaves: list[Any], entries: list[Any]) -> list[Any]:
            chosen = mirror.at_start(self.rules)[0] if own else self.rules
            step = lambda key, ws, bs, count: self.mirrored(key, chosen, ws, bs, count, True)[0]
            return mirror.period(step, key, steps, leaves, entries)

        return jax.jit(period, static_argnums=(1, 2))

    def init(self, key: jax.Array, params: Any, model_state: Any = None, mirror_steps: int | None = None) -> TrainState:
        """See ``Steps``."""
        own = mirror_steps is None
        if mirror_steps is None:
            mirror_steps = mirror.at_start(self.rules)[1]
        checks.key(key)
        self.check_as_given("params", params)
        checks.named_leaves(params)
        self.check_as_given("model_state", model_state)
        must = "be an integer of at least 0 and below 2^31"
        checks.number("mirror_steps", mirror_steps, must, lambda n: 0 <= n < 2**31, numbers.Integral)
        updates.check_usable(self.optimizer, params)
        updates.check_finite(self.optimizer, params)
        if mirror_steps and not any(rule.mirror for rule in self.rules.values()):
            raise ValueError(
                "mirror_steps asks for a mirror period, but no rule here has a mirror mode; leave it out, or use one that has, such as weight_mirror()"
            )
        # The state is donated by the steps, so it must share no buffer with what the caller keeps.
        # (Weakly typed it would be another after a step, which would then be compiled again.)
        params, model_state, key = jax.tree.map(_own_copy, (params, model_state, key))
        key, feedback_key, noise_key = jax.random.split(key, 3)
        feedback = initial_feedback(feedback_key, self.rules, self.analysis, params)
        if mirror_steps:
            entries = self.tree.flatten_up_to(feedback)
            feedback = self.tree.unflatten(self.period(noise_key, mirror_steps, own, jax.tree.leaves(params), entries))
        learning = enumerate(self.feedback_optimizers)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            feedback=feedback,
            model_state=model_state,
            opt_state=self.optimizer.init(params),
            feedback_opt_state=tuple(trainer.init(self.learning(feedback, i)) for i, trainer in learning),
            mirrored=jnp.asarray(mirror_steps, jnp.int32),
            key=key,
        )
        return state if self.mesh is None else jax.jit(self.place)(state)

    def explain(self, error: Exception, state: Any = None, batch: Any = None, *more: Any, **named: Any) -> None:
        """Raises what was wrong with a step's arguments, if it is one of the mistakes that JAX sees before the step does."""
        for name, value in (("state", state), ("batch", batch)):
            for where, leaf in checks.places(name, value):
                if checks.aval(leaf) is None:
                    raise TypeError(
                        f"{where} is {checks.shape(leaf)}; a step takes only arrays: remove it, or pass an array"
                    ) from error
            checks.traceable(name, value)
            if "deleted" in str(error) or "not a valid JAX type" in str(error):
                checks.values(name, value)
        if "donate the same buffer twice" in str(error):
            raise ValueError(
                "state holds an array twice, but a step takes over the memory of each array (JAX donates it). Pass a copy: "
                "jax.tree.map(jnp.copy, state)"
            ) from error
        if "incompatible devices" in str(error):
            raise ValueError(
                f"state or batch is not on the devices of the step ({checks.first_line(error)}). Take state from the init of the "
                "same steps, and place batches: jax.device_put(batch, wmkp.training.batch_sharding(mesh))"
            ) from error
        if isinstance(error, NameError | AssertionError) and self.axis_name is not None:
            raise ValueError(
                f"axis_name={self.axis_name!r} is not an axis of a jax.pmap or jax.shard_map around the step; call the "
                "step inside one, or leave axis_name out"
            ) from error


def _check_form(loss_fn: Any) -> None:
    """TypeError unless ``loss_fn`` takes the four arguments."""
    checks.function("loss_fn", loss_fn, "loss_fn(params, model_state, batch, key)")
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # some callables have none
        return
    try:
        signature.bind(None, None, None, None)
    except TypeError:
        raise TypeError(
            "loss_fn must have the form loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)); got "
            f"{getattr(loss_fn, '__name__', type(loss_fn).__name__)}{signature}"
        ) from None


def _check_output(analysis: Analysis, model_state: Any, check_finite: bool) -> None:
    """What loss_fn returns is ``(loss, (model_state, metrics))``."""
    out = jax.tree.unflatten(analysis.out_tree, [v.aval for v in analysis.plan.jaxpr.outvars])
    pair = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple) and len(out[1]) == 2
    if not pair or not isinstance(out[1][1], dict):
        raise ValueError(
            "loss_fn must have the form loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)) with a "
            f"dict of metrics; it returned {checks.short(checks.shapes(out))}"
        )
    check_loss(lambda: out, True)()
    if odd := [name for name in out[1][1] if not isinstance(name, str)]:
        raise TypeError(f"loss_fn's metrics must have strings as names; got {odd[0]!r}")
    if taken := {"loss", *(["finite"] if check_finite else [])} & set(out[1][1]):
        raise ValueError(
            f"loss_fn's metrics must not hold {min(taken)!r}, which a step reports itself; give it another name"
        )
    checks.alike("the model_state that loss_fn returns", out[1][0], model_state, "the model_state that it is given")


def _own_copy(x: Any) -> jax.Array:
    copy = jnp.copy(x)
    return copy.astype(copy.dtype) if copy.aval.weak_type else copy


def _floats(f: Callable[[Any], Any], tree: Any) -> Any:
    """``f`` of the floating-point leaves; counters and random keys are the same on every device."""
    return jax.tree.map(lambda x: f(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
