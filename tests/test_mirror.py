"""Mirror mode: the mean of its signal, the angle of one estimate, and where B converges."""

import functools
import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import angle, drawn, drawn_feedback
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from marks import some_slow

import wmkp
from wmkp.noise import draw_noise, threefry

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def normal(seed, *shape, fan_in=1):
    return (np.random.default_rng(seed).normal(size=shape) / math.sqrt(fan_in)).astype(np.float32)


def signals(rule, fun, params, *args, key=KEY):
    return jax.jit(lambda k, p: wmkp.mirror_signals(k, rule, fun, p, *args))(key, params)


def drawn_noise(key, mirror, *shape):
    return np.asarray(jax.jit(lambda key: draw_noise(key, mirror, shape, jnp.float32))(key))


def one_estimate(**options):
    """A weight mirror whose B is a single estimate (rate 1)."""
    return wmkp.weight_mirror(**{"noise": "gaussian", "rate": 1.0, **options})


def estimates(rule, fun, *args, keys=8):
    """A function of the parameters that returns a signal for each of several keys."""
    data = np.random.default_rng(0).integers(2**32, size=(keys, 2), dtype=np.uint32)
    one = lambda data, params: wmkp.mirror_signals(jax.random.wrap_key_data(data), rule, fun, params, *args)
    run = jax.jit(jax.vmap(one, (0, None)))
    return lambda params: jax.tree.map(np.asarray, run(data, params))


def mean_angles(rule, fun, params, *args, keys=8):
    """{path: angle between the signal and W, averaged over keys}, because one estimate's angle varies by chance."""
    found = flat(estimates(rule, fun, *args, keys=keys)(params))
    return {path: np.mean([angle(signal, flat(params)[path]) for signal in each]) for path, each in found.items()}


def degrees(tangent_squared):
    return math.degrees(math.atan(math.sqrt(tangent_squared)))


def flat(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# --- the law of angles ------------------------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((4, 24), jnp.float32)  # only shapes are read
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def dense(params, x):
    return jnp.tanh(x @ params["first"]) @ params["w"]


def scaled(params, x):
    return jnp.tanh(x @ params["first"]) @ (0.5 * params["w"])


def transposed(params, x):
    return jnp.tanh(x @ params["first"]) @ params["w"].T


def half_precision(params, x):
    """A model with float32 parameters that computes in bfloat16."""
    first, w = (params[k].astype(jnp.bfloat16) for k in ("first", "w"))
    return jnp.tanh(x.astype(jnp.bfloat16) @ first) @ w


def fused(params, x, split=lambda w: (w[:, : w.shape[1] // 3], w[:, w.shape[1] // 3 : -(w.shape[1] // 3)],
                                       w[:, -(w.shape[1] // 3) :])):  # fmt: skip
    """Queries, keys and values from slices of one array."""
    x = jnp.tanh(x @ params["first"])
    q, k, v = (x @ w for w in split(params["w"]))
    return jax.nn.softmax(q @ k.T) @ v


def twice(params, x):
    """A model that uses one matrix twice."""
    x = jnp.tanh(x @ params["first"])
    return jnp.tanh(x @ params["w"]) @ params["w"]


def stacked(params, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jnp.tanh(x @ params["first"]), params["w"])
    return x


def embedded(params, tokens):
    """A tied embedding that is looked up at the input and transposed at the output."""
    return jnp.tanh(params["w"][tokens] @ params["first"]) @ params["w"].T


FIRST = normal(1, 24, 96, fan_in=24)
MODELS = {  # fun, the matrix's shape, its fan_in, the number of uses (whose estimates are averaged)
    "scaled": (scaled, (96, 80), 96, 1),
    "transposed": (transposed, (80, 96), 96, 1),
    "bf16 compute": (half_precision, (96, 80), 96, 1),
    "fused": (fused, (96, 3 * 40), 96, 1),
    "twice": (twice, (96, 96), 96, 2),
    "stacked": (stacked, (3, 96, 96), 96, 1),
}


@pytest.mark.parametrize("name", some_slow(["transposed", "fused", "twice", "stacked"], {"transposed"}))
def test_law_of_angles(name):
    """tan(theta) = sqrt(fan_in / (uses N)), within a degree, for several positions of a matrix in a model."""
    fun, shape, fan_in, uses = MODELS[name]
    params = {"first": FIRST, "w": normal(2, *shape, fan_in=fan_in)}
    samples = 24 * (4 + len(name))  # varies with the model
    rule = one_estimate(num_samples=samples)
    found = mean_angles(rule, fun, params, X)
    assert list(found) == ["w"]
    assert found["w"] == pytest.approx(degrees(fan_in / (uses * samples)), abs=1)
    assert found["w"] == pytest.approx(wmkp.mirror_angle(uses * samples, fan_in, rule), abs=1)


def test_law_of_tied_embeddings():
    """Only the transposed use of the embedding is a projection, so its fan_in is the embedding's width."""
    params = {"w": normal(3, 300, 64, fan_in=64), "first": normal(4, 64, 64, fan_in=64)}
    tokens = jax.ShapeDtypeStruct((5,), jnp.int32)
    found = mean_angles(one_estimate(num_samples=128), embedded, params, tokens)
    assert found == {"w": pytest.approx(degrees(0.5), abs=1), "first": pytest.approx(degrees(0.5), abs=1)}


class ConvNet(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, padding="SAME", feature_group_count=self.groups, name="conv")(x))
        return nn.Dense(10, name="last")(x.mean((1, 2)))


def test_law_of_convolutions():
    """The law holds for each group of a strided SAME convolution, and at its corner and middle taps."""
    groups, samples = 2, 512
    net = ConvNet(groups)
    params = drawn(0, jax.eval_shape(net.init, KEY, IMAGE))
    rule = one_estimate(num_samples=samples, activation=jax.nn.relu)
    found = estimates(rule, net.apply, IMAGE, keys=24)(params)["params"]
    kernel = params["params"]["conv"]["kernel"]
    fan_in = 9 * 32 // groups
    assert kernel.shape == (3, 3, 32 // groups, 64)
    projections = wmkp.projections(net.apply, params, IMAGE)
    assert projections["params/conv/kernel"].fan_in == fan_in
    law = degrees(2 * fan_in / samples)

    def mean_angle(part):
        ours, theirs = found["conv"]["kernel"][:, *part], kernel[part]
        return np.mean([angle(signal, theirs) for signal in ours])

    for part in range(groups):  # each group by itself, so that the mean hides no group
        columns = slice(part * 64 // groups, (part + 1) * 64 // groups)
        assert mean_angle((..., columns)) == pytest.approx(law, abs=1)
    for tap in ((0, 0), (1, 1), (2, 2)):  # corner taps and the middle tap
        assert mean_angle(tap) == pytest.approx(law, abs=1.5)
    assert found["first"]["kernel"] is None and found["conv"]["bias"] is None


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="in")(x)
        return nn.MultiHeadDotProductAttention(4, qkv_features=64, name="attention")(x)


@pytest.mark.slow
def test_law_of_attention():
    """The law holds for kernels of shape (width, heads, size) and (heads, size, width)."""
    net, x = Attention(), jax.ShapeDtypeStruct((2, 5, 24), jnp.float32)
    params = drawn(0, jax.eval_shape(net.init, KEY, x))
    found = mean_angles(one_estimate(num_samples=160), net.apply, params, x)
    assert found == {
        f"params/attention/{name}/kernel": pytest.approx(degrees(64 / 160), abs=1)
        for name in ("key", "out", "query", "value")
    }


PAIRS = "orthogonal+antithetic"
LAWS = {  # the mirror, the angle it has by theory (None: only mirror_angle gives it)
    "gaussian": ({"num_samples": 800, "noise_std": 0.01, "activation": jax.nn.relu}, degrees(2 * 96 / 800)),
    "uniform": ({"noise": "uniform", "num_samples": 200, "noise_std": 10.0}, degrees(96 / 200)),
    "rademacher": ({"noise": "rademacher", "num_samples": 100, "activation": jax.nn.relu}, degrees(2 * 96 / 100)),
    # Below fan_in directions the law of orthogonal noise is sqrt((fan_in - N) / N).
    "part_of_a_block": ({"noise": "orthogonal", "num_samples": 24}, degrees((96 - 24) / 24)),
    "blocks_and_a_part": ({"noise": "orthogonal", "num_samples": 456}, None),
    "pairs": ({"noise": PAIRS, "num_samples": 96}, degrees((96 - 48) / 48)),
    "orthogonal_relu": ({"noise": "orthogonal", "num_samples": 64, "activation": jax.nn.relu}, None),
    "pairs_relu": ({"noise": PAIRS, "num_samples": 128, "activation": jax.nn.relu}, None),
}


def test_law_of_every_noise():
    """Each noise has the angle of theory and of ``mirror_angle``. In one network each mirrors a weight of its own."""
    rules = {name: one_estimate(**options) for name, (options, _) in LAWS.items()}
    params = {"first": FIRST, **{name: normal(5 + i, 96, 160, fan_in=96) for i, name in enumerate(LAWS)}}
    fun = lambda params, x: sum(jnp.sum(jnp.tanh(x @ params["first"]) @ params[name]) for name in LAWS)
    patterns = {f"^{name}$": rule for name, rule in rules.items()} | {".*": wmkp.backprop()}
    found = mean_angles(patterns, fun, params, X, keys=12)
    for name, (options, theory) in LAWS.items():
        law = wmkp.mirror_angle(options["num_samples"], 96, rules[name])
        # Whole blocks of orthogonal noise have zero mean, which removes part of the error from ReLU's even half.
        assert law - (4 if name == "orthogonal_relu" else 1) < found[name] < law + 1, name
        assert theory is None or found[name] == pytest.approx(theory, abs=1), name


@pytest.mark.parametrize(
    ("phi", "std", "samples"), [pytest.param(jnp.tanh, 1.0, 300, marks=pytest.mark.slow), (jax.nn.gelu, 0.3, 900)]
)
def test_law_of_other_activations(phi, std, samples):
    """For weights of unit norm the angle is ``mirror_angle`` and the scale is ``mirror_gain``."""
    w = normal(6, 96, 200)
    params = {"first": FIRST, "w": w / np.linalg.norm(w, axis=0)}
    rule = one_estimate(noise_std=std, num_samples=samples, activation=phi)
    (measured,) = mean_angles(rule, dense, params, X, keys=12).values()
    assert measured == pytest.approx(wmkp.mirror_angle(samples, 96, rule), abs=1)
    found = signals(rule, dense, params, X)
    scale = np.vdot(found["w"], params["w"]) / np.vdot(params["w"], params["w"])
    assert scale == pytest.approx(wmkp.mirror_gain(rule), rel=0.05)


def test_noise_comes_from_jax_randoms_own_cipher():
    from jax.extend.random import threefry_2x32

    seed, counter = (np.random.default_rng(i).integers(2**32, size=n, dtype=np.uint32) for i, n in enumerate((2, 200)))
    ours, theirs = jax.jit(lambda s, c: (threefry(s, tuple(c.reshape(2, -1))), threefry_2x32(s, c)))(seed, counter)
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_gaussian_noise_is_box_and_mullers():
    """Gaussian noise equals the Box-Muller transform of the cipher's two words, in float64."""
    from jax.extend.random import threefry_2x32

    shape, rule = (2, 50, 40), wmkp.weight_mirror("gaussian", noise_std=0.5)
    x = drawn_noise(KEY, rule.mirror, *shape).astype(np.float64)
    block, place = (a.ravel().astype(np.uint32) for a in np.mgrid[:2, :2000])
    words = threefry_2x32(jax.random.key_data(KEY), np.concatenate([block, place]))
    u, v = np.asarray(words, np.uint64).reshape(2, -1).astype(np.int64) >> 9
    expected = 0.5 * np.sqrt(-2 * np.log1p(-u / 2**23)) * np.sin(np.pi / 2 * (v / 2**22 - 1))
    np.testing.assert_allclose(x.ravel(), expected, atol=1e-6)
    assert np.isfinite(x).all()


def test_keys_of_any_generator_draw_noise():
    mirror = wmkp.weight_mirror("rademacher").mirror
    drawn = [drawn_noise(key, mirror, 1, 60, 40)
             for key in (jax.random.key(3, impl="rbg"), jax.random.PRNGKey(3), jax.random.key(3))]  # fmt: skip
    assert not np.allclose(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[1], drawn[2])


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_noise_has_its_distribution_and_no_two_entries_alike(noise):
    """Noise has its distribution, and no correlation with its shifted copies or with another key's noise.

    Gaussian noise passes Kolmogorov's test at a level of one in 10,000. Rademacher noise has two values and mean zero.
    """
    shape = (3, 200, 70)
    x = drawn_noise(KEY, wmkp.weight_mirror(noise).mirror, *shape).astype(np.float64)
    assert x.shape == shape
    sign = np.sign(x)
    assert set(np.unique(sign)) == {-1, 1}
    count = x.size
    if noise == "rademacher":
        assert abs(x.mean()) < 4 / math.sqrt(count)
    else:
        cdf = normal_cdf(np.sort(x, axis=None))
        assert np.max(np.abs(cdf - np.arange(count) / count)) < 2.2 / math.sqrt(count)
        assert len(np.unique(x)) > 0.99 * count  # 2^23 values
    for other in (np.roll(x, 1, 0), np.roll(x, 1, 1), np.roll(x, 1, 2), np.roll(x, 32, 2), x[:, :, ::-1]):
        assert abs(np.mean(x * other)) < 4.5 / math.sqrt(count / 2)
    again = drawn_noise(jax.random.key(1), wmkp.weight_mirror(noise).mirror, *shape)
    assert abs(np.mean(x * again)) < 4.5 / math.sqrt(count)


def test_a_few_samples_of_a_wide_projection_repeat_nothing():
    x = drawn_noise(KEY, wmkp.weight_mirror("gaussian").mirror, 2, 10, 300)
    assert len(np.unique(x)) > 0.99 * x.size


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_noise_is_finite_whatever_is_drawn(word, monkeypatch):
    """Noise stays within its bounds for the smallest and the largest random word."""
    monkeypatch.setattr(wmkp.noise, "_words", lambda key, shape: (jnp.full(shape, word, jnp.uint32),) * 2)
    for noise, least, most in (("gaussian", 5 if word else 0, 6), ("uniform", 1.73, 1.7321)):
        x = np.abs(drawn_noise(KEY, wmkp.weight_mirror(noise).mirror, 1, 2, 3))
        assert np.all((least <= x) & (x < most)), x


NOISES = ["gaussian", "uniform", "rademacher", "orthogonal", "antithetic", "orthogonal+antithetic"]


def in_parts_of_60(monkeypatch):
    """Draws the noise of 96 inputs in parts of 60 samples, by products and not by transforms."""
    monkeypatch.setattr(wmkp.mirror, "LEAST", 60)
    monkeypatch.setattr(wmkp.mirror, "AT_ONCE", 96 * 60)
    monkeypatch.setattr(wmkp.mirror, "_transforms", lambda *_: False)


def test_noise_drawn_in_parts(monkeypatch):
    """Noise in parts gives the same mean angle as noise drawn at once, and both have zero mean."""
    noise, samples = "orthogonal+antithetic", 150
    rule = one_estimate(noise=noise, num_samples=samples, bias="kept")
    w, zero, one = normal(5, 96, 160, fan_in=96), np.zeros(160, np.float32), np.ones(160, np.float32)
    fun = lambda params, x: jnp.tanh(x @ params["first"]) @ params["w"] + params["b"]

    def angle_and_mean():
        estimate = estimates(rule, fun, X)
        found = estimate({"first": FIRST, "w": w, "b": zero})["w"]
        flat_response = {"first": FIRST, "w": np.zeros_like(w), "b": one}  # y = 1: the signal is the noise's mean
        return np.mean([angle(signal, w) for signal in found]), estimate(flat_response)["w"][:, :, 0]

    whole, mean = angle_and_mean()
    in_parts_of_60(monkeypatch)
    in_parts, mean_in_parts = angle_and_mean()
    assert in_parts == pytest.approx(whole, abs=1)
    np.testing.assert_allclose((mean, mean_in_parts), 0, atol=1e-6)


@pytest.mark.parametrize(("noise", "samples"), [("rademacher", 1921), ("orthogonal+antithetic", 61)])
def test_parts_make_up_the_number_of_samples(monkeypatch, noise, samples):
    """For W = I the signal is X^T X / N. Its trace is fan_in, and its diagonal is 1 for Rademacher noise."""
    in_parts_of_60(monkeypatch)
    rule = one_estimate(noise=noise, num_samples=samples)
    found = np.asarray(signals(rule, dense, {"first": FIRST, "w": np.eye(96, dtype=np.float32)}, X)["w"])
    assert np.trace(found) == pytest.approx(96, rel=1e-5)
    if noise == "rademacher":
        np.testing.assert_allclose(np.diagonal(found), 1, rtol=1e-5)


def test_a_loss_on_noise_is_one_of_all_samples(monkeypatch):
    rule = wmkp.information_alignment()
    params = {"first": FIRST, "w": normal(5, 96, 160, fan_in=96)}
    mirrored = {"first": None, "w": normal(6, 96, 160)}
    signal = lambda params, b: wmkp.mirror_signals(KEY, rule, dense, params, X, feedback=b)["w"]
    find = lambda: jax.jit(lambda *args: signal(*args))(params, mirrored)  # compiles again at each call
    whole = find()
    monkeypatch.setattr(wmkp.mirror, "LEAST", 2)
    monkeypatch.setattr(wmkp.mirror, "AT_ONCE", 1)
    np.testing.assert_array_equal(find(), whole)


def test_the_memory_of_noise_does_not_grow_with_the_samples(monkeypatch):
    """A hundred times the samples need at most 1.2 times the temporary memory. Parts also work inside shard_map."""
    in_parts_of_60(monkeypatch)
    params = {"first": FIRST, "w": normal(5, 96, 160, fan_in=96)}

    def temporary(samples):
        rule = one_estimate(num_samples=samples)
        run = jax.jit(lambda key, params: wmkp.mirror_signals(key, rule, dense, params, X))
        return run.lower(KEY, params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(60_000) < 1.2 * temporary(600) < 1.2 * 2**20

    loss = lambda params, model_state, x, key: (jnp.mean(dense(params, x) ** 2), (model_state, {}))
    rule = one_estimate(num_samples=600)
    steps = wmkp.make_steps(loss, rule, optax.sgd(0.1), params, X, axis_name="d")
    state = steps.init(KEY, params)
    mesh = jax.sharding.Mesh(jax.devices(), ("d",))
    none = jax.sharding.PartitionSpec()
    mirrored, _ = jax.jit(jax.shard_map(steps.mirror_step, mesh=mesh, in_specs=none, out_specs=none))(state)
    expected = degrees(96 / (600 * len(jax.devices())))
    assert angle(mirrored.feedback["w"], params["w"]) == pytest.approx(expected, abs=1.5)


@pytest.mark.slow
def test_projections_take_turns_where_together_they_would_take_too_much_memory(monkeypatch):
    """Projections that take turns give the same signals, and their memory stays within the limit."""
    layers, width = 16, 96
    params = {f"{i:02}": normal(i, width, width, fan_in=width) for i in range(layers)}
    each = 3 * width**2  # noise, responses and signals, of as many samples

    def net(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    def found(together):
        monkeypatch.setattr(wmkp.mirror, "TOGETHER", together)
        rule = one_estimate(num_samples=width)
        of = lambda key, params: jax.tree.leaves(
            wmkp.mirror_signals(key, rule, net, params, np.ones((2, width), np.float32))
        )
        run = jax.jit(of).lower(KEY, params).compile()
        return run(KEY, params), run.memory_analysis().temp_size_in_bytes

    whole, most = found(layers * each)
    for number in (1, 2):
        signals, memory = found(number * each)
        np.testing.assert_allclose(signals, whole, rtol=1e-5, atol=1e-6)
        assert memory < 4 * each * number < most / 2

    # This also works inside shard_map, where each device draws its own noise.
    loss = lambda params, model_state, x, key: (jnp.mean(net(params, x) ** 2), (model_state, {}))
    rule = one_estimate(noise="orthogonal", num_samples=width)
    steps = wmkp.make_steps(loss, rule, optax.sgd(0.1), params, np.ones((2, width), np.float32), axis_name="d")
    none = jax.sharding.PartitionSpec()
    mesh = jax.sharding.Mesh(jax.devices(), ("d",))
    step = jax.jit(jax.shard_map(steps.mirror_step, mesh=mesh, in_specs=none, out_specs=none))
    mirrored, _ = step(steps.init(KEY, params, mirror_steps=0))
    for name in list(params)[1:]:
        np.testing.assert_allclose(mirrored.feedback[name], params[name], atol=1e-5)


def test_default_number_of_samples_reaches_the_target():
    """num_samples=None draws for each projection as many samples as the target angle needs."""

    def net(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    sizes = (24, 40, 160, 80)
    params = [normal(i, m, n, fan_in=m) for i, (m, n) in enumerate(itertools.pairwise(sizes))]
    rule = one_estimate(target_angle=20.0)
    assert mean_angles(rule, net, params, X) == {"1": pytest.approx(20, abs=1), "2": pytest.approx(20, abs=1)}


# --- better noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", [1, 7])
def test_orthogonal_noise_is_orthogonal(fan_in):
    """Whole blocks satisfy X^T X = N sigma^2 I, and a partial block has orthogonal rows. Rows and signs are random."""
    blocks, rule = 3, one_estimate(noise="orthogonal", noise_std=0.7)

    @functools.partial(jax.jit, static_argnames="samples")
    def draw(key, samples):
        return draw_noise(key, rule.mirror, (blocks, samples, fan_in), jnp.float32)

    x = np.asarray(draw(KEY, samples=2 * fan_in))
    gram = np.einsum("kni,knj->kij", x, x)
    np.testing.assert_allclose(gram, np.tile(2 * fan_in * 0.49 * np.eye(fan_in), (blocks, 1, 1)), atol=1e-4 * fan_in)
    if fan_in > 2:
        assert not np.allclose(x, draw(jax.random.key(1), samples=2 * fan_in))
        assert not np.allclose(x[0], x[1]) and not np.allclose(x[:, :fan_in], x[:, fan_in:])
        half = np.asarray(draw(KEY, samples=fan_in // 2))
        gram = np.einsum("kni,kmi->knm", half, half)
        np.testing.assert_allclose(
            gram, np.tile(fan_in * 0.49 * np.eye(fan_in // 2), (blocks, 1, 1)), atol=1e-4 * fan_in
        )
        assert not np.allclose(np.abs(half[0]), np.abs(half[1])), "other rows, not other signs alone"
        signs = np.sign(drawn_noise(KEY, rule.mirror, 100, fan_in // 2, fan_in)[:, 0]).mean(0)
        assert np.all(np.abs(signs) < 0.5), "other signs, not other rows alone"


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_centred_with_its_standard_deviation(noise):
    rule = one_estimate(noise=noise, noise_std=0.5)
    x = drawn_noise(KEY, rule.mirror, 3, 400, 40)
    assert x.shape == (3, 400, 40) and x.dtype == np.float32
    assert abs(x.mean()) < 0.01 and x.std() == pytest.approx(0.5, rel=0.02)
    assert np.max(np.abs(np.einsum("kni,knj->ij", x, x) / 300 - np.eye(40))) < 0.2
    if "antithetic" in noise:
        np.testing.assert_array_equal(x[:, :200], -x[:, 200:])
    assert not np.allclose(x[0], x[1])
    odd = jax.eval_shape(lambda: draw_noise(KEY, rule.mirror, (3, 7, 40), jnp.float32))
    assert odd.shape == (3, 7, 40), "an odd number"


@pytest.mark.parametrize("name", some_slow(["bf16 compute", "stacked", "fused"], {"stacked"}))
def test_orthogonal_noise_is_exact_from_fan_in_samples(name):
    """From fan_in samples on, orthogonal noise gives W exactly, even for a model that computes in bfloat16."""
    fun, shape, fan_in, _ = MODELS[name]
    params = {"first": FIRST, "w": normal(2, *shape, fan_in=fan_in)}
    samples = 2 * fan_in if name == "fused" else fan_in
    rule = one_estimate(noise="orthogonal", num_samples=samples)
    found = signals(rule, fun, params, X)
    assert angle(found["w"], params["w"]) < 1e-3
    assert wmkp.mirror_angle(samples, fan_in, rule) == 0


def test_orthogonal_pairs_are_exact_for_relu():
    """Orthogonal antithetic noise is exact for ReLU from 2 fan_in samples on, since relu(z) - relu(-z) = z.

    Orthogonal or antithetic noise alone stays over 20 degrees.
    """
    params = {"first": FIRST, "w": normal(2, 96, 80, fan_in=96)}
    for samples in (192, 384):
        rule = one_estimate(noise="orthogonal+antithetic", num_samples=samples, activation=jax.nn.relu)
        found = signals(rule, dense, params, X)
        assert angle(found["w"], params["w"]) < 1e-2
        np.testing.assert_allclose(found["w"], params["w"] / 2, atol=1e-5)
        assert wmkp.mirror_angle(samples, 96, rule) == pytest.approx(0, abs=1e-3)
    for noise in ("orthogonal", "antithetic"):
        rule = one_estimate(noise=noise, num_samples=192, activation=jax.nn.relu)
        assert angle(signals(rule, dense, params, X)["w"], params["w"]) > 20


PARTS = {  # noise, samples over fan_in, activation
    "a whole block": ("orthogonal", 1, None),
    "most of one": ("orthogonal", 0.7, jnp.tanh),
    "less than half": ("orthogonal", 0.3, None),
    "a block in pairs": ("orthogonal+antithetic", 2, jax.nn.relu),
    "part of one in pairs": ("orthogonal+antithetic", 1.5, jnp.tanh),
}


@pytest.mark.parametrize(
    ("name", "fan_in", "written"),
    [
        ("a whole block", 256, False),
        ("less than half", 256, False),
        *(
            pytest.param(name, 256, False, marks=pytest.mark.slow)
            for name in ("most of one", "a block in pairs", "part of one in pairs")
        ),
        ("part of one in pairs", 256, True),
        ("most of one", 255, False),
        ("a block in pairs", 509, False),
    ],
)
def test_orthogonal_noise_written_down_or_not(monkeypatch, name, fan_in, written):
    """Orthogonal noise by transforms or by products gives the signal of Eq. 6-8 in NumPy float64, with a bias.

    Sizes lie on both sides of the switch to Fourier transforms, and one is a prime. Devices other than CPUs use
    products.
    """
    noise, share, phi = PARTS[name]
    if written:
        monkeypatch.setattr(wmkp.mirror, "_transforms", lambda *_: False)
    samples = 2 * round(share * fan_in / 2)
    rule = one_estimate(noise=noise, num_samples=samples, noise_std=0.7, activation=phi, bias="kept")
    params = {"first": normal(1, 24, fan_in), "w": normal(2, fan_in, 20, fan_in=fan_in), "b": normal(3, 20) / 2}
    x = drawn_noise(jax.random.fold_in(KEY, 0), rule.mirror, 1, samples, fan_in)[0].astype(np.float64)
    y = x @ params["w"].astype(np.float64) + params["b"]
    y = y if phi is None else np.maximum(y, 0) if phi is jax.nn.relu else np.tanh(y)
    found = signals(rule, biased, params, X)["w"]
    np.testing.assert_allclose(found, x.T @ y / samples, atol=2e-6)


# --- what the signal is in the mean -----------------------------------------------------------------------------------


def mean_signal(rule, fun, params, *args, keys=400):
    def add(total, key):
        return jax.tree.map(jnp.add, total, wmkp.mirror_signals(key, rule, fun, params, *args)), None

    zero = jax.tree.map(np.zeros_like, drawn_feedback(rule, fun, params, *args))
    total, _ = jax.jit(lambda: lax.scan(add, zero, jax.random.split(KEY, keys)))()
    return jax.tree.map(lambda t: np.asarray(t) / keys, total)


@pytest.mark.parametrize(
    ("name", "phi"),
    [("scaled", jax.nn.relu), ("twice", None)],
)
def test_mean_is_unbiased(name, phi):
    """The mean signal is sigma^2 E[phi'] W^T, in size and direction, for every element.

    This holds for the parameter itself where the model uses a multiple of it, or uses it twice.
    """
    fun, shape, _, _ = MODELS[name]
    shape = tuple(s // 4 for s in shape)
    params = {"first": normal(1, 24, 24, fan_in=24), "w": normal(2, *shape, fan_in=24)}
    rule = one_estimate(num_samples=50, noise_std=2.0, activation=phi)
    mean = mean_signal(rule, fun, params, X, keys=1600)["w"]
    gain = 4.0 if phi is None else 2.0
    # ReLU's angle is 1.05 of the law's on average, with a standard deviation of 0.07.
    assert angle(mean, params["w"]) < 1.3 * wmkp.mirror_angle(50 * 1600, 24, rule)
    assert np.vdot(mean, params["w"]) / np.vdot(params["w"], params["w"]) == pytest.approx(gain, rel=0.02)
    errors = mean - gain * params["w"]
    assert np.max(np.abs(errors)) < 5 * errors.std()


@pytest.mark.slow
def test_mean_of_grouped_convolution_is_unbiased():
    """The mean signal has the right size at every tap and group of a dilated convolution."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(12, (3,), name="first")(x)
            return nn.Conv(8, (3,), feature_group_count=4, kernel_dilation=2, name="conv")(x)

    net, x = Net(), np.zeros((1, 6, 3), np.float32)
    params = drawn(0, jax.eval_shape(net.init, KEY, x))
    rule = one_estimate(num_samples=50, activation=jax.nn.relu)
    mean = mean_signal(rule, net.apply, params, x)["params"]["conv"]["kernel"]
    w = np.asarray(params["params"]["conv"]["kernel"])
    fan_in = 9
    assert angle(mean, w) < 1.2 * wmkp.mirror_angle(50 * 400, fan_in, rule)
    for tap in range(3):
        for group in range(4):
            part = (tap, slice(None), slice(2 * group, 2 * group + 2))
            assert np.vdot(mean[part], w[part]) / np.vdot(w[part], w[part]) == pytest.approx(0.5, abs=0.12)


def test_uses_that_overlap():
    """If half of a matrix is used twice and half once, each element's signal is the mean over its uses."""

    def net(params, x):
        x = jnp.tanh(x @ params["first"])
        return (x @ params["w"]).sum() + (x @ params["w"][:, :12]).sum()

    params = {"first": normal(1, 24, 24, fan_in=24), "w": normal(2, 24, 24, fan_in=24)}
    found = signals(one_estimate(noise="orthogonal", num_samples=24), net, params, X)
    np.testing.assert_allclose(found["w"], params["w"], atol=1e-5)


@pytest.mark.parametrize("columns", [24, 5])
def test_a_weight_beside_itself_in_one_product(columns):
    """A matrix joined to a copy or part of itself has two uses in one product. The signal is their mean."""

    def net(params, x):
        joined = jnp.concatenate([params["w"], params["w"][:, :columns]], axis=1)
        return jnp.tanh(x @ params["first"]) @ joined

    params = {"first": normal(1, 24, 24, fan_in=24), "w": normal(2, 24, 24, fan_in=24)}
    found = signals(one_estimate(noise="orthogonal", num_samples=24), net, params, X)
    np.testing.assert_allclose(found["w"], params["w"], atol=1e-5)


def test_a_parameter_that_is_partly_used_has_zeros_elsewhere():
    def net(params, x):
        return jnp.tanh(x @ params["first"]) @ params["w"][:, 4:]

    params = {"first": normal(1, 24, 24, fan_in=24), "w": normal(2, 24, 16, fan_in=24)}
    found = signals(one_estimate(noise="orthogonal", num_samples=24), net, params, X)
    np.testing.assert_allclose(found["w"][:, 4:], params["w"][:, 4:], atol=1e-5)
    np.testing.assert_array_equal(found["w"][:, :4], 0)


# --- biases -----------------------------------------------------------------------------------------------------------


def biased(params, x):
    return jnp.maximum(jnp.tanh(x @ params["first"]) @ params["w"] + params["b"], 0)


BIASED = {"first": FIRST, "w": normal(2, 96, 300, fan_in=96), "b": normal(3, 300) / 2}
BIASED["w"] /= np.linalg.norm(BIASED["w"], axis=0)


def test_one_estimate_against_numpy():
    """The signal equals Eq. 6-8 in NumPy with the same noise: the mean of x phi(W x + b)^T over samples."""
    for bias in ("kept", "blocked"):
        rule = one_estimate(num_samples=50, noise_std=1.5, activation=jax.nn.relu, bias=bias)
        found = signals(rule, biased, BIASED, X)["w"]
        x = drawn_noise(jax.random.fold_in(KEY, 0), rule.mirror, 1, 50, 96)[0]
        W = BIASED["w"].astype(np.float64).T
        b = BIASED["b"] if bias == "kept" else np.zeros(300)
        expected = np.zeros((96, 300))
        for sample in x.astype(np.float64):
            y = np.maximum(W @ sample + b, 0)
            expected += np.outer(sample, y) / 50  # (7): B += eta delta_l delta_{k+1}^T
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_kept_bias_leaves_a_floor():
    """A kept bias leaves an angle that no number of samples removes, since E[x relu(w x + b)] = Phi(b) w.

    With the bias blocked, the angle follows the law.
    """
    cdf = normal_cdf(BIASED["b"])
    floor = math.degrees(math.acos(cdf.sum() / math.sqrt(len(cdf) * (cdf**2).sum())))
    assert 18 < floor < 24
    many = {"num_samples": 20_000, "activation": jax.nn.relu}
    kept = signals(one_estimate(bias="kept", **many), biased, BIASED, X)["w"]
    blocked = signals(one_estimate(bias="blocked", **many), biased, BIASED, X)["w"]
    assert angle(kept, BIASED["w"]) == pytest.approx(floor, abs=1)
    assert angle(blocked, BIASED["w"]) == pytest.approx(wmkp.mirror_angle(20_000, 96, one_estimate(**many)), abs=0.5)
    np.testing.assert_allclose(
        np.einsum("io,io->o", kept, BIASED["w"]) / np.einsum("io,io->o", BIASED["w"], BIASED["w"]), cdf, atol=0.05
    )


def normal_cdf(z):
    return np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(np.asarray(z, np.float64))


def test_kept_bias_of_convolution_and_attention():
    """Each output of a grouped convolution or attention head keeps its own bias."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), name="first")(x)
            x = nn.Conv(12, (3, 3), feature_group_count=4, name="conv")(x)
            x = nn.DenseGeneral((3, 5), name="heads")(x)
            return nn.DenseGeneral(7, axis=(-2, -1), name="out")(x)

    net, rng = Net(), np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
    params = drawn(0, jax.eval_shape(net.init, KEY, image), 0.25)["params"]
    for name in params:
        params[name]["bias"] = rng.normal(scale=2, size=params[name]["bias"].shape).astype(np.float32)
    rule = one_estimate(bias="kept", num_samples=20_000, activation=jax.nn.relu)
    found = signals(rule, lambda p, x: net.apply({"params": p}, x), params, image)
    for name, outputs in (("conv", (12,)), ("heads", (3, 5)), ("out", (7,))):
        assert params[name]["bias"].shape == outputs
        w, signal = (np.asarray(t[name]["kernel"]).reshape(-1, math.prod(outputs)) for t in (params, found))
        norms = np.linalg.norm(w, axis=0)
        cdf = normal_cdf(params[name]["bias"].ravel() / norms)
        assert np.ptp(cdf) > 0.8
        np.testing.assert_allclose(np.sum(signal * w, 0) / norms**2, cdf, atol=0.1)


def test_a_scan_that_returns_a_number():
    """A scan that returns a literal for each step can be mirrored exactly, with its layers stacked from parameters."""

    def fun(params, x):
        turn = lambda x, w: (jnp.tanh(x @ w), 0)
        return jnp.sum(lax.scan(turn, jnp.tanh(x @ params["first"]), jnp.stack([params["a"], params["b"]]))[0])

    params = {n: normal(i, 4, 4) for i, n in enumerate(("first", "a", "b"))}
    found = signals(wmkp.weight_mirror("orthogonal", num_samples=4), fun, params, np.ones((2, 4), np.float32))
    for name in ("a", "b"):
        np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-5)


def test_kept_bias_under_scan():
    def net(params, x):
        def layer(x, p):
            return jnp.maximum(x @ p["w"] + p["b"], 0), None

        return lax.scan(layer, jnp.tanh(x @ params["first"]), params["stack"])[0]

    stack = {"w": normal(1, 3, 24, 24, fan_in=24), "b": 2 * normal(2, 3, 24)}
    params = {"first": normal(3, 24, 24, fan_in=24), "stack": stack}
    rule = one_estimate(bias="kept", num_samples=20_000, activation=jax.nn.relu)
    signal = signals(rule, net, params, X)["stack"]["w"]
    norms = np.linalg.norm(stack["w"], axis=1)
    cdf = normal_cdf(stack["b"] / norms)
    np.testing.assert_allclose(np.einsum("lio,lio->lo", signal, stack["w"]) / norms**2, cdf, atol=0.08)


def test_bias_without_activation_is_not_in_the_mean():
    rule = one_estimate(bias="kept", num_samples=20_000)
    found = signals(rule, biased, BIASED, X)["w"]
    assert angle(found, BIASED["w"]) == pytest.approx(degrees(1.25 * 96 / 20_000), abs=0.5)


# --- gains and sample counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
def test_mirror_gain(std):
    z = np.linspace(-12, 12, 200_001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    slopes = {
        None: np.ones_like(z),
        jax.nn.relu: (z > 0).astype(float),
        jnp.tanh: 1 - np.tanh(std * z) ** 2,
        jax.nn.sigmoid: 1 / (2 + 2 * np.cosh(std * z)),
    }
    for phi, slope in slopes.items():
        expected = std**2 * np.sum(density * slope)
        assert wmkp.mirror_gain(one_estimate(noise_std=std, activation=phi)) == pytest.approx(expected, rel=2e-3)
    if std == 1:
        assert wmkp.mirror_gain(one_estimate()) == 1
        assert wmkp.mirror_gain(one_estimate(activation=jax.nn.relu)) == pytest.approx(0.5, rel=1e-6)


def test_gain_inside_jit():
    """``mirror_gain`` works inside jit."""
    rule = one_estimate(activation=jax.nn.relu)
    assert float(jax.jit(lambda x: x * wmkp.mirror_gain(rule))(2.0)) == pytest.approx(1.0)


RULES = st.builds(
    one_estimate,
    noise=st.sampled_from(["gaussian", "uniform", "rademacher", "antithetic"]),
    activation=st.sampled_from([None, jax.nn.relu, jnp.tanh]),
    rate=st.sampled_from([1.0, 0.5, 0.1, 0.01]),
)


@settings(max_examples=25, deadline=None)
@given(rule=RULES, target=st.floats(1.0, 80.0), fan_in=st.integers(1, 5000))
def test_samples_for_angle_inverts_mirror_angle(rule, target, fan_in):
    samples = wmkp.samples_for_angle(target, fan_in, rule)
    assert isinstance(samples, int) and samples >= 1
    assert wmkp.mirror_angle(samples, fan_in, rule) <= target * (1 + 1e-6)
    step = 2 if "antithetic" in rule.mirror.noise else 1
    if samples > step:  # it is the smallest number that suffices
        assert wmkp.mirror_angle(samples - step, fan_in, rule) > target * (1 - 1e-6)


@settings(max_examples=25, deadline=None)
@given(
    paired=st.booleans(),
    relu=st.booleans(),
    rate=st.sampled_from([1.0, 0.1]),
    target=st.floats(1.0, 80.0),
    fan_in=st.integers(2, 5000),
)
def test_samples_for_angle_of_orthogonal_noise(paired, relu, rate, target, fan_in):
    rule = one_estimate(
        noise="orthogonal+antithetic" if paired else "orthogonal", activation=jax.nn.relu if relu else None, rate=rate
    )
    samples = wmkp.samples_for_angle(target, fan_in, rule)
    assert wmkp.mirror_angle(samples, fan_in, rule) <= target * (1 + 1e-6) + 1e-6
    whole = (2 if paired else 1) * fan_in
    if paired or not relu:
        assert samples <= whole  # exact at this number, so no more are needed
    if not paired:  # never more than Gaussian noise needs
        gaussian = one_estimate(activation=rule.mirror.activation, rate=rate)
        assert samples <= wmkp.samples_for_angle(target, fan_in, gaussian)


def test_design_figures():
    """The law gives known figures, such as 13.7 degrees for 512 Gaussian samples, rate 0.1 and fan_in 576."""
    rule = wmkp.weight_mirror("gaussian", num_samples=512, rate=0.1)
    assert wmkp.mirror_angle(512, 576, rule) == pytest.approx(13.7, abs=0.05)
    assert wmkp.mirror_angle(1, 1, one_estimate()) == pytest.approx(45)
    assert wmkp.samples_for_angle(45, 100, one_estimate(activation=jax.nn.relu)) == 200
    assert wmkp.samples_for_angle(45, 96, one_estimate(noise="orthogonal")) == 48


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("blocks", [1, 5])
def test_samples_for_the_angle_of_whole_blocks(blocks, rate):
    """The angle of whole blocks needs exactly their samples. Rounding adds none."""
    rule = one_estimate(noise="orthogonal", activation=jax.nn.relu, rate=rate)
    samples = blocks * 96
    assert wmkp.samples_for_angle(wmkp.mirror_angle(samples, 96, rule), 96, rule) == samples


# --- where B converges ------------------------------------------------------------------------------------------------


def settle(rule, params, steps, fun=dense, keys=1):
    """B after ``steps`` calibrated mirror steps from a random start with W fixed, for each of ``keys`` keys."""
    tx = wmkp.updates.calibrated_mirror(rule)
    feedback = drawn_feedback(rule, fun, params, X)

    def step(feedback, key):
        change, _ = tx.update(wmkp.mirror_signals(key, rule, fun, params, X), optax.EmptyState(), feedback)
        return optax.apply_updates(feedback, change), None

    mirror = lambda b, key: lax.scan(step, b, jax.random.split(key, steps))[0]
    return jax.jit(jax.vmap(mirror, (None, 0)))(feedback, jax.random.split(KEY, keys))


@pytest.mark.parametrize(
    ("rate", "phi", "std"), [pytest.param(0.1, None, 1.0, marks=pytest.mark.slow), (0.5, jax.nn.relu, 2.0)]
)
def test_leaky_average_settles_at_the_law(rate, phi, std):
    params = {"first": FIRST, "w": normal(2, 96, 160, fan_in=96)}
    rule = wmkp.weight_mirror("gaussian", std, 64, phi, rate=rate)
    every = np.asarray(settle(rule, params, int(8 / rate), keys=8)["w"], np.float64)
    w = np.asarray(params["w"], np.float64)
    predicted = wmkp.mirror_angle(64, 96, rule)
    assert np.mean([angle(found, w) for found in every]) == pytest.approx(predicted, abs=1)
    # B's size also holds: B is W^T plus noise orthogonal to it. For one key its standard deviation is 0.016.
    assert np.mean([np.vdot(found, w) / np.vdot(w, w) for found in every]) == pytest.approx(1, abs=0.03)
    ratio = np.mean([np.linalg.norm(found) for found in every]) / np.linalg.norm(w)
    assert ratio == pytest.approx(1 / math.cos(math.radians(predicted)), abs=0.03)


@pytest.mark.slow
def test_rule_settles_at_its_target_and_at_the_size_of_w():
    rule = wmkp.weight_mirror("gaussian", target_angle=6.0, rate=0.1)
    params = {"first": FIRST, "w": normal(2, 96, 160, fan_in=96)}
    found = settle(rule, params, 80)["w"][0]
    assert angle(found, params["w"]) == pytest.approx(rule.mirror.target_angle, abs=0.5)
    assert np.linalg.norm(found) / np.linalg.norm(params["w"]) == pytest.approx(1, abs=0.02)


# --- structure --------------------------------------------------------------------------------------------------------


def test_structure_of_signals():
    """Signals have feedback's structure, shapes and dtypes, and are zero where the rule has no mirror mode."""

    def net(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x.astype(layer["w"].dtype) @ layer["w"] + layer["b"])
        return params["gain"] * x

    layers = [{"w": normal(i, 24, 24), "b": np.zeros(24, np.float32)} for i in range(4)]
    layers[3]["w"] = layers[3]["w"].astype(jnp.bfloat16)
    params = {"layers": layers, "gain": np.ones((), np.float32)}
    mirror = one_estimate(num_samples=8)
    rules = {"[13]/w": mirror, "2/w": wmkp.kolen_pollack(), ".*": wmkp.backprop()}
    found, feedback = signals(rules, net, params, X), drawn_feedback(rules, net, params, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, feedback)
    assert list(flat(found)) == ["layers/1/w", "layers/2/w", "layers/3/w"]
    assert found["layers"][3]["w"].dtype == jnp.bfloat16
    zero = [bool(np.all(np.asarray(layer["w"], np.float32) == 0)) for layer in found["layers"][1:]]
    assert zero == [False, True, False]
    assert not np.any(np.asarray(signals(mirror, net, params, X)["layers"][2]["w"]) == 0)


def test_a_loss_on_noise_beside_feedback_of_another_shape():
    """A mirror signal that depends on B works beside feedback of other shapes, and leaves their signals zero."""

    def net(params, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ params["first"]) @ params["v"].T) @ params["u"]) @ params["w"]

    params = {name: normal(i, 24, 24, fan_in=24) for i, name in enumerate(("first", "u", "v", "w"))}
    rules = {"w": wmkp.information_alignment(), "v": wmkp.product_feedback_alignment(),
             "u": wmkp.direct_feedback_alignment(), "first": wmkp.backprop()}  # fmt: skip
    signal = lambda params, b: wmkp.mirror_signals(KEY, rules, net, params, X, feedback=b)
    found = jax.jit(signal)(params, drawn_feedback(rules, net, params, X))
    assert found["first"] is None and np.all(found["w"] != 0)
    assert not any(np.any(part) for name in "uv" for part in jax.tree.leaves(found[name]))


def test_key_decides_and_projections_draw_apart():
    """The same key gives the same signal. Other keys, projections and layers have other noise."""

    def net(params, x):
        x = jnp.tanh(x @ params["first"])
        return jnp.tanh(x @ params["a"]) @ params["b"]

    w = normal(2, 24, 24, fan_in=24)
    params = {"first": normal(1, 24, 24), "a": w, "b": w}
    rule = one_estimate(num_samples=16)
    run = jax.jit(lambda key: wmkp.mirror_signals(key, rule, net, params, X))
    once, again, other = (jax.tree.map(np.asarray, run(jax.random.key(k))) for k in (0, 0, 1))
    chex.assert_trees_all_equal(once, again)
    assert not np.allclose(once["a"], other["a"])
    assert 60 < angle(once["a"] - w, once["b"] - w) < 120
    layers = signals(rule, stacked, {"first": FIRST[:, :24], "w": np.stack([w, w])}, X)["w"]
    layers = np.asarray(layers)
    assert 60 < angle(layers[0] - w, layers[1] - w) < 120


def test_no_data_enters():
    params = {"first": FIRST, "w": normal(2, 96, 80, fan_in=96)}
    rule = one_estimate(num_samples=16)
    by_shape = signals(rule, dense, params, X)
    # Neither the data nor the first layer's weights have an effect.
    nothing = np.full(X.shape, np.nan, np.float32), {**params, "first": np.full_like(FIRST, np.nan)}
    np.testing.assert_array_equal(by_shape["w"], signals(rule, dense, nothing[1], nothing[0])["w"])


def test_errors():
    params = {"first": FIRST, "w": normal(2, 96, 80, fan_in=96)}
    for call in (
        lambda: wmkp.mirror_signals(KEY, wmkp.kolen_pollack(), dense, params, X),
        lambda: wmkp.mirror_gain(wmkp.backprop()),
        lambda: wmkp.mirror_angle(10, 10, wmkp.kolen_pollack()),
        lambda: wmkp.samples_for_angle(10, 10, wmkp.feedback_alignment()),
    ):
        with pytest.raises(ValueError, match=r"no.* mirror mode"):
            call()
    for bad in (0, 90, -1, 120):
        with pytest.raises(ValueError, match="angle must lie"):
            wmkp.samples_for_angle(bad, 10, one_estimate())
    for options in (
        {"noise": "pink"},
        {"bias": "both"},
        {"noise_std": 0.0},
        {"noise_std": float("inf")},
        {"num_samples": 0},
        {"num_samples": 1.5},
        {"target_angle": 90.0},
        {"rate": 0.0},
        {"rate": 1.5},
        {"activation": "relu"},
        {"scale": -1.0},
    ):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            wmkp.weight_mirror(**options)


def test_a_gain_is_one_in_mirror_mode():
    # B has W's gain in engaged mode, so mirror mode gives W and not the scaled W.
    w, g = normal(0, 6, 5), normal(1, 5) + 3
    rule = one_estimate(noise="orthogonal", num_samples=12)
    normed = lambda p, x: jnp.tanh(x @ p["u"]) @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"])
    params = {"u": normal(2, 4, 6), "w": w, "g": g}
    scaled = lambda p, x: jnp.tanh(x @ p["u"]) @ (p["w"].T / x.max()).astype(jnp.bfloat16).T
    for fun in (normed, scaled):
        found = signals(rule, fun, params, normal(3, 2, 4))
        np.testing.assert_allclose(found["w"], w, rtol=1e-4, atol=1e-5)
        assert found["u"] is None and found["g"] is None


GAINS_AND_BIASES = {
    "a weight norm's": lambda p, h, s: h @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"]) + p["b"],
    "data's": lambda p, h, s: h @ (p["w"] / s) + p["b"],
    "of the bias": lambda p, h, s: h @ p["w"] + p["b"] * p["s"],
}


@pytest.mark.parametrize("name", GAINS_AND_BIASES)
def test_a_bias_is_not_kept_beside_a_gain(name):
    params = {"u": normal(0, 4, 6), "w": normal(1, 6, 5), "g": normal(2, 5), "b": normal(3, 5), "s": normal(4)}
    fun = lambda p, x: jnp.tanh(GAINS_AND_BIASES[name](p, jnp.tanh(x @ p["u"]), x.max()))
    options = {"noise": "orthogonal", "num_samples": 12, "activation": jnp.tanh}
    blocked = lambda params: wmkp.mirror_signals(KEY, one_estimate(**options), fun, params, normal(5, 2, 4))
    assert jax.eval_shape(blocked, params)["w"].shape == (6, 5)
    with pytest.raises(ValueError, match=r"bias=\"kept\" at params\['w'\], where a gain.*bias=\"blocked\""):
        signals(one_estimate(**options, bias="kept"), fun, params, normal(5, 2, 4))


def test_where_there_is_no_bias_a_gain_may_be():
    params = {"u": normal(0, 4, 6), "w": normal(1, 6, 5), "g": normal(2, 5)}
    fun = lambda p, x: jnp.tanh(x @ p["u"]) @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"])
    rules = [one_estimate(noise="orthogonal", num_samples=12, bias=bias) for bias in ("kept", "blocked")]
    kept, blocked = (signals(rule, fun, params, normal(5, 2, 4))["w"] for rule in rules)
    np.testing.assert_array_equal(kept, blocked)


@pytest.mark.parametrize("spec", [("a", None), (("b", "a"), None)])
def test_parts_of_a_weight_on_devices_are_mirrored_each_by_itself(spec):
    mesh, P = (
        jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2),
        jax.sharding.PartitionSpec,
    )
    params = {"u": normal(0, 4, 16), "w": normal(1, 16, 8), "stack": normal(2, 3, 8, 8)}
    inside, outside = spec

    def block(w, stack, x):
        x = jax.lax.psum(x @ w, inside) if inside else x @ w
        if outside:
            x = jax.lax.all_gather(x, outside, axis=1, tiled=True)
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jax.lax.pcast(x, (), to="varying"), stack)[0]

    def fun(p, x):
        x = jnp.tanh(x @ p["u"])
        return jax.shard_map(
            block, mesh=mesh, in_specs=(P(*spec), P(), P(None, inside)), out_specs=P(), check_vma=False
        )(p["w"], p["stack"], x).sum()

    found = signals(one_estimate(noise="orthogonal", num_samples=16), fun, params, normal(3, 2, 4))
    assert found["u"] is None
    for name in ("w", "stack"):
        np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-5)
    gaussian = signals(one_estimate(num_samples=64), fun, params, normal(3, 2, 4))["w"]
    tangent = math.tan(math.radians(angle(gaussian, params["w"]))) ** 2
    parts = math.prod(mesh.shape[a] for a in ([inside] if isinstance(inside, str) else inside or []))
    assert tangent == pytest.approx(16 / parts / 64, rel=0.5)  # the law with the fan_in of one device


def test_gains_of_parts_on_devices_are_one_in_mirror_mode():
    # The norm's constant differs between devices, and a device scales its part by its index.
    mesh, P = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    params = {"u": normal(0, 4, 6), "w": normal(1, 6, 8), "g": normal(2, 8) + 3}

    def block(w, g, x):
        y = x @ (w * (g / jnp.sqrt((w**2).sum(0) + 1e-6)))
        return jnp.tanh(y * jax.lax.axis_index("a"))

    def fun(p, x):
        specs = (P(None, "a"), P("a"), P())
        return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P(None, "a"))(
            p["w"], p["g"], jnp.tanh(x @ p["u"])
        )

    found = signals(one_estimate(noise="orthogonal", num_samples=12), fun, params, normal(3, 2, 4))
    np.testing.assert_allclose(found["w"], params["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        lambda w: jnp.where(jnp.linalg.norm(w, axis=0) > 2, w / jnp.linalg.norm(w, axis=0), w),
        lambda w: w * (jnp.abs(w) > 0.3),
    ],
)
def test_weight_that_its_own_size_selects_is_an_error(weight):
    params = {"first": normal(1, 24, 24), "w": normal(2, 24, 8)}
    with pytest.raises(wmkp.WeightTransportError, match="mirror mode cannot reach params\\['w'\\]"):
        wmkp.mirror_signals(
            KEY, one_estimate(num_samples=8), lambda p, x: jnp.tanh(x @ p["first"]) @ weight(p["w"]), params, X
        )


def test_weight_that_a_device_selects_by_its_place_is_an_error():
    mesh, P = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    params = {"first": normal(1, 24, 24), "w": normal(2, 24, 8)}

    def block(w, x):
        return x @ jax.lax.dynamic_slice_in_dim(w, 2 * jax.lax.axis_index("a"), 2, 1)

    def fun(p, x):
        return jax.shard_map(block, mesh=mesh, in_specs=(P(), P()), out_specs=P(None, "a"))(
            p["w"], jnp.tanh(x @ p["first"])
        )

    with pytest.raises(wmkp.WeightTransportError, match="axis_index"):
        wmkp.mirror_signals(KEY, one_estimate(num_samples=8), fun, params, X)


def test_weight_that_noise_cannot_reach_is_an_error():
    """Mirror mode raises an error for a matrix that data masks, which noise alone cannot reach."""

    def masked(params, x, mask):
        return jnp.tanh(x @ params["first"]) @ (params["w"] * mask)

    params = {"first": normal(1, 24, 24), "w": normal(2, 24, 8)}
    with pytest.raises(wmkp.WeightTransportError, match="'w'"):
        wmkp.mirror_signals(KEY, one_estimate(num_samples=8), masked, params, X, np.ones((24, 8), np.float32))


def test_a_convolution_of_a_weight_by_an_activity_is_an_error():
    """Mirror mode raises an error for a weight that is the left operand of a convolution."""

    def fun(params, x):
        kernel = jnp.tanh(x @ params["first"]).reshape(2, 3, 4)
        return lax.conv_general_dilated(params["w"], kernel, (1,), "VALID", dimension_numbers=("NCH", "OIH", "NCH"))

    params = {"first": normal(1, 24, 12), "w": normal(2, 1, 3, 9)}
    x = jax.ShapeDtypeStruct((2, 24), jnp.float32)
    with pytest.raises(wmkp.WeightTransportError, match="'w'.*left operand of a convolution"):
        wmkp.mirror_signals(KEY, one_estimate(num_samples=8), fun, params, x)


def test_a_scaled_weight_whose_parts_devices_exchange_is_an_error():
    mesh, P = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec

    def fun(p, x, scale):
        block = lambda w, h, scale: h @ jax.lax.all_gather(w * scale, "a", axis=0, tiled=True)
        specs = P("a", None), P(), P()
        return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
            p["w"], jnp.tanh(x @ p["u"]), scale
        ).sum()

    params = {"u": normal(0, 4, 8), "w": normal(1, 8, 5)}
    with pytest.raises(wmkp.WeightTransportError, match=r"params\['w'\] by noise alone \(all_gather\)"):
        signals(one_estimate(num_samples=8), fun, params, normal(2, 3, 4), jnp.float32(2))
