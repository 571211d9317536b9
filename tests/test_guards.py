"""Guards of speed that count products, copies, bytes, compilations and tracing work, and take no times."""

import contextlib
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import some_slow

import wmkp
from benchmarks import models, programs
from wmkp.program import compat, patches

KEY = jax.random.key(0)
RULES = {
    "SS": wmkp.sign_symmetry(),
    "KP": wmkp.kolen_pollack(),
    "WM": wmkp.weight_mirror(),
}
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))


def convolve(x, w, strides=(1, 1)):
    return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loss_fn(params, model_state, batch, key):
    x = jnp.tanh(convolve(batch["image"], params["first"]))
    x = jnp.tanh(convolve(x, params["second"], (2, 2)))
    logits = jnp.tanh(x.reshape(len(x), -1) @ params["dense"]) @ params["output"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), (model_state, {})


def drawn(i, *shape):
    return np.random.default_rng(i).normal(size=shape).astype(np.float32)


def case(batch_size=4, side=8):
    draw = lambda i, *shape: drawn(i, *shape) / 4
    params = {
        "first": draw(0, 3, 3, 3, 8),
        "second": draw(1, 3, 3, 8, 16),
        "dense": draw(2, side * side * 4, 24),
        "output": draw(3, 24, 10),
        "bias": np.zeros(10, np.float32),
    }
    batch = {"image": draw(4, batch_size, side, side, 3), "label": np.arange(batch_size) % 10}
    return models.Case(loss_fn, params, None, OPTIMIZER, batch)


def compiled_backprop(case):
    step, state = models.backprop_step(case)
    return jax.jit(step, donate_argnums=0).lower(state, case.batch).compile(), programs.tree_bytes(state)


def steps_and_state(case, rule):
    """Returns the steps and the shapes of their state."""
    steps = wmkp.make_steps(case.loss_fn, rule, case.optimizer, case.params, case.batch)
    return steps, jax.eval_shape(steps.init, KEY, case.params)


@pytest.fixture(scope="module")
def backprop():
    return compiled_backprop(case())


@pytest.mark.parametrize("rule", some_slow(RULES, {"SS", "WM"}))
def test_an_engaged_step_has_backprops_products_copies_and_bytes(rule, backprop):
    """An engaged step has backprop's products, copies no weight, and adds only B, its optimizer's state and 1000 bytes.

    The 1000 bytes are for addresses of results and alignment. Sign symmetry may also hold the signs of its largest
    matrix.
    """
    plain, plain_state = backprop
    steps, state = steps_and_state(case(), RULES[rule])
    ours = steps.engaged_step.lower(state, case().batch).compile()
    assert programs.products(ours) == programs.products(plain)
    assert programs.weight_copies(plain, case().params) > 0, "backprop copies what it reads on the way back"
    assert programs.weight_copies(ours, case().params) == 0, "W or B is not written in place"
    more = programs.tree_bytes(state) - plain_state
    signs = max(w.nbytes for w in case().params.values()) if rule == "SS" else 0
    assert programs.peak_bytes(ours) <= programs.peak_bytes(plain) + more + signs + 1000


@pytest.mark.parametrize(("platform", "written"), [("cuda", 2), ("rocm", 2), ("cpu", 0), ("tpu", 0)])
def test_gpus_lay_out_what_convolutions_share_with_an_update(platform, written):
    """A step for GPUs fixes the layout of two gradients and one B, of two shapes. CPUs and TPUs need none.

    Without this XLA fuses them with the update in one kernel and copies W, B and their moments.
    """
    steps, state = steps_and_state(case(), RULES["KP"])
    traced = steps.engaged_step.trace(state, case().batch)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("call @laid_out") == 3
    assert text.count("@LayoutConstraint") == text.count("stablehlo.optimization_barrier") == written


def test_signs_are_made_a_matrix_at_a_time():
    """Sign symmetry holds the signs of one matrix at a time, not of all matrices from the forward pass on."""
    params = [drawn(i, 64, 64) / 8 for i in range(6)]
    forward = lambda params, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x)
    loss_fn = lambda params, model_state, x, key: ((forward(params, x) ** 2).mean(), (model_state, {}))
    chain = models.Case(loss_fn, params, None, OPTIMIZER, np.ones((8, 64), np.float32))
    plain, plain_state = compiled_backprop(chain)
    steps, state = steps_and_state(chain, RULES["SS"])
    ours = steps.engaged_step.lower(state, chain.batch).compile()
    more = programs.tree_bytes(state) - plain_state
    assert programs.peak_bytes(ours) <= programs.peak_bytes(plain) + more + params[0].nbytes + 1000


def test_counts_see_what_they_are_for():
    """The counts detect a step that multiplies twice, copies a weight and keeps an array."""

    def step(w, x):
        return w + 1, (x @ w, jnp.sin(x) @ w, jnp.cumsum(w))

    def lean(w, x):
        return w + 1, x[0] * 2

    w, x = jnp.ones((32, 32)), jnp.ones((8, 32))
    fat, thin = (jax.jit(f, donate_argnums=0).lower(w, x).compile() for f in (step, lean))
    assert programs.products(fat)["dot"] == 2 and programs.products(thin)["dot"] == 0
    assert programs.weight_copies(fat, w) == 1 and programs.weight_copies(thin, w) == 0
    assert programs.peak_bytes(fat) >= programs.peak_bytes(thin) + w.nbytes


@pytest.mark.slow
def test_weight_gradients_by_patches_lay_out_no_batch_anew():
    """The peak memory of a step by patches is at most backprop's plus B, its state and one chunk of patches."""
    big = case(batch_size=64, side=32)
    plain, plain_state = compiled_backprop(big)
    steps, state = steps_and_state(big, RULES["KP"])
    ours = steps.engaged_step.lower(state, big.batch).compile()
    assert " while(" in ours.as_text(), "patches were not used"
    chunk = 4 * patches.CHUNK
    batch = 4 * 64 * 32 * 32 * 8  # the activation between the convolutions
    assert chunk <= batch
    more = programs.tree_bytes(state) - plain_state
    assert programs.peak_bytes(ours) <= programs.peak_bytes(plain) + more + chunk + 1000


@pytest.mark.slow
def test_strided_positions_are_picked_out_when_delta_is_there(monkeypatch):
    """A strided 1x1 shortcut selects its inputs only after its delta is computed, which lowers the peak memory."""
    monkeypatch.setattr(patches, "LEAST", 0)
    draw = lambda i, *shape: drawn(i, *shape) / 8
    params = {"stem": draw(0, 3, 3, 3, 32)}
    for i, n in enumerate((32, 64)):
        params |= {f"a{i}": draw(i, 3, 3, n, 2 * n), f"b{i}": draw(i, 3, 3, 2 * n, 2 * n)}
        params[f"shortcut{i}"] = draw(i, 1, 1, n, 2 * n)

    def residual(params, model_state, batch, key):
        x = jax.nn.relu(convolve(batch, params["stem"]))
        for i in range(2):
            y = convolve(jax.nn.relu(convolve(x, params[f"a{i}"], (2, 2))), params[f"b{i}"])
            x = jax.nn.relu(y + convolve(x, params[f"shortcut{i}"], (2, 2)))
        return (x.mean((1, 2)) ** 2).mean(), (model_state, {})

    def peak():
        steps, state = steps_and_state(net, RULES["KP"])
        return programs.peak_bytes(steps.engaged_step.lower(state, net.batch).compile())

    net = models.Case(residual, params, None, optax.sgd(0.1), draw(9, 8, 32, 32, 3))
    waiting = peak()
    monkeypatch.setattr(compat, "zeros_of", lambda x: jnp.zeros(x.shape, jnp.int32))
    assert waiting < peak()


def test_what_waits_is_the_same_to_the_bit():
    """``compat.after`` leaves every value bit-for-bit unchanged, including NaN, infinities and signed zeros."""
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3.0], np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.asarray(values, dtype)
        for earlier in (0.0, -0.0, 2.0, np.inf, -np.inf, np.nan):
            waited = compat.after(x, jnp.full((2, 3), earlier, dtype))
            assert np.asarray(waited).tobytes() == np.asarray(x).tobytes()
    assert np.array_equal(compat.after(x, jnp.zeros((0, 3))), x, equal_nan=True)


@pytest.mark.parametrize("noise", some_slow(["gaussian", "orthogonal"], {"gaussian"}))
def test_a_mirror_step_is_two_products_a_projection_and_a_small_one_for_its_lag(noise):
    """With orthogonal noise two Fourier transforms replace two products, and the noise is not stored."""
    steps, state = steps_and_state(case(), wmkp.weight_mirror(noise, target_angle=45.0, rate=1.0))
    compiled = steps.mirror_step.lower(state).compile()
    transforms = compiled.as_text().count(" fft(")
    assert transforms == (2 if noise == "orthogonal" else 0)
    assert sum(programs.products(compiled).values()) == 3 * 3 - transforms  # the first layer has no B
    assert programs.weight_copies(compiled, state.params) == 0, "B is not written in place"
    if transforms:
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 128 * 256


@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "uniform"])
def test_noise_is_drawn_in_one_pass(noise):
    """Drawing noise has no loop over an array of its size. jax.random's own generator has one on CPUs."""
    draw = lambda key: wmkp.noise.draw_noise(key, wmkp.weight_mirror(noise).mirror, (1, 64, 32), jnp.float32)
    program = jax.jit(draw).lower(KEY)
    reference = jax.jit(lambda key: jax.random.normal(key, (64, 32))).lower(KEY)
    most = "64x32xui32"
    assert all("while" not in line or most not in line for line in program.as_text().splitlines())
    assert any("threefry" in line for line in reference.as_text().splitlines())


def lines_while(trace):
    """The number of lines in wmkp's files that ``trace`` runs. A line in a loop counts each time."""
    here, count = str(Path(wmkp.__file__).parent), 0

    def line(frame, event, arg):
        nonlocal count
        count += event == "line"
        return line

    def call(frame, event, arg):
        return line(frame, "line", arg) if frame.f_code.co_filename.startswith(here) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        trace()
    finally:
        sys.settrace(before)
    return count


@contextlib.contextmanager
def settings(**values):
    """Changes JAX's settings inside a ``with`` block."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def checkpointed(params, x):
    layer = jax.checkpoint(lambda h: jnp.tanh(h @ params["w"] + params["b"][None]))
    return jnp.mean(layer(jnp.tanh(x @ params["in"])) ** 2)


def small():
    return {"b": np.ones(5, np.float32), "in": drawn(0, 4, 7), "w": drawn(1, 7, 5)}, drawn(2, 3, 4)


def test_no_rank_is_raised_nor_dtype_promoted_unasked():
    params, x = small()

    def gradients(rule, key):
        feedback = wmkp.init_feedback(key, rule, checkpointed, params, x)
        return wmkp.value_and_grad(checkpointed, rule)(params, feedback, x)[1][0]

    def mirrored(noise, key):
        rule = wmkp.weight_mirror(noise, activation=jax.nn.relu, num_samples=40)
        return wmkp.mirror_signals(key, rule, checkpointed, params, x)

    with settings(jax_numpy_rank_promotion="raise", jax_numpy_dtype_promotion="strict"):
        for rule in (wmkp.kolen_pollack(), wmkp.sign_symmetry("batch"), wmkp.activity_mirror(whiten=True)):
            assert jax.eval_shape(functools.partial(gradients, rule), jax.random.key(1))["w"].shape == (7, 5)
        for noise in ("gaussian", "uniform", "rademacher", "orthogonal+antithetic"):
            assert jax.eval_shape(functools.partial(mirrored, noise), jax.random.key(1))["w"].shape == (7, 5)


def test_no_tracer_is_leaked():
    params, x = small()
    with settings(jax_check_tracer_leaks=True):
        rule = wmkp.kolen_pollack()
        gradient = jax.eval_shape(wmkp.value_and_grad(checkpointed, rule), params, {**params, "in": None, "b": None}, x)
        assert gradient[1][1]["w"].shape == (7, 5)
        assert list(wmkp.input_covariances(checkpointed, params, x)) == ["in", "w"]


@pytest.mark.parametrize("what", some_slow(["engaged", "mirror"], {"mirror"}))
def test_tracing_work_is_linear_in_the_number_of_layers(what):
    """From 20 to 30 layers, the number of lines that run grows by at most 1 % more than from 10 to 20."""

    def loss(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b)
        return jnp.sum(x)

    def work(layers):
        params, x = [(jnp.eye(2), jnp.ones(2))] * layers, jnp.ones((1, 2))
        if what == "mirror":
            rule = wmkp.weight_mirror()
            return lines_while(lambda: jax.make_jaxpr(lambda p: wmkp.mirror_signals(KEY, rule, loss, p, x))(params))
        rule = wmkp.kolen_pollack()
        feedback = wmkp.init_feedback(KEY, rule, loss, params, x)
        return lines_while(lambda: jax.make_jaxpr(wmkp.value_and_grad(loss, rule))(params, feedback, x))

    first, second, third = (work(layers) for layers in (10, 20, 30))
    assert second > first > 0
    assert third - second <= 1.01 * (second - first)
