"""What a learning rule is: a NamedTuple of pure functions, its checks, and the choice of a rule by path."""

import functools
import inspect
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from wmkp import checks
from wmkp.program.pathways import Signal, hebbian
from wmkp.program.products import Product, WeightTransportError
from wmkp.program.projections import Analysis, Projection


class Mirror(NamedTuple):
    """How mirror mode trains a rule's B: the noise, the response to it, and how fast B follows.

    Attributes:
      noise: one of ``NOISES``.
      noise_std: sigma, the standard deviation of each presynaptic value.
      num_samples: samples that a mirror step draws for a projection. None: as many as ``target_angle`` needs.
      target_angle: degrees between B and W^T at which mirroring settles while W stands still. None: what ``SAMPLES``
        samples for each input leave.
      rate: a, the share of B that one mirror step replaces by its estimate of W^T. None: 1/t at the t-th mirror step,
        so that B is the mean of all estimates. An estimate that is exact by the law of angles replaces all of B.
      activation: phi, or None for a linear response.
      bias: "blocked" (no bias in mirror mode) or "kept" (the layer's own).
      signal: a function of ``wmkp.Synapses`` on noise that B descends by ``rate``, in place of the average of x y^T; or
        None.
      each_step: whether ``mirror_step`` changes B, or only the mirror steps before training do.
      start: mirror steps before training, by ``steps.init`` and ``init_feedback``.
    """

    noise: str = "gaussian"
    noise_std: float = 1.0
    num_samples: int | None = None
    target_angle: float | None = None
    rate: float | None = 0.1
    activation: Callable[[jax.Array], jax.Array] | None = None
    bias: str = "blocked"
    signal: Signal | None = None
    each_step: bool = True
    start: int = 0


class Rule(NamedTuple):
    """A learning rule: which array carries the error back through a projection, and how that array learns.

    Attributes:
      name: the name that tables print.
      init: ``(key, projection, W) -> B``, of W's shape and dtype, or a pytree that ``backward`` understands. Its leaves
        that are not floats (signs, a random key) are constants: they have no signal and do not change.
      backward: ``(W, B) -> array`` in W's layout that carries the error back. None: W itself (backprop). If you
        differentiate an engaged function by hand, ``backward`` must read W behind ``jax.lax.stop_gradient``.
      signal: what B descends in engaged mode: a function of ``wmkp.Synapses`` that returns an array in W's layout,
        which is differentiated through ``backward`` to B. If B is no array, it may also return a pytree of B's
        structure, with None where nothing learns. It is summed over uses, as W's gradient is. None: B does not learn in
        engaged mode. ``wmkp.hebbian``: Kolen-Pollack's signal.
      optimizer: the optax transformation that turns the signal into B's change. None: the optimizer that trains W.
      error: ``(delta, key) -> array`` of delta's shape, which travels back through B. W's own gradient keeps delta.
        None: delta itself. ``key`` is None if no key was given.
      noise: standard deviation of Gaussian noise that engaged mode adds to the projection's input.
      mirror: how B learns in mirror mode. None: it does not.
      redrawn: whether each engaged step draws B again.
      direct: whether B carries the output's error straight to this projection's input.
      transports: what of W reaches the backward pass or B: "weights", "signs", "changes" (then B's signal is W's whole
        gradient, not that of this use alone) or "nothing".
    """

    name: str
    init: Callable[[jax.Array, Projection, jax.Array], Any] | None
    backward: Callable[[jax.Array, Any], Any] | None
    signal: Signal | None = None
    optimizer: optax.GradientTransformation | None = None
    error: Callable[[Any, Any], Any] | None = None
    noise: float = 0.0
    mirror: Mirror | None = None
    redrawn: bool = False
    direct: bool = False
    transports: str = "nothing"


RuleOrRules = Rule | Mapping[str, Rule]
BACKPROP = Rule("backprop", None, None, transports="weights")
LOCAL = Rule("local", None, None)
P = ParamSpec("P")


def named(factory: Callable[P, Rule]) -> Callable[P, Rule]:
    """Names a factory's rules by their arguments, such as ``weight_mirror(noise='gaussian')``."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Rule:
        rule = factory(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if "name" in given:
            return rule
        changed = [f"{k}={_shown(v)}" for k, v in given.items() if v != signature.parameters[k].default]
        return rule._replace(name=factory.__name__ + (f"({', '.join(changed)})" if changed else ""))

    return make


def _shown(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


@jax.tree_util.register_pytree_node_class
class Fixed:
    """A part of B that does not learn: no optimizer sees it, so it neither moves nor decays.

    Use it in a B of several arrays: ``init`` returns ``{"Q": Q, "P": Fixed(P)}``, and ``backward`` reads
    ``B["P"].array``.

    Attributes:
      array: the array (or a pytree of arrays).
    """

    def __init__(self, array: Any):
        self.array = array

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        """For JAX."""
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, static: None, children: Any) -> "Fixed":
        """For JAX."""
        return cls(*children)


def is_float(x: Any) -> bool:
    """Whether an array can have a derivative. Other leaves of a B (signs, a random key) are constants."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def float_part(b: Any) -> Any:
    """A B with None in place of its constants."""
    return jax.tree.map(lambda x: x if is_float(x) else None, b)


def learning_part(b: Any) -> Any:
    """A B with None in place of its fixed parts and its constants."""
    return float_part(jax.tree.map(lambda x: None if _is_fixed(x) else x, b, is_leaf=_is_fixed))


def _is_fixed(x: Any) -> bool:
    return isinstance(x, Fixed)


def overlay(below: Any, above: Any) -> Any:
    """``above`` where it has an entry, ``below`` elsewhere."""
    return jax.tree.map(lambda a, b: b if a is None else a, above, below, is_leaf=lambda x: x is None)


NOISES = ("gaussian", "uniform", "rademacher", "orthogonal", "antithetic", "orthogonal+antithetic")
# Samples a mirror step draws for each input where neither num_samples nor target_angle says (of pairs, so many pairs).
SAMPLES = {noise: 1 if "orthogonal" in noise else 8 for noise in NOISES}


def check_mirror(mirror: Mirror) -> None:
    checks.one_of("noise", mirror.noise, NOISES)
    checks.one_of("bias", mirror.bias, ("blocked", "kept"))
    checks.positive("noise_std", mirror.noise_std)
    if mirror.num_samples is not None:
        must = "be an integer of at least 1, and below 2^31"
        checks.number("num_samples", mirror.num_samples, must, lambda x: 1 <= x < 2**31, numbers.Integral)
    between = "lie between 0 and 90 degrees (from 1e-6 on), or be None"
    if mirror.target_angle is not None:
        checks.number("target_angle", mirror.target_angle, between, lambda x: 1e-6 <= x < 90)
    if mirror.rate is not None:
        checks.number("rate", mirror.rate, "lie in (0, 1]", lambda x: 0 < x <= 1)
    elif mirror.signal is not None:
        raise ValueError(
            "rule.mirror.rate is None, but a mirror with its own signal needs a rate: use Mirror(signal=..., rate=0.1)"
        )
    least = 0 if mirror.rate is not None else 1
    must = f"be an integer of at least {least}, and below 2^31"
    if least:
        must += " (rate=None is the mean over all mirror steps, the first of them before training)"
    checks.number("start", mirror.start, must, lambda x: least <= x < 2**31, numbers.Integral)
    checks.flag("rule.mirror.each_step", mirror.each_step)
    if not mirror.each_step and mirror.start == 0:
        raise ValueError("rule.mirror never mirrors: set start=1 (a mirror step before training) or each_step=True")
    if mirror.signal is not None:
        checks.function("rule.mirror.signal", mirror.signal, "(synapses) -> array in W's layout, or None")
    if mirror.activation is not None and not callable(mirror.activation):
        raise ValueError(f"activation must be a function of an array, or None; got {checks.shown(mirror.activation)}")


def _check_fields(rule: Rule) -> None:
    """TypeError or ValueError if a rule (perhaps the user's own) is incomplete."""
    if (rule.init is None) != (rule.backward is None):
        lacking = "init" if rule.init is None else "backward"
        raise ValueError(
            f"rule {rule.name} has no {lacking}: give both, or neither for backprop. Without backward the error would go "
            "back through W, and without init there is no B."
        )
    if rule.init is not None:
        checks.function("rule.init", rule.init, "(key, projection, W) -> B")
        checks.function("rule.backward", rule.backward, "(W, B) -> array in W's layout")
    for name in ("redrawn", "direct"):
        checks.flag(f"rule.{name}", getattr(rule, name))
    checks.one_of("rule.transports", rule.transports, ("nothing", "signs", "changes", "weights"))
    checks.number("rule.noise", rule.noise, "be a number of at least 0", lambda x: x >= 0)
    if rule.signal is not None:
        checks.function("rule.signal", rule.signal, "(synapses) -> array in W's layout, or None")
    if rule.error is not None:
        checks.function("rule.error", rule.error, "(delta, key) -> array of delta's shape, or None")
    if rule.signal is not None and rule.backward is None:
        raise ValueError(f"rule {rule.name}: a signal trains B; give init and backward too")
    if rule.optimizer is not None:
        checks.transformation("rule.optimizer", rule.optimizer)
    if not isinstance(rule.mirror, Mirror | None):
        raise TypeError(f"rule.mirror must be a Mirror, or None; got {checks.shown(rule.mirror)}")
    if rule.mirror is not None:
        check_mirror(rule.mirror)


def check_rule(rule: Any, *, mapping: bool = True) -> None:
    """TypeError unless ``rule`` is a rule, or (with ``mapping``) a mapping of patterns to rules."""
    if isinstance(rule, Rule):
        _check_fields(rule)
        return
    if mapping and isinstance(rule, Mapping):
        for pattern, one in rule.items():
            if not isinstance(pattern, str):
                raise TypeError(f"rule's patterns must be strings, searched for in the paths; got {pattern!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"rule's pattern {pattern!r} is no regular expression ({error}); use re.escape(path) for a literal path"
                ) from None
            if not isinstance(one, Rule):
                raise TypeError(f"rule[{pattern!r}] must be a wmkp rule such as kolen_pollack(); got {_no_rule(one)}")
            check_rule(one)
        return
    what = ", or a mapping of path patterns to rules" if mapping else ""
    raise TypeError(f"rule must be a wmkp rule such as kolen_pollack(){what}; got {_no_rule(rule)}")


def _no_rule(value: Any) -> str:
    called = f" (call it: {value.__name__}())" if callable(value) and hasattr(value, "__name__") else ""
    return f"{checks.shown(value)}{called}"


def _check_allowed(path: str, product: Product, rule: Rule) -> None:
    """WeightTransportError unless the rule allows this use of the parameter, which B cannot follow."""
    if rule == BACKPROP or (rule == LOCAL and product.gain):
        return
    declare = {name: f'rule={{"{re.escape(path)}": wmkp.{name}(), ".*": ...}}' for name in ("local", "backprop")}
    what = f"params[{path!r}] meets an activation in {product.obstacle!r}"
    if product.gain:
        raise WeightTransportError(
            f"{what}: it scales activations, and wmkp cannot tell gains of single neurons from a product written by hand. If each "
            f"of its values belongs to one neuron, declare it: {declare['local']}. If it connects neurons, write the "
            "product as x @ w, jnp.einsum or a convolution, so that it gets a B. Or let the error go back through it: "
            f"{declare['backprop']}."
        )
    if "complex" in str(product.obstacle):
        raise WeightTransportError(
            f"{what}: feedback weights are real. Keep the parameter as two real arrays, each with its own B, and write the product "
            "in real numbers: real, imag = x @ a, x @ b. Or let the error go back through it: "
            f"{declare['backprop']}."
        )
    raise WeightTransportError(
        f"{what}, where B cannot follow it, so the error could only go back through W. Multiply the activation by the parameter "
        "itself, or by a linear map of it (a reshape, a slice, a cast, a constant multiple), as x @ w, jnp.einsum or a "
        f"convolution. Or let the error go back through it: {declare['backprop']}."
    )


def check_samples(analysis: Analysis) -> None:
    """ValueError if no sample reaches any projection."""
    outputs = [p.output_aval.shape for products in analysis.sites().values() for p in products]
    if outputs and all(0 in shape for shape in outputs):
        raise ValueError(
            "args hold no samples: every projection's output is empty. Pass a batch of at least one sample."
        )


def resolve(rule: RuleOrRules, analysis: Analysis) -> dict[str, Rule]:
    """The rule of each projection: ``rule`` itself, or the first whose pattern is found in the path (``re.search``).

    Raises:
      TypeError: ``rule`` is no rule and no mapping of patterns to rules.
      ValueError: no projection at all; a pattern that matches none, or a projection that matches no pattern; a
        projection of no neurons, or that no sample reaches; parts of one weight whose B would learn differently.
      WeightTransportError: feedback weights cannot follow a parameter whose rule is not backprop.
    """
    check_rule(rule)
    sites = analysis.sites()
    paths = list(sites)
    if not paths and not (isinstance(rule, Rule) and rule.backward is None):
        raise ValueError(
            "fun has no projection: no parameter multiplies an activation. Call fun(params, *args): params first, and "
            "data as arrays in args (not closed over, and not Python numbers or lists)."
        )
    if isinstance(rule, Rule):
        rules = dict.fromkeys(paths, rule)
    else:
        rules = {}
        for pattern, one in rule.items():
            among = analysis.paths if one == LOCAL else paths
            if not any(re.search(pattern, path) for path in among):
                raise ValueError(
                    f"rule's pattern {pattern!r} matches no projection; the projections are {', '.join(paths)}"
                )
        for path in paths:
            found = next((r for pattern, r in rule.items() if re.search(pattern, path)), None)
            if found is None:
                raise ValueError(f'no pattern of rule matches projection {path!r}; end with ".*" to match all others')
            rules[path] = found
    check_samples(analysis)
    for path, products in sites.items():
        for product in products:
            if rules[path].backward is not None and 0 in product.weight_aval.shape:
                raise ValueError(
                    f"params[{path!r}] is {list(product.weight_aval.shape)} where it multiplies an activation: a "
                    "projection of no neurons (fan_in or fan_out is zero) has no feedback weights. Leave it out of "
                    "the model, or give it backprop()."
                )
            joined = [rules[analysis.paths[leaf]] for leaf in product.params]
            circuits = {(r.signal, r.error, r.noise) for r in joined if r.backward is not None}
            plain = all(signal in (None, hebbian) and not (error or noise) for signal, error, noise in circuits)
            if (len(circuits) > 1 and not plain) or len({r.mirror for r in joined if r.mirror}) > 1:
                raise ValueError(
                    f"rule gives params[{path!r}] and a parameter that is joined to it, as one weight, different mirrors, "
                    "signals, errors or noises; give all parts of one weight the same rule"
                )
            if product.needs_feedback and product.obstacle:
                _check_allowed(path, product, rules[path])
    return rules
