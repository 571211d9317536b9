"""Each rule equals its equations in NumPy. Tests of a rule for each layer, and of gradients with B = W."""

import copy
import functools
import itertools
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import optax
import pytest
from arrays import drawn_feedback
from jax import lax
from marks import some_slow

import wmkp
from wmkp.alignment import Alignment
from wmkp.noise import draw_noise
from wmkp.program.interpreter import Direct
from wmkp.program.projections import direct_sizes
from wmkp.rules import ProductFeedback

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES = (7, 9, 8, 5)  # two hidden layers
STEPS, BATCH = 6, 11
RATE, DECAY, MOMENTUM = 0.1, 0.05, 0.9
RIDGE = 1e-4  # whitening adds this share of the mean variance to the covariance
KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape, fan_in=1):
    return np.random.default_rng(seed).normal(size=shape) / math.sqrt(fan_in)


def optimizer():
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))


# --- a tanh MLP, in the library and in NumPy --------------------------------------------------------------------------


def network(seed=0):
    """Return weights in Flax's layout, with kernels (in, out), and a batch of data for each step."""
    rng = np.random.default_rng(seed)
    params = [
        {"w": rng.normal(size=(m, n)) / np.sqrt(m), "b": 0.3 * rng.normal(size=n)} for m, n in itertools.pairwise(SIZES)
    ]
    return params, (rng.normal(size=(STEPS, BATCH, SIZES[0])), rng.normal(size=(STEPS, BATCH, SIZES[-1])))


def mlp(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def mlp_loss(params, x, target):
    return jnp.sum((mlp(params, x) - target) ** 2) / (2 * x.shape[0])


def as_step(loss):
    """Convert a plain loss to the form that make_steps takes."""
    return lambda params, model_state, batch, key: (loss(params, *batch), (model_state, {}))


class Equations:
    """A rule as rules.md writes it: activities are columns, W is (out, in), and B is (in, out) or the result of ``of``.

    Each method is one column of the table: the error at x, the signal of B's optimizer, the change of B that a local
    loss adds in engaged mode, and the change of B in mirror mode.
    """

    def of(self, b):
        return np.array(b)

    def back(self, W, B, delta, e):
        return B @ delta

    def signal(self, B, x, delta, e):
        return None

    def local(self, W, B, x):
        return 0.0

    def mirror(self, W, b, B, x):
        return 0.0


class BP(Equations):
    def of(self, b):
        return b

    def back(self, W, B, delta, e):
        return W.T @ delta


class FA(Equations):
    pass


class SignSymmetry(Equations):
    """abs(B) * sign(W)^T. Under uSF B is a constant. Under brSF the training loop passes each step's B."""

    def __init__(self, uniform=None):
        self.uniform = uniform

    def back(self, W, B, delta, e):
        size = self.uniform / np.sqrt(W.shape[1]) if self.uniform else np.abs(B)
        return (size * np.sign(W).T) @ delta


class KP(Equations):
    """dB = -eta x delta^T - lambda B."""

    def signal(self, B, x, delta, e):
        return x @ delta.T


class TransportedKP(Equations):
    """dB = A^T - lambda B, where dW = A - lambda W."""

    def signal(self, B, x, delta, e):
        return (delta @ x.T).T


class PFA(Equations):
    """dL/dx := R B delta; dB = -eta (R^T x) delta^T - lambda B. ``rs`` maps the shape of B to its R."""

    def of(self, b):
        return np.array(b.b[0])

    def back(self, W, B, delta, e):
        return self.R(B) @ (B @ delta)

    def R(self, B):
        return self.rs[B.shape]

    def signal(self, B, x, delta, e):
        return (self.R(B).T @ x) @ delta.T


class DFA(Equations):
    """dL/dx := B e."""

    def of(self, b):
        return np.array(b.array)

    def back(self, W, B, delta, e):
        return B @ e


class DKP(DFA):
    """dB = -eta x e^T - lambda B."""

    def signal(self, B, x, delta, e):
        return x @ e.T


class Kunin(Equations):
    """Minus the gradient of R(B; W, x), term by term. Means are over samples."""

    def __init__(self, rate, amplitude=0.0, decay=0.0, null=0.0, sparse=0.0, self_alignment=0.0, *, on,
                 whiten=False, normalize="none"):  # fmt: skip
        self.rate, self.on, self.whiten, self.normalize = rate, on, whiten, normalize
        self.amplitude, self.decay, self.null, self.sparse = amplitude, decay, null, sparse
        self.self_alignment = self_alignment

    def change(self, W, B, x):
        u, v = W @ x, B.T @ x
        inputs, n = x.shape
        size = {"none": 1.0, "mean": np.mean(x**2), "total": np.mean(np.sum(x**2, axis=0))}[self.normalize]
        xu = x @ u.T / n / size
        if self.whiten:
            c = x @ x.T / n
            xu = np.linalg.inv(c + RIDGE * np.trace(c) / inputs * np.eye(inputs)) @ xu
        return self.rate * (
            -self.decay * B
            + self.amplitude * xu
            - self.sparse * (x @ v.T) / n / size
            - self.null * ((B @ u) @ u.T) / n / size
            + self.self_alignment * W.T
        )

    def local(self, W, B, x):
        return self.change(W, B, x) if self.on == "activity" else 0.0

    def mirror(self, W, b, B, x):
        return self.change(W, B, x) if self.on == "noise" else 0.0


class MKP(Equations):
    """KP's changes in engaged mode. The t-th mirror step moves B a share 1/t of the way to its estimate of W^T."""

    def __init__(self, start):
        self.count = {1: start, 2: start}  # by the index of the projection

    def signal(self, B, x, delta, e):
        return x @ delta.T

    def mirror(self, W, b, B, x):
        i = SIZES.index(B.shape[0])
        self.count[i] += 1
        return (x @ (W @ x).T / x.shape[1] - B) / self.count[i]


class WM(Equations):
    """Eq. 6-8 with decay: B changes by ``rate`` times x phi(W x + b)^T / gain - B, where gain = sigma^2 E[phi']."""

    def __init__(self, rate, gain=1.0, phi=lambda z: z, bias=False):
        self.rate, self.gain, self.phi, self.bias = rate, gain, phi, bias

    def mirror(self, W, b, B, x):
        y = self.phi(W @ x + (b if self.bias else 0.0))
        return self.rate * (x @ y.T / x.shape[1] / self.gain - B)


def paper(equations, params, starts, data, noises, redrawn):
    """Train in the paper's notation, with heavy-ball momentum and decay for W and for each B that has a signal.

    ``noises[step][i]`` is mirror mode's x at projection i after that step, or None. ``redrawn[step][i]`` is the redrawn
    B, or None.
    """
    layers = len(params)
    W = [layer["w"].T.copy() for layer in params]
    b = [layer["b"][:, None].copy() for layer in params]
    B = [None] + [equations[i].of(starts[i]) for i in range(1, layers)]
    speed = {}

    def descend(name, value, signal):
        speed[name] = MOMENTUM * speed.get(name, 0.0) + signal + DECAY * value
        return value - RATE * speed[name]

    for step, (x, target) in enumerate(zip(*data, strict=True)):
        B = [b if anew is None else np.array(anew) for b, anew in zip(B, redrawn[step], strict=True)]
        y = [x.T]
        for i in range(layers):
            a = W[i] @ y[i] + b[i]
            y.append(np.tanh(a) if i < layers - 1 else a)
        delta = [None] * layers
        delta[-1] = e = (y[-1] - target.T) / x.shape[0]
        for i in reversed(range(layers - 1)):
            delta[i] = (1 - y[i + 1] ** 2) * equations[i + 1].back(W[i + 1], B[i + 1], delta[i + 1], e)
        new_B = list(B)
        for i in range(1, layers):
            signal = equations[i].signal(B[i], y[i], delta[i], e)
            if signal is not None:
                new_B[i] = descend(("B", i), B[i], signal)
            if B[i] is not None:
                new_B[i] = new_B[i] + equations[i].local(W[i], B[i], y[i])
        B = new_B
        for i in range(layers):
            W[i] = descend(("W", i), W[i], delta[i] @ y[i].T)
            b[i] = descend(("b", i), b[i], delta[i].sum(1, keepdims=True))
        for i in range(1, layers):
            if noises[step][i] is not None:
                B[i] = B[i] + equations[i].mirror(W[i], b[i], B[i], noises[step][i])
    return W, b, B


def noise_of(key, rules, samples):
    """Return mirror mode's noise at each projection for this key, as columns. The library draws it, in the
    same order.
    """
    noises, count = [None] * len(rules), 0
    for i in range(1, len(rules)):
        if rules[i].mirror is not None and rules[i].mirror.each_step:
            shape = (1, samples, SIZES[i])
            noises[i] = np.array(draw_noise(jax.random.fold_in(key, count), rules[i].mirror, shape, jnp.float64)[0]).T
            count += 1
    return noises


def entries(feedback):
    return [layer["w"] for layer in feedback]


def copied(tree):
    return jax.tree.map(np.array, tree)


SAMPLES = 13
NOISY = {"num_samples": SAMPLES}
MIRROR: dict = {**NOISY, "rate": 0.1, "start": 0}
ALIGN = functools.partial(wmkp.alignment, on="activity")
TERMS = {"amplitude": 0.9, "decay": 0.4, "null": 0.3, "sparse": 0.2, "self_alignment": 0.1}

# name: (rule, its equations)
CASES = {
    "backprop": (wmkp.backprop(), BP()),
    "FA": (wmkp.feedback_alignment(), FA()),
    "uSF": (wmkp.sign_symmetry(scale=1.5), SignSymmetry(1.5)),
    "frSF": (wmkp.sign_symmetry("fixed"), SignSymmetry()),
    "brSF": (wmkp.sign_symmetry("batch", scale=1.2), SignSymmetry()),
    "KP": (wmkp.kolen_pollack(), KP()),
    "KP, mirrored start": (wmkp.kolen_pollack(start="mirror"), KP()),
    "KP, transported": (wmkp.kolen_pollack_transported(), TransportedKP()),
    "PFA": (wmkp.product_feedback_alignment(expansion=3.0), PFA()),
    "DFA": (wmkp.direct_feedback_alignment(), DFA()),
    "DKP": (wmkp.direct_kolen_pollack(scale=0.8), DKP()),
    "all five on noise": (
        wmkp.alignment(**TERMS, rate=0.3, noise_std=1.3, **NOISY),
        Kunin(0.3, **TERMS, on="noise"),
    ),
    "amplitude + decay on orthogonal noise": (
        wmkp.alignment(amplitude=1, decay=1, noise="orthogonal", **NOISY),
        Kunin(0.1, amplitude=1, decay=1, on="noise"),
    ),
    "all five on activity": (ALIGN(**TERMS, rate=0.2), Kunin(0.2, **TERMS, on="activity")),
    "all five, over the mean square": (
        ALIGN(**TERMS, normalize="mean"),
        Kunin(0.1, **TERMS, on="activity", normalize="mean"),
    ),
    "all five, whitened": (ALIGN(**TERMS, whiten=True), Kunin(0.1, **TERMS, on="activity", whiten=True)),
    "SA": (wmkp.symmetric_alignment(1.2, 0.9, rate=0.3), Kunin(0.3, self_alignment=1.2, decay=0.9, on="activity")),
    "AA": (
        wmkp.activation_alignment(1.1, 0.9, rate=0.8),
        Kunin(0.8, amplitude=1.1, sparse=0.9, on="activity", normalize="total"),
    ),
    "activity mirror": (
        wmkp.activity_mirror(rate=0.2),
        Kunin(0.2, amplitude=1, decay=1, on="activity", normalize="mean"),
    ),
    "MKP": (wmkp.mirrored_kolen_pollack("gaussian", **NOISY, start=2), MKP(2)),
    "WM": (wmkp.weight_mirror("gaussian", **MIRROR | {"rate": 0.3}), WM(0.3)),
    "WM, other noise": (wmkp.weight_mirror("uniform", 1.5, **MIRROR), WM(0.1, 1.5**2)),
    "WM, orthogonal": (wmkp.weight_mirror("orthogonal", **MIRROR | {"rate": 0.5}), WM(0.5)),
    "WM, a kept bias": (wmkp.weight_mirror("rademacher", **MIRROR, bias="kept"), WM(0.1, bias=True)),
    "WM, relu": (
        wmkp.weight_mirror("antithetic", 0.5, **MIRROR, activation=jax.nn.relu),
        WM(0.1, wmkp.mirror_gain(wmkp.weight_mirror("antithetic", 0.5, activation=jax.nn.relu)),
           lambda z: np.maximum(z, 0)),
    ),
    "WM, tanh and a kept bias": (
        wmkp.weight_mirror("gaussian", 0.3, **MIRROR, activation=jnp.tanh, bias="kept"),
        WM(0.1, wmkp.mirror_gain(wmkp.weight_mirror(noise_std=0.3, activation=jnp.tanh)), np.tanh, bias=True),
    ),
}  # fmt: skip
# Each pair stands in one network, the first rule below the second.
PAIRS = [
    ("backprop", "FA"),
    ("PFA", "brSF"),
    ("all five on activity", "all five on noise"),
    ("AA", "MKP"),
    ("WM", "WM, orthogonal"),
    ("WM, a kept bias", "WM, tanh and a kept bias"),
    ("KP, mirrored start", "WM, relu"),
    ("DFA", "KP"),
    ("DKP", "uSF"),
    ("frSF", "all five, whitened"),
    ("KP, transported", "amplitude + decay on orthogonal noise"),
    ("SA", "WM, other noise"),
    ("activity mirror", "all five, over the mean square"),
]


def unpacked(b):
    return b.b[0] if isinstance(b, ProductFeedback) else b.array if isinstance(b, Direct) else b


@pytest.mark.parametrize("pair", some_slow(PAIRS, PAIRS[8:]), ids=" under ".join)
def test_training_equals_numpy(float64, pair):
    """After engaged steps and mirror steps, W, biases and B equal those of the equations to 1e-9."""
    (first, ours), (second, theirs) = (CASES[name] for name in pair)
    rule, rules, equations = {"0|1": first, "2": second}, [first, first, second], [BP(), ours, theirs]
    params, data = network()
    batches = list(zip(*data, strict=True))
    steps = wmkp.make_steps(as_step(mlp_loss), rule, optimizer(), params, batches[0])
    state = steps.init(jax.random.key(2), jax.tree.map(jnp.asarray, params))
    starts = entries(state.feedback)
    starts = copied(starts)
    chex.assert_tree_all_finite(starts)
    pfa = [b for b in starts if isinstance(b, ProductFeedback)]
    for eq in equations:
        if isinstance(eq, PFA):
            eq.rs = {b.b[0].shape: b.r[0] for b in pfa}
    noises, redrawn = [], []
    for batch in batches:
        state, metrics = steps.engaged_step(state, batch)
        redrawn.append([b if r.redrawn else None for b, r in zip(copied(entries(state.feedback)), rules, strict=True)])
        noises.append(noise_of(jax.random.split(state.key)[1], rules, SAMPLES))
        before = copied(state.feedback)
        state, _ = steps.mirror_step(state)
        moved = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, state.feedback)), strict=True))
        assert moved == any(x is not None for x in noises[-1]), "mirror mode moves what has one, and nothing else"
    W, b, B = paper(equations, params, starts, data, noises, redrawn)
    final = entries(state.feedback)
    for i in range(len(params)):
        assert np.max(np.abs(W[i] - params[i]["w"].T)) > 0.01, "training must move W"
        np.testing.assert_allclose(state.params[i]["w"], W[i].T, rtol=0, atol=1e-9)
        np.testing.assert_allclose(state.params[i]["b"], b[i][:, 0], rtol=0, atol=1e-9)
        if i == 0 or rules[i].backward is None:
            assert final[i] is None
            continue
        chex.assert_trees_all_equal_dtypes(final[i], starts[i])
        np.testing.assert_allclose(unpacked(final[i]), B[i], rtol=0, atol=1e-9)
        if isinstance(final[i], ProductFeedback):
            np.testing.assert_array_equal(final[i].r, starts[i].r)
        gained = np.max(np.abs(unpacked(final[i]) - unpacked(starts[i])))
        fixed = not (rules[i].signal or rules[i].mirror or rules[i].redrawn)
        assert gained == 0 if fixed else gained > 1e-3
    assert np.isfinite(metrics["loss"])


def test_every_factory_has_a_case():
    """Each rule that the library exports has a case here or tests of its own."""
    assert sorted(name for pair in PAIRS for name in pair) == sorted(CASES)
    found = {rule.name.split("(")[0] for rule, _ in CASES.values()}
    assert found == {
        "backprop", "feedback_alignment", "sign_symmetry",
        "kolen_pollack", "kolen_pollack_transported", "product_feedback_alignment", "direct_feedback_alignment",
        "direct_kolen_pollack", "alignment", "symmetric_alignment", "activation_alignment", "activity_mirror",
        "weight_mirror", "mirrored_kolen_pollack",
    }  # fmt: skip
    homes = {"wmkp.rules", "wmkp.direct", "wmkp.alignment"}
    factories = [f for f in vars(wmkp).values() if callable(f) and getattr(f, "__module__", "") in homes]
    names = {f().name for f in factories if not isinstance(f, type) and f is not wmkp.alignment}
    own = {"information_alignment", "local", "forward_direct_feedback_alignment"}
    assert names - found == own, "which have tests of their own"


def test_information_alignment_equals_numpy(float64):
    """Each projection draws as many samples as its target angle needs, and B equals the equations in NumPy."""
    rule = wmkp.information_alignment(0.9, 0.4, 0.6, rate=0.2, noise_std=1.2)
    equation = Kunin(0.2, amplitude=0.9, null=0.4, decay=0.6, on="noise")
    params, data = network(4)
    steps = wmkp.make_steps(as_step(mlp_loss), rule, optimizer(), params, (data[0][0], data[1][0]))
    state = steps.init(KEY, jax.tree.map(jnp.asarray, params))
    B = [None if b is None else np.array(b) for b in entries(state.feedback)]
    for _ in range(3):
        key = jax.random.split(state.key)[1]
        for i in (1, 2):
            samples = wmkp.samples_for_angle(rule.mirror.target_angle, SIZES[i], rule)
            x = draw_noise(jax.random.fold_in(key, i - 1), rule.mirror, (1, samples, SIZES[i]), jnp.float64)[0]
            B[i] = B[i] + equation.change(params[i]["w"].T, B[i], np.array(x).T)
        state, _ = steps.mirror_step(state)
        for i in (1, 2):
            np.testing.assert_allclose(state.feedback[i]["w"], B[i], rtol=0, atol=1e-9)


def test_mirror_period_is_the_mean_of_its_estimates(float64):
    """After k mirror steps before training, B is the mean of k estimates over the gain. The first random B has no
    effect.
    """
    rule, count = wmkp.weight_mirror("gaussian", 1.5, SAMPLES, jax.nn.relu, rate=0.1), 4
    params, data = network(5)
    steps = wmkp.make_steps(as_step(mlp_loss), rule, optimizer(), params, (data[0][0], data[1][0]))
    state = steps.init(KEY, jax.tree.map(jnp.asarray, params), mirror_steps=count)
    noise_key = jax.random.split(KEY, 3)[2]
    for i in (1, 2):
        estimates = []
        for k in range(count):
            x = noise_of(jax.random.fold_in(noise_key, k), [rule] * 3, SAMPLES)[i]
            y = np.maximum(params[i]["w"].T @ x, 0)
            estimates.append(x @ y.T / SAMPLES)
        expected = np.mean(estimates, axis=0) / wmkp.mirror_gain(rule)
        np.testing.assert_allclose(state.feedback[i]["w"], expected, rtol=0, atol=1e-9)
    assert wmkp.mirror_gain(rule) == pytest.approx(1.5**2 / 2, rel=1e-6)


def test_mirrored_start_is_exact_and_is_backprop(float64):
    params, data = network(6)
    batches = list(zip(*data, strict=True))
    states = {}
    for name, rule in {"kp": wmkp.kolen_pollack(start="mirror"), "bp": wmkp.backprop()}.items():
        steps = wmkp.make_steps(as_step(mlp_loss), rule, optimizer(), params, batches[0])
        state = steps.init(KEY, jax.tree.map(jnp.asarray, params))
        if name == "kp":
            for i in (1, 2):
                np.testing.assert_allclose(state.feedback[i]["w"], params[i]["w"], rtol=0, atol=1e-12)
        for batch in batches:
            state, _ = steps.engaged_step(state, batch)
        states[name] = state
    chex.assert_trees_all_close(states["kp"].params, states["bp"].params, rtol=0, atol=1e-11)
    for i in (1, 2):
        np.testing.assert_allclose(states["kp"].feedback[i]["w"], states["kp"].params[i]["w"], rtol=0, atol=1e-11)


# --- how each B starts ------------------------------------------------------------------------------------------------

WIDE = [
    {"w": normal(i, m, n, fan_in=m), "b": np.zeros(n)} for i, (m, n) in enumerate([(20, 300), (300, 200), (200, 50)])
]
WIDE = jax.tree.map(np.float32, WIDE)
WIDE_DATA = np.ones((4, 20), np.float32), np.ones((4, 50), np.float32)


@pytest.mark.parametrize("rule", [wmkp.feedback_alignment, functools.partial(wmkp.weight_mirror, start=0),
                                  wmkp.direct_feedback_alignment, wmkp.product_feedback_alignment])  # fmt: skip
def test_start_is_gaussian_of_the_scale_asked_for(rule):
    """B has standard deviation scale / sqrt(fan_in) and does not correlate with W. Direct feedback uses the error's
    size.
    """
    feedback = jitted.init_feedback(KEY, rule(scale=1.6), mlp_loss, WIDE, *WIDE_DATA)
    for i in (1, 2):
        b = feedback[i]["w"]
        fan_in = 50 if isinstance(b, Direct) else WIDE[i]["w"].shape[0]
        b = b.effective() if isinstance(b, ProductFeedback) else unpacked(b)
        b = np.asarray(b, np.float64)
        # PFA's product is not Gaussian entry by entry, and its entries are correlated, but its variance is right.
        assert b.std() * math.sqrt(fan_in) / 1.6 == pytest.approx(1, abs=0.03)
        assert abs(b.mean()) < 5 * b.std() / math.sqrt(b.size)
        kurtosis = np.mean(b**4) / np.mean(b**2) ** 2
        assert kurtosis == pytest.approx(3, abs=0.15)
        if b.shape == WIDE[i]["w"].shape:
            cosine = np.vdot(b, WIDE[i]["w"]) / np.linalg.norm(b) / np.linalg.norm(WIDE[i]["w"])
            assert abs(cosine) < 5 / math.sqrt(b.size)
    other = jitted.init_feedback(jax.random.key(9), rule(scale=1.6), mlp_loss, WIDE, *WIDE_DATA)
    assert not np.allclose(jax.tree.leaves(other)[0], jax.tree.leaves(feedback)[0])


def test_a_matrix_in_two_places_starts_at_the_scale_of_the_larger_fan_in():
    there_and_back = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x * p["gain"]) @ p["w"]) @ p["w"].T)
    for shape in ((400, 25), (25, 400)):
        params = {"gain": np.ones(shape[0]), "w": normal(0, *shape)}
        x = np.ones((2, shape[0]))
        assert wmkp.projections(there_and_back, params, x)["w"].fan_in == 400
        b = jitted.init_feedback(KEY, wmkp.feedback_alignment(), there_and_back, params, x)["w"]
        assert b.std() == pytest.approx(1 / 20, rel=0.05)


@pytest.mark.slow
def test_product_feedback_has_r_near_orthogonal():
    """R R^T is the identity up to 1 / sqrt(hidden) for each entry, and ``effective`` returns R B."""
    feedback = jitted.init_feedback(KEY, wmkp.product_feedback_alignment(8.0), mlp_loss, WIDE, *WIDE_DATA)
    b = feedback[1]["w"]
    assert b.r.shape == (1, 300, 2400) and b.b.shape == (1, 2400, 200)
    gram = np.asarray(b.r[0] @ b.r[0].T, np.float64)
    assert np.max(np.abs(np.diag(gram) - 1)) < 6 * math.sqrt(2 / 2400)
    off = gram[~np.eye(300, dtype=bool)]
    assert off.std() == pytest.approx(1 / math.sqrt(2400), rel=0.05)
    np.testing.assert_allclose(b.effective(), np.asarray(b.r[0]) @ np.asarray(b.b[0]), rtol=0, atol=1e-5)
    for expansion, hidden in ((0.0295, 9), (0.001, 1)):  # the nearest number of neurons, and at least one
        rule = wmkp.product_feedback_alignment(expansion)
        assert drawn_feedback(rule, mlp_loss, WIDE, *WIDE_DATA)[1]["w"].b.shape == (1, hidden, 200)


def test_published_coefficients_are_the_defaults():
    """The default coefficients are those of Kunin et al., or those in the docstrings."""
    information = wmkp.information_alignment(noise_std=2.0)
    assert information.mirror.signal == Alignment(amplitude=1.0, null=0.5, decay=0.5) and information.mirror.rate == 0.1
    assert information.mirror.noise_std == 2.0 and wmkp.information_alignment().mirror.noise_std == 1.0
    on_activity = (
        (wmkp.symmetric_alignment(), Alignment(self_alignment=1.0, decay=1.0), 0.1),
        (wmkp.activation_alignment(), Alignment(amplitude=1.0, sparse=1.0, normalize="total"), 1.0),
        (wmkp.activity_mirror(), Alignment(amplitude=1.0, decay=1.0, normalize="mean"), 0.1),
    )
    for rule, signal, rate in on_activity:
        change, _ = rule.optimizer.update(jnp.ones(3), rule.optimizer.init(jnp.ones(3)))
        assert rule.signal == signal and np.allclose(change, -rate)
    mirror = wmkp.weight_mirror().mirror
    assert (mirror.noise, mirror.noise_std, mirror.num_samples, mirror.target_angle) == ("orthogonal", 1.0, None, None)
    assert (mirror.rate, mirror.start) == (1.0, 1)
    mirror = wmkp.weight_mirror("gaussian").mirror
    assert (mirror.num_samples, mirror.target_angle, mirror.rate, mirror.start) == (None, None, 0.5, 20)
    assert wmkp.weight_mirror(activation=jax.nn.relu).mirror.noise == "orthogonal+antithetic"
    assert wmkp.weight_mirror(num_samples=4).mirror[-1] == 20 and wmkp.weight_mirror(num_samples=4).mirror.rate == 0.5
    start = wmkp.kolen_pollack(start="mirror")
    for rule in (start, wmkp.mirrored_kolen_pollack(), wmkp.weight_mirror()):  # one mirror step is exact
        assert (rule.mirror.noise, rule.mirror.num_samples, rule.mirror.start) == ("orthogonal", None, 1)
        assert [wmkp.mirror_angle(n, n, rule) for n in (1, 96, 4608, 100_000)] == [0.0] * 4


def test_what_is_transported_is_said():
    said = {
        "weights": (wmkp.backprop(), wmkp.symmetric_alignment(), wmkp.alignment(self_alignment=0.1, decay=1.0)),
        "changes": (wmkp.kolen_pollack_transported(),),
        "signs": (wmkp.sign_symmetry(),),
        "nothing": (wmkp.kolen_pollack(), wmkp.weight_mirror(), wmkp.information_alignment(), wmkp.activity_mirror()),
    }
    for what, rules in said.items():
        assert {rule.transports for rule in rules} == {what}


def test_a_layer_that_no_sample_reaches_beside_others():
    fun = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p["first"]) @ p["w"])) + jnp.sum(x[:0] @ p["unused"])
    params = {"first": normal(0, 6, 8), "w": normal(1, 8, 4), "unused": normal(2, 6, 3)}
    feedback = drawn_feedback(wmkp.kolen_pollack(), fun, params, normal(3, 5, 6))
    assert feedback["w"].shape == (8, 4) and feedback["unused"] is None


def test_a_layer_of_no_neurons_is_refused_by_name():
    fun = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p["first"]) @ p["w"])) + jnp.sum(x @ p["empty"])
    params = {"first": normal(0, 6, 8), "w": normal(1, 8, 4), "empty": np.zeros((6, 0))}
    with pytest.raises(ValueError, match=r"params\['empty'\] is \[6, 0\].*no neurons"):
        wmkp.init_feedback(KEY, wmkp.kolen_pollack(), fun, params, normal(3, 5, 6))
    rules = {"empty": wmkp.backprop(), ".*": wmkp.kolen_pollack()}
    assert drawn_feedback(rules, fun, params, normal(3, 5, 6))["empty"] is None


@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "batch"])
def test_sign_symmetry_starts_with_the_signs_of_w(magnitude):
    feedback = jitted.init_feedback(KEY, wmkp.sign_symmetry(magnitude, scale=1.3), mlp_loss, WIDE, *WIDE_DATA)
    for i in (1, 2):
        w, b = (np.asarray(x, np.float64) for x in (WIDE[i]["w"], feedback[i]["w"]))
        np.testing.assert_array_equal(np.sign(w), np.sign(b))
        size = np.abs(b) * math.sqrt(w.shape[0]) / 1.3
        if magnitude == "uniform":
            np.testing.assert_allclose(size, 1, rtol=1e-6)
        else:  # a half-normal distribution
            assert size.mean() == pytest.approx(math.sqrt(2 / math.pi), rel=0.03)
            assert np.sqrt(np.mean(size**2)) == pytest.approx(1, rel=0.03)


def test_random_magnitudes_are_drawn_for_each_batch():
    """brSF draws a new B at each step from the state's key, uncorrelated with the last B."""
    params, data = jax.tree.map(np.float32, network(1))
    steps = wmkp.make_steps(
        as_step(mlp_loss), wmkp.sign_symmetry("batch"), optimizer(), params, (data[0][0], data[1][0])
    )
    seen = []
    for _ in range(2):
        state = steps.init(KEY, params)
        seen.append([np.abs(state.feedback[1]["w"])])
        for batch in zip(*data, strict=True):
            state, _ = steps.engaged_step(state, batch)
            seen[-1].append(np.abs(state.feedback[1]["w"]))
    np.testing.assert_array_equal(*seen, "the same key gives the same B")
    drawn = np.array(seen[0]).reshape(STEPS + 1, -1)
    correlation = np.corrcoef(drawn)[~np.eye(STEPS + 1, dtype=bool)]
    assert np.max(np.abs(correlation)) < 5 / math.sqrt(drawn.shape[1])


@pytest.mark.parametrize(
    "rule",
    [wmkp.sign_symmetry("fixed"), wmkp.direct_feedback_alignment(), wmkp.information_alignment()],
    ids=lambda rule: rule.name,
)  # fmt: skip
def test_the_signal_is_zero_where_b_learns_nothing_in_engaged_mode(rule):
    feedback = drawn_feedback(rule, mlp_loss, WIDE, *WIDE_DATA)
    _, (_, signal) = jitted.value_and_grad(mlp_loss, rule)(WIDE, feedback, *WIDE_DATA)
    chex.assert_trees_all_equal(signal, jax.tree.map(np.zeros_like, feedback))


def test_product_feedback_is_laid_out_as_its_weight():
    """``effective`` returns W's layout for outputs, groups, inputs: an order of axes that is not its own inverse."""
    r, b = normal(0, 2, 3, 7), normal(1, 2, 7, 4)
    found = ProductFeedback(r, b, (4, 2, 3), (1, 2, 0)).effective()
    np.testing.assert_allclose(found, np.einsum("gih,gho->ogi", r, b), rtol=1e-5, atol=1e-5)


def test_of_product_feedback_b_alone_learns():
    rule = wmkp.product_feedback_alignment()
    feedback = drawn_feedback(rule, mlp_loss, WIDE, *WIDE_DATA)
    _, (_, signal) = jitted.value_and_grad(mlp_loss, rule)(WIDE, feedback, *WIDE_DATA)
    for entry in (signal[1]["w"], signal[2]["w"]):
        assert not np.any(entry.r) and np.any(entry.b)


def test_redrawn_rule_leaves_other_layers_alone():
    params, data = jax.tree.map(np.float32, network(1))
    rule = {"1": wmkp.sign_symmetry("batch"), ".*": wmkp.feedback_alignment()}
    batch = data[0][0], data[1][0]
    steps = wmkp.make_steps(as_step(mlp_loss), rule, optimizer(), params, batch)
    state = steps.init(KEY, params)
    first = copied(entries(state.feedback))
    state, _ = steps.engaged_step(state, batch)
    assert not np.any(np.isclose(first[1], state.feedback[1]["w"], rtol=1e-6))
    np.testing.assert_array_equal(first[2], state.feedback[2]["w"])


# --- a parameter with other uses: the signal of one product, and the transported change -------------------------------


def tied(params, tokens, target):
    """The loss of a net whose embedding table is looked up and also tied to the output."""
    h = jnp.tanh(params["table"][tokens] @ params["w"])
    return jnp.sum((h @ params["table"].T - target) ** 2) / (2 * tokens.shape[0])


def test_transported_change_differs_from_the_circuit_where_a_weight_has_other_uses(float64):
    params = {"table": normal(0, 6, 4), "w": normal(1, 4, 4, fan_in=4)}
    tokens, target = np.array([0, 3, 3, 5, 1]), normal(2, 5, 6)
    E, W = params["table"], params["w"]
    for transported, rule in enumerate((wmkp.kolen_pollack(), wmkp.kolen_pollack_transported())):
        feedback = drawn_feedback(rule, tied, params, tokens, target)
        B, B_w = np.asarray(feedback["table"]), np.asarray(feedback["w"])
        _, (grads, signal) = jitted.value_and_grad(tied, rule)(params, feedback, tokens, target)
        x = E[tokens]
        h = np.tanh(x @ W)
        e = (h @ E.T - target) / len(tokens)
        delta = (1 - h**2) * (e @ B)
        product = e.T @ h
        lookup = np.zeros_like(E)
        np.add.at(lookup, tokens, delta @ B_w.T)
        np.testing.assert_allclose(grads["table"], product + lookup, rtol=0, atol=1e-12)
        np.testing.assert_allclose(grads["w"], x.T @ delta, rtol=0, atol=1e-12)
        np.testing.assert_allclose(signal["w"], x.T @ delta, rtol=0, atol=1e-12)
        np.testing.assert_allclose(signal["table"], product + transported * lookup, rtol=0, atol=1e-12)
        assert np.max(np.abs(lookup)) > 0.01


# --- convolutions -----------------------------------------------------------------------------------------------------


def conv(x, w, stride=1, groups=1, dilation=1, padding="SAME"):
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, rhs_dilation=(dilation, dilation), feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def patches(x, size, stride=1, dilation=1):
    """(N, H, W, C) -> (N, H', W', size, size, C), with SAME padding as in TensorFlow and JAX."""
    n, height, width, c = x.shape
    reach = (size - 1) * dilation + 1
    rows, cols = -(-height // stride), -(-width // stride)
    pads = [max((out - 1) * stride + reach - length, 0) for out, length in ((rows, height), (cols, width))]
    padded = np.zeros((n, height + pads[0], width + pads[1], c))
    padded[:, pads[0] // 2 : pads[0] // 2 + height, pads[1] // 2 : pads[1] // 2 + width] = x
    out = np.zeros((n, rows, cols, size, size, c))
    for i in range(rows):
        for j in range(cols):
            for p in range(size):
                for q in range(size):
                    out[:, i, j, p, q] = padded[:, i * stride + p * dilation, j * stride + q * dilation]
    return out


def folded(delta_patches, shape, size, stride=1):
    """Apply the transpose of ``patches``, entry by entry."""
    n, height, width, c = shape
    rows, cols = delta_patches.shape[1:3]
    pads = [max((out - 1) * stride + size - length, 0) for out, length in ((rows, height), (cols, width))]
    padded = np.zeros((n, height + pads[0], width + pads[1], c))
    for i in range(rows):
        for j in range(cols):
            padded[:, i * stride : i * stride + size, j * stride : j * stride + size] += delta_patches[:, i, j]
    return padded[:, pads[0] // 2 : pads[0] // 2 + height, pads[1] // 2 : pads[1] // 2 + width]


def convnet(params, x):
    x = jnp.tanh(conv(x, params["conv1"]["w"]) + params["conv1"]["b"])
    x = jnp.tanh(conv(x, params["conv2"]["w"], stride=2) + params["conv2"]["b"])
    x = x.reshape(x.shape[0], -1)
    x = jnp.tanh(x @ params["dense"]["w"] + params["dense"]["b"])
    return x @ params["head"]["w"] + params["head"]["b"]


def convnet_loss(params, x, target):
    return jnp.sum((convnet(params, x) - target) ** 2) / (2 * x.shape[0])


def convnet_params(dtype=np.float64):
    shapes = {"conv1": (3, 3, 2, 4), "conv2": (3, 3, 4, 3), "dense": (27, 6), "head": (6, 5)}
    params = {
        name: {"w": normal(i, *shape, fan_in=math.prod(shape[:-1])).astype(dtype), "b": 0.2 * normal(i + 9, shape[-1])}
        for i, (name, shape) in enumerate(shapes.items())
    }
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    return params, normal(20, 3, 6, 6, 2).astype(dtype), normal(21, 3, 5).astype(dtype)


def convnet_numpy(params, x, target, back):
    """Return the gradients of ``convnet_loss`` when ``back[name](delta, e)`` sends the error back."""
    p1 = patches(x, 3)
    y1 = np.tanh(np.einsum("nijpqc,pqco->nijo", p1, params["conv1"]["w"]) + params["conv1"]["b"])
    p2 = patches(y1, 3, stride=2)
    y2 = np.tanh(np.einsum("nijpqc,pqco->nijo", p2, params["conv2"]["w"]) + params["conv2"]["b"])
    flat = y2.reshape(len(x), -1)
    y3 = np.tanh(flat @ params["dense"]["w"] + params["dense"]["b"])
    e = (y3 @ params["head"]["w"] + params["head"]["b"] - target) / len(x)
    d3 = (1 - y3**2) * back["head"](e, e)
    d2 = (1 - y2**2) * back["dense"](d3, e).reshape(y2.shape)
    d1 = (1 - y1**2) * back["conv2"](d2, e).reshape(y1.shape)
    grads = {
        "conv1": {"w": np.einsum("nijpqc,nijo->pqco", p1, d1), "b": d1.sum((0, 1, 2))},
        "conv2": {"w": np.einsum("nijpqc,nijo->pqco", p2, d2), "b": d2.sum((0, 1, 2))},
        "dense": {"w": flat.T @ d3, "b": d3.sum(0)},
        "head": {"w": y3.T @ e, "b": e.sum(0)},
    }
    activities = {"conv2": p2, "dense": flat, "head": y3}
    return grads, activities, {"conv2": d2, "dense": d3, "head": e}, y1.shape


def through_conv(matrix, shape):
    """Send the error back through a kernel of shape (3 * 3 * 4, outputs), and fold its patches onto the input."""
    return lambda delta, e: folded((delta @ matrix.T).reshape(*delta.shape[:3], 3, 3, 4), shape, 3, stride=2)


def test_product_feedback_on_a_conv_kernel_equals_numpy(float64):
    """R is (patch, hidden) for the whole 3 x 3 x in patch: dL/dpatch = R B delta, dB = (R^T patch) delta^T."""
    params, x, target = convnet_params()
    rule = wmkp.product_feedback_alignment(expansion=2.0)
    feedback = drawn_feedback(rule, convnet_loss, params, x, target)
    found = {name: layer["w"] for name, layer in feedback.items()}
    assert found["conv1"] is None and found["conv2"].r.shape == (1, 36, 72) and found["conv2"].b.shape == (1, 72, 3)
    R = {name: np.asarray(b.r[0]) for name, b in found.items() if b is not None}
    B = {name: np.asarray(b.b[0]) for name, b in found.items() if b is not None}
    back = {
        "conv2": through_conv(R["conv2"] @ B["conv2"], (3, 6, 6, 4)),
        "dense": lambda delta, e: delta @ (R["dense"] @ B["dense"]).T,
        "head": lambda delta, e: delta @ (R["head"] @ B["head"]).T,
    }
    expected, activities, deltas, _ = convnet_numpy(params, x, target, back)
    _, (grads, signal) = jitted.value_and_grad(convnet_loss, rule)(params, feedback, x, target)
    chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-12)
    for name, activity in activities.items():
        activity = activity.reshape(-1, R[name].shape[0])
        delta = deltas[name].reshape(-1, B[name].shape[1])
        np.testing.assert_allclose(signal[name]["w"].b[0], (activity @ R[name]).T @ delta, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            found[name].effective(), (R[name] @ B[name]).reshape(params[name]["w"].shape), rtol=0, atol=1e-12
        )


def test_direct_feedback_in_a_convnet_equals_numpy(float64):
    """dL/dx = B e for a whole image x, where B is (height * width * channels, outputs). DKP learns x e^T."""
    params, x, target = convnet_params()
    rule = wmkp.direct_kolen_pollack()
    feedback = drawn_feedback(rule, convnet_loss, params, x, target)
    B = {name: np.asarray(layer["w"].array) for name, layer in feedback.items() if layer["w"] is not None}
    assert {name: b.shape for name, b in B.items()} == {"conv2": (144, 5), "dense": (27, 5), "head": (6, 5)}
    back = {name: lambda delta, e, b=b: e @ b.T for name, b in B.items()}
    expected, activities, _, shape = convnet_numpy(params, x, target, back)
    _, (grads, signal) = jitted.value_and_grad(convnet_loss, rule)(params, feedback, x, target)
    chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-12)
    e = np.asarray(jax.jit(convnet)(params, x)) - target
    image = np.tanh(np.einsum("nijpqc,pqco->nijo", patches(x, 3), params["conv1"]["w"]) + params["conv1"]["b"])
    assert image.shape == shape
    for name, activity in {**activities, "conv2": image}.items():
        learned = activity.reshape(len(x), -1).T @ e / len(x)
        np.testing.assert_allclose(signal[name]["w"].array, learned, rtol=0, atol=1e-12)


CONVS = {
    "plain": {},
    "dilated": {"dilation": 2},
    "strided and grouped": {"stride": 2, "groups": 2},
}


def one_conv(options, params, x):
    return jnp.sum(jnp.tanh(conv(jnp.tanh(x * params["gain"]), params["w"], **options)))


def grouped_patches(x, options):
    """Return the patches of a 3 x 3 conv's input, of shape (groups, samples, fan_in)."""
    groups = options.get("groups", 1)
    p = patches(x, 3, options.get("stride", 1), options.get("dilation", 1))
    p = p.reshape(-1, 9, groups, x.shape[-1] // groups)
    return np.moveaxis(p, 2, 0).reshape(groups, -1, 9 * x.shape[-1] // groups)


@pytest.mark.parametrize("name", some_slow(CONVS, {"plain", "dilated"}))
def test_input_covariances_of_a_conv_are_those_of_its_patches(float64, name):
    options = CONVS[name]
    params = {"gain": normal(1, 4) + 2, "w": normal(0, 3, 3, 4 // options.get("groups", 1), 6)}
    x = normal(2, 2, 7, 6, 4)
    found = jitted.input_covariances(functools.partial(one_conv, options), params, x)
    assert list(found) == ["w"]
    p = grouped_patches(np.tanh(x * params["gain"]), options)
    np.testing.assert_allclose(found["w"], np.einsum("kni,knj->kij", p, p) / p.shape[1], rtol=0, atol=1e-12)


def test_input_covariances_of_dense_layers(float64):
    params, data = network()
    found = jitted.input_covariances(mlp_loss, params, data[0][0], data[1][0])
    y = [data[0][0]]
    for layer in params[:-1]:
        y.append(np.tanh(y[-1] @ layer["w"] + layer["b"]))
    assert list(found) == ["0/w", "1/w", "2/w"]
    for x, c in zip(y, found.values(), strict=True):
        np.testing.assert_allclose(c[0], x.T @ x / BATCH, rtol=0, atol=1e-12)


def test_input_covariances_are_means_over_uses():
    fun = lambda p, x: jnp.sum(x @ p["w"]) + jnp.sum(jnp.sin(2 * x @ p["w"]))
    x = normal(2, 5, 6)
    found = jitted.input_covariances(fun, {"w": normal(1, 6, 4)}, x)["w"][0]
    np.testing.assert_allclose(found, (1 + 4) / 2 * (x.T @ x) / 5, rtol=0, atol=1e-5)


def test_input_covariances_leave_out_what_b_cannot_follow():
    params = {"first": normal(0, 6, 8), "w": normal(1, 8, 4)}
    fun = lambda p, x: jnp.tanh(x @ p["first"]) @ jnp.tanh(p["w"])
    found = jax.eval_shape(lambda params: wmkp.input_covariances(fun, params, normal(2, 5, 6)), params)
    assert list(found) == ["first"]


def test_input_covariances_are_of_what_was_evaluated():
    """Only evaluated uses count: a branch that is not taken does not change a scan's mean.

    The covariance of a parameter that no gradient reaches is NaN, not zero.
    """
    w, x = normal(0, 4, 4), normal(1, 5, 4)

    def scanned(params, x):
        step = lambda h, i: (jax.lax.cond(i > 0, lambda: h @ params["a"] + x, lambda: h), None)
        return jax.lax.scan(step, x, jnp.arange(3))[0]

    found = jitted.input_covariances(scanned, {"a": w}, x)["a"]
    other = x @ w + x
    np.testing.assert_allclose(found[0], (x.T @ x + other.T @ other) / 2 / len(x), rtol=1e-4, atol=1e-5)
    behind = lambda params, x: jax.lax.stop_gradient(x @ params["a"]) @ params["b"]
    found = jitted.input_covariances(behind, {"a": w, "b": w}, x)
    assert np.isnan(found["a"]).all() and np.isfinite(found["b"]).all()


def settle(rule, fun, params, batch, times=1):
    """Return B after engaged and mirror steps with a constant W."""
    steps = wmkp.make_steps(as_step(fun), rule, optax.sgd(0.0), params, batch)
    both = lambda state, _: (steps.mirror_step(steps.engaged_step(state, batch)[0])[0], None)
    state, _ = jax.jit(lambda state: lax.scan(both, state, length=times))(steps.init(KEY, params))
    chex.assert_trees_all_equal(state.params, params)
    return state.feedback


@pytest.mark.parametrize("name", some_slow(CONVS, {"plain", "dilated"}))
def test_activity_mirror_on_a_conv(float64, name):
    """Whitened, B converges to W up to the ridge.

    Not whitened, it converges to the input's covariance times W^T, over the input's mean square.
    """
    options = CONVS[name]
    groups = options.get("groups", 1)
    params = {"gain": normal(1, 4) + 2, "w": normal(0, 3, 3, 4 // groups, 6)}
    x = normal(2, 5, 9, 9, 4)
    loss = functools.partial(one_conv, options)
    p = grouped_patches(np.tanh(x * params["gain"]), options)
    c = np.einsum("kni,knj->kij", p, p) / p.shape[1]
    kernel = params["w"].reshape(-1, groups, 6 // groups).swapaxes(0, 1)  # (groups, fan_in, outputs)
    for whiten in (True, False):
        feedback = settle(wmkp.activity_mirror(whiten=whiten, rate=1.0), loss, params, (x,))
        if whiten:
            ridge = RIDGE * np.trace(c, axis1=1, axis2=2)[:, None, None] / c.shape[-1] * np.eye(c.shape[-1])
            expected = np.linalg.solve(c + ridge, c @ kernel)
            assert wmkp.matrix_angles(params, feedback)["w"] < 0.5
        else:
            # This is the mean square of the input itself. Its patches also hold the zeros of the padding.
            expected = c @ kernel / np.mean(np.tanh(x * params["gain"]) ** 2)
            assert wmkp.matrix_angles(params, feedback)["w"] > 5
        expected = expected.swapaxes(0, 1).reshape(params["w"].shape)
        np.testing.assert_allclose(feedback["w"], expected, rtol=0, atol=1e-9)


LOCAL = {
    "symmetric_alignment": wmkp.symmetric_alignment(),
    "activation_alignment": wmkp.activation_alignment(),
    "activity_mirror": wmkp.activity_mirror(),
    "input_whitened": wmkp.activity_mirror(whiten=True),
}


@pytest.mark.parametrize("how", ["scan", "unrolled", "parts"])
def test_a_local_loss_is_a_mean_over_uses(float64, how):
    """If a weight is used three times, B's signal is the mean of those of three separate weights.

    If a weight is used in parts, B's signal is that of the whole weight. Each rule has a weight of its own.
    """
    turns = 3
    w, gain, x = normal(0, 6, 6, fan_in=6), normal(1, 6) + 2, normal(2, 8, 6)

    def used(own, x):
        h = x
        if how == "scan" and own.ndim == 3:
            h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, own)
        elif how == "scan":
            h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ own), None), h, length=turns)
        elif how == "unrolled":
            for i in range(turns):
                h = jnp.tanh(h @ (own[i] if own.ndim == 3 else own))
        else:  # its columns, two at a time
            h = jnp.concatenate([jnp.tanh(h @ own[:, i : i + 2]) for i in range(0, 6, 2)], 1)
        return h

    def signals(w, b, used=used):
        h = lambda params, x: jnp.tanh(x * params["gain"])
        loss = lambda params, x: sum(jnp.sum(used(params[name], h(params, x))) for name in LOCAL)
        params, feedback = {"gain": gain, **dict.fromkeys(LOCAL, w)}, {"gain": None, **dict.fromkeys(LOCAL, b)}
        _, (_, found) = jitted.value_and_grad(loss, LOCAL)(params, feedback, x)
        return {name: np.asarray(found[name]) for name in LOCAL}

    b = normal(3, 6, 6, fan_in=6)
    found = signals(w, b)
    if how == "parts":
        expected = signals(w, b, lambda own, h: jnp.tanh(h @ own))
    else:
        stacked = signals(np.stack([w] * turns), np.stack([b] * turns))
        expected = {name: each.mean(0) for name, each in stacked.items()}
        np.testing.assert_allclose(found["symmetric_alignment"], b - w, rtol=0, atol=1e-12)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-12)


def test_parts_of_one_weight_learn_by_one_rule():
    def joined(params, x):
        return jnp.sum(jnp.tanh(x * params["gain"]) @ jnp.concatenate([params["a"], params["b"]], 1))

    params = {"gain": normal(1, 6) + 2, "a": normal(2, 6, 3), "b": normal(3, 6, 3)}
    x, kp, mirror = normal(4, 8, 6), wmkp.kolen_pollack(), wmkp.weight_mirror()
    for a, b in (
        (kp, wmkp.activity_mirror()),
        (mirror, wmkp.weight_mirror(noise_std=3.0)),
        (mirror, wmkp.information_alignment()),
    ):
        with pytest.raises(ValueError, match=r"params\['a'\] and a parameter that is joined to it.*the same rule"):
            wmkp.init_feedback(KEY, {"a": a, "b": b}, joined, params, x)
    for a, b in ((kp, wmkp.kolen_pollack(start="mirror")), (mirror, wmkp.feedback_alignment())):
        wmkp.init_feedback(KEY, {"a": a, "b": b}, joined, params, x)
    signals = jitted.mirror_signals(KEY, {"a": mirror, "b": wmkp.feedback_alignment()}, joined, params, x)
    assert np.all(signals["a"] != 0) and np.all(signals["b"] == 0), "one part is mirrored, the other is fixed"


def test_activity_in_half_precision():
    """In float16 the signal equals that of float32 up to rounding, even if sums of squares exceed float16's range."""
    rules = {name: rule for name, rule in LOCAL.items() if name != "symmetric_alignment"}

    def signals(dtype):
        params = {"gain": np.ones(32), **dict.fromkeys(rules, normal(1, 32, 8) / 32)}
        feedback = {"gain": None, **dict.fromkeys(rules, normal(2, 32, 8) / 32)}
        params, feedback, x = jax.tree.map(dtype, (params, feedback, 300 * normal(0, 2048, 32)))
        h = lambda p, x: x * p["gain"]
        loss = lambda p, x: sum(jnp.sum(jnp.tanh(h(p, x) @ p[name]).astype(jnp.float32)) for name in rules)
        found = jitted.value_and_grad(loss, rules)(params, feedback, x)[1][1]
        chex.assert_trees_all_equal_shapes_and_dtypes(found, feedback)
        return {name: np.float32(found[name]) for name in rules}

    half, whole = signals(np.float16), signals(np.float32)
    for name in rules:
        assert np.max(np.abs(half[name] - whole[name])) < 2e-3 * np.max(np.abs(whole[name])), name


# --- what each B converges to -----------------------------------------------------------------------------------------


def test_rules_settle_where_their_docstrings_say(float64):
    """With a constant W, B converges to W^T, to a multiple of it, or to the fixed point of the equations."""
    params, data = network(7)
    batch = data[0][0], data[1][0]
    W = [layer["w"] for layer in params]
    # With this many samples their covariance is the identity, so the mean has no noise.
    exact = {"noise": "orthogonal", "num_samples": 72}
    information = wmkp.alignment(amplitude=0.9, decay=0.4, null=0.3, rate=0.2, noise_std=1.3, **exact)
    inverse = np.linalg.inv(0.3 * W[2].T @ W[2] + 0.4 / 1.3**2 * np.eye(W[2].shape[1]))
    noisy = wmkp.alignment(amplitude=0.9, decay=0.4, rate=0.3, noise_std=1.3, **exact)
    sparse = wmkp.alignment(amplitude=0.8, sparse=0.4, rate=0.5, **exact)
    for below, above, expected in (
        (wmkp.symmetric_alignment(1.5, 0.5, rate=0.3), noisy, (3 * W[1], 0.9 * 1.3**2 / 0.4 * W[2])),
        (sparse, information, (2 * W[1], 0.9 * W[2] @ inverse)),
    ):
        feedback = settle({"0|1": below, "2": above}, mlp_loss, params, batch, times=300)
        for i in (1, 2):
            np.testing.assert_allclose(feedback[i]["w"], expected[i - 1], rtol=0, atol=1e-9)


def test_activation_alignment_settles_wherever_the_activity_reaches():
    """With more directions than samples, B converges along the activities and keeps its start in other directions."""
    w1, w2, x = normal(0, 12, 12, fan_in=12), normal(1, 12, 12, fan_in=12), normal(3, 5, 12)
    params, x = jax.tree.map(np.float32, ({"first": w1, "w": w2}, x))
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["first"]) @ params["w"])
    start = jitted.init_feedback(jax.random.split(KEY, 3)[1], wmkp.activation_alignment(), loss, params, x)["w"]
    feedback = settle(wmkp.activation_alignment(2.0, 1.0, rate=1.5), loss, params, (x,), times=2000)
    activity = np.tanh(x @ w1)
    along = np.linalg.pinv(activity) @ activity
    expected = along @ (2.0 * w2) + (np.eye(12) - along) @ np.asarray(start)
    np.testing.assert_allclose(feedback["w"], expected, rtol=0, atol=2e-3)


# --- direct feedback: the channel from the output ---------------------------------------------------------------------

DEPTH, WIDTH, OUT = 3, 6, 4


def chain_params():
    params = {
        "in": normal(0, 5, WIDTH, fan_in=5),
        "stack": normal(1, DEPTH, WIDTH, WIDTH, fan_in=WIDTH),
        "out": normal(2, WIDTH, OUT, fan_in=WIDTH),
    }
    return params, normal(3, 7, 5), normal(4, 7, OUT)


def block(x, w):
    return jnp.tanh(x @ w)


def unrolled(params, x):
    for w in params["stack"]:
        x = block(x, w)
    return x


def scanned(params, x):
    return lax.scan(lambda x, w: (block(x, w), None), x, params["stack"])[0]


def scanned_checkpointed(params, x):
    return lax.scan(lambda x, w: (jax.checkpoint(block)(x, w), None), x, params["stack"])[0]


def conditional(params, x):
    for w in params["stack"]:
        x = lax.cond(jnp.sum(x) < 1e9, block, lambda x, w: x, x, w)
    return x


BODIES = {f.__name__: f for f in (scanned, scanned_checkpointed, conditional)}


def chain_loss(body, params, x, target):
    h = body(params, jnp.tanh(x @ params["in"]))
    return jnp.sum((h @ params["out"] - target) ** 2) / (2 * x.shape[0])


def chain_numpy(params, B, x, target):
    y = [x, np.tanh(x @ params["in"])]
    for w in params["stack"]:
        y.append(np.tanh(y[-1] @ w))
    e = (y[-1] @ params["out"] - target) / len(x)
    stack = [y[i + 1].T @ ((1 - y[i + 2] ** 2) * (e @ b.T)) for i, b in enumerate([*B["stack"][1:], B["out"]])]
    first = x.T @ ((1 - y[1] ** 2) * (e @ B["stack"][0].T))
    grads = {"in": first, "stack": np.array(stack), "out": y[-1].T @ e}
    learned = {"stack": np.array([h.T @ e for h in y[1:-1]]), "out": y[-1].T @ e}
    return grads, learned


@pytest.mark.parametrize("name", BODIES)
def test_error_reaches_layers_inside_loops_and_branches(float64, name):
    """Through lax.scan over stacked weights, jax.checkpoint and lax.cond, gradients equal those of the equations."""
    params, x, target = chain_params()
    B = {"stack": normal(5, DEPTH, WIDTH, OUT), "out": normal(6, WIDTH, OUT)}
    loss = functools.partial(chain_loss, BODIES[name])
    rule = wmkp.direct_kolen_pollack()
    expected, learned = chain_numpy(params, B, x, target)
    if name not in ("scanned", "scanned_checkpointed"):
        # Parts of one parameter would share one B, so here each layer has its own parameter.
        loss = lambda params, x, target: chain_loss(
            BODIES[name], {**params, "stack": [params[f"w{i}"] for i in range(DEPTH)]}, x, target
        )
        split = lambda tree: {**{k: v for k, v in tree.items() if k != "stack"},
                              **{f"w{i}": v for i, v in enumerate(tree["stack"])}}  # fmt: skip
        params, B, expected, learned = split(params), split(B), split(expected), split(learned)
    start = drawn_feedback(rule, loss, params, x, target)
    assert start["in"] is None
    chex.assert_trees_all_equal_shapes({k: v.array for k, v in start.items() if v is not None}, B)
    feedback = {"in": None, **{k: Direct(b) for k, b in B.items()}}
    for wrapped in (jax.jit, lambda f: f)[: 2 if name == "scanned" else 1]:
        value, (grads, signal) = wrapped(wmkp.value_and_grad(loss, rule))(params, feedback, x, target)
        assert value == pytest.approx(float(jax.jit(loss)(params, x, target)), rel=1e-12)
        chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-12)
        chex.assert_trees_all_close({k: signal[k].array for k in B}, learned, rtol=0, atol=1e-12)


def test_nothing_passes_between_projections():
    """Under direct feedback B_l changes only the layer below it. Under feedback alignment it changes all
    layers below.
    """
    params, x, target = jax.tree.map(lambda v: v.astype(np.float32), chain_params())
    loss = lambda params, x, target: chain_loss(unrolled, {**params, "stack": params["stack"]}, x, target)
    params = {**params, "stack": list(params["stack"])}
    layers = [("in", None), *(("stack", i) for i in range(DEPTH)), ("out", None)]
    leaf = lambda tree, where: tree[where[0]] if where[1] is None else tree[where[0]][where[1]]

    def gradients(rule, changes):
        """Yield the gradients at the start, then those with the B of each of these layers changed."""
        start = drawn_feedback(rule, loss, params, x, target)
        gradient = jitted.value_and_grad(loss, rule)
        yield gradient(params, start, x, target)[1][0]
        for place, index in changes:
            feedback = {**start, "stack": list(start["stack"])}
            into, at = (feedback, place) if index is None else (feedback[place], index)
            into[at] = Direct(into[at].array + 1) if isinstance(into[at], Direct) else into[at] + 1
            yield gradient(params, feedback, x, target)[1][0]

    reference, *others = gradients(wmkp.direct_kolen_pollack(), layers[1:])
    for i, grads in enumerate(others):
        same = [np.array_equal(leaf(grads, where), leaf(reference, where)) for where in layers]
        assert same == [j != i for j in range(len(layers))], layers[i + 1]
    reference, grads = gradients(wmkp.feedback_alignment(), layers[-1:])
    assert [np.array_equal(leaf(grads, w), leaf(reference, w)) for w in layers] == [False] * (DEPTH + 1) + [True]


def test_skip_connections_carry_the_error_on(float64):
    """A skip connection passes the error: h + f(h) gets the error of the next projection and that of f's projection."""
    params = {"a": normal(0, 5, 6), "b": normal(1, 6, 6), "c": normal(2, 6, 4), "gain": normal(3, 6)}
    x, target = normal(4, 7, 5), normal(5, 7, 4)

    def loss(params, x, target):
        h = jnp.tanh(x @ params["a"]) * params["gain"]
        h = h + jnp.tanh(h @ params["b"])
        return jnp.sum((h @ params["c"] - target) ** 2) / (2 * x.shape[0])

    rule = wmkp.direct_feedback_alignment()
    feedback = drawn_feedback(rule, loss, params, x, target)
    Bb, Bc = (np.asarray(feedback[k].array) for k in "bc")
    y = np.tanh(x @ params["a"])
    h = y * params["gain"]
    f = np.tanh(h @ params["b"])
    e = ((h + f) @ params["c"] - target) / len(x)
    above = e @ Bc.T
    dh = above + e @ Bb.T
    expected = {
        "c": (h + f).T @ e,
        "b": h.T @ ((1 - f**2) * above),
        "gain": (dh * y).sum(0),
        "a": x.T @ ((1 - y**2) * params["gain"] * dh),
    }
    _, (grads, _) = jitted.value_and_grad(loss, rule)(params, feedback, x, target)
    chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-12)


def test_direct_feedback_of_sequences_is_per_position(float64):
    """If the output has the positions of the inputs, one B of shape (features, outputs) applies to each position."""
    params = {"a": normal(0, 3, 6), "b": normal(1, 6, 6), "c": normal(2, 6, 4)}
    x, target = normal(3, 2, 5, 3), normal(4, 2, 5, 4)

    def loss(params, x, target):
        h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jnp.sum((h @ params["c"] - target) ** 2) / 2

    rule = wmkp.direct_kolen_pollack()
    feedback = drawn_feedback(rule, loss, params, x, target)
    Bb, Bc = (np.asarray(feedback[k].array) for k in "bc")
    assert Bb.shape == Bc.shape == (6, 4)
    y = np.tanh(x @ params["a"])
    h = np.tanh(y @ params["b"])
    e = h @ params["c"] - target
    _, (grads, signal) = jitted.value_and_grad(loss, rule)(params, feedback, x, target)
    np.testing.assert_allclose(grads["b"], np.einsum("nti,nto->io", y, (1 - h**2) * (e @ Bc.T)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads["a"], np.einsum("nti,nto->io", x, (1 - y**2) * (e @ Bb.T)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(signal["b"].array, np.einsum("nti,nto->io", y, e), rtol=0, atol=1e-12)


# --- B = W ------------------------------------------------------------------------------------------------------------

SETTLING = {  # networks with a rule for each of its three projections that need a B
    "KP, AA, frSF": (  # with B = W frSF's magnitudes are W's own
        wmkp.kolen_pollack(), wmkp.activation_alignment(), wmkp.sign_symmetry("fixed")),
    "FA, transported KP, WM": (
        wmkp.feedback_alignment(), wmkp.kolen_pollack_transported(),
        wmkp.weight_mirror("orthogonal+antithetic", activation=jax.nn.relu)),
    "IA, SA, mirrored KP": (
        wmkp.information_alignment(), wmkp.symmetric_alignment(), wmkp.kolen_pollack(start="mirror")),
    "activity mirror, also whitened, amplitude + decay": (
        wmkp.activity_mirror(), wmkp.activity_mirror(whiten=True), wmkp.alignment(amplitude=1, decay=1)),
}  # fmt: skip


def mirrored(params, feedback):
    """Return feedback with W in place of every B."""
    leaves, tree = jax.tree.flatten(params)
    entries = tree.flatten_up_to(feedback)
    return tree.unflatten([None if b is None else w for w, b in zip(leaves, entries, strict=True)])


@pytest.mark.parametrize("name", some_slow(SETTLING, set(SETTLING) - {"KP, AA, frSF"}))
def test_b_equal_to_w_is_backprop(float64, name):
    params, x, target = convnet_params()
    rule = dict(zip(("conv", "dense", "head"), SETTLING[name], strict=True))
    feedback = drawn_feedback(rule, convnet_loss, params, x, target)
    gradient = jitted.value_and_grad(convnet_loss, rule)
    value, (grads, _) = gradient(params, mirrored(params, feedback), x, target)
    expected = jax.jit(jax.value_and_grad(convnet_loss))(params, x, target)
    chex.assert_trees_all_close((value, grads), expected, rtol=0, atol=1e-13)
    other = gradient(params, feedback, x, target)[1][0]
    for below in ("conv1", "conv2", "dense"):
        assert not np.allclose(other[below]["w"], grads[below]["w"], rtol=0.01), "a random B is not backprop"


def test_product_feedback_equal_to_w_is_backprop(float64):
    """PFA with R B = W^T is backprop for any R. Such a B exists because R has full row rank."""
    params, x, target = convnet_params()
    rule = wmkp.product_feedback_alignment(2.0)
    feedback = drawn_feedback(rule, convnet_loss, params, x, target)

    def solved(w, b):
        matrix = np.asarray(w).reshape(b.r.shape[1], -1)
        return ProductFeedback(b.r, (np.linalg.pinv(b.r[0]) @ matrix)[None], b.shape, b.order)

    feedback = {k: {"w": None if v["w"] is None else solved(params[k]["w"], v["w"]), "b": None}
                for k, v in feedback.items()}  # fmt: skip
    _, (grads, _) = jitted.value_and_grad(convnet_loss, rule)(params, feedback, x, target)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(convnet_loss))(params, x, target), rtol=0, atol=1e-12)
    assert all(angle < 1e-6 for angle in wmkp.matrix_angles(params, feedback).values())


def test_direct_feedback_in_mixed_precision():
    """B has its parameter's dtype, and activity and error keep theirs. The result is float32's up to rounding."""

    rule = wmkp.direct_kolen_pollack()

    def gradients(params_in, compute_in):
        def loss(params, x):
            h = jnp.tanh((x @ params["u"]).astype(compute_in))
            h = jnp.tanh(h @ params["v"].astype(compute_in))
            return jnp.sum(jnp.sin(h.astype(jnp.float32) @ params["w"]))

        params = {"u": normal(0, 6, 8) / 3, "v": normal(1, 8, 8) / 3, "w": normal(2, 8, 4) / 3}
        params = {k: w.astype(params_in if k == "v" else np.float32) for k, w in params.items()}
        x = normal(3, 5, 6).astype(np.float32)
        feedback = drawn_feedback(rule, loss, params, x)
        grads, signal = jitted.value_and_grad(loss, rule)(params, feedback, x)[1]
        chex.assert_trees_all_equal_shapes_and_dtypes((grads, signal), (params, feedback))
        return jax.tree.map(lambda g: np.asarray(g, np.float32), (grads, signal))

    expected = gradients(jnp.float32, jnp.float32)
    for mixed in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        chex.assert_trees_all_close(gradients(*mixed), expected, rtol=0, atol=0.1)


def test_direct_feedback_is_never_backprop(float64):
    """With each B_l the product of the weights above it, all gradients are those of backprop only in a linear
    network.
    """
    params, data = network(8)
    x, target = data[0][0], data[1][0]
    rule = wmkp.direct_kolen_pollack()
    feedback = drawn_feedback(rule, mlp_loss, params, x, target)
    assert wmkp.matrix_angles(params, feedback) == {}
    last = params[2]["w"]
    feedback[2]["w"], feedback[1]["w"] = Direct(last), Direct(params[1]["w"] @ last)
    _, (grads, _) = jitted.value_and_grad(mlp_loss, rule)(params, feedback, x, target)
    expected = jax.jit(jax.grad(mlp_loss))(params, x, target)
    np.testing.assert_allclose(grads[1]["w"], expected[1]["w"], rtol=0, atol=1e-12)  # one matrix below the output
    assert np.max(np.abs(grads[0]["w"] - expected[0]["w"])) > 1e-3

    def linear(params, x, target):
        for layer in params:
            x = x @ layer["w"] + layer["b"]
        return jnp.sum((x - target) ** 2) / (2 * x.shape[0])

    _, (grads, _) = jitted.value_and_grad(linear, rule)(params, feedback, x, target)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(linear))(params, x, target), rtol=0, atol=1e-12)


# --- a rule for each layer --------------------------------------------------------------------------------------------

MIXED = {"head": wmkp.backprop(), "conv": wmkp.weight_mirror(num_samples=50), ".*": wmkp.direct_feedback_alignment()}


@pytest.mark.slow
def test_mixed_rules_in_one_network_equal_numpy(float64):
    """The error goes back through W at the head, directly at the dense layer, and through a mirrored B at the conv."""
    params, x, target = convnet_params()
    feedback = drawn_feedback(MIXED, convnet_loss, params, x, target)
    assert feedback["head"]["w"] is None and feedback["conv1"]["w"] is None
    assert feedback["conv2"]["w"].shape == (3, 3, 4, 3) and feedback["dense"]["w"].array.shape == (27, 5)
    back = {
        "head": lambda delta, e: delta @ params["head"]["w"].T,
        "dense": lambda delta, e: e @ np.asarray(feedback["dense"]["w"].array).T,
        "conv2": through_conv(np.asarray(feedback["conv2"]["w"]).reshape(36, 3), (3, 6, 6, 4)),
    }
    expected, *_ = convnet_numpy(params, x, target, back)
    value, (grads, signal) = jitted.value_and_grad(convnet_loss, MIXED)(params, feedback, x, target)
    chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-12)
    assert all(not np.any(s) for s in jax.tree.leaves(signal))
    engaged = wmkp.engage(convnet_loss, MIXED)
    same, gradient = jax.jit(jax.value_and_grad(engaged))(params, feedback, x, target)
    chex.assert_trees_all_close(gradient, expected, rtol=0, atol=1e-12)
    assert value == same == jax.jit(convnet_loss)(params, x, target)
    # Mirror mode changes only the conv's B, from patches of noise.
    found = jitted.mirror_signals(KEY, MIXED, convnet_loss, params, x, target, feedback=feedback)
    noise = np.asarray(draw_noise(jax.random.fold_in(KEY, 0), MIXED["conv"].mirror, (1, 50, 36), jnp.float64)[0])
    kernel = params["conv2"]["w"].reshape(36, 3)
    np.testing.assert_allclose(found["conv2"]["w"], (noise.T @ (noise @ kernel) / 50).reshape(3, 3, 4, 3), atol=1e-12)
    assert found["conv1"]["w"] is None and found["head"]["w"] is None and not np.any(jax.tree.leaves(found["dense"])[0])
    angles = jax.jit(lambda *args: wmkp.delta_angles(convnet_loss, MIXED, *args))(params, feedback, x, target)
    assert angles["head/w"] < 1e-6 and angles["dense/w"] < 1e-6 and angles["conv2/w"] > 1


def test_first_pattern_wins():
    params, x, target = convnet_params(np.float32)
    order = {"conv2": wmkp.kolen_pollack(), "conv": wmkp.backprop(), ".*": wmkp.direct_feedback_alignment()}
    feedback = drawn_feedback(order, convnet_loss, params, x, target)
    assert feedback["conv2"]["w"].shape == (3, 3, 4, 3) and isinstance(feedback["head"]["w"], Direct)
    turned = dict(reversed(order.items()))
    feedback = drawn_feedback(turned, convnet_loss, params, x, target)
    assert all(isinstance(feedback[k]["w"], Direct) for k in ("conv2", "dense", "head"))
    anchored = {"^conv2/w$": wmkp.feedback_alignment(), ".*": wmkp.backprop()}
    feedback = drawn_feedback(anchored, convnet_loss, params, x, target)
    assert [k for k, v in feedback.items() if v["w"] is not None] == ["conv2"]


def test_one_rule_as_a_mapping_is_that_rule():
    params, data = jax.tree.map(np.float32, network())

    def both(rule, params, *batch):
        feedback = wmkp.init_feedback(KEY, rule, mlp_loss, params, *batch)
        return feedback, wmkp.value_and_grad(mlp_loss, rule)(params, feedback, *batch)

    for rule in (wmkp.direct_kolen_pollack(), wmkp.backprop()):
        runs = [
            jax.make_jaxpr(functools.partial(both, r))(params, data[0][0], data[1][0]) for r in (rule, {".*": rule})
        ]
        assert str(runs[0]) == str(runs[1])


USES = {
    "init_feedback": lambda rule, *a: wmkp.init_feedback(KEY, rule, convnet_loss, *a),
    "engage": lambda rule, *a: wmkp.engage(convnet_loss, rule)(a[0], {}, *a[1:]),
    "value_and_grad": lambda rule, *a: wmkp.value_and_grad(convnet_loss, rule)(a[0], {}, *a[1:]),
    "mirror_signals": lambda rule, *a: wmkp.mirror_signals(KEY, rule, convnet_loss, *a),
    "delta_angles": lambda rule, *a: wmkp.delta_angles(convnet_loss, rule, a[0], {}, *a[1:]),
    "make_steps": lambda rule, *a: wmkp.make_steps(as_step(convnet_loss), rule, optimizer(), a[0], a[1:]),
}


@pytest.mark.parametrize("use", USES)
def test_errors_of_a_mapping(use):
    """Each function that takes a rule names a pattern without a projection, and a projection without a pattern."""
    args = convnet_params(np.float32)
    with pytest.raises(
        ValueError, match=r"'hed' matches no projection; the projections are conv1/w, conv2/w, dense/w, head/w"
    ):
        USES[use]({"hed": wmkp.backprop(), ".*": wmkp.weight_mirror()}, *args)
    with pytest.raises(ValueError, match=r"no pattern of rule matches projection 'dense/w'"):
        USES[use]({"conv": wmkp.weight_mirror(), "head": wmkp.backprop()}, *args)
    for wrong in ("backprop", wmkp.backprop, {".*": "backprop"}, {".*": wmkp.backprop}, None, [wmkp.backprop()]):
        with pytest.raises(TypeError, match=r"rule(\['\.\*'\])? must be a wmkp rule"):
            USES[use](wrong, *args)


BAD = {
    "a scale of zero": lambda: wmkp.feedback_alignment(scale=0.0),
    "a negative scale": lambda: wmkp.direct_feedback_alignment(scale=-1.0),
    "a magnitude": lambda: wmkp.sign_symmetry("random"),
    "a start": lambda: wmkp.kolen_pollack(start="mirrored"),
    "an expansion": lambda: wmkp.product_feedback_alignment(expansion=0),
    "no coefficient": lambda: wmkp.alignment(),
    "a negative coefficient": lambda: wmkp.alignment(amplitude=1, decay=-1),
    "an infinite coefficient": lambda: wmkp.information_alignment(float("inf")),
    "where": lambda: wmkp.alignment(amplitude=1, on="data"),
    "a rate": lambda: wmkp.activity_mirror(rate=0.0),
    "a normalization": lambda: wmkp.alignment(amplitude=1, on="activity", normalize="max"),
    "whitening noise": lambda: wmkp.alignment(amplitude=1, whiten=True),
    "normalizing noise": lambda: wmkp.alignment(amplitude=1, normalize="mean"),
    "alignment's noise": lambda: wmkp.alignment(amplitude=1, noise="white"),
    "alignment's samples": lambda: wmkp.alignment(amplitude=1, num_samples=0),
    "a noise": lambda: wmkp.weight_mirror("white"),
    "a target angle": lambda: wmkp.weight_mirror(target_angle=90.0),
    "a mirror's rate": lambda: wmkp.weight_mirror(rate=1.5),
    "samples": lambda: wmkp.weight_mirror(num_samples=0.5),
    "a bias": lambda: wmkp.weight_mirror(bias="none"),
    "an activation": lambda: wmkp.weight_mirror(activation="relu"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_out_of_range_are_errors(name):
    with pytest.raises(ValueError, match=r"must|apply only to|already divides|all zero"):
        BAD[name]()


def test_direct_feedback_needs_one_output():
    """Direct feedback needs an output with its own error, and inputs of one size. Otherwise it raises an error."""
    params = {"a": normal(0, 4, 4), "w": normal(1, 3, 4, 4)}
    inside = lambda params, x: jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ params["a"], params["w"])[0])
    with pytest.raises(ValueError, match=r"enters a projection in the next step"):
        wmkp.init_feedback(KEY, wmkp.direct_feedback_alignment(), inside, params, normal(2, 5, 4))
    twice = lambda params, x: jnp.sum(
        (jnp.tanh(x @ params["a"]) @ params["b"]).reshape(x.shape[0], 2, 4) @ params["b"] @ params["c"]
    )
    params = {"a": normal(0, 4, 4), "b": normal(1, 4, 8), "c": normal(1, 8, 2)}
    with pytest.raises(ValueError, match=r"'b'.*different sizes"):
        wmkp.init_feedback(KEY, wmkp.direct_feedback_alignment(), twice, params, normal(2, 5, 4))


def test_product_feedback_needs_one_matrix():
    """A weight that is used twice has no single R B. The error names the weight."""
    params = {"a": normal(0, 4, 4), "b": normal(1, 4, 4)}
    twice = lambda params, x: jnp.sum(jnp.tanh(x @ params["a"] @ params["b"]) @ params["b"])
    with pytest.raises(ValueError, match=r"'b'.*one matrix"):
        wmkp.init_feedback(KEY, wmkp.product_feedback_alignment(), twice, params, normal(2, 5, 4))
    mixed = {"b": wmkp.kolen_pollack(), ".*": wmkp.product_feedback_alignment()}
    assert drawn_feedback(mixed, twice, params, normal(2, 5, 4))["b"].shape == (4, 4)


def test_product_feedback_of_stacked_and_reshaped_weights(float64):
    """Each layer of a scan has its own R and B. ``effective`` returns W's layout."""
    params, x, target = chain_params()
    rule = wmkp.product_feedback_alignment(2.0)
    loss = functools.partial(chain_loss, scanned)
    feedback = drawn_feedback(rule, loss, params, x, target)
    b = feedback["stack"]
    assert b.r.shape == (DEPTH, WIDTH, 2 * WIDTH) and b.b.shape == (DEPTH, 2 * WIDTH, WIDTH)
    effective = np.einsum("lih,lho->lio", b.r, b.b)
    np.testing.assert_allclose(b.effective(), effective, rtol=0, atol=1e-12)
    fixed = {"in": None, "stack": effective, "out": feedback["out"].effective()}
    _, (grads, signal) = jitted.value_and_grad(loss, rule)(params, feedback, x, target)
    _, (same, circuit) = jitted.value_and_grad(loss, wmkp.kolen_pollack())(params, fixed, x, target)
    chex.assert_trees_all_close(grads, same, rtol=0, atol=1e-12)
    np.testing.assert_allclose(signal["stack"].b, np.einsum("lih,lio->lho", b.r, circuit["stack"]), rtol=0, atol=1e-12)
    assert np.max(np.abs(signal["stack"].r)) == 0

    def heads(params, x):  # DenseGeneral's kernel (in, heads, features), and that of its output (heads, features, out)
        h = jnp.einsum("nd,dhk->nhk", jnp.tanh(x @ params["a"]), params["qkv"])
        return jnp.sum(jnp.einsum("nhk,hkd->nd", jnp.tanh(h), params["o"]) ** 2)

    params = {"a": normal(0, 5, 6), "qkv": normal(1, 6, 2, 3), "o": normal(2, 2, 3, 4)}
    feedback = drawn_feedback(rule, heads, params, x)
    assert feedback["qkv"].r.shape == (1, 6, 12) and feedback["o"].b.shape == (1, 12, 4)
    assert feedback["qkv"].effective().shape == (6, 2, 3) and feedback["o"].effective().shape == (2, 3, 4)
    fixed = {"a": None, "qkv": feedback["qkv"].effective(), "o": feedback["o"].effective()}
    _, (grads, _) = jitted.value_and_grad(heads, rule)(params, feedback, x)
    _, (same, _) = jitted.value_and_grad(heads, wmkp.feedback_alignment())(params, fixed, x)
    chex.assert_trees_all_close(grads, same, rtol=0, atol=1e-12)


def test_sizes_of_direct_feedback():
    """The first axes that input and error share, except the last, are samples. All other axes are neurons."""
    assert direct_sizes((4, 5), (4, 5)) == (1, 5, 5)
    assert direct_sizes((2, 3, 5), (2, 3, 7)) == (2, 5, 7)
    assert direct_sizes((2, 3, 4, 5), (2, 6, 4, 7)) == (1, 60, 168)
    assert direct_sizes((5,), (7,)) == (0, 5, 7)


DIRECT = {  # fun, the shape of x, the shape of B
    "one sample": (lambda p, x: jnp.tanh(x @ p["first"]) @ p["w"], (6,), (6, 6)),
    "an output as wide as the layer": (lambda p, x: jnp.tanh(x @ p["first"]) @ p["w"], (5, 6), (6, 6)),
    "data of other sizes through the same weight": (
        lambda p, x: jnp.tanh((x @ p["w"]).sum(1) @ p["first"]) @ p["w"], (5, 3, 6), (6, 6)),
    "what backprop alone can train behind it": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["first"]) @ p["w"]) @ jnp.tanh(p["out"]), (5, 6), (6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECT)
def test_direct_feedback_has_its_shape(name):
    fun, size, shape = DIRECT[name]
    params = {"first": normal(0, 6, 6), "w": normal(1, 6, 6), "out": normal(2, 6, 4)}
    rules, x = {"out": wmkp.backprop(), ".*": wmkp.direct_feedback_alignment()}, normal(3, *size)
    if "out" not in wmkp.projections(fun, params, x):
        del rules["out"]
    loss = lambda p, x: jnp.sum(jnp.sin(fun(p, x)))
    feedback = drawn_feedback(rules, loss, params, x)
    assert feedback["w"].array.shape == shape
    grads = jitted.value_and_grad(loss, rules)(params, feedback, x)[1][0]
    assert np.all(grads["first"] != 0)


def test_axes_of_matrices():
    projections = wmkp.projections(
        lambda p, x, mask: jnp.einsum("bhi,hio->bo", jnp.tanh(jnp.einsum("bi,hio->bho", x, p["heads"])), p["groups"])
        @ (p["masked"] * mask) @ jnp.tanh(p["bent"]),
        {"heads": normal(0, 3, 6, 4), "groups": normal(1, 3, 4, 5), "masked": normal(2, 5, 7), "bent": normal(3, 7, 2)},
        normal(4, 8, 6), np.ones((5, 7)),
    )  # fmt: skip
    assert projections["heads"].matrix_axes((3, 6, 4)) == ([], [1], [0, 2])
    for name, shape in (("masked", (5, 7)), ("bent", (7, 2))):
        with pytest.raises(ValueError, match=f"'{name}'.* is not one matrix"):
            projections[name].matrix_axes(shape)
    grouped = lambda p, x: jnp.einsum("bhi,hio->bho", x * p["gain"], p["w"])
    params = {"gain": np.ones(4), "w": normal(0, 3, 4, 5)}
    assert wmkp.projections(grouped, params, normal(1, 8, 3, 4))["w"].matrix_axes((3, 4, 5)) == ([0], [1], [2])


def test_direct_feedback_refuses_inputs_whose_first_axis_is_not_the_batch():
    """If time is the first axis, samples would get each other's errors, so this is an error."""
    params = {"a": np.ones((3, 4)), "b": np.ones((4, 4)), "c": np.ones((4, 2))}

    def time_major(params, x):
        h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jnp.sum((h[-1] @ params["c"]) ** 2)

    with pytest.raises(ValueError, match=r"params\['b'\].*first axis|first axis.*params\['b'\]"):
        wmkp.init_feedback(jax.random.key(0), wmkp.direct_feedback_alignment(), time_major, params, np.ones((7, 5, 3)))


# --- pickling, copying and comparing rules ----------------------------------------------------------------------------


def relu(z):
    """A response that can be pickled, unlike jax.nn.relu."""
    return jnp.maximum(z, 0)


VALUES = [
    *(rule for rule, _ in CASES.values() if "activation" not in rule.name),
    wmkp.weight_mirror(activation=relu),
    wmkp.information_alignment(),
    wmkp.forward_direct_feedback_alignment(),
]


@pytest.mark.parametrize("rule", VALUES, ids=lambda rule: rule.name)
def test_rules_can_be_pickled_copied_and_compared(rule):
    for again in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
        assert again == rule and hash(again) == hash(rule)


def test_distinct_rules_have_distinct_names():
    names = {}
    for rule in VALUES:
        names.setdefault(rule.name, rule)
        if "alignment" not in rule.name:  # its coefficients may be given by keyword or by position
            assert names[rule.name] == rule
    assert wmkp.kolen_pollack(start="mirror").name == "kolen_pollack(start='mirror')"
    assert wmkp.weight_mirror("gaussian").name == "weight_mirror(noise='gaussian')"
    assert wmkp.weight_mirror().name == "weight_mirror" and wmkp.alignment(decay=1.0, name="mine").name == "mine"
