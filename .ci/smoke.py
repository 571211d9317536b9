"""What an installed wmkp must do, wherever Python starts: `python smoke.py VERSION` trains a small model under a rule."""

import importlib.resources
import sys

import jax
import jax.numpy as jnp
import optax

import wmkp

assert wmkp.__version__ == sys.argv[1], f"wmkp is {wmkp.__version__} from {wmkp.__file__}"
assert (importlib.resources.files("wmkp") / "py.typed").is_file()


def loss_fn(params, state, batch, key):
    """The mean squared error of two layers."""
    prediction = jnp.tanh(batch @ params["W1"]) @ params["W2"]
    return jnp.mean((prediction - jnp.sin(batch)) ** 2), (state, {})


keys = jax.random.split(jax.random.key(0), 3)
params = {"W1": jax.random.normal(keys[0], (4, 16)) / 2, "W2": jax.random.normal(keys[1], (16, 4)) / 4}
batch = jax.random.normal(keys[2], (32, 4))
steps = wmkp.make_steps(loss_fn, wmkp.weight_mirror(), optax.sgd(0.1), params, batch)
state = steps.init(jax.random.key(1), params)
for _ in range(20):
    state, metrics = steps.engaged_step(state, batch)
    state, _ = steps.mirror_step(state)
assert jnp.isfinite(metrics["loss"])
print(f"wmkp {wmkp.__version__} from {wmkp.__file__}: {wmkp.matrix_angles(state.params, state.feedback)}")
