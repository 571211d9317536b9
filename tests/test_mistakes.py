"""Wrong calls of public functions raise a library error that names the argument and the fix, and give no NaN."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import wmkp
import wmkp.nnx
from wmkp import updates
from wmkp.program.interpreter import Direct
from wmkp.training import batch_sharding, state_sharding


@pytest.fixture(scope="module")
def all_frames():
    """Shows JAX's frames in tracebacks, so that an error of JAX is not taken for one of wmkp."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


pytestmark = pytest.mark.usefixtures("quick_compile", "all_frames")

KEY, B_KEY = jax.random.key(0), jax.random.key(1)
NAN, INF = float("nan"), float("inf")
KP, FA, WM, BP = wmkp.kolen_pollack(), wmkp.feedback_alignment(), wmkp.weight_mirror(num_samples=4), wmkp.backprop()
DFA, DKP, PFA = wmkp.direct_feedback_alignment(), wmkp.direct_kolen_pollack(), wmkp.product_feedback_alignment()
IA, SS = wmkp.information_alignment(), wmkp.sign_symmetry()
SGD = optax.sgd(0.1)

normal = lambda i, *shape: np.random.default_rng(i).normal(size=shape).astype(np.float32)
PARAMS = {"first": jnp.asarray(normal(0, 3, 6)), "b": jnp.zeros(6), "w": jnp.asarray(normal(1, 6, 2))}
X = jnp.asarray(normal(2, 4, 3))


def fun(params, x):
    return jnp.mean((jnp.tanh(x @ params["first"] + params["b"]) @ params["w"]) ** 2)


def loss_fn(params, model_state, batch, key):
    return fun(params, batch), (model_state, {})


def changed(**leaves):
    return {**PARAMS, **leaves}


def without(tree, name):
    return {k: v for k, v in tree.items() if k != name}


@functools.cache
def made(rule):
    return wmkp.init_feedback(B_KEY, rule, fun, PARAMS, X)


@functools.cache
def steps(rule, **options):
    return wmkp.make_steps(loss_fn, rule, SGD, PARAMS, X, **dict(options))


def state(rule=KP, **over):
    return steps(rule).init(KEY, PARAMS)._replace(**over)


def grad(rule, params=PARAMS, feedback=None, *args, fun=fun, **options):
    return wmkp.value_and_grad(fun, rule, **options)(params, feedback, *(args or (X,)))


def init(rule=KP, params=PARAMS, *args, fun=fun, key=B_KEY):
    return wmkp.init_feedback(key, rule, fun, params, *(args or (X,)))


def make(rule=KP, **over):
    arguments = {"loss_fn": loss_fn, "rule": rule, "optimizer": SGD, "params": PARAMS, "batch": X, **over}
    return wmkp.make_steps(**arguments)


def used_twice():
    old = state()
    steps(KP).engaged_step(old, X)
    return steps(KP).engaged_step(old, X)


def returning(out):
    return lambda params, model_state, batch, key: out(fun(params, batch), model_state)


def mirror_with(optimizer):
    return make(WM, mirror_optimizer=optimizer)


custom = lambda **fields: FA._replace(name="mine", **fields)


def gone(tree):
    copy = jax.tree.map(jnp.copy, tree)
    jax.tree.map(lambda x: x.delete(), copy)
    return copy


async def later(params, x):
    return fun(params, x)


old_key = jax.random.PRNGKey(0)
model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
apply, nnx_params, nnx_state = wmkp.nnx.pure(model)
the_mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
explicit_mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
other_mesh = jax.sharding.Mesh(np.array(jax.devices()[2:4]), ("e",))

# {mistake: (the call, words that the message must contain)}
WRONG = {
    # --- rules
    **{
        f"{f.__name__}(scale={bad!r})": (functools.partial(f, scale=bad), "scale must be a positive number")
        for f in (
            wmkp.feedback_alignment, wmkp.sign_symmetry, wmkp.kolen_pollack, wmkp.kolen_pollack_transported,
            wmkp.product_feedback_alignment, wmkp.direct_feedback_alignment, wmkp.direct_kolen_pollack,
            wmkp.weight_mirror, functools.wraps(wmkp.alignment)(functools.partial(wmkp.alignment, decay=1)),
        )
        for bad in (0, -1.0, NAN, INF, "1", None, True, 1e300, 1e-300, np.ones(2))
    },
    **{
        f"weight_mirror({name}={bad!r})": (functools.partial(wmkp.weight_mirror, **{name: bad}), name)
        for name, values in {
            "noise": ("pink", 1, ["gaussian"]), "noise_std": (0, -1, NAN, INF, "1", None, 1e200),
            "num_samples": (0, -3, 1.5, "10", NAN, True), "activation": ("relu", 1), "bias": (None, "none", False),
            "target_angle": (0, 90, -5, NAN, "6", 1e-200), "rate": (0, -0.1, 1.5, NAN, "a"), "start": (-1, 0.5, "1"),
        }.items()
        for bad in values
    },
    **{
        f"alignment({name}={bad!r})": (functools.partial(wmkp.alignment, **{"amplitude": 1, name: bad}), name)
        for name, values in {
            "amplitude": (-1, NAN, INF, "1", None), "decay": (-1, None), "null": (-1, NAN), "sparse": (-1, "x"),
            "self_alignment": (-1, []), "on": (None, "both", 1), "rate": (0, -1, NAN, "1", None),
            "noise": ("white", None), "noise_std": (0, None), "num_samples": (0, 2.5), "normalize": (None, "sum"),
            "whiten": ("no", None, 1),
        }.items()
        for bad in values
    },
    **{
        f"{rule.name}: {scale} in half precision": (
            lambda rule=rule: init(rule, jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS), X.astype(jnp.float16)),
            f"scale={scale:g} gives params['w'] a B of standard deviation", "which float16 cannot hold", "nearer to 1")
        for scale in (1e6, 4e4, 1e-8)
        for rule in (
            wmkp.feedback_alignment(scale), wmkp.sign_symmetry(scale=scale), wmkp.direct_feedback_alignment(scale),
            wmkp.product_feedback_alignment(scale=scale), wmkp.weight_mirror(scale=scale),
        )
    },
    **{
        f"noise_std={std} in half precision": (
            lambda std=std: wmkp.mirror_signals(
                KEY, wmkp.weight_mirror(noise_std=std, num_samples=4), fun, jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS),
                X.astype(jnp.float16)),
            f"noise_std={std:g} makes signals", "params['w']", "which float16 cannot hold", "nearer to 1")
        for std in (300.0, 1e-4)
    },
    "alignment that overshoots": (lambda: wmkp.alignment(amplitude=1, decay=20, rate=0.1), "rate * decay must be below 2"),
    "alignment of nothing": (wmkp.alignment, "coefficients", "all zero"),
    "alignment, whitened noise": (lambda: wmkp.alignment(decay=1, whiten=True), "whiten", "activity"),
    "alignment, normalized noise": (lambda: wmkp.alignment(decay=1, normalize="mean"), "normalize", "activity"),
    "a noise that is not used": (lambda: wmkp.alignment(decay=1, on="activity", noise="white"), "noise must be"),
    "information_alignment": (lambda: wmkp.information_alignment(null=-1), "null must be a number from 0"),
    "symmetric_alignment": (lambda: wmkp.symmetric_alignment(decay=NAN), "decay must"),
    "activation_alignment": (lambda: wmkp.activation_alignment(rate=0), "rate must"),
    "activity_mirror": (lambda: wmkp.activity_mirror(whiten="yes"), "whiten must be True or False"),
    "sign_symmetry": (lambda: wmkp.sign_symmetry(["fixed"]), "magnitude must be"),
    "kolen_pollack": (lambda: wmkp.kolen_pollack(start=None), 'start must be "random" or "mirror"'),
    **{
        f"expansion={bad!r}": (functools.partial(wmkp.product_feedback_alignment, bad), "expansion must be")
        for bad in (0, -1, NAN, INF, "4", None)
    },
    # --- choice of rule
    **{
        f"{name}: {what}": (functools.partial(call, bad), *words)
        for name, call in {
            "init_feedback": lambda rule: init(rule),
            "engage": lambda rule: wmkp.engage(fun, rule),
            "value_and_grad": lambda rule: wmkp.value_and_grad(fun, rule),
            "mirror_signals": lambda rule: wmkp.mirror_signals(KEY, rule, fun, PARAMS, X),
            "delta_angles": lambda rule: wmkp.delta_angles(fun, rule, PARAMS, None, X),
            "make_steps": lambda rule: make(rule),
        }.items()
        for what, (bad, *words) in {
            "a factory that is not called": (wmkp.kolen_pollack, "rule must be", "call it: kolen_pollack()"),
            "a factory in a mapping": ({".*": wmkp.weight_mirror}, "rule['.*'] must be", "call it: weight_mirror()"),
            "a name": ("kolen_pollack", "rule must be a wmkp rule such as kolen_pollack()"),
            "a list": ([KP, FA], "rule must be", "a mapping of path patterns to rules"),
            "nothing": (None, "rule must be"),
            "an optimizer": (SGD, "rule must be"),
            "a pattern that is no string": ({0: KP}, "patterns must be strings", "0"),
            "a pattern that does not compile": ({"w[": KP}, "'w['", "regular expression", "re.escape"),
        }.items()
    },
    "a pattern that matches nothing": (lambda: init({"haed": BP, ".*": KP}), "'haed' matches no projection", "first, w"),
    "a projection without a pattern": (lambda: init({"first": BP}), "projection 'w'", 'end with ".*"'),
    "no pattern": (lambda: init({}), "no pattern of rule", "first"),
    # --- keys
    **{
        f"{name}: key={bad!r}": (functools.partial(call, bad), "key must be one JAX random key", "jax.random.key(0)")
        for name, call in {
            "init_feedback": lambda key: init(key=key),
            "mirror_signals": lambda key: wmkp.mirror_signals(key, WM, fun, PARAMS, X),
            "steps.init": lambda key: steps(KP).init(key, PARAMS),
        }.items()
        for bad in (0, None, "key", 1.5, jnp.zeros(2), jnp.zeros(3, jnp.uint32), jax.random.split(KEY, 2), PARAMS)
    },
    # --- functions and their arguments
    **{
        f"{name}: fun={bad!r}": (functools.partial(call, bad), "fun must be a function fun(params, *args)")
        for name, call in {
            "init_feedback": lambda f: init(fun=f),
            "engage": lambda f: wmkp.engage(f, KP),
            "value_and_grad": lambda f: wmkp.value_and_grad(f, KP),
            "projections": lambda f: wmkp.projections(f, PARAMS, X),
            "mirror_signals": lambda f: wmkp.mirror_signals(KEY, WM, f, PARAMS, X),
            "delta_angles": lambda f: wmkp.delta_angles(f, KP, PARAMS, made(KP), X),
            "input_covariances": lambda f: wmkp.input_covariances(f, PARAMS, X),
        }.items()
        for bad in (None, "loss", KP, PARAMS)
    },
    "fun and rule changed places": (lambda: init(fun, PARAMS, X, fun=KP), "rule must be", "fun"),
    **{
        f"{name}: {what}": (functools.partial(call, *bad), *words)
        for name, call in {
            "init_feedback": lambda p, *a: init(KP, p, *a),
            "value_and_grad": lambda p, *a: grad(KP, p, made(KP), *a),
            "backprop": lambda p, *a: grad(BP, p, None, *a),
            "engage": lambda p, *a: wmkp.engage(fun, KP)(p, made(KP), *a),
            "engaged backprop": lambda p, *a: wmkp.engage(fun, BP)(p, None, *a),
            "projections": lambda p, *a: wmkp.projections(fun, p, *a),
            "delta_angles": lambda p, *a: wmkp.delta_angles(fun, KP, p, made(KP), *a),
            "input_covariances": lambda p, *a: wmkp.input_covariances(fun, p, *a),
            "mirror_signals": lambda p, *a: wmkp.mirror_signals(KEY, WM, fun, p, *a),
        }.items()
        for what, (bad, *words) in {
            "integer params": ((changed(w=jnp.ones((6, 2), int)), X), "params['w'] is int", "floating-point"),
            "a number among params": ((changed(b=1.0), X), "params['b'] is float", "floating-point arrays"),
            "a string among params": ((changed(b="zeros"), X), "params['b'] is str"),
            "a list in params": ((changed(b=[0.0] * 6), X), "params['b/0'] is float"),
            "a function for params": ((fun, X), "params[''] is function", "wmkp.nnx.pure"),
            "two leaves of one path": (({**PARAMS, "a": {"b": X}, "a/b": X}, X), "two leaves", "'a/b'"),
            "None in place of a parameter": ((changed(w=None), X), "fun(params, *args) raised", "params: b: float32[6], first"),
            "a parameter missing": ((without(PARAMS, "b"), X), "fun(params, *args) raised KeyError: 'b'"),
            "another shape": ((changed(w=jnp.ones((5, 2))), X), "fun(params, *args) raised", "w: float32[5, 2]"),
            "no params": (({}, X), "fun(params, *args) raised"),
            "another batch": ((PARAMS, jnp.ones((4, 7))), "fun(params, *args) raised", "args: (float32[4, 7],)"),
            "no batch": ((PARAMS, None), "fun(params, *args) raised", "args: (None,)"),
            "one argument too many": ((PARAMS, X, X), "fun(params, *args) raised TypeError", "positional"),
        }.items()
    },
    "complex params": (
        lambda: init(KP, changed(w=jnp.ones((6, 2), complex))), "params['w']", "feedback weights are real", "as two real arrays"),
    "feedback forgotten": (
        lambda: wmkp.value_and_grad(fun, KP)(PARAMS, X), "raised TypeError", "with feedback: params, feedback, *args"),
    "data closed over": (lambda: init(KP, fun=lambda p, x: fun(p, X) + x.sum()), "data as arrays in args"),
    "data as lists": (lambda: init(KP, PARAMS, X.tolist(), fun=lambda p, x: fun(p, jnp.array(x))), "not Python numbers or lists"),
    "no projection": (lambda: init(KP, {"b": jnp.ones(3)}, fun=lambda p, x: (x + p["b"]).sum()), "fun has no projection"),
    "no params, no projection": (lambda: init(KP, {}, fun=lambda p, x: x.sum()), "fun has no projection"),
    "fan_in zero": (lambda: init(KP, changed(first=jnp.ones((0, 6))), X[:, :0]), "params['first']", "fan_in or fan_out is zero"),
    "fan_out zero": (lambda: init(KP, changed(w=jnp.ones((6, 0)))), "params['w']", "fan_in or fan_out is zero"),
    "no samples in the batch": (lambda: init(KP, PARAMS, X[:0]), "args hold no sample", "at least one"),
    "no samples, gradient": (lambda: grad(KP, PARAMS, made(KP), X[:0]), "args hold no sample"),
    "shapes in place of params": (lambda: init(SS, jax.eval_shape(lambda: PARAMS)), "params['w'] is a ShapeDtypeStruct"),
    "shapes in place of params, gradient": (lambda: grad(KP, jax.eval_shape(lambda: PARAMS), made(KP)), "ShapeDtypeStruct"),
    # --- losses
    **{
        f"{rule.name}: a loss of {what}": (functools.partial(grad, rule, PARAMS, feedback, fun=lambda p, x, o=o: o(fun(p, x))), *words)
        for rule, feedback in ((KP, made(KP)), (BP, None))
        for what, (o, *words) in {
            "a tuple": (lambda l: (l, {}), "real scalar loss", "tuple", "has_aux=True"),
            "an array": (lambda l: l * jnp.ones(3), "real scalar loss", "float32[3]"),
            "a complex number": (lambda l: l + 0j, "real scalar loss", "complex64[]"),
            "an integer": (lambda l: l.astype(int), "real scalar loss", "int32[]"),
            "nothing": (lambda l: None, "real scalar loss", "NoneType"),
            "a dict": (lambda l: {"loss": l}, "real scalar loss", "dict"),
        }.items()
    },
    "auxiliary data missing": (lambda: grad(KP, PARAMS, made(KP), has_aux=True), "with has_aux=True fun must return (loss, aux)"),
    "has_aux is no flag": (lambda: grad(KP, PARAMS, made(KP), has_aux="aux"), "has_aux must be True or False"),
    "delta angles of no scalar": (
        lambda: wmkp.delta_angles(lambda p, x: x @ p["first"] @ p["w"], KP, PARAMS, made(KP), X), "real scalar loss"),
    # --- feedback
    **{
        f"{name}: feedback {what}": (functools.partial(call, bad), *words)
        for name, call in {
            "value_and_grad": lambda b: grad(KP, PARAMS, b),
            "engage": lambda b: wmkp.engage(fun, KP)(PARAMS, b, X),
            "delta_angles": lambda b: wmkp.delta_angles(fun, KP, PARAMS, b, X),
            "mirror_signals": lambda b: wmkp.mirror_signals(KEY, IA, fun, PARAMS, X, feedback=b),
            "engaged_step": lambda b: steps(KP).engaged_step(state(feedback=b), X),
            "mirror_step": lambda b: steps(WM).mirror_step(state(WM, feedback=b)),
            "matrix_angles": lambda b: wmkp.matrix_angles(PARAMS, b),
        }.items()
        for what, (bad, *words) in {
            "None": (None, "feedback", "init_feedback"),
            "without a leaf": (without(made(KP), "w"), "feedback must have the structure of params"),
            "renamed": ({**without(made(KP), "w"), "v": made(KP)["w"]}, "feedback must have the structure of params"),
            "of another shape": ({**made(KP), "w": jnp.ones((2, 6))}, "feedback['w'] is float32[2, 6]", "float32[6, 2]"),
            "of another dtype": ({**made(KP), "w": made(KP)["w"].astype(jnp.bfloat16)}, "feedback['w'] is bfloat16[6, 2]"),
            "of a list": ([None, None, made(KP)["w"]], "feedback must have the structure of params"),
            "missing": ({**made(KP), "w": None}, "feedback['w'] is None", "init_feedback"),
            "of a number": ({**made(KP), "w": 1.0}, "feedback['w'] "),
            "of direct feedback": (made(DFA), "feedback['w'] is Direct", "init_feedback"),
            "of product feedback": (made(PFA), "feedback['w'] is ProductFeedback", "init_feedback"),
        }.items()
        if not (name == "matrix_angles" and what in ("missing", "of direct feedback", "of product feedback"))
        and not (name == "mirror_signals" and what == "None")
        and not (name.endswith("_step") and what == "of a number")  # jit makes an array of it
        and not (name == "mirror_step" and what in ("missing", "of direct feedback", "of product feedback"))
    },
    **{
        f"feedback of {b.name} for {rule.name}": (
            lambda rule=rule, b=b: grad(rule, PARAMS, made(b)), "feedback['w']", f"not a B of {rule.name}", "init_feedback")
        for rule, b in ((PFA, KP), (DFA, KP), (DKP, PFA), (PFA, DKP), (SS, DFA), (WM, PFA))
    },
    "direct feedback of another size": (
        lambda: grad(DFA, PARAMS, {**made(DFA), "w": Direct(jnp.ones((5, 2)))}), "feedback['w']", "float32[5, 2], not [6, 2]"),
    "a rule whose B is of another shape": (
        lambda: grad(custom(backward=lambda w, b: b.T), PARAMS, made(FA)), "feedback['w']", "float32[2, 6], not [6, 2]"),
    "matrix angles, params and feedback changed places": (
        lambda: wmkp.matrix_angles(made(KP), PARAMS), "feedback must have the structure of params"),
    "matrix angles with a mapping": (lambda: wmkp.matrix_angles(PARAMS, made(KP), {".*": KP}), "rule must be"),
    "matrix angles with another rule": (lambda: wmkp.matrix_angles(PARAMS, made(KP), PFA), "feedback['w']", "product_feedback"),
    "matrix angles of integers": (lambda: wmkp.matrix_angles(changed(w=np.ones((6, 2), int)), made(KP)), "params['w'] is int"),
    # --- values that JAX cannot trace
    **{
        f"fun returns {what}": (functools.partial(grad, KP, fun=f, has_aux=aux), "what fun returns", "is " + kind, "JAX cannot trace")
        for what, f, aux, kind in (
            ("a string", lambda p, x: "loss", False, "str"), ("a string beside the loss", lambda p, x: (fun(p, x), "text"), True, "str"),
            ("an object", lambda p, x: (fun(p, x), object()), True, "object"), ("a coroutine", later, False, "coroutine"),
        )
    },
    "metrics of strings": (lambda: make(loss_fn=returning(lambda l, s: (l, (s, {"a": "x"})))), "what fun returns['1/1/a'] is str"),
    **{
        f"data of {x.dtype}": (lambda x=x: grad(KP, PARAMS, made(KP), x), "args['0'] is ndarray", "JAX cannot trace")
        for x in (np.full((4, 3), "a"), np.full((4, 3), None), np.zeros((4, 3), "datetime64[s]"), np.ones((4, 3), ">f4"))
    },
    "masked params": (lambda: grad(KP, changed(w=np.ma.ones((6, 2), np.float32)), made(KP)), "params['w'] is MaskedArray"),
    **{
        f"{of.__name__} under {rule.name}: params and feedback exchanged": (lambda of=of, rule=rule: of(fun, rule)(made(rule), PARAMS, X), "params and feedback are exchanged")
        for of in (wmkp.engage, wmkp.value_and_grad) for rule in (KP, PFA, DFA)
    },
    **{
        f"{name}: data by keyword": (functools.partial(call, PARAMS, made(KP), x=X), "x was given by keyword", "by position", "functools.partial")
        for name, call in {
            "engage": wmkp.engage(fun, KP), "value_and_grad": wmkp.value_and_grad(fun, KP), "backprop": wmkp.value_and_grad(fun, BP),
        }.items()
    },
    # --- custom rules
    "a rule of one's own in a mapping": (lambda: init({".*": custom(backward=None)}), "rule mine has no backward"),
    **{
        f"a rule whose {what}": (lambda fields=fields: grad(custom(**fields), PARAMS, init(custom(**fields))), *words)
        for what, fields, *words in (
            ("B is not used", {"backward": None}, "rule mine has no backward", "back through W"),
            ("B is not made", {"init": None}, "rule mine has no init"),
            ("transports what there is not", {"transports": "half"}, "rule.transports must be", "got 'half'"),
            ("init takes two", {"init": lambda key, p: 0}, "rule.init of mine raised TypeError", "(key, projection, W) -> B"),
            ("init is no function", {"init": 3}, "rule.init must be a function"),
            ("init makes another shape", {"init": lambda k, p, w: jnp.zeros(3)}, "rule.init of mine made float32[3] for params['w']", "float32[6, 2]"),
            ("init makes another dtype", {"init": lambda k, p, w: jnp.ones(w.shape, int)}, "rule.init of mine made int32[6, 2]"),
            ("init makes nothing", {"init": lambda k, p, w: None}, "rule.init of mine made None"),
            ("backward is no function", {"backward": "b"}, "rule.backward must be a function"),
            ("backward returns another dtype", {"backward": lambda w, b: b > 0}, "feedback['w']", "bool[6, 2], where W is float32[6, 2]"),
            ("backward fails", {"backward": lambda w, b: {}["r"]}, "feedback['w']", "KeyError"),
            ("signal is a word", {"signal": "yes"}, "rule.signal must be a function"),
            ("optimizer is a rate", {"signal": wmkp.hebbian, "optimizer": 0.1}, "rule.optimizer must be an optax"),
            ("error is a word", {"error": "sign"}, "rule.error must be a function"),
            ("noise is negative", {"noise": -1.0}, "rule.noise must be"),
            ("mirror is a word", {"mirror": "yes"}, "rule.mirror must be a Mirror, or None"),
        )
    },
    # --- numbers too large for float32 or float64
    **{
        f"10**400: {name}": (functools.partial(call, 10**400), name)
        for name, call in {
            "scale": wmkp.feedback_alignment, "num_samples": lambda n: wmkp.weight_mirror(num_samples=n),
            "amplitude": lambda a: wmkp.alignment(amplitude=a), "fan_in": lambda n: wmkp.mirror_angle(8, n, WM),
            "learning_rate": lambda r: updates.weight_mirror(r, 1), "max_norm": updates.clip_together,
        }.items()
    },
    "samples beyond 32 bits": (lambda: wmkp.weight_mirror(num_samples=2**31), "num_samples must be an integer of at least 1, and below 2^31"),
    "a signal beyond float32": (lambda: wmkp.alignment(amplitude=1e300), "amplitude must be a number from 0 to 1e15"),
    "a rate beyond float32": (lambda: updates.weight_mirror(1e300, 1), "learning_rate must be a number from 0 to 1e15"),
    # --- deleted arrays
    **{
        f"{name}: deleted": (call, words, "is deleted", "Continue with the state that the step returned")
        for name, words, call in (
            ("init_feedback", "params['w']", lambda: init(KP, gone(PARAMS))),
            ("value_and_grad", "params['b']", lambda: grad(KP, gone(PARAMS), made(KP))),
            ("value_and_grad of B", "feedback['w']", lambda: grad(KP, PARAMS, gone(made(KP)))),
            ("engage", "params['b']", lambda: wmkp.engage(fun, BP)(gone(PARAMS), None, X)),
            ("matrix_angles", "feedback['w']", lambda: wmkp.matrix_angles(PARAMS, gone(made(KP)))),
            ("delta_angles", "params['b']", lambda: wmkp.delta_angles(fun, KP, gone(PARAMS), made(KP), X)),
            ("input_covariances", "params['b']", lambda: wmkp.input_covariances(fun, gone(PARAMS), X)),
            ("steps.init", "params['b']", lambda: steps(KP).init(KEY, gone(PARAMS))),
            ("value_and_grad of data", "args['0']", lambda: grad(KP, PARAMS, made(KP), gone(X))),
            ("backprop of data", "args['0']", lambda: grad(BP, PARAMS, None, gone(X))),
            ("engage of data", "args['0']", lambda: wmkp.engage(fun, KP)(PARAMS, made(KP), gone(X))),
            ("delta_angles of data", "args['0']", lambda: wmkp.delta_angles(fun, KP, PARAMS, made(KP), gone(X))),
            ("input_covariances of data", "args['0']", lambda: wmkp.input_covariances(fun, PARAMS, gone(X))),
            ("init_feedback's key", "key", lambda: init(key=gone(B_KEY))),
            ("mirror_signals' key", "key", lambda: wmkp.mirror_signals(gone(KEY), WM, fun, PARAMS, X)),
            ("an old key", "key", lambda: steps(KP).init(gone(old_key), PARAMS)),
            ("clip_together", "updates['0/b']", lambda: updates.clip_together(1.0).update((gone(PARAMS), X), optax.EmptyState())),
            ("mirror_signals", "params['b']", lambda: wmkp.mirror_signals(KEY, WM, fun, gone(PARAMS), X)),
        )
    },
    **{
        f"shapes in place of data, {name}": (functools.partial(call, jax.eval_shape(lambda: X)), "is a ShapeDtypeStruct where its values are needed")
        for name, call in {
            "value_and_grad": lambda x: grad(KP, PARAMS, made(KP), x), "engage": lambda x: wmkp.engage(fun, KP)(PARAMS, made(KP), x),
            "backprop": lambda x: grad(BP, PARAMS, None, x), "delta_angles": lambda x: wmkp.delta_angles(fun, KP, PARAMS, made(KP), x),
            "input_covariances": lambda x: wmkp.input_covariances(fun, PARAMS, x), "a batch": lambda x: steps(KP).engaged_step(state(), x),
            "a state": lambda x: steps(KP).engaged_step(jax.eval_shape(state), X),
            "clip_together": lambda x: updates.clip_together(1.0).update((x, x), optax.EmptyState()),
        }.items()
    },
    **{
        f"{name}: deleted arrays in its place": (functools.partial(call, gone(PARAMS)), name, "float32[3, 6]")
        for name, call in {
            "mesh": lambda x: make(mesh=x), "axis_name": lambda x: make(axis_name=x), "clip_norm": lambda x: make(clip_norm=x),
            "activation": lambda x: wmkp.weight_mirror(activation=x), "rule.mirror": lambda x: init(custom(mirror=x)),
            "rule": lambda x: wmkp.matrix_angles(PARAMS, made(KP), x), "model": wmkp.nnx.pure,
        }.items()
    },
    "a batch of NumPy's strings": (lambda: steps(KP).engaged_step(state(), np.full((4, 3), "x")), "batch is ndarray", "JAX cannot trace"),
    "a mirror that never mirrors": (lambda: init(custom(mirror=wmkp.Mirror(each_step=False))), "set start=1"),
    "a mirror's flag": (lambda: init(custom(mirror=wmkp.Mirror(each_step="no"))), "rule.mirror.each_step must be True or False"),
    "a mirror's losses": (lambda: init(custom(mirror=wmkp.Mirror(signal="decay"))), "rule.mirror.signal must be a function"),
    "shapes in place of params, steps.init": (lambda: steps(KP).init(KEY, jax.eval_shape(lambda: PARAMS)), "params['b'] is ShapeDtypeStruct"),
    "covariances of no sample": (lambda: wmkp.input_covariances(fun, PARAMS, X[:0]), "args hold no sample"),
    "backprop with another tree for feedback": (lambda: grad(BP, PARAMS, X), "feedback must have the structure of params"),
    "nested feedback": (
        lambda: wmkp.matrix_angles({"a": PARAMS, "c": [X]}, {"a": without(made(KP), "w"), "c": [X, X]}),
        "feedback must have the structure of params", "lacks 'a/w'", "also has 'c/1'"),
    # --- mirrors
    **{
        f"{f.__name__} of {bad!r}": (functools.partial(call, bad), *words)
        for f, call in (
            (wmkp.mirror_gain, wmkp.mirror_gain), (wmkp.mirror_angle, lambda r: wmkp.mirror_angle(8, 8, r)),
            (wmkp.samples_for_angle, lambda r: wmkp.samples_for_angle(6, 8, r)),
            (updates.calibrated_mirror, updates.calibrated_mirror),
        )
        for bad, *words in (
            (KP, "kolen_pollack has no mirror mode; use one that has, such as weight_mirror()"), (wmkp.weight_mirror, "rule must be", "call it"),
            (None, "rule must be"), ({".*": WM}, "rule must be a wmkp rule"),
            (wmkp.weight_mirror(activation=jnp.square), "activation", "mean slope"),
            (wmkp.weight_mirror(activation=jnp.negative), "activation", "mean slope"),
            (wmkp.weight_mirror(activation=lambda x: x**4), "activation", "mean slope"),
            (wmkp.weight_mirror(activation=lambda x: x * NAN), "activation", "mean slope"),
            (wmkp.weight_mirror(activation=jnp.sum), "activation must map an array elementwise"),
            (wmkp.weight_mirror(activation=lambda x: x[1:]), "activation must map an array elementwise; for shape [128] it"),
            (wmkp.weight_mirror(activation=jax.nn.softmax), "activation must map an array elementwise; here one element"),
            (wmkp.weight_mirror(activation=jnp.sort), "activation must map an array elementwise; here one element"),
            (wmkp.weight_mirror(activation=lambda x, y: x), "activation raised TypeError"),
        )
    },
    **{
        f"mirror_angle({n!r}, {m!r})": (lambda n=n, m=m: wmkp.mirror_angle(n, m, WM), name)
        for n, m, name in (
            (0, 8, "num_samples"), (-1, 8, "num_samples"), (NAN, 8, "num_samples"), ("8", 8, "num_samples"),
            (None, 8, "num_samples"), (8, 0, "fan_in"), (8, -2, "fan_in"), (8, 1.5, "fan_in"), (8, None, "fan_in"),
        )
    },
    **{
        f"samples_for_angle({a!r}, {m!r})": (lambda a=a, m=m: wmkp.samples_for_angle(a, m, WM), name)
        for a, m, name in (
            (0, 8, "angle"), (90, 8, "angle"), (-1, 8, "angle"), (NAN, 8, "angle"), ("6", 8, "angle"), (None, 8, "angle"),
            (6, 0, "fan_in"), (6, -1, "fan_in"), (6, "8", "fan_in"),
        )
    },
    "a mirror of nothing": (lambda: wmkp.mirror_signals(KEY, KP, fun, PARAMS, X), "no rule here has a mirror mode"),
    "a mirror that needs B": (lambda: wmkp.mirror_signals(KEY, IA, fun, PARAMS, X), "call mirror_signals(..., feedback=feedback)"),
    **{
        f"{name}: {asked}": (functools.partial(call, wmkp.weight_mirror(noise, **{asked: value}, rate=0.1)), *words)
        for name, call in {
            "mirror_signals": lambda rule: wmkp.mirror_signals(KEY, rule, fun, PARAMS, X), "make_steps": lambda rule: make(rule),
        }.items()
        for noise, asked, value, *words in (
            ("gaussian", "target_angle", 1e-5, "target_angle=1e-05 takes 6.2e+13 numbers of noise at params['w']", 'noise="orthogonal"'),
            ("gaussian", "num_samples", 2**30, "num_samples=1073741824 takes 6.4e+09 numbers of noise at params['w']", "fewer num_samples"),
        )
    },
    "the noise of an activation": (
        lambda: make(wmkp.weight_mirror("orthogonal", target_angle=1e-5, activation=jax.nn.relu)), "numbers of noise at params['w']"),
    "a custom mirror": (
        lambda: init(custom(mirror=wmkp.Mirror(num_samples=0))), "num_samples must be an integer of at least 1"),
    # --- updates
    **{
        f"updates.kolen_pollack({bad!r})": (functools.partial(updates.kolen_pollack, bad), "optimizer must be an optax")
        for bad in (None, "sgd", optax.sgd, 0.1, KP, PARAMS)
    },
    "a rate that is not finite": (lambda: updates.kolen_pollack(optax.sgd(NAN)).init(made(KP)), "optimizer", "learning rate"),
    "a decay that grows": (
        lambda: updates.kolen_pollack(optax.chain(optax.add_decayed_weights(-0.1), SGD)).init(made(KP)), "optimizer", "W - B^T"),
    "a decay that overshoots": (
        lambda: updates.kolen_pollack(optax.chain(optax.add_decayed_weights(30), SGD)).init(made(KP)), "optimizer", "W - B^T"),
    **{
        f"updates.kolen_pollack({optimizer.update.__name__}): {what}": (
            lambda o=optimizer, s=state, b=b: updates.kolen_pollack(o).update(made(KP), s, b), "optimizer raised", "(signal, state, feedback)")
        for optimizer in (optax.adamw(0.1),)
        for what, state, b in (
            ("no feedback", optimizer.init(made(KP)), None), ("W's state", optimizer.init(PARAMS), made(KP)),
            ("another optimizer's state", SGD.init(made(KP)), made(KP)), ("no state", None, made(KP)),
        )
    },
    **{
        f"updates.kolen_pollack of {bad!r}": (lambda bad=bad: updates.kolen_pollack(SGD).init({"w": bad}), "feedback['w'] is", "only arrays")
        for bad in ("x", 1.0)
    },
    "signals that are no arrays": (
        lambda: updates.kolen_pollack(SGD).update({**made(KP), "w": "x"}, SGD.init(made(KP)), made(KP)), "signal['w'] is str"),
    "signals of integers": (
        lambda: updates.kolen_pollack(SGD).update(jax.tree.map(lambda b: b.astype(int), made(KP)), SGD.init(made(KP)), made(KP)),
        "signal['w'] is int32[", "floating-point arrays"),
    "clipping what is no array": (
        lambda: updates.clip_together(1.0).update((PARAMS, 1.0), optax.EmptyState()), "updates['1'] is float", "floating-point arrays"),
    "gradients in place of signals": (
        lambda: updates.kolen_pollack(SGD).update(PARAMS, SGD.init(made(KP)), made(KP)), "signal", "also has 'b', 'first'"),
    "signals of another shape": (
        lambda: updates.kolen_pollack(SGD).update({**made(KP), "w": X}, SGD.init(made(KP)), made(KP)),
        "signal['w'] is float32[4, 3]", "feedback has float32[6, 2]"),
    **{
        f"clip_together({bad!r})": (functools.partial(updates.clip_together, bad), "max_norm must be a positive number")
        for bad in (0, -1, NAN, INF, "1", None)
    },
    "clipping gradients alone": (
        lambda: updates.clip_together(1.0).update(PARAMS, optax.EmptyState()), "updates must be the pair (grads, feedback_signal)"),
    **{
        f"updates.weight_mirror({rate!r}, {decay!r})": (lambda r=rate, d=decay: updates.weight_mirror(r, d), name)
        for rate, decay, name in (
            (-0.1, 1, "learning_rate"), (NAN, 1, "learning_rate"), (INF, 1, "learning_rate"), ("0.1", 1, "learning_rate"),
            (None, 1, "learning_rate"), (np.float32(-1), 1, "learning_rate"), (jnp.float32(NAN), 1, "learning_rate"),
            (optax.constant_schedule(0.1), 1, "learning_rate"), (0.1, -1, "decay"), (0.1, None, "decay"),
            (0.1, jnp.ones(2), "decay"),
        )
    },
    "a mirror's update without B": (
        lambda: updates.weight_mirror(0.1, 1).update(made(KP), optax.EmptyState()), "needs feedback: call update(signal, state, feedback)"),
    "a mirror's update of gradients": (
        lambda: updates.weight_mirror(0.1, 1).update(PARAMS, optax.EmptyState(), made(KP)), "signal must have the structure of feedback"),
    **{
        f"calibrated_mirror(rate={bad!r})": (lambda bad=bad: updates.calibrated_mirror(WM, bad), "rate")
        for bad in (-0.1, 2.5, NAN, "0.1", jnp.ones(3))
    },
    "a mirror's rate and decay": (lambda: updates.weight_mirror(1000.0, 10.0), "learning_rate * decay must be below 2"),
    # --- make_steps
    "an optimizer that wants the loss": (
        lambda: make(rule=wmkp.feedback_alignment(), optimizer=optax.contrib.reduce_on_plateau()).init(KEY, PARAMS),
        "optimizer cannot be used here", "'value'"),
    "an optimizer that wants pairs": (
        lambda: updates.kolen_pollack(optax.lookahead(SGD, 5, 0.5)).init(made(KP)), "optimizer", "tried on small arrays"),
    **{
        f"make_steps({name}={bad!r})": (functools.partial(make, **{name: bad}), name)
        for name, values in {
            "loss_fn": (None, "loss", KP), "optimizer": (None, optax.sgd, "adam", 0.1), "mirror_optimizer": (optax.sgd, 0.1),
            "axis_name": (0, True), "mesh": ("d", 8), "fsdp": ("yes", None), "clip_norm": (0, -1, NAN, "1"),
            "check_finite": ("yes", 1), "rule": (optax.sgd,), "params": (None, {}, changed(w=1.0)),
        }.items()
        for bad in values
    },
    **{
        f"loss_fn returns {what}": (lambda o=o: make(loss_fn=returning(o)), "loss_fn must have the form", "it returned")
        for what, o in {
            "a loss": lambda l, s: l, "metrics alone": lambda l, s: (l, {}), "three": lambda l, s: (l, s, {}),
            "a list": lambda l, s: [l, (s, {})], "no dict": lambda l, s: (l, (s, l)),
        }.items()
    },
    "loss_fn's metrics have a number for a name": (lambda: make(loss_fn=returning(lambda l, s: (l, (s, {1: l})))), "metrics must have strings as names", "got 1"),
    "keys of two kinds": (lambda: init(KP, {**PARAMS, 3: X}), "JAX cannot flatten params", "dict keys of one type"),
    "loss_fn's metrics hold the loss": (lambda: make(loss_fn=returning(lambda l, s: (l, (s, {"loss": l})))), "metrics must not hold 'loss'"),
    "loss_fn's metrics hold what check_finite reports": (
        lambda: make(loss_fn=returning(lambda l, s: (l, (s, {"finite": l}))), check_finite=True), "metrics must not hold 'finite'"
    ),
    "loss_fn returns an array": (lambda: make(loss_fn=returning(lambda l, s: (l[None], (s, {})))), "real scalar loss"),
    "loss_fn loses the model's state": (
        lambda: make(loss_fn=returning(lambda l, s: (l, (None, {}))), model_state={"n": X}), "model_state that loss_fn returns", "lacks 'n'"),
    "loss_fn of two arguments": (
        lambda: make(loss_fn=lambda params, batch: 0.0),
        "loss_fn must have the form loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)); got",
        "(params, batch)",
    ),
    "a mesh and an axis": (lambda: make(mesh=the_mesh, axis_name="d"), "axis_name", "mesh, not both"),
    "fsdp without a mesh": (lambda: make(fsdp=True), "pass mesh=mesh"),
    "a mirror's optimizer of a tree": (lambda: mirror_with(optax.masked(optax.scale(1), {"w": True})), "mirror_optimizer must take one B at a time"),
    "a mirror's optimizer with a state": (lambda: mirror_with(optax.adam(0.1)), "mirror_optimizer must keep no state"),
    "a mirror's optimizer that goes down": (lambda: mirror_with(SGD), "mirror_optimizer must add the signal"),
    "a mirror's optimizer of NaN": (lambda: mirror_with(optax.scale(NAN)), "mirror_optimizer must"),
    "an optimizer of NaN": (lambda: make(FA, optimizer=optax.sgd(NAN)).init(KEY, PARAMS), "optimizer", "learning rate"),
    "an optimizer under which B cannot be trained": (lambda: make(KP, optimizer=optax.lamb(0.1)).init(KEY, PARAMS), "Kolen-Pollack"),
    # --- the steps that make_steps returns
    **{
        f"steps.init(params: {what})": (functools.partial(steps(KP).init, KEY, bad), "params", *words)
        for what, (bad, *words) in {
            "missing": (without(PARAMS, "w"), "lacks 'w'"), "more": (changed(v=X), "also has 'v'"),
            "another shape": (changed(w=X), "params['w'] is float32[4, 3]", "float32[6, 2]"),
            "another dtype": (changed(w=PARAMS["w"].astype(jnp.bfloat16)), "params['w'] is bfloat16[6, 2]"),
            "None": (None, "structure"),
        }.items()
    },
    **{
        f"mirror_steps={bad!r}": (lambda bad=bad: steps(WM).init(KEY, PARAMS, mirror_steps=bad), "mirror_steps must be an integer of at least 0")
        for bad in (-1, 1.5, "3", NAN, 2**31)
    },
    "an array twice in a state": (
        lambda: steps(FA).engaged_step((lambda s: s._replace(feedback={**s.feedback, "w": s.params["w"]}))(state(FA)), X),
        "state holds an array twice", "jax.tree.map(jnp.copy, state)"),
    "a mirror period of nothing": (lambda: steps(KP).init(KEY, PARAMS, mirror_steps=1), "mirror_steps", "no rule here has a mirror mode"),
    "a model state that was not announced": (lambda: steps(KP).init(KEY, PARAMS, {"mean": X}), "model_state", "also has 'mean'"),
    "a state used twice": (used_twice, "is deleted", "Continue with the state that the step returned"),
    "params in place of a state": (lambda: steps(KP).engaged_step(PARAMS, X), "state must be a TrainState", "steps.init"),
    "mirror, params in place of a state": (lambda: steps(WM).mirror_step(PARAMS), "state must be a TrainState"),
    "a batch of another structure": (lambda: steps(KP).engaged_step(state(), {"image": X}), "batch must have the structure"),
    "a batch of no array": (lambda: steps(KP).engaged_step(state(), "batch"), "batch is str"),
    "a batch of more axes": (lambda: steps(KP).engaged_step(state(), X[None]), "batch is float32[1, 4, 3]", "float32[4, 3]"),
    "a batch of another dtype": (lambda: steps(KP).engaged_step(state(), np.ones((4, 3), int)), "batch is int32[4, 3]"),
    "a batch of other features": (lambda: steps(KP).engaged_step(state(), X[:, :2]), "raised TypeError", "float32[4, 2]"),
    "a batch of nothing": (lambda: steps(KP).engaged_step(state(), X[:0]), "args hold no sample"),
    "a state of other params": (lambda: steps(KP).engaged_step(state(params=changed(w=X)), X), "state.params['w']"),
    "a state of another optimizer": (
        lambda: steps(KP).engaged_step(state(opt_state=optax.adam(0.1).init(PARAMS)), X), "state.opt_state"),
    "a state of another optimizer of B": (
        lambda: steps(KP).engaged_step(state(feedback_opt_state=optax.adam(0.1).init(made(KP))), X), "state.feedback_opt_state"),
    "a state of another model state": (
        lambda: steps(KP).engaged_step(state(model_state={"mean": X}), X), "state.model_state", "also has 'mean'"),
    "a state with no key": (lambda: steps(KP).engaged_step(state(key=None), X), "state.key must be one JAX random key"),
    "an axis that is not there": (lambda: steps(KP, axis_name="d").engaged_step(state(), X), "axis_name='d'", "inside"),
    "an axis of another mesh": (
        lambda: jax.jit(jax.shard_map(steps(KP, axis_name="d").engaged_step, mesh=other_mesh, in_specs=(P(), P("e")), out_specs=P()))(
            state(), X), "axis_name='d'", "inside"),
    "a state of another mesh": (
        lambda: make(mesh=the_mesh).engaged_step(make(mesh=other_mesh).init(KEY, PARAMS), X), "not on the devices of the step", "init of the same steps"),
    "a step of no number": (lambda: steps(KP).engaged_step(state(step=None), X), "state.step must have the structure"),
    "a step of many numbers": (lambda: steps(KP).engaged_step(state(step=jnp.zeros(3, int)), X), "state.step is int32[3]"),
    "a mesh of no device": (lambda: make(mesh=jax.sharding.Mesh(np.array([]), ("d",))), "mesh must be a jax.sharding.Mesh"),
    **{
        f"explicit axes, {name}": (call, "mesh has axes of other types than Auto", "AxisType.Auto")
        for name, call in {
            "make_steps": lambda: make(mesh=explicit_mesh), "batch_sharding": lambda: batch_sharding(explicit_mesh),
            "state_sharding": lambda: state_sharding(PARAMS, explicit_mesh),
        }.items()
    },
    "batch_sharding": (lambda: batch_sharding("d"), "mesh must be a jax.sharding.Mesh"),
    "state_sharding": (lambda: state_sharding(PARAMS, None), "mesh must be a jax.sharding.Mesh"),
    "state_sharding of strings": (lambda: state_sharding({"w": "x"}, the_mesh), "state must hold only arrays"),
    # --- nnx
    **{
        f"nnx.pure({bad!r})": (functools.partial(wmkp.nnx.pure, bad), "model must be an nnx.Module")
        for bad in (None, nn.Dense(3), PARAMS, nnx.Linear)
    },
    "nnx: other params": (lambda: apply(without(nnx_params, "bias"), nnx_state, X), "params", "lacks 'bias'"),
    "nnx: params of another shape": (lambda: apply({**nnx_params, "kernel": X}, nnx_state, X), "params['kernel'] is float32[4, 3]"),
    "nnx: another state": (lambda: apply(nnx_params, {"count": X}, X), "state", "also has 'count'"),
    "nnx: a method by name": (lambda: apply(nnx_params, nnx_state, X, method="encode"), "method must be a function"),
}  # fmt: skip


def said_by_the_library(error):
    """Asserts that wmkp raised the error (the innermost frame is in wmkp), and returns its message."""
    assert type(error) in (ValueError, TypeError, wmkp.WeightTransportError), repr(error)
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    assert frame.tb_frame.f_globals["__name__"].startswith("wmkp."), f"{frame.tb_frame} raised {error!r}"
    return str(error)


# Ids have no addresses, because these differ between the test runner's processes.
@pytest.mark.parametrize("name", WRONG, ids=[re.sub(r" at 0x[0-9a-f]+", "", name) for name in WRONG])
def test_wrong_calls(name):
    call, *words = WRONG[name]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    text = said_by_the_library(error.value)
    for word in words:
        assert word in text, text


# --- valid calls with one change --------------------------------------------------------------------------------------

FEEDBACK = made(KP)
CALLS = {
    "init_feedback": (wmkp.init_feedback, {"key": B_KEY, "rule": KP, "fun": fun, "params": PARAMS, "args": X}),
    "value_and_grad": (
        lambda fun, rule, params, feedback, args: wmkp.value_and_grad(fun, rule)(params, feedback, args),
        {"fun": fun, "rule": KP, "params": PARAMS, "feedback": FEEDBACK, "args": X}),
    "engage": (
        lambda fun, rule, params, feedback, args: wmkp.engage(fun, rule)(params, feedback, args),
        {"fun": fun, "rule": FA, "params": PARAMS, "feedback": FEEDBACK, "args": X}),
    "projections": (wmkp.projections, {"fun": fun, "params": PARAMS, "args": X}),
    "mirror_signals": (wmkp.mirror_signals, {"key": KEY, "rule": WM, "fun": fun, "params": PARAMS, "args": X}),
    "matrix_angles": (wmkp.matrix_angles, {"params": PARAMS, "feedback": FEEDBACK, "rule": KP}),
    "delta_angles": (wmkp.delta_angles, {"fun": fun, "rule": KP, "params": PARAMS, "feedback": FEEDBACK, "args": X}),
    "input_covariances": (wmkp.input_covariances, {"fun": fun, "params": PARAMS, "args": X}),
    "mirror_gain": (wmkp.mirror_gain, {"rule": WM}),
    "mirror_angle": (wmkp.mirror_angle, {"num_samples": 8, "fan_in": 4, "rule": WM}),
    "samples_for_angle": (wmkp.samples_for_angle, {"angle": 6.0, "fan_in": 4, "rule": WM}),
    "make_steps": (
        lambda loss_fn, rule, optimizer, params, batch: wmkp.make_steps(loss_fn, rule, optimizer, params, batch).init(KEY, PARAMS),
        {"loss_fn": loss_fn, "rule": FA, "optimizer": SGD, "params": PARAMS, "batch": X}),
    "kolen_pollack": (wmkp.kolen_pollack, {"scale": 1.0}),
    "sign_symmetry": (wmkp.sign_symmetry, {"magnitude": "fixed", "scale": 1.0}),
    "product_feedback_alignment": (wmkp.product_feedback_alignment, {"expansion": 2.0, "scale": 1.0}),
    "weight_mirror": (
        lambda **options: wmkp.weight_mirror(**options),
        {"noise": "uniform", "noise_std": 1.0, "num_samples": 3, "bias": "kept", "target_angle": 6.0, "rate": 0.1, "start": 2, "scale": 1.0}),
    "alignment": (
        lambda **options: wmkp.alignment(**options),
        {"amplitude": 1.0, "decay": 1.0, "null": 0.5, "sparse": 0.0, "on": "noise", "rate": 0.1, "noise": "gaussian"}),
    "updates.weight_mirror": (updates.weight_mirror, {"learning_rate": 0.1, "decay": 1.0}),
    "updates.calibrated_mirror": (updates.calibrated_mirror, {"rule": WM, "rate": 0.1}),
    "updates.clip_together": (updates.clip_together, {"max_norm": 1.0}),
    "updates.kolen_pollack": (updates.kolen_pollack, {"optimizer": SGD}),
}  # fmt: skip
BAD = (None, "text", -1, 0, NAN, INF, -INF, 10**30, [], {}, (), True, 3.5, b"", jnp.ones(3), np.ones((4, 3), int), object(),
       KEY, jax.random.split(KEY), KP, WM, wmkp.backprop, SGD, {"w": KP}, {".*": None}, fun, lambda: None)  # fmt: skip


@st.composite
def changed_tree(draw, tree):
    """A tree with a leaf dropped, renamed, reshaped, cast, replaced or added."""
    name = draw(st.sampled_from(sorted(tree)))
    leaf = jnp.ones((6, 2)) if tree[name] is None else tree[name]
    how = draw(
        st.sampled_from(
            ["drop", "rename", "transpose", "longer", "empty", "cast", "none", "list", "string", "more", "number"]
        )
    )
    rest = without(tree, name)
    return {
        "drop": rest, "rename": {**rest, name + "_": leaf}, "transpose": {**rest, name: leaf.T}, "none": {**rest, name: None},
        "longer": {**rest, name: jnp.concatenate([leaf, leaf])}, "empty": {**rest, name: leaf[:0]}, "string": {**rest, name: "w"},
        "cast": {**rest, name: leaf.astype(draw(st.sampled_from([int, bool, complex, jnp.bfloat16])))},
        "list": {**rest, name: leaf.tolist()}, "more": {**tree, "extra": leaf}, "number": {**rest, name: 1.0},
    }[how]  # fmt: skip


@st.composite
def wrong_calls(draw):
    """Draws (the call's name, its arguments, the names of the changed arguments)."""
    call = draw(st.sampled_from(sorted(CALLS)))
    arguments = CALLS[call][1]
    name, other = draw(st.sampled_from(sorted(arguments))), draw(st.sampled_from(sorted(arguments)))
    if name != other and draw(st.booleans()):
        return call, {**arguments, name: arguments[other], other: arguments[name]}, (name, other)
    if isinstance(arguments[name], dict) and draw(st.booleans()):
        return call, {**arguments, name: draw(changed_tree(arguments[name]))}, (name,)
    return call, {**arguments, name: draw(st.sampled_from(BAD))}, (name,)


def right_or_named(call, arguments, names):
    """Asserts that the call returns finite numbers or raises a library error that names one of the arguments."""
    function, valid = CALLS[call]
    try:
        # ``fun``'s arguments are passed by position.
        if "args" in valid and call in (
            "init_feedback",
            "projections",
            "mirror_signals",
            "delta_angles",
            "input_covariances",
        ):
            result = function(*arguments.values())
        else:
            result = function(**arguments)
    except Exception as error:
        text = said_by_the_library(error)
        # An error that ``fun`` raises shows all its arguments. A difference of params and feedback may name either.
        named = (*names, "feedback") if "params" in names else names
        assert "raised" in text or any(re.search(rf"\b{name}\b", text) for name in named), text
        return
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert jnp.isfinite(leaf).all()
        assert not isinstance(leaf, float) or np.isfinite(leaf)


@pytest.mark.parametrize("call", CALLS)
def test_every_bad_value_in_every_place_and_every_two_arguments_exchanged(call):
    valid = CALLS[call][1]
    for name, bad in itertools.product(valid, BAD):
        right_or_named(call, {**valid, name: bad}, (name,))
    for name, other in itertools.combinations(valid, 2):
        right_or_named(call, {**valid, name: valid[other], other: valid[name]}, (name, other))


@settings(deadline=None, derandomize=True, max_examples=120, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(wrong_calls())
def test_any_change_of_a_valid_call_is_right_or_an_error_that_names_the_argument(changed_call):
    call, arguments, names = changed_call
    note(f"{call}: {names} changed, {arguments}")
    right_or_named(call, arguments, names)


# --- random keys ------------------------------------------------------------------------------------------------------


def test_weights_drawn_from_the_key_of_feedback():
    """``init_feedback`` and ``steps.init`` raise an error if W and B were drawn from the same key."""
    first, w = (jax.random.normal(k, s) for k, s in zip(jax.random.split(KEY), ((3, 16), (16, 4)), strict=True))
    params = {"a": first, "w": w}
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["w"])
    step = lambda p, state, x, key: (loss(p, x), (state, {}))
    train_key = next(k for k in map(jax.random.key, range(9)))
    for rule in (KP, FA, WM, IA, wmkp.kolen_pollack_transported()):
        with pytest.raises(ValueError, match=r"key gives params\['w'\].*both were drawn from this key.*fold_in"):
            wmkp.init_feedback(KEY, rule, loss, params, X)
    truncated = {"a": first, "w": jax.nn.initializers.lecun_normal()(jax.random.split(KEY)[1], (16, 4))}
    uniform = {"a": first, "w": jax.random.uniform(jax.random.split(KEY)[1], (16, 4), minval=-1)}
    for drawn in (truncated, uniform, jax.tree.map(np.asarray, params), {"a": first, "w": -w}):
        with pytest.raises(ValueError, match="both were drawn from this key"):
            wmkp.init_feedback(KEY, KP, loss, drawn, X)
    large = jax.tree.map(lambda x: (300 * x).astype(jnp.float16), params)  # their squares overflow float16
    with pytest.raises(ValueError, match="both were drawn from this key"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(1200.0), loss, large, X.astype(jnp.float16))
    wmkp.init_feedback(jax.random.fold_in(KEY, 1), KP, loss, params, X)
    one = {"a": np.ones((3, 1), np.float32), "w": np.ones((1, 1), np.float32)}  # any number is a multiple of another
    assert wmkp.init_feedback(KEY, KP, loss, one, X)["w"].shape == (1, 1)
    init_key = jax.random.split(train_key, 3)[1]  # the key that steps.init derives
    w = jax.random.normal(jax.random.fold_in(init_key, 1), (16, 4))
    steps = wmkp.make_steps(step, KP, SGD, params, X)
    with pytest.raises(ValueError, match="both were drawn from this key"):
        steps.init(train_key, {"a": first, "w": w})


def test_old_keys_do_as_typed_ones_do():
    a, b = (init(key=key)["w"] for key in (jax.random.key(7), jax.random.PRNGKey(7)))
    np.testing.assert_array_equal(a, b)
    a, b = (wmkp.mirror_signals(key, WM, fun, PARAMS, X)["w"] for key in (jax.random.key(7), jax.random.PRNGKey(7)))
    np.testing.assert_array_equal(a, b)
    state = steps(KP).init(old_key, PARAMS)
    steps(KP).engaged_step(state, X)


@pytest.mark.slow
def test_no_key_is_used_twice():
    """JAX's key-reuse checker finds no reuse in ``init_feedback``, ``init`` and both steps, for six rules."""

    def loss(params, model_state, batch, key):
        value = jnp.mean(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, batch) ** 2)
        return value + jax.random.normal(key), (model_state, {})

    mirror = wmkp.weight_mirror("orthogonal+antithetic", num_samples=9)
    rules = BP, wmkp.kolen_pollack(start="mirror"), PFA, DFA, wmkp.sign_symmetry("batch"), IA, mirror
    by_path = {str(i): rule for i, rule in enumerate(rules)}
    params = [jnp.asarray(normal(i, 3, 3)) for i in range(len(rules))]
    with jax.debug_key_reuse(True):
        wmkp.init_feedback(jax.random.key(3), by_path, lambda p, x: loss(p, None, x, KEY)[0], params, X)
        fresh = wmkp.make_steps(loss, by_path, SGD, params, X)
        state = fresh.init(jax.random.key(4), params)
        state, _ = fresh.engaged_step(state, X)
        state, _ = fresh.mirror_step(state)
        fresh.engaged_step(state, X)
        with pytest.raises(jax.errors.KeyReuseError):
            key = jax.random.key(5)
            jax.random.normal(key) + jax.random.normal(key)


def test_a_step_of_three():
    with pytest.raises(TypeError, match=r"engaged_step\(\) takes 2 positional arguments but 3 were given"):
        steps(KP).engaged_step(state(), X, KEY)


def test_a_batch_by_keyword():
    by_position, by_keyword = steps(KP).engaged_step(state(), X), steps(KP).engaged_step(state(), batch=X)
    jax.tree.map(np.testing.assert_array_equal, by_position[0].params, by_keyword[0].params)


def test_a_projection_of_any_size_may_have_exact_noise():
    """``make_steps`` allows orthogonal noise at a fan_in of 100,000, and raises an error for Gaussian noise."""
    sizes = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"first": sizes(3, 100_000), "b": sizes(100_000), "w": sizes(100_000, 2)}
    for rule in (
        wmkp.kolen_pollack(start="mirror"),
        wmkp.weight_mirror("orthogonal+antithetic", activation=jax.nn.relu),
    ):
        make(rule, params=params)
    with pytest.raises(ValueError, match=r"numbers of noise at params\['w'\] \(476,438 samples of 100000\)"):
        make(wmkp.weight_mirror("gaussian", target_angle=6, rate=0.1), params=params)


@pytest.mark.parametrize(
    "rule", [wmkp.activity_mirror(whiten=True), wmkp.activity_mirror(), wmkp.activation_alignment()],
    ids=lambda rule: rule.name,
)  # fmt: skip
def test_a_layer_without_activity_leaves_no_nan(rule):
    dead = {**PARAMS, "first": jnp.zeros((3, 6))}
    _, (_, signal) = grad(rule, dead, init(rule, dead))
    assert jnp.isfinite(signal["w"]).all()
    _, (_, signal) = grad(rule, PARAMS, init(rule))
    assert jnp.abs(signal["w"]).max() > 0


def test_a_number_in_a_state_goes_to_every_device():
    assert state_sharding({"n": 3}, the_mesh, fsdp=True)["n"].spec == P()


def test_numpy_params_in_double_precision():
    """NumPy float64 params and data give the same gradients as float32 arrays, and ``make_steps`` accepts them."""
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    feedback = wmkp.init_feedback(B_KEY, KP, fun, double, np.asarray(X, np.float64))
    _, (grads, _) = grad(KP, double, feedback)
    _, (expected, _) = grad(KP, PARAMS, made(KP))
    for name in PARAMS:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-7)
    of_double = make(params=double, batch=np.asarray(X, np.float64))
    of_double.engaged_step(of_double.init(KEY, PARAMS), X)
