"""The models have the published numbers of parameters, and wmkp finds no obstacle in any of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import wmkp
from wmkp.experiments.models.lenet import LeNet
from wmkp.experiments.models.resnet import ResNet18, ResNet20, ResNet50, ResNet56
from wmkp.experiments.models.transformer import Decoder, ViT

pytestmark = pytest.mark.usefixtures("quick_compile")

# (model, input, parameters, weights with a feedback path)
MODELS = {
    "LeNet": (LeNet(10), (2, 32, 32, 1), 61_706, 4),
    "ResNet-20": (ResNet20(10), (2, 32, 32, 3), 269_722, 19),  # He et al.: 0.27 million
    "ResNet-56": (ResNet56(10), (2, 32, 32, 3), 853_018, 55),  # 0.85 million
    "ResNet-18": (ResNet18(1000), (2, 224, 224, 3), 11_689_512, 20),
    "ResNet-18, BatchNorm after the ReLU": (ResNet18(1000, norm_last=True), (2, 224, 224, 3), 11_689_512, 20),
    "ResNet-50": (ResNet50(1000), (2, 224, 224, 3), 25_557_032, 53),
    "ViT-Ti/16": (ViT(1000), (2, 224, 224, 3), 5_717_416, 12 * 6 + 1),  # DeiT-Ti
    "Decoder": (Decoder(64, 32), (2, 32), None, 3 * 6 + 1),
}


@pytest.mark.parametrize(("name", "dtype"), [*((n, jnp.float32) for n in MODELS), ("ResNet-18", jnp.bfloat16)])
def test_parameters_and_projections(name, dtype):
    model, shape, count, weights = MODELS[name]
    if dtype == jnp.bfloat16:
        if not hasattr(model, "dtype"):
            pytest.skip("computes in float32 alone")
        model = model.clone(dtype=dtype)
    x = jax.ShapeDtypeStruct(shape, jnp.int32 if name == "Decoder" else jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    if count is not None:
        assert sum(p.size for p in jax.tree.leaves(variables["params"])) == count
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables["params"]))

    def loss(params, rest, x):
        out, _ = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
        assert out.dtype == jnp.float32
        return out.sum()

    rest = {k: v for k, v in variables.items() if k != "params"}
    found = wmkp.projections(loss, variables["params"], rest, x)
    assert not any(p.obstacle for p in found.values())
    assert sum(p.feedback for p in found.values()) == weights


@pytest.mark.slow
def test_lenet_pools_as_flax_does():
    """LeNet's pooling gives the same values and gradients as nn.max_pool."""

    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (6, 16):
                x = nn.max_pool(nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x)), (2, 2), strides=(2, 2))
            x = x.reshape(x.shape[0], -1)
            for features in (120, 84):
                x = nn.relu(nn.Dense(features)(x))
            return nn.Dense(10, name="output")(x)

    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 1))
    params = jax.jit(LeNet(10).init)(jax.random.key(1), x)

    def of(model):
        return jax.jit(jax.value_and_grad(lambda p: (model.apply(p, x) ** 2).sum()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of(LeNet(10)), of(Pooled()))
