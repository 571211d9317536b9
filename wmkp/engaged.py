"""init_feedback, engage and value_and_grad: JAX functions whose backward pass goes through feedback weights."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wmkp import checks, mirror
from wmkp.feedback import feedback_leaves, initial_feedback
from wmkp.forward import forward_signal, jacobians
from wmkp.program import compat, pathways
from wmkp.program.interpreter import Direct, Handler, anchored, run
from wmkp.program.pathways import hebbian
from wmkp.program.products import Product
from wmkp.program.projections import Analysis, Projection, analyse, explained
from wmkp.rule import Rule, RuleOrRules, check_rule, float_part, overlay, resolve


def init_feedback(key: jax.Array, rule: RuleOrRules, fun: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Makes the feedback weights B that a rule starts from.

    If the rule mirrors before training (``rule.mirror.start``), this function takes those mirror steps too.

    Args:
      key: a JAX random key. Each projection draws from a key derived from it.
      rule: a rule, or a mapping from path patterns to rules (the first match wins).
      fun: the function to train, ``fun(params, *args)``.
      params: its parameters, a pytree of floating-point arrays.
      *args: its further arguments, or ShapeDtypeStructs in their place.

    Returns:
      A pytree of params' structure. Each B has its parameter's shape, dtype and layout: a Flax kernel of shape (in,
      out) is the paper's W^T, and its B is the paper's B. ``None`` where no error must pass back: biases,
      normalizations, first layers, parameters under ``backprop()``.

    Raises:
      ValueError: no projection in ``fun``; patterns and paths that do not match; a ``scale`` that a parameter's dtype
        cannot hold; a rule of your own that reads W but says that it transports nothing.
      WeightTransportError: B cannot follow a parameter. The message names its path and the primitive.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x = jax.ShapeDtypeStruct((16, 4), jnp.float32)
      >>> feedback = wmkp.init_feedback(jax.random.key(0), wmkp.kolen_pollack(), loss_fn, params, x)
      >>> jax.tree.map(jnp.shape, feedback)
      {'W1': None, 'W2': (8, 2)}
    """
    checks.key(key)
    check_rule(rule)
    analysis = analyse(fun, params, *args)
    rules = resolve(rule, analysis)
    feedback = initial_feedback(key, rules, analysis, params)
    chosen, steps = mirror.at_start(rules)
    if not steps:
        return feedback
    leaves, tree = jax.tree.leaves(params), jax.tree.structure(params)  # type: list[Any], Any

    def step(key: jax.Array, leaves: list[Any], entries: list[Any], count: jax.Array) -> list[Any]:
        signals = mirror.signals(key, chosen, analysis, leaves, entries)
        return mirror.averaged(chosen, analysis, entries, signals, count, True)

    # Another key than those of B, which are numbered by the leaves.
    own = jax.random.fold_in(key, 2**32 - 1)
    period = jax.jit(functools.partial(mirror.period, step, steps=steps))
    return tree.unflatten(period(own, leaves=leaves, entries=tree.flatten_up_to(feedback)))


def companions(analysis: Analysis, rules: dict[str, Rule], leaves: list[Any], feedback: list[Any]) -> list[Any]:
    """For each parameter the array that carries the error back: W under backprop, None if nothing does."""
    sites, projections = analysis.sites(), analysis.projections()
    result: list[Any] = []
    for path, w, b in zip(analysis.paths, leaves, feedback, strict=True):
        rule = rules.get(path)
        if rule is None:
            result.append(None)
        elif rule.backward is None:
            result.append(w)
        elif b is None:
            if any(p.needs_feedback for p in sites[path]):
                raise ValueError(
                    f"feedback[{path!r}] is None, but an error must pass back through that projection under "
                    f"{rule.name}; make feedback for this rule: init_feedback(key, rule, fun, params, ...)."
                )
            result.append(None)
        elif rule.direct and not projections[path].feedback:
            result.append(None)
        else:
            result.append(carried(rule, projections[path], path, w, b))
    return result


def carried(rule: Rule, projection: Projection | None, path: str, w: Any, b: Any) -> Any:
    """The array that carries the error back (W's shape, or Direct). ValueError if the rule did not make this B."""
    assert rule.backward is not None
    try:
        carrier = rule.backward(w, b)
        array = carrier.array if isinstance(carrier, Direct) else carrier
        expected = jnp.shape(w)
        if rule.direct:
            expected = jnp.shape(array) if projection is None else projection.direct_shape()
        fits = isinstance(carrier, Direct) == rule.direct and checks.is_array(array) and array.shape == expected
        why = f"{checks.shape(array)}, not {list(expected)}"
        if fits and not rule.direct and checks.aval(carrier) != checks.aval(w):
            fits, why = False, f"{checks.shape(array)}, where W is {checks.shape(w)}"
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        fits, why = False, checks.first_line(error)
    if not fits:
        raise ValueError(
            f"feedback[{path!r}] is {checks.shape(b)}, which is not a B of {rule.name} (rule.backward gives "
            f"{why}); make feedback for this rule: init_feedback(key, rule, fun, params, ...)."
        )
    if rule.signal is None:
        carrier = jax.lax.stop_gradient(carrier)
    elif carrier is w:  # given for both: B's signal must not reach what W is made of
        carrier = jnp.copy(w)
    return carrier if rule.direct else compat.divided_as(carrier, jax.typeof(w))


def _delta_tap(product: Product, x: Any, y: Any, tap: Any) -> Any:
    """``y``; the tap's cotangent is the delta there."""
    return y + tap


def evaluate(
    analysis: Analysis,
    rules: dict[str, Rule],
    leaves: list[Any],
    carriers: list[Any],
    args: Any,
    taps: dict[Product, Any],
    tapped: Callable[[Product, Any, Any, Any], Any] = _delta_tap,
    entries: list[Any] | None = None,
    key: Any = None,
) -> Any:
    """``fun``'s value; errors go back through ``carriers``. ``tapped(product, x, y, tap)`` puts taps in.

    ``entries`` are feedback's, for B's signals. Without them there are no signals, and without a ``key`` no noise.
    """
    direct = any(isinstance(carrier, Direct) for carrier in carriers)
    last = analysis.last() if direct else None
    circuits = _circuits(analysis, rules, leaves)
    if entries is None:
        circuits = {path: circuit._replace(signal=None) for path, circuit in circuits.items()}

    def on_product(handler: Handler, product: Product, x: Any, w: Any, b: Any, tap: Any) -> Any:
        leaf = min(product.params)
        rule = rules.get(analysis.paths[leaf])
        bare = any(carriers[i] is None for i in product.params)
        if b is w and not bare and (rule is None or _leaves_alone(rule) or not product.needs_feedback):
            y = product.multiply(x, w)
        elif bare or not product.followed or (isinstance(b, Direct) and not product.needs_feedback):
            y = pathways.without_feedback(product, x, w, analysis.paths[leaf])
        else:
            circuit = circuits[analysis.paths[leaf]]
            handler.channel, own = pathways.next_key(handler.channel)
            x, noise = pathways.noisy(x, 0.0 if rule is None else rule.noise, own)
            if isinstance(b, Direct):
                y, passed = pathways.directly(product, x, w, b.array, handler.channel.error, circuit, noise, own)
                handler.channel = handler.channel._replace(error=passed)
            else:
                entry = entries[leaf] if circuit.own and entries is not None else None
                y = pathways.through_feedback(product, x, w, b, circuit, _whole(entry, product), noise, own)
        if product is last:
            y = pathways.emit_error(y, handler.channel.error)
            handler.channel = handler.channel._replace(error=error)  # each step of a scan has its own error
        return y if tap is None else tapped(product, x, y, tap)

    data = [leaf for leaf in jax.tree.leaves(args) if checks.is_array(leaf)]
    inputs = [(w, None if b is w else b) for w, b in zip(leaves, carriers, strict=True)] + [(x, None) for x in data]
    error = None
    if last is not None:
        error = compat.divided_as(jnp.zeros(last.output_aval.shape, last.output_aval.dtype), last.output_aval)
    if not any(rule.noise or rule.error or circuits[path].own for path, rule in rules.items()):
        key = None
    channel = None if error is None and key is None else pathways.Channel(error, key)
    anchor = anchored((inputs, analysis.plan.consts))
    outs = run(analysis.plan, inputs, Handler(on_product, taps, channel, anchor))
    return jax.tree.unflatten(analysis.out_tree, [value for value, _ in outs])


def _circuits(analysis: Analysis, rules: dict[str, Rule], leaves: list[Any]) -> dict[str, pathways.Circuit]:
    """How its rule runs each projection."""
    circuits = {}
    for path, products in analysis.sites().items():
        if rule := rules.get(path):
            circuit = pathways.Circuit(
                rule.signal, rule.error, rule.transports == "signs", rule.transports == "weights"
            )
            if circuit.own:  # how often an element of the parameter is used, on average
                shares = (p.weight_aval.size / sum(leaves[i].size for i in p.params) for p in products)
                uses = sum(math.prod(p.lengths) * share for p, share in zip(products, shares, strict=True))
                circuit = circuit._replace(uses=uses)
            circuits[path] = circuit
    return circuits


def _leaves_alone(rule: Rule) -> bool:
    """Whether the rule leaves the function unchanged: backprop without noise or error."""
    return rule.backward is None and rule.error is None and not rule.noise


def _whole(entry: Any, product: Product) -> Any:
    """A B of several arrays, for a signal with its structure. ValueError if this use of the weight reads only a part of B."""
    if entry is None or checks.is_array(entry):
        return None
    if product.stack or len(product.params) > 1:
        raise ValueError(
            "a rule with its own signal and a B of several arrays needs a weight that is used whole in one place, but a "
            "parameter here is scanned over or joined to another. Make B one array in W's layout, or give this parameter "
            "another rule."
        )
    return entry


def engage(fun: Callable[..., Any], rule: RuleOrRules) -> Callable[..., Any]:
    """Returns ``fun`` in engaged mode: the same value, its backward pass through the feedback weights B.

    At each projection (eq. 3-4) the forward pass computes ``u = W x``. The backward pass computes ``dx = B delta`` and
    ``dW = delta x^T``. B's cotangent is the rule's signal: under Kolen-Pollack ``x delta^T`` in W's layout (eq. 15;
    also under ``kolen_pollack_transported``), and zero if B does not learn in engaged mode.

    Args:
      fun: any JAX function ``fun(params, *args)``.
      rule: a rule, or a mapping from path patterns to rules.

    Returns:
      ``engaged(params, feedback, *args, key=None)``, which computes ``fun(params, *args)``. You can differentiate it in
      reverse mode with respect to params and feedback, and jit, vmap and scan it. Without ``jax.jit`` it walks ``fun``
      at every call. ``key`` is a random key; a rule with noise needs one.

      Its gradient G(W, B) can be differentiated again, in either mode. With B fixed, dG/dW is no Hessian and not
      symmetric, because G is the gradient of no function. With B = W moving together it is the loss's Hessian. A B that
      does not learn in engaged mode counts as fixed.

    Raises:
      TypeError: ``rule`` is no rule; ``fun`` is no function; forward-mode differentiation of the engaged function
        itself.
      ValueError, TypeError, WeightTransportError: when called, as ``init_feedback``; or feedback that does not match.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x, rule = jnp.ones((16, 4)), wmkp.feedback_alignment()
      >>> feedback = wmkp.init_feedback(jax.random.key(0), rule, loss_fn, params, x)
      >>> grads = jax.grad(wmkp.engage(loss_fn, rule))(params, feedback, x)
    """

    checks.function("fun", fun, "fun(params, *args)")
    check_rule(rule)

    @functools.wraps(fun, assigned=("__name__", "__doc__"), updated=())
    def engaged(params: Any, feedback: Any, *args: Any, key: Any = None, **named: Any) -> Any:
        _check_call(params, feedback, args, named)
        if isinstance(rule, Rule) and _leaves_alone(rule):
            _check_no_feedback(params, feedback)
            return explained(fun)(params, *args)
        analysis = analyse(fun, params, *args)
        rules = resolve(rule, analysis)
        _check_key(rules, key)
        leaves, entries = jax.tree.leaves(params), feedback_leaves(params, feedback)
        carriers = companions(analysis, rules, leaves, entries)
        try:
            return evaluate(analysis, rules, leaves, carriers, args, {}, entries=entries, key=key)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "an engaged function has no forward mode (jax.jvp, jax.jacfwd): B says how errors go back, not how "
                "changes go forward. Take its gradient in reverse mode. You can differentiate that gradient in either mode: "
                "jax.jvp(jax.grad(engaged), ...)."
            ) from error

    return engaged


def _check_call(params: Any, feedback: Any, args: Any, named: dict[str, Any]) -> None:
    if named:
        raise TypeError(
            f"{next(iter(named))} was given by keyword; fun's arguments go by position here: (params, feedback, *args). "
            f"Bind other options first: functools.partial(fun, {next(iter(named))}=...)."
        )
    checks.values("args", args)
    ours, theirs = jax.tree.leaves(params), jax.tree.leaves(feedback)
    if len(ours) < len(theirs):  # params have at least as many leaves as feedback
        try:
            feedback_leaves(feedback, params)
        except (TypeError, ValueError):
            return
        raise ValueError("params and feedback are exchanged; call engaged(params, feedback, *args)")


def _check_key(rules: dict[str, Rule], key: Any) -> None:
    if key is not None:
        checks.key(key)
    elif noisy := [rule for rule in rules.values() if rule.noise or rule.signal is forward_signal]:
        raise ValueError(
            f"rule {noisy[0].name} has noise in engaged mode: pass key=jax.random.key(0), and another key at each call"
        )


def _check_no_feedback(params: Any, feedback: Any) -> None:
    """If the rule is backprop alone, feedback must be None or fit params."""
    checks.named_leaves(params)
    if feedback is not None:
        feedback_leaves(params, feedback)


def check_loss(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """``fun`` with a check: ValueError if it does not return a real scalar (beside auxiliary data)."""

    def loss(*args: Any) -> Any:
        out = fun(*args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"with has_aux=True fun must return (loss, aux); got {type(out).__name__}")
        value = checks.aval(out[0] if has_aux else out)
        if value is None or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            hint = "" if has_aux else ". If it returns (loss, aux), pass has_aux=True"
            raise ValueError(
                "fun must return a real scalar loss to be differentiated; got "
                f"{checks.shape(out[0] if has_aux else out)}{hint}"
            )
        return out

    return loss


def value_and_grad(fun: Callable[..., Any], rule: RuleOrRules, has_aux: bool = False) -> Callable[..., Any]:
    """The replacement for ``jax.value_and_grad``: the loss, and its gradients under any rule.

    Args:
      fun: a loss ``fun(params, *args) -> scalar``, or ``-> (scalar, aux)`` with ``has_aux``.
      rule: a rule, or a mapping from path patterns to rules.
      has_aux: whether ``fun`` returns auxiliary data beside the loss.

    Returns:
      A function ``(params, feedback, *args, key=None) -> (value, (grads,
      feedback_signal))``. ``value`` is the loss, or ``(loss, aux)`` with ``has_aux``. ``grads`` are the gradients of W,
      in params' structure, shapes and dtypes. ``feedback_signal`` is for B what a gradient is for W, in feedback's
      structure: under Kolen-Pollack ``x delta^T`` (eq. 15), and zeros if B does not learn in engaged mode. Leaves of a B
      that are not floats have None.
      ``rule.optimizer`` (None: W's own) descends on it. ``key`` is a random key for rules whose noise, error or signal
      needs one. The same key gives the same result.

    Raises:
      TypeError: ``rule`` is no rule, or ``fun`` no function.
      ValueError, TypeError, WeightTransportError: when called, as ``engage``; or a loss that is not a scalar.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x, rule = jnp.ones((16, 4)), wmkp.kolen_pollack()
      >>> feedback = wmkp.init_feedback(jax.random.key(0), rule, loss_fn, params, x)
      >>> gradients = jax.jit(wmkp.value_and_grad(loss_fn, rule))
      >>> loss, (grads, signal) = gradients(params, feedback, x)
      >>> params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    """

    checks.function("fun", fun, "fun(params, *args)")
    check_rule(rule)
    checks.flag("has_aux", has_aux)

    def value_and_gradients(params: Any, feedback: Any, *args: Any, key: Any = None, **named: Any) -> Any:
        _check_call(params, feedback, args, named)
        if isinstance(rule, Rule) and _leaves_alone(rule):
            _check_no_feedback(params, feedback)
            loss_fn = check_loss(explained(fun), has_aux)
            value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *args)
            return value, (grads, jax.tree.map(jnp.zeros_like, float_part(feedback)))
        analysis = analyse(fun, params, *args)
        rules = resolve(rule, analysis)
        leaves, tree = jax.tree.leaves(params), jax.tree.structure(params)
        entries = feedback_leaves(params, feedback)
        floats = float_part(entries)
        _check_key(rules, key)
        # If W does nothing but multiply activations, B's cotangent is W's own gradient. It is not computed (or stacked up
        # by a scan) twice.
        same = {
            i for i, b in enumerate(entries) if b is not None and _as_weight(rules.get(analysis.paths[i]), i, analysis)
        }

        def loss(ours: list[Any], theirs: list[Any]) -> Any:
            # B comes from outside this derivative, so a Hessian-vector product can differentiate by it. An array that a
            # rule makes from W for the backward pass is no use of W. Under backprop the array is W itself.
            itself = [path in rules and rules[path].backward is None for path in analysis.paths]
            ws = [own if backprop else w for backprop, w, own in zip(itself, leaves, ours, strict=True)]
            bs = [b if i in same else overlay(b, own) for i, (b, own) in enumerate(zip(entries, theirs, strict=True))]
            return evaluate(analysis, rules, ours, companions(analysis, rules, ws, bs), args, {}, entries=bs, key=key)

        value, (grads, signal) = jax.value_and_grad(check_loss(loss, has_aux), argnums=(0, 1), has_aux=has_aux)(
            leaves, floats
        )
        for i in same:
            backward, learns = rules[analysis.paths[i]].backward, rules[analysis.paths[i]].signal is not None
            if backward is not None and learns:
                carrier, pull_back = jax.vjp(lambda b: backward(leaves[i], overlay(entries[i], b)), floats[i])  # noqa: B023
                (signal[i],) = pull_back(compat.divided_as(grads[i], jax.typeof(carrier)))
        learn = [path for path, one in rules.items() if one.signal is forward_signal]
        for i, taught in jacobians(key, learn, analysis, leaves, args).items():
            signal[i] = jax.tree.map(jnp.subtract, signal[i], taught)
        return value, (jax.tree.unflatten(tree, grads), jax.tree.unflatten(tree, signal))

    return value_and_gradients


def _as_weight(rule: Rule | None, leaf: int, analysis: Analysis) -> bool:
    """Whether B's signal is W's gradient (or zero), so that it needs no separate derivative."""
    if rule is None or rule.signal is None:
        return rule is not None
    plain = rule.signal is hebbian and rule.error is None and not rule.direct
    return plain and (rule.transports == "changes" or leaf not in analysis.shared)
