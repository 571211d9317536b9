"""Steps on a mesh: eight devices give the results of one, replicated or sharded, and share mirror mode's work."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import drawn
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from marks import some_slow

import wmkp
from benchmarks import hlo
from wmkp.training import batch_sharding, state_sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

DEVICES = 8
RULES = {
    "bp": wmkp.backprop(),
    "kp": wmkp.kolen_pollack(),
    "wmo": wmkp.weight_mirror("orthogonal+antithetic", num_samples=200, activation=jax.nn.relu),
}
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9))


class Net(nn.Module):
    """A network with BatchNorm, which needs the whole batch, and with widths that eight does and does not divide."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(12, (3, 3), strides=2)(x).reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.tanh(nn.Dense(30)(x)))


MODEL = Net()


def loss_fn(params, model_state, batch, key):
    logits, model_state = MODEL.apply({"params": params, **model_state}, batch[0], mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), (model_state, {})


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(16, 8, 8, 3)).astype(np.float32), rng.integers(0, 10, 16).astype(np.int32)


def the_mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def run(name, **over):
    """Takes two engaged steps with a mirror step after each, and returns (losses, state)."""
    variables = drawn(0, jax.eval_shape(MODEL.init, jax.random.key(0), batch()[0]), 0.1)
    params, model_state = variables.pop("params"), variables
    steps = wmkp.make_steps(loss_fn, RULES[name], OPTIMIZER, params, batch(), model_state=model_state, **over)
    state = steps.init(jax.random.key(1), params, model_state)
    losses = []
    for i in range(2):
        data = jax.device_put(batch(i), batch_sharding(over["mesh"])) if "mesh" in over else batch(i)
        state, metrics = steps.engaged_step(state, data)
        losses.append(float(metrics["loss"]))
        state, _ = steps.mirror_step(state)
    return losses, state


@pytest.mark.parametrize("name", some_slow(["kp", "wmo"], {"wmo"}))
def test_eight_devices_do_what_one_does(name, caplog):
    """With ``fsdp`` they also divide W, B and their moments."""
    losses, one = run(name)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        many_losses, many = run(name, mesh=the_mesh(), fsdp=True)
    compiled = [record.getMessage().split()[1] for record in caplog.records if "Compiling" in record.getMessage()]
    for step in ("jit(engaged_step)", "jit(mirror_step)"):
        assert compiled.count(step) == 1, "a step came back laid out in another way"
    np.testing.assert_allclose(many_losses, losses, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(many):
        assert len(leaf.sharding.device_set) == DEVICES
    kernel = many.params["Conv_0"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, None, ("data",))
    assert kernel.addressable_shards[0].data.shape == (3, 3, 3, 2)
    moments = [state[1][0].trace for state in (many.opt_state, *many.feedback_opt_state)]
    for tree in (many.feedback, *moments):
        assert tree["Dense_0"]["kernel"].sharding == many.params["Dense_0"]["kernel"].sharding
    mine, whole = (
        sum(x.nbytes for x in jax.tree.leaves(tree))
        for tree in (jax.tree.map(lambda b: b.addressable_shards[0].data, many.feedback), many.feedback)
    )
    assert mine < 1.3 * whole / DEVICES  # eight does not divide the output's (30, 10)


@pytest.mark.slow
def test_fsdp_divides_the_batch_and_gathers_what_it_divides():
    """Devices exchange W, B and gradients, and no activations."""
    shapes, mesh = jax.eval_shape(MODEL.init, jax.random.key(0), batch()[0]), the_mesh()
    params = shapes.pop("params")
    steps = wmkp.make_steps(
        loss_fn, RULES["kp"], OPTIMIZER, params, batch(), model_state=shapes, mesh=mesh, fsdp=True
    )  # fmt: skip
    state = jax.eval_shape(steps.init, jax.random.key(0), *(drawn(0, tree, 0.1) for tree in (params, shapes)))
    placed = lambda tree, where: jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
    )
    state = placed(state, state_sharding(state, mesh, True))
    data = placed(batch(), (batch_sharding(mesh),) * 2)
    found = hlo.collectives(hlo.parse(steps.engaged_step.lower(state, data).compile().as_text()))
    assert "all-gather" in found and found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}, found


def test_mirror_noise_is_divided_among_the_devices():
    """In the compiled mirror step each device has an eighth of the samples and about an eighth of the operations."""
    params = {"first": np.ones((4, 64), np.float32), "w": np.ones((64, 96), np.float32)}

    def loss(params, model_state, x, key):
        return jnp.mean(jnp.tanh(x @ params["first"]) @ params["w"]), (None, {})

    x = np.ones((DEVICES, 4), np.float32)

    def flops(**over):
        steps = wmkp.make_steps(
            loss, wmkp.weight_mirror("gaussian", num_samples=800, rate=0.1, start=0), OPTIMIZER, params, x, **over
        )
        state = steps.init(jax.random.key(0), params)
        compiled = steps.mirror_step.lower(state).compile()
        return compiled.cost_analysis()["flops"], compiled.as_text()

    one, _ = flops()
    each, text = flops(mesh=the_mesh())
    assert 4 * 800 * 64 * 96 < one < 1.5 * 4 * 800 * 64 * 96
    assert each < 1.2 * one / DEVICES
    assert "f32[100,96]" in text or "f32[1,100,96]" in text
    assert "all-reduce" in text
    assert "f32[1,800,64]" not in text and "f32[800,64]" not in text, "noise for all devices on each"


def test_noise_that_devices_share_is_summed_over_them_once(monkeypatch):
    """One device may draw noise in parts. Eight devices do not, because each part would need a sum over them."""
    params = {"first": np.ones((4, 64), np.float32), "w": np.ones((64, 96), np.float32)}
    loss = lambda params, model_state, x, key: (jnp.mean(jnp.tanh(x @ params["first"]) @ params["w"]), (None, {}))
    x = np.ones((DEVICES, 4), np.float32)

    def loops(mesh):
        steps = wmkp.make_steps(
            loss, wmkp.weight_mirror("gaussian", num_samples=800, rate=0.1, start=0), OPTIMIZER, params, x, mesh=mesh
        )
        return steps.mirror_step.lower(steps.init(jax.random.key(0), params)).compile().as_text().count(" while(")

    meshes = the_mesh(), None, jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    whole = [loops(mesh) for mesh in meshes]
    monkeypatch.setattr(wmkp.mirror, "AT_ONCE", 1)
    monkeypatch.setattr(wmkp.mirror, "LEAST", 100)
    assert [loops(mesh) > before for mesh, before in zip(meshes, whole, strict=True)] == [False, True, True]


@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "orthogonal"])
def test_each_device_makes_its_own_noise(noise):
    """No device sends noise to another, and the noise equals that of one device."""
    where = jax.sharding.NamedSharding(the_mesh(), jax.sharding.PartitionSpec(None, "data", None))
    rule = wmkp.weight_mirror(noise)
    draw = lambda key: wmkp.noise.draw_noise(key, rule.mirror, (1, 40, 40), jnp.float32)
    shared = jax.jit(draw, out_shardings=where).lower(jax.random.key(0)).compile()
    assert "collective-permute" not in shared.as_text() and "all-" not in shared.as_text()
    np.testing.assert_allclose(shared(jax.random.key(0)), jax.jit(draw)(jax.random.key(0)), atol=1e-5)


def test_finite_names_the_parameter():
    params = {"first": np.ones((4, 5), np.float32), "w": np.ones((5, 3), np.float32)}

    def loss(params, model_state, x, key):
        # The square root's derivative at zero is infinite, so the loss is finite and the gradient is not.
        return jnp.mean(jnp.sqrt(jnp.abs(x @ params["first"])) @ params["w"]), (None, {})

    steps = wmkp.make_steps(loss, wmkp.kolen_pollack(), OPTIMIZER, params, np.ones((2, 4)), check_finite=True)
    _, good = steps.engaged_step(steps.init(jax.random.key(0), params), np.ones((2, 4), np.float32))
    assert all(good["finite"].values()) and set(good["finite"]) == {"loss", "first", "w"}
    _, bad = steps.engaged_step(steps.init(jax.random.key(0), params), np.zeros((2, 4), np.float32))
    assert {path: bool(ok) for path, ok in bad["finite"].items()} == {"loss": True, "first": False, "w": True}


def test_finite_is_a_metric_like_any_where_it_is_not_asked_for():
    loss = lambda params, model_state, x, key: (jnp.sum(x @ params["w"]), (None, {"finite": 7.0}))
    params = {"w": np.ones((4, 5), np.float32)}
    steps = wmkp.make_steps(loss, wmkp.kolen_pollack(), OPTIMIZER, params, np.ones((2, 4), np.float32))
    _, metrics = steps.engaged_step(steps.init(jax.random.key(0), params), np.ones((2, 4), np.float32))
    assert float(metrics["finite"]) == 7


@pytest.mark.parametrize("what", ["gradient", "signal"])
def test_finite_is_of_gradient_and_signal_both(what):
    """``finite`` is False if W's gradient is not finite or if B's signal is not."""

    def loss(params, model_state, x, key):
        value = jnp.mean(jnp.tanh(x @ params["first"]) @ params["w"])
        return value + (0 * jnp.sqrt(params["w"][0, 0]) if what == "gradient" else 0), (None, {})

    rule = wmkp.kolen_pollack() if what == "gradient" else wmkp.activation_alignment()
    params = {"first": np.ones((4, 5), np.float32), "w": np.zeros((5, 3), np.float32)}
    steps = wmkp.make_steps(loss, rule, OPTIMIZER, params, np.ones((2, 4)), check_finite=True)
    state = steps.init(jax.random.key(0), params)
    if what == "signal":
        state = state._replace(feedback={"first": None, "w": np.full((5, 3), 3e38, np.float32)})
    _, metrics = steps.engaged_step(state, np.ones((2, 4), np.float32))
    assert {path: bool(ok) for path, ok in metrics["finite"].items()} == {"loss": True, "first": True, "w": False}


def test_a_batch_is_divided_among_the_devices_of_all_axes():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    shards = jax.device_put(np.zeros((16, 3)), batch_sharding(mesh)).addressable_shards
    assert [shard.data.shape for shard in shards] == [(2, 3)] * DEVICES


def test_errors():
    arguments = (loss_fn, RULES["bp"], OPTIMIZER, {"w": np.ones(3)}, batch())
    with pytest.raises(ValueError, match="axis_name.*or mesh, not both"):
        wmkp.make_steps(*arguments, mesh=the_mesh(), axis_name="d")
    with pytest.raises(ValueError, match="fsdp.*pass mesh=mesh"):
        wmkp.make_steps(*arguments, fsdp=True)
