"""Kolen-Pollack from an exact mirror follows backprop to rounding. Also tests how exact mirrors are, and lag."""

import pydoc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import some_slow

import wmkp
from wmkp import mirror
from wmkp.program.projections import analyse
from wmkp.rule import resolve

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
LARGEST_ANGLE = 0.05  # degrees


def as_step(apply, loss):
    def loss_fn(params, model_state, batch, key):
        out, model_state = apply(params, model_state, batch[0])
        return loss(out, batch[1]), (model_state, {})

    return loss_fn


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plain(model):
    """A Flax model without state in the form that ``as_step`` needs."""
    return lambda params, state, x: (model.apply({"params": params}, x), state)


def histories(rule, loss_fn, optimizer, params, model_state, *variants):
    """The losses and the largest angles of W and B, from the start on, for each variant of the data."""
    batches = variants[0]
    first = jax.tree.map(lambda x: x[0], batches)
    steps = wmkp.make_steps(loss_fn, rule, optimizer, params, first, model_state=model_state)

    def largest(state):
        angles = list(wmkp.matrix_angles(state.params, state.feedback).values())
        return jnp.max(jnp.stack(angles)) if angles else jnp.zeros(())

    def step(state, batch):
        state, metrics = steps.engaged_step(state, batch)
        return state, (metrics["loss"], largest(state))

    @jax.jit
    def train(params, model_state, batches):
        state = steps.init(KEY, params, model_state)
        return largest(state), *jax.lax.scan(step, state, batches)[1]

    found = [train(params, model_state, batches) for batches in variants]
    return [(np.asarray(losses), np.array([start, *angles])) for start, losses, angles in found]


def both(loss_fn, optimizer, params, model_state, batches):
    """Backprop's losses, and the losses and largest angles of Kolen-Pollack from an exact mirror."""
    [(bp, _)] = histories(wmkp.backprop(), loss_fn, optimizer, params, model_state, batches)
    [(kp, angles)] = histories(wmkp.kolen_pollack(start="mirror"), loss_fn, optimizer, params, model_state, batches)
    return bp, kp, angles


OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9)),
    "adamw": optax.adamw(1e-3, weight_decay=0.01),
}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def test_mlp_follows_backprop_for_200_steps():
    """On clusters with noisy labels, losses agree to 1e-4 and angles stay under 0.05 degrees."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 20))
    labels = rng.integers(0, 10, (200, 64))
    x = (centres[labels] + rng.normal(size=(200, 64, 20))).astype(np.float32)
    labels = np.where(rng.random(labels.shape) < 0.1, rng.integers(0, 10, labels.shape), labels)
    params = MLP().init(KEY, x[0])["params"]
    bp, kp, angles = both(as_step(plain(MLP()), cross_entropy), OPTIMIZERS["adamw"], params, None, (x, labels))
    assert np.mean(bp[-20:]) < 0.6 * bp[0], "it must have learned"
    np.testing.assert_allclose(kp, bp, rtol=1e-4)
    assert np.max(angles) < LARGEST_ANGLE and np.isfinite(angles).all()


TEXT = pydoc.plain(pydoc.render_doc(str))
VOCABULARY = sorted(set(TEXT))
LENGTH, WIDTH, HEADS = 24, 32, 2


class Transformer(nn.Module):
    """One pre-norm layer that predicts the next character."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(len(VOCABULARY), WIDTH)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x), mask=mask)
        h = nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))
        x = x + nn.Dense(WIDTH)(nn.gelu(h))
        return nn.Dense(len(VOCABULARY))(nn.LayerNorm()(x))


@pytest.mark.slow
def test_transformer_follows_backprop_for_100_steps():
    rng = np.random.default_rng(1)
    characters = np.array([VOCABULARY.index(c) for c in TEXT], np.int32)
    starts = rng.integers(0, len(characters) - LENGTH - 1, (100, 8))
    windows = characters[starts[..., None] + np.arange(LENGTH + 1)]
    tokens, following = windows[..., :-1], windows[..., 1:]
    params = jax.jit(Transformer().init)(KEY, tokens[0])["params"]
    loss_fn = as_step(plain(Transformer()), cross_entropy)
    bp, kp, angles = both(loss_fn, OPTIMIZERS["adamw"], params, None, (tokens, following))
    assert np.mean(bp[-20:]) < 0.8 * bp[0], "it must have learned"
    np.testing.assert_allclose(kp, bp, rtol=1e-4)
    assert np.max(angles) < LARGEST_ANGLE and np.isfinite(angles).all()


class ResNet(nn.Module):
    """A small CIFAR ResNet (``stem`` 3), or one for ImageNet (``stem`` 7)."""

    widths: tuple[int, ...] = (8, 16)
    blocks: int = 1
    stem: int = 3
    classes: int = 10

    @nn.compact
    def __call__(self, x, train=True):
        norm = lambda: nn.BatchNorm(use_running_average=not train)
        x = nn.Conv(self.widths[0], (self.stem,) * 2, 2 if self.stem == 7 else 1, use_bias=False)(x)
        x = nn.relu(norm()(x))
        if self.stem == 7:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, width in enumerate(self.widths):
            for i in range(self.blocks):
                stride = 2 if stage and not i else 1
                y = nn.relu(norm()(nn.Conv(width, (3, 3), stride, use_bias=False)(x)))
                y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
                if stride > 1:
                    x = norm()(nn.Conv(width, (1, 1), stride, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def with_statistics(model):
    def apply(params, state, x):
        out, state = model.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
        return out, state["batch_stats"]

    return apply


@pytest.mark.slow
def test_resnet_follows_backprop():
    """In float64 Kolen-Pollack's losses differ from backprop's by rounding alone.

    The reference for rounding is backprop with each batch in another order. In float32 the order of a sum can change
    the sign of a ReLU's input, so trajectories diverge, differently on each machine.
    """
    rng = np.random.default_rng(2)
    x = rng.normal(size=(12, 8, 8, 8, 3)).astype(np.float64)
    labels = rng.integers(0, 10, (12, 8))
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: a.astype(np.float64), jax.jit(ResNet().init)(KEY, x[0]))
        params, statistics = variables["params"], variables["batch_stats"]
        assert len([k for k in params if k.startswith("Conv")]) == 6  # 5, and one in a shortcut
        rest = as_step(with_statistics(ResNet()), cross_entropy), OPTIMIZERS["sgd"], params, statistics
        data = x, labels
        (bp, _), (other, _) = histories(wmkp.backprop(), *rest, data, (x[:, ::-1], labels[:, ::-1]))
        [(kp, angles)] = histories(wmkp.kolen_pollack(start="mirror"), *rest, data)
    assert len(set(bp)) == len(bp)
    assert np.max(angles) < LARGEST_ANGLE and np.isfinite(angles).all()
    ours, theirs = (np.abs(run / bp - 1) for run in (kp, other))
    assert np.all(ours < 20 * np.maximum.accumulate(theirs) + 1e-12), (ours, theirs)
    assert np.max(ours) < 1e-12


@pytest.mark.slow
def test_resnet_is_mirrored_in_one_step():
    """With 2 fan_in orthogonal antithetic samples through ReLU, every angle is under 0.01 degrees after one step.

    The widths are an eighth of ResNet-18's, with one block per stage.
    """
    model = ResNet((8, 16, 32, 64), 1, 7)
    data = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.jit(model.init)(KEY, jnp.zeros(data.shape))
    params = variables["params"]
    fun = lambda params, x: with_statistics(model)(params, variables["batch_stats"], x)[0]
    found = wmkp.projections(fun, params, data)
    assert sum(p.feedback for p in found.values()) == 12 and max(p.fan_in for p in found.values()) == 576
    # The law gives 2 fan_in samples for the target angle.
    rule = wmkp.weight_mirror("orthogonal+antithetic", activation=jax.nn.relu, rate=1.0, target_angle=0.01)
    assert all(wmkp.samples_for_angle(0.01, p.fan_in, rule) == 2 * p.fan_in for p in found.values())
    signals = jax.jit(lambda params: wmkp.mirror_signals(KEY, rule, fun, params, data))(params)
    angles = wmkp.matrix_angles(params, signals)
    assert len(angles) == 12
    assert max(map(float, angles.values())) < 0.01, angles
    scale = wmkp.mirror_gain(rule)
    for w, signal in zip(jax.tree.leaves(params["Conv_1"]), jax.tree.leaves(signals["Conv_1"]), strict=True):
        np.testing.assert_allclose(signal / scale, w, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(w))))


# --- mirrored Kolen-Pollack -------------------------------------------------------------------------------------------

WIDTHS = 96, 160


def wide():
    rng = np.random.default_rng(2)
    params = {"first": rng.normal(size=(6, 96)), "w": rng.normal(size=WIDTHS) / np.sqrt(96)}
    return jax.tree.map(np.float32, params)


def wide_loss(params, model_state, batch, key):
    return jnp.mean((jnp.tanh(batch @ params["first"]) @ params["w"]) ** 2), (None, {})


def degrees(b, params):
    return float(wmkp.matrix_angles(params, {"first": None, "w": b})["w"])


def test_mirrored_kolen_pollack_is_backprop_from_the_first_step():
    """With default options the losses equal backprop's, and every mirror step is exact."""
    x = np.random.default_rng(3).normal(size=(5, 8, 6)).astype(np.float32)
    losses = {}
    for name, rule in {"mkp": wmkp.mirrored_kolen_pollack(), "bp": wmkp.backprop()}.items():
        steps = wmkp.make_steps(wide_loss, rule, OPTIMIZERS["sgd"], wide(), x[0])
        state, losses[name] = steps.init(KEY, wide()), []
        for batch in x:
            state, metrics = steps.engaged_step(state, batch)
            losses[name].append(float(metrics["loss"]))
            if name == "mkp":
                state, _ = steps.mirror_step(state)
                assert degrees(state.feedback["w"], state.params) < LARGEST_ANGLE
    np.testing.assert_allclose(losses["mkp"], losses["bp"], rtol=1e-5)
    assert int(state.mirrored) == 0


@pytest.mark.parametrize("noise", some_slow(["gaussian", "rademacher", "antithetic"], {"rademacher"}))
def test_mirrored_kolen_pollack_averages_over_all_mirror_steps(noise):
    """While W learns, t mirror steps of N samples give the angle of one of t N: tan(angle) = sqrt(fan_in / (t N))."""
    rule = wmkp.mirrored_kolen_pollack(noise, num_samples=400, start=3)
    x = np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.5, momentum=0.9))
    steps = wmkp.make_steps(wide_loss, rule, tx, wide(), x)
    state = steps.init(KEY, wide())
    pairs = 2 if noise == "antithetic" else 1
    law = lambda count: np.degrees(np.arctan(np.sqrt(96 * pairs / (400 * count))))
    assert int(state.mirrored) == 3
    assert degrees(state.feedback["w"], state.params) == pytest.approx(law(3), rel=0.05)
    assert wmkp.mirror_angle(400, 96, rule) == pytest.approx(law(3), rel=1e-6)
    for _ in range(9):
        for _ in range(4):
            state, _ = steps.engaged_step(state, x)
        state, _ = steps.mirror_step(state)
    assert np.linalg.norm(state.params["w"] - wide()["w"]) > 0.1 * np.linalg.norm(wide()["w"]), "W must have moved"
    assert int(state.mirrored) == 12
    assert degrees(state.feedback["w"], state.params) == pytest.approx(law(12), rel=0.12)


def test_mirrored_kolen_pollack_under_vmap_and_in_a_checkpoint():
    """The state holds the count of mirror steps. Each seed under vmap has one, and a copied state continues from it."""
    rule = wmkp.mirrored_kolen_pollack("gaussian", num_samples=64, start=2)
    x = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
    steps = wmkp.make_steps(wide_loss, rule, optax.sgd(0.1), wide(), x)
    run = lambda key: steps.mirror_step(steps.engaged_step(steps.init(key, wide()), x)[0])[0]
    keys = jax.random.split(KEY, 2)
    both, alone = jax.jit(jax.vmap(run))(keys), run(keys[1])
    assert both.mirrored.tolist() == [3, 3]
    np.testing.assert_allclose(both.feedback["w"][1], alone.feedback["w"], atol=1e-5)
    again = jax.tree.map(jnp.copy, alone)
    ours, theirs = steps.mirror_step(alone)[0], steps.mirror_step(again)[0]
    assert np.array_equal(ours.feedback["w"], theirs.feedback["w"]) and int(ours.mirrored) == 4


def test_mirrored_kolen_pollack_defaults():
    gaussian = wmkp.mirrored_kolen_pollack("gaussian")
    assert gaussian.mirror.start == 20 and gaussian.signal
    assert wmkp.mirror_angle(8 * 500, 500, gaussian) == pytest.approx(4.5, abs=0.1)
    with pytest.raises(ValueError, match="start must be an integer of at least 1"):
        wmkp.mirrored_kolen_pollack(start=0)
    assert wmkp.mirrored_kolen_pollack(start=0, rate=0.1).mirror.rate == 0.1
    with pytest.raises(ValueError, match=r"calibrated_mirror\(rule, rate=1 / t\)"):
        wmkp.updates.calibrated_mirror(gaussian)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_init_feedback_mirrors_as_steps_do():
    """By ``init_feedback`` and ``make_steps``, an exact start is W and a noisy one the mean of its estimates."""
    x = np.ones((3, 6), np.float32)
    noisy = wmkp.weight_mirror("gaussian", num_samples=64, start=3)
    exact = wmkp.kolen_pollack(start="mirror"), wmkp.mirrored_kolen_pollack(), wmkp.weight_mirror()
    signal = jax.jit(lambda key: wmkp.mirror_signals(key, noisy, wide_loss, wide(), None, x, KEY)["w"])
    mean = lambda key: sum(signal(jax.random.fold_in(key, i)) for i in range(3)) / 3
    for rule in (*exact, noisy):
        by_hand = wmkp.init_feedback(KEY, rule, wide_loss, wide(), None, x, KEY)
        by_steps = wmkp.make_steps(wide_loss, rule, OPTIMIZERS["sgd"], wide(), x).init(KEY, wide()).feedback
        assert by_hand["first"] is by_steps["first"] is None
        keys = jax.random.fold_in(KEY, 2**32 - 1), jax.random.split(KEY, 3)[2]  # the keys that each derives for itself
        for b, key in zip((by_hand["w"], by_steps["w"]), keys, strict=True):
            np.testing.assert_allclose(b, mean(key) if rule is noisy else wide()["w"], atol=1e-5)


def test_a_loop_by_hand_is_make_steps():
    """A hand-written loop and ``make_steps`` give the same B from the same B and noise."""
    x = np.random.default_rng(6).normal(size=(4, 8, 6)).astype(np.float32)
    tx, params = OPTIMIZERS["sgd"], wide()
    for rule in (
        wmkp.weight_mirror("gaussian", num_samples=64),
        wmkp.mirrored_kolen_pollack("gaussian", num_samples=64),
    ):
        steps = wmkp.make_steps(wide_loss, rule, tx, params, x[0])
        state = steps.init(KEY, params)
        w, b, opt = jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.copy, state.feedback), tx.init(params)
        feedback_tx = wmkp.updates.kolen_pollack(tx)
        feedback_opt = feedback_tx.init(b)
        for t, batch in enumerate(x):
            noise_key = jax.random.split(jax.random.split(state.key, 3)[0])[1]
            state, _ = steps.mirror_step(steps.engaged_step(state, batch)[0])
            _, (grads, signal) = wmkp.value_and_grad(wide_loss, rule, True)(w, b, None, batch, KEY)
            change, opt = tx.update(grads, opt, w)
            w = optax.apply_updates(w, change)
            if rule.signal is not None:
                change, feedback_opt = feedback_tx.update(signal, feedback_opt, b)
                b = optax.apply_updates(b, change)
            mirror = wmkp.updates.calibrated_mirror(rule, None if rule.mirror.rate else 1 / (rule.mirror.start + t + 1))
            signal = wmkp.mirror_signals(noise_key, rule, wide_loss, w, None, batch, KEY)
            b = optax.apply_updates(b, mirror.update(signal, mirror.init(b), b)[0])
        np.testing.assert_allclose(state.feedback["w"], b["w"], atol=1e-5)


# --- lag --------------------------------------------------------------------------------------------------------------


INS, OUTS = 48, 12


def reported(rule, groups, speed, steps=60):
    """Takes mirror steps by hand while W turns by ``speed`` radians per step.

    Returns the lags that ``lags`` reports and the true lags, in degrees.
    """
    fun = lambda p, x: jnp.sum(jnp.einsum("ngi,gio->ngo", jnp.tanh(jnp.einsum("nd,dgi->ngi", x, p["first"])), p["w"]))
    rng = np.random.default_rng(11)
    w = rng.normal(size=(groups, INS, OUTS)) / np.sqrt(INS)
    params = {"first": jnp.ones((3, groups, INS)), "w": jnp.asarray(w)}
    analysis = analyse(fun, params, jnp.ones((2, 3)))
    rules = resolve(rule, analysis)

    @jax.jit
    def lags(w, b, signal, t):
        return mirror.lags(rules, analysis, [params["first"], w], [None, b], [None, signal], t)["w"]

    b = late = w  # late is B without noise
    aside = rng.normal(size=w.shape)
    aside -= w * np.sum(w * aside) / np.sum(w * w)
    aside *= np.linalg.norm(w) / np.linalg.norm(aside)
    count, a, found, true = rule.mirror.num_samples, rule.mirror.rate, [], []
    for t in range(1, steps + 1):
        x = rng.normal(size=(groups, count, INS))
        if rule.mirror.noise == "orthogonal":
            x = np.linalg.qr(rng.normal(size=(groups, INS, INS)))[0][:, :count] * np.sqrt(INS)
        estimate = x.swapaxes(1, 2) @ (x @ w) / count
        if t > steps // 2:
            found.append(float(lags(w, b, estimate, t)))
            true.append(np.degrees(np.arctan(np.linalg.norm(w - late) / np.linalg.norm(w))))
        rate = a or 1 / t
        b, late = b + rate * (estimate - b), late + rate * (w - late)
        w, aside, before = np.cos(speed) * w + np.sin(speed) * aside, np.cos(speed) * aside - np.sin(speed) * w, w
        if not a:  # Kolen-Pollack's updates move B as W
            b, late = b + w - before, late + w - before
    return np.array(found), np.array(true)


MIRRORS = {
    "gaussian": wmkp.weight_mirror("gaussian", num_samples=8 * INS, rate=0.5),
    "gaussian, many and slow": wmkp.weight_mirror("gaussian", num_samples=32 * INS, rate=0.1),
    "gaussian, few": wmkp.weight_mirror("gaussian", num_samples=INS // 2, rate=0.2),
    "half of all directions": wmkp.weight_mirror("orthogonal", num_samples=INS // 2, rate=0.5),
    "exact": wmkp.weight_mirror("orthogonal", num_samples=INS, rate=1.0),
    "a mean of all": wmkp.mirrored_kolen_pollack("gaussian", num_samples=8 * INS, start=1),
}


@pytest.mark.parametrize("name", some_slow(MIRRORS, {"gaussian", "gaussian, few"}))
def test_noise_is_no_lag(name):
    """If W is fixed or B moves with W, the mean lag is under 1 degree. Few steps report more."""
    found, true = reported(MIRRORS[name], 3, 0.0 if MIRRORS[name].mirror.rate else 0.01)
    assert true.max() < 1e-6
    assert found.mean() < 1 and np.mean(found > 1) < 0.1


@pytest.mark.parametrize(
    ("name", "speed"),
    [("gaussian", 0.15), ("gaussian, many and slow", 0.02), ("half of all directions", 0.5), ("exact", 0.01), ("exact", 0.3)],
)  # fmt: skip
def test_lag_is_what_w_moved_beyond_the_noise(name, speed):
    """If W turns steadily, the reported lag is the angle between W and B without noise, to 10 %."""
    found, true = reported(MIRRORS[name], 1, speed)
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.1), (found, true)
    if name == "exact":
        np.testing.assert_allclose(found, true, rtol=1e-3)


def test_lag_of_a_slow_mirror_shows_and_of_kolen_pollacks_changes_does_not():
    x = np.random.default_rng(8).normal(size=(8, 6)).astype(np.float32)
    found = {}
    for name, rule in {
        "slow": wmkp.weight_mirror("gaussian", num_samples=4000, rate=0.05),
        "exact": wmkp.weight_mirror(),
        "mkp": wmkp.mirrored_kolen_pollack("gaussian"),
    }.items():
        steps = wmkp.make_steps(wide_loss, rule, optax.sgd(0.5), wide(), x)
        state = steps.init(KEY, wide())
        for _ in range(20):
            state, metrics = steps.mirror_step(steps.engaged_step(state, x)[0])
        found[name] = float(metrics["lag"]["w"])
    assert found["mkp"] == 0 and found["slow"] > 3 * found["exact"] > 0


# --- learning rates that are traced -----------------------------------------------------------------------------------


def test_learning_rates_can_be_vmapped():
    rule = wmkp.mirrored_kolen_pollack("gaussian", num_samples=64, start=2)
    x = np.random.default_rng(9).normal(size=(8, 6)).astype(np.float32)

    def train(rate):
        tx = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(rate, momentum=0.9))
        steps = wmkp.make_steps(wide_loss, rule, tx, wide(), x)
        state = steps.init(KEY, wide())
        for _ in range(3):
            state, metrics = steps.engaged_step(state, x)
            state, _ = steps.mirror_step(state)
        return metrics["loss"], state.feedback["w"]

    rates = jnp.array([0.1, 0.3])
    together = jax.jit(jax.vmap(train))(rates)
    alone = train(float(rates[1]))
    np.testing.assert_allclose(together[0][1], alone[0], rtol=1e-5)
    np.testing.assert_allclose(together[1][1], alone[1], atol=1e-5)
    assert abs(together[0][0] / together[0][1] - 1) > 1e-3


def test_a_traced_optimizer_of_b_is_taken_as_it_is():
    def change(rate):
        tx = wmkp.updates.kolen_pollack(optax.sgd(rate))
        b = {"w": jnp.ones((3, 4))}
        return tx.update(b, tx.init(b), b)[0]["w"]

    np.testing.assert_allclose(jax.jit(change)(0.5), -0.5)
    np.testing.assert_allclose(jax.vmap(change)(jnp.array([0.5, 1.0]))[:, 0, 0], [-0.5, -1.0])


def test_one_learning_rate_for_w_and_b():
    """B uses the learning rate in W's optimizer state. A rate set in B's optimizer state alone has no effect."""
    x = np.random.default_rng(10).normal(size=(8, 6)).astype(np.float32)
    inject = optax.inject_hyperparams(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9))
    tx = optax.chain(optax.clip(10.0), inject(learning_rate=0.1))
    steps = wmkp.make_steps(wide_loss, wmkp.kolen_pollack(start="mirror"), tx, wide(), x)
    for ours, theirs in ((0.5, 0.1), (0.1, 0.5)):
        state = steps.init(KEY, wide())
        state.opt_state[1].hyperparams["learning_rate"] = jnp.float32(ours)
        state.feedback_opt_state[0][1].hyperparams["learning_rate"] = jnp.float32(theirs)
        plain = optax.sgd(ours, momentum=0.9)
        reference = wmkp.make_steps(wide_loss, wmkp.kolen_pollack(start="mirror"), plain, wide(), x)
        expected = reference.init(KEY, wide())
        for _ in range(3):
            state, expected = steps.engaged_step(state, x)[0], reference.engaged_step(expected, x)[0]
        np.testing.assert_allclose(state.params["w"], expected.params["w"], atol=1e-6)
        np.testing.assert_allclose(state.feedback["w"], state.params["w"], atol=1e-6)
        assert float(state.feedback_opt_state[0][1].hyperparams["learning_rate"]) == pytest.approx(ours)
