"""Mirror mode (eq. 5-11): noise enters a projection, and a Hebbian signal comes out."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wmkp import checks
from wmkp.feedback import feedback_leaves
from wmkp.law import concentrated, mirror_gain, mirror_rate, noise_left, samples_drawn, variance
from wmkp.noise import SMALL, hartley, hartley_draw, noise_in_parts
from wmkp.program import compat
from wmkp.program.interpreter import collect
from wmkp.program.pathways import Signal, Synapses
from wmkp.program.products import Product
from wmkp.program.projections import Analysis, WeightTransportError, analyse
from wmkp.rule import Mirror, Rule, RuleOrRules, check_rule, resolve

# The most numbers of noise for a projection (16 GiB in float32): 32 bits number them, and more would repeat.
MOST = 2**32
# The most of them in memory at a time, which fit a processor's cache; the least samples, so that no product is too small.
AT_ONCE, LEAST = 2**21, 512
# The most numbers of noise, responses and signals over all projections that are computed at the same time.
TOGETHER = 2**22


def _transforms(mirror: Mirror, fan_in: int, shared: bool) -> bool:
    """Whether transforms can compute a mirror step: one Hartley matrix, of which at least half is drawn."""
    samples = samples_drawn(mirror, fan_in)
    paired = "antithetic" in mirror.noise
    if "orthogonal" not in mirror.noise or mirror.signal or shared or (paired and samples % 2):
        return False
    return fan_in <= 2 * (samples // 2 if paired else samples) <= 2 * fan_in


def _by_transforms(key: jax.Array, mirror: Mirror, w: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``_estimate`` by transforms, from the same noise (see ``_transforms``).

    The noise's rows are h_j s, where h_j is a row of the Hartley matrix and s are the signs of its columns. So all
    responses together are the transform of s W. The sum of x y^T over samples is s times the transform of the
    responses. Each weight takes about log2(fan_in) operations instead of 4 fan_in.
    """
    blocks, fan_in, _ = w.shape
    samples = samples_drawn(mirror, fan_in)
    pairs = "antithetic" in mirror.noise
    signs, drawn = hartley_draw(key, (blocks, samples // 2 if pairs else samples, fan_in), w.dtype)
    scaled = mirror.noise_std * signs[:, :1]
    respond = mirror.activation or (lambda y: y)
    y = hartley(scaled * w.swapaxes(1, 2))
    kept = 0 if bias is None else bias[:, :, None]
    y = respond(kept + y) - respond(kept - y) if pairs else respond(kept + y)
    if drawn is not None:
        taken = jax.vmap(lambda rows: jnp.zeros(fan_in, bool).at[rows].set(True))(drawn)
        y = jnp.where(taken[:, None], y, 0)
    return (scaled / samples * hartley(y)).swapaxes(1, 2)


def _at_once(mirror: Mirror, blocks: int, fan_in: int, shared: bool) -> int:
    """The largest number of a projection's samples in memory at a time."""
    # Devices share all the noise at once: each part would cost a sum over devices. A loss needs all samples at once.
    if shared or mirror.signal:
        return samples_drawn(mirror, fan_in)
    return max(LEAST, AT_ONCE // (blocks * fan_in) // 2 * 2)


def _numbers(mirror: Mirror, shape: tuple[int, ...]) -> int:
    """How many numbers of noise, responses and signals a projection's ``_estimate`` has in memory at a time."""
    blocks, fan_in, fan_out = shape
    samples = min(samples_drawn(mirror, fan_in), _at_once(mirror, blocks, fan_in, False))
    numbers = blocks * (samples * (fan_in + fan_out) + fan_in * fan_out)
    # Transforms hold a spectrum of complex numbers and its input.
    return max(numbers, 4 * math.prod(shape)) if _transforms(mirror, fan_in, False) else numbers


def _estimate(
    key: jax.Array,
    mirror: Mirror,
    w: jax.Array,
    bias: jax.Array | None,
    b: jax.Array | None,
    spread: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """The mean of x y^T over samples (or minus R's gradient at ``b``), in the layout of ``w``: (K, fan_in, fan_out)."""
    fan_in = w.shape[1]
    if not _transforms(mirror, fan_in, spread is not None):
        return _by_products(key, mirror, w, bias, b, spread)
    if fan_in < SMALL:
        return _by_transforms(key, mirror, w, bias)
    return jax.lax.platform_dependent(  # measured only on CPUs; elsewhere products are fast
        key,
        w,
        bias,
        cpu=lambda key, w, bias: _by_transforms(key, mirror, w, bias),
        default=lambda key, w, bias: _by_products(key, mirror, w, bias, None, None),
    )


def _by_products(
    key: jax.Array,
    mirror: Mirror,
    w: jax.Array,
    bias: jax.Array | None,
    b: jax.Array | None,
    spread: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """``_estimate`` by matrix products, a part of the samples at a time."""
    blocks, fan_in, _ = w.shape
    samples = samples_drawn(mirror, fan_in)
    at_once = _at_once(mirror, blocks, fan_in, spread is not None)
    draw = noise_in_parts(key, mirror, (blocks, samples, fan_in), w.dtype)

    def signal(start: Any, count: int) -> jax.Array:
        x = spread(draw(start, count)) if spread else draw(start, count)
        y = jnp.einsum("kni,kio->kno", x, w)
        if bias is not None:
            y = y + bias[:, None, :]
        if mirror.activation is not None:
            y = mirror.activation(y)
        outer = lambda x, y: jnp.einsum("kni,kno->kio", x, y)
        if mirror.signal is not None:
            multiply = lambda x, w: jnp.einsum("kni,kio->kno", x, w)
            return -mirror.signal(
                Synapses(x, y, None, None, b, w, x, key, outer, multiply, float(samples), 1.0, fan_in, None)
            )
        return outer(x, y)

    more = (samples - 1) // at_once
    first = samples - more * at_once
    total = signal(0, first)
    if more:
        starts = first + at_once * jnp.arange(more, dtype=jnp.uint32)
        total, _ = jax.lax.scan(lambda total, start: (total + signal(start, at_once), None), total, starts)
    return total if mirror.signal else total / float(samples)  # as a float: an int32 may overflow


def _bias_matrix(product: Product, bias: jax.Array, w: jax.Array) -> jax.Array:
    """A bias as a product's output sees it -> (K, outputs of one group), beside ``w`` as (*stack, *weight shape)."""
    axes = product.output_axes()
    rank = product.output_aval.ndim
    lead = bias.ndim - rank
    bias = jnp.moveaxis(bias, [lead + a for a in axes], range(lead, lead + len(axes)))
    bias = bias[(..., *[0] * (rank - len(axes)))]  # it varies only along its outputs
    *_, split = product.axes()
    fan_out = product.fans()[1]
    bias = bias.reshape(*bias.shape[:lead], -1)
    stack = w.shape[: w.ndim - product.weight_aval.ndim]
    return jnp.broadcast_to(bias, (*stack, bias.shape[-1])).reshape(-1, fan_out // split)


def targets(rules: dict[str, Rule], analysis: Analysis) -> dict[Product, Mirror]:
    """The products that mirror mode must reach, each with its mirror.

    Raises:
      WeightTransportError: noise alone cannot reach one.
      ValueError: it would take too much noise; the weight's dtype cannot hold its signals; or a bias is kept beside a
        gain.
    """
    wanted: dict[Product, Mirror] = {}
    for path, products in analysis.sites().items():
        mirror = rules[path].mirror
        for product in products:
            if mirror is None or not product.needs_feedback:
                continue
            reason = product.unmirrored
            if product.primitive == "conv_general_dilated" and product.weight == 0:
                reason = "it is the left operand of a convolution"
            if reason:
                raise WeightTransportError(
                    f"mirror mode cannot reach params[{path!r}] by noise alone ({reason}); give it a rule without a "
                    f'mirror mode: rule={{"{path}": wmkp.kolen_pollack(), ".*": ...}}.'
                )
            if mirror.bias == "kept" and product.bias is not None and product.scaled:
                raise ValueError(
                    f'bias="kept" at params[{path!r}], where a gain scales the weight or its bias: mirror mode sets gains to 1, '
                    'so the bias would be too large or too small for the response. Use bias="blocked".'
                )
            wanted[product] = mirror
            power, limits = mirror.noise_std**2, jnp.finfo(product.weight_aval.dtype)
            if not 64 * float(limits.tiny) <= power <= float(limits.max) / 64:
                raise ValueError(
                    f"noise_std={mirror.noise_std:g} makes signals of {power:.2g} times W at params[{path!r}], which "
                    f"{limits.dtype} cannot hold; use a noise_std nearer to 1, or keep params in a wider dtype"
                )
            fan_in, _ = product.fans()
            samples = samples_drawn(mirror, fan_in)
            # A projection of any size may need 2 fan_in orthogonal samples, which are exact in pairs.
            exact = 2 * fan_in**2 if "orthogonal" in mirror.noise else 0
            if samples * fan_in > max(MOST, exact):
                asked = f"num_samples={samples}"
                if mirror.num_samples is None and mirror.target_angle is not None:
                    asked = f"target_angle={mirror.target_angle:g}"
                raise ValueError(
                    f"{asked} takes {samples * fan_in:.2g} numbers of noise at params[{path!r}] ({samples:,} samples of "
                    f"{fan_in}); at most 2^32 are allowed. Use a larger target_angle, fewer num_samples, or "
                    'noise="orthogonal", which is exact at fan_in samples ("orthogonal+antithetic" with an activation, at '
                    "2 fan_in)."
                )
    return wanted


def _without_weights(signal: Signal) -> Signal:
    """The signal, without access to W."""
    return lambda seen: signal(seen._replace(w=None))


def signals(
    key: jax.Array,
    rules: dict[str, Rule],
    analysis: Analysis,
    leaves: list[Any],
    feedback: list[Any],
    spread: Callable[[jax.Array], jax.Array] | None = None,
) -> list[Any]:
    """Mirror mode's signal for each parameter leaf, None for those that do not mirror.

    ``spread`` says where a projection's noise (K, N, fan_in) is drawn if devices share it.
    """
    wanted = targets(rules, analysis)
    products = list(wanted)

    def weights(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        found = collect(analysis.plan, leaves, products)
        return [compat.gathered(found[p][0]) for p in products], [compat.gathered(found[p][1]) for p in products]

    ws, pull_back, biases = jax.vjp(weights, leaves, has_aux=True)
    losses = [wanted[p].signal is not None for p in products]
    if any(losses):  # these read B, in the layout of its weight
        entries = [w if b is None or not checks.is_array(b) else b for w, b in zip(leaves, feedback, strict=True)]
        bs = weights(entries)[0]
    mirrored, keys = [], jax.random.split(key, max(1, len(products)))
    in_work: deque[tuple[int, jax.Array]] = deque()
    room, done = TOGETHER, None
    for i, (product, w, bias) in enumerate(zip(products, ws, biases, strict=True)):
        mirror = wanted[product]
        if mirror.signal is not None and rules[analysis.paths[min(product.params)]].transports != "weights":
            mirror = mirror._replace(signal=_without_weights(mirror.signal))
        matrices = product.to_matrices(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
        kept = _bias_matrix(product, bias, w) if mirror.bias == "kept" and bias is not None else None
        b = product.to_matrices(bs[i].astype(matrices.dtype)) if losses[i] else None
        own, numbers = keys[i], _numbers(mirror, matrices.shape)
        room -= numbers
        while room < 0 and in_work:
            before, done = in_work.popleft()
            room += before
        if done is not None and not spread:
            # The compiler starts all it can, and would hold the noise of all projections at once. On CPUs it drops barriers,
            # so this key depends on an earlier result. (Only a signal of NaN changes the noise.)
            own = keys[jnp.where(jnp.isnan(done[0, 0, 0]), 0, i)]
        signal = _estimate(own, mirror, matrices, kept, b, spread)
        in_work.append((numbers, signal))
        mirrored.append(product.from_matrices(signal, w.shape).astype(w.dtype))
    (pulled,) = pull_back(mirrored)
    reached = {leaf for product in products for leaf in product.params}
    if not all(
        p.plain and w.size == sum(leaves[i].size for i in p.params) for p, w in zip(products, ws, strict=True)
    ) or (len(reached) < sum(len(p.params) for p in products)):
        # A weight used twice, in part, or scaled: each use is mapped back to the parameter, and the signal is their mean.
        (uses,) = pull_back(weights([jnp.ones_like(x) for x in leaves])[0])
        pulled = [s / jnp.where(u > 0, u, 1) for s, u in zip(pulled, uses, strict=True)]
    mirrors = {path for path, rule in rules.items() if rule.mirror is not None}
    return [s if i in reached and analysis.paths[i] in mirrors else None for i, s in enumerate(pulled)]


def at_start(rules: dict[str, Rule]) -> tuple[dict[str, Rule], int]:
    """The rules that mirror before training, and their number of mirror steps."""
    starts = [rule.mirror.start for rule in rules.values() if rule.mirror]
    return only(rules, lambda mirror: mirror.start > 0), max(starts, default=0)


def only(rules: dict[str, Rule], which: Callable[[Mirror], bool]) -> dict[str, Rule]:
    """The rules, with a mirror mode only where ``which`` accepts the mirror."""
    return {p: r if r.mirror and which(r.mirror) else r._replace(mirror=None) for p, r in rules.items()}


def period(step: Callable[..., list[Any]], key: jax.Array, steps: int, leaves: list[Any], entries: list[Any]) -> Any:
    """B after ``steps`` mirror steps, while W stands still: ``step(key, leaves, entries, count) -> entries``."""
    one = lambda i, b: step(jax.random.fold_in(key, i), leaves, b, jnp.asarray(i + 1))
    return jax.lax.fori_loop(0, steps, one, entries)


def averaged(
    rules: dict[str, Rule],
    analysis: Analysis,
    entries: list[Any],
    signals: list[Any],
    count: jax.Array,
    before: bool,
) -> list[Any]:
    """B after the mirror step number ``count`` (from 1), at each rule's rate. ``before`` training B is a plain mean."""
    result, projections = list(entries), analysis.projections()
    for i, (path, signal, b) in enumerate(zip(analysis.paths, signals, entries, strict=True)):
        if signal is None or b is None:
            continue
        mirror = rules[path].mirror
        assert mirror is not None
        if mirror.signal is not None:  # the signal is the whole change
            result[i] = b + (mirror.rate * signal).astype(signal.dtype)
            continue
        # This is updates.calibrated_mirror, written so that a step of rate 1 leaves nothing of the old B, not even rounding.
        number = count.astype(jnp.promote_types(signal.dtype, jnp.float32))
        rate = 1 / number if before else mirror_rate(mirror, projections[path].fan_in, number)
        result[i] = ((1 - rate) * b + rate * (signal / mirror_gain(rules[path]))).astype(signal.dtype)
    return result


def lags(
    rules: dict[str, Rule],
    analysis: Analysis,
    leaves: list[Any],
    entries: list[Any],
    signals: list[Any],
    count: jax.Array,
    parts: int = 1,
) -> dict[str, jax.Array]:
    """How far each B is from the mirror step's estimate of W^T, beyond what noise explains. W is not read.

    Let v be the variance of the estimate E by the law of angles, and u that of B. Without lag ``|E - B|^2`` is (v + u)
    |W|^2 and ``|E|^2`` is (1 + v) |W|^2. What exceeds this is lag, if by more than three standard deviations.

    Args:
      parts: the number of devices over which each signal is a mean.

    Returns:
      ``{path: degrees}``, the angle whose tangent is the lag over |W|, for mirrors that average and keep no bias.
    """
    sizes, projections, found = [w.size for w in leaves], analysis.projections(), {}
    for i, (path, signal, b) in enumerate(zip(analysis.paths, signals, entries, strict=True)):
        mirror = None if signal is None or b is None else rules[path].mirror
        if mirror is None or mirror.signal is not None or mirror.bias == "kept":
            continue
        products = [p for p in analysis.sites()[path] if p.needs_feedback and i in p.params]
        shares = [math.prod(p.stack) * p.weight_aval.size / sum(sizes[j] for j in p.params) for p in products]
        noise = sum(a * variance(mirror, p.fans()[0]) for a, p in zip(shares, products, strict=True))
        noise /= parts * sum(shares) ** 2  # the mean over uses
        estimate = (signal / mirror_gain(rules[path])).astype(jnp.promote_types(signal.dtype, jnp.float32))
        size = jnp.sum(estimate**2) / (1 + noise)
        moved = jnp.sum((estimate - b) ** 2) / jnp.where(size > 0, size, 1)
        explained = (noise + noise_left(mirror, noise, count)) * (
            1 + 1 / projections[path].fan_in
        )  # (and along W itself)
        beyond = moved - explained
        spread = jnp.sqrt(2 * (1 + noise) / _independent(mirror, products, estimate))
        found[path] = jnp.rad2deg(jnp.arctan(jnp.sqrt(jnp.where(beyond > 3 * explained * spread, beyond, 0))))
    return found


def _independent(mirror: Mirror, products: list[Product], estimate: jax.Array) -> Any:
    """How many independent numbers of similar size make up an estimate's noise.

    The noise mixes the inputs in the same way in all columns of W. So the number is fan_in times the effective number of
    columns, the participation ratio |W|^4 / |W^T W|^2. It is taken from at most 64 columns of the estimate, which costs
    ``2 * 64 * 64 * fan_in`` operations.
    """
    if concentrated(mirror):
        return 1
    (product, *others), fan_in = products, min(p.fans()[0] for p in products)
    if others or not product.plain or estimate.shape != (*product.stack, *product.weight_aval.shape):
        return fan_in
    columns = product.to_matrices(compat.gathered(estimate))[..., :64]
    gram = jnp.einsum("kio,kip->kop", columns, columns)
    total = jnp.sum(gram**2)
    ratio = jnp.sum(columns**2) ** 2 / jnp.where(total > 0, total, 1)
    return fan_in * jnp.clip(ratio, 1, 64)


def mirror_signals(
    key: jax.Array, rule: RuleOrRules, fun: Callable[..., Any], params: Any, *args: Any, feedback: Any = None
) -> Any:
    """Mirror mode's signal: each projection alone receives noise, and the signal is the mean of x y^T.

    x is the noise and y = phi(W x + b) the response (eq. 6-8). The expectation of the signal is sigma^2 E[phi'] W^T
    (eq. 10-11). ``wmkp.updates.calibrated_mirror`` moves B along it. No data enters. A convolution's noise is patches
    of shape (N, fan_in), which is unbiased. It costs ``4 N |W|`` operations, whatever the image size. On CPUs fast
    transforms make orthogonal noise cheaper for 256 inputs or more.

    Args:
      key: a JAX random key.
      rule: a rule with a mirror mode, or a mapping that has one.
      fun: the function that is trained, ``fun(params, *args)``.
      params: its parameters.
      *args: its further arguments, or ShapeDtypeStructs in their place. Only shapes are read.
      feedback: the feedback weights, for rules whose signal depends on B (``Mirror.signal``). Their signal is B's whole
        change over its rate.

    Returns:
      A pytree of params' structure with the signal of each B, in W's shape, dtype and layout. ``None`` where
      ``init_feedback`` has None, and zeros for a B whose rule has no mirror mode.

    Raises:
      ValueError: no rule has a mirror mode; a rule's signal depends on B and ``feedback`` is missing; a bias is kept
        beside a gain.
      WeightTransportError: noise alone cannot reach a projection. The message names its path and the reason.

    Example:
      >>> params = {"W1": jnp.ones((4, 8)) / 4, "W2": jnp.ones((8, 2)) / 8}
      >>> loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["W1"]) @ params["W2"] - 1) ** 2)
      >>> x = jax.ShapeDtypeStruct((16, 4), jnp.float32)
      >>> signal = wmkp.mirror_signals(jax.random.key(0), wmkp.weight_mirror(), loss_fn, params, x)
      >>> bool(jnp.allclose(signal["W2"], params["W2"], atol=1e-6))  # orthogonal noise is exact
      True
    """
    checks.key(key)
    check_rule(rule)
    analysis = analyse(fun, params, *args)
    checks.alive("params", params)
    rules = resolve(rule, analysis)
    if not any(r.mirror for r in rules.values()):
        raise ValueError("no rule here has a mirror mode; use one that has, such as weight_mirror()")
    leaves, tree = jax.tree.flatten(params)
    projections = analysis.projections()
    if feedback is None and any(r.mirror and r.mirror.signal for r in rules.values()):
        raise ValueError("the signal of this rule depends on B: call mirror_signals(..., feedback=feedback)")
    entries = [None] * len(leaves) if feedback is None else feedback_leaves(params, feedback)
    for path, b in zip(analysis.paths, entries, strict=True):
        mirror = rules[path].mirror if path in rules else None
        if mirror and mirror.signal and projections[path].feedback and not checks.is_array(b):
            raise ValueError(
                f"feedback[{path!r}] is {checks.shape(b)}, but the signal of {rules[path].name} depends on B; make "
                "feedback with init_feedback for this rule."
            )
    result = signals(key, rules, analysis, leaves, entries)
    for i, path in enumerate(analysis.paths):
        if result[i] is None and path in projections and projections[path].feedback and rules[path].init is not None:
            result[i] = jnp.zeros_like(leaves[i])
    return jax.tree.unflatten(tree, result)
