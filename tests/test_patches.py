"""A convolution's weight gradient by patches equals XLA's, in every layout and over devices.

Patches are used only for some convolutions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import wmkp
from wmkp.program import patches

pytestmark = pytest.mark.usefixtures("quick_compile")

CASES = {
    "same": ((6, 9, 8, 3), (3, 3, 3, 5), "NHWC", "HWIO", {}),
    "strided": ((6, 9, 8, 3), (3, 2, 3, 5), "NHWC", "HWIO", {"window_strides": (2, 3)}),
    "dilated": ((6, 9, 11, 3), (3, 2, 3, 5), "NHWC", "HWIO", {"rhs_dilation": (2, 3)}),
    "both": ((6, 13, 11, 3), (3, 2, 3, 5), "NHWC", "HWIO", {"rhs_dilation": (3, 2), "window_strides": (2, 2)}),
    "padded unevenly": ((6, 9, 8, 3), (3, 3, 3, 5), "NHWC", "HWIO", {"padding": ((0, 2), (3, 1))}),
    "valid": ((6, 9, 8, 3), (4, 1, 3, 5), "NHWC", "HWIO", {"padding": "VALID"}),
    "1x1": ((6, 5, 4, 3), (1, 1, 3, 5), "NHWC", "HWIO", {}),
    "channels first": ((6, 3, 9, 8), (5, 3, 3, 3), "NCHW", "OIHW", {"window_strides": (2, 1)}),
    "one dimension": ((7, 9, 3), (4, 3, 5), "NHC", "HIO", {"window_strides": (2,)}),
    "three dimensions": ((2, 5, 6, 4, 3), (3, 2, 2, 3, 4), "NDHWC", "DHWIO", {"window_strides": (1, 2, 1)}),
}


def convolution(layouts, options):
    def convolve(x, w):
        strides = options.get("window_strides", (1,) * (w.ndim - 2))
        rest = {name: value for name, value in options.items() if name != "window_strides"}
        return jax.lax.conv_general_dilated(
            x, w, strides, **{"padding": "SAME"} | rest, dimension_numbers=(*layouts, layouts[0])
        )

    return convolve


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(patches, "LEAST", 0)


@pytest.mark.parametrize("case", CASES)
def test_it_is_xlas_own(case, always, monkeypatch):
    """This holds for an example at a time and for all at once."""
    x_shape, w_shape, *layouts, options = CASES[case]
    convolve = convolution(layouts, options)
    x, w, b = (normal(i, *s) for i, s in enumerate((x_shape, w_shape, w_shape)))

    def loss(params, x):
        return jnp.sum(jnp.sin(convolve(x * params["first"], params["w"])))

    params, feedback = {"first": np.float32(1), "w": w}, {"first": None, "w": b}
    expected = jax.jit(jax.grad(loss))(params, x)
    for chunk in (1, 2**19):
        monkeypatch.setattr(patches, "CHUNK", chunk)
        gradient = jax.jit(lambda p, x: wmkp.value_and_grad(loss, wmkp.kolen_pollack())(p, feedback, x)[1])
        compiled = gradient.lower(params, x).compile()
        grads, signal = compiled(params, x)
        np.testing.assert_allclose(grads["w"], expected["w"], rtol=2e-4, atol=2e-4)
        np.testing.assert_array_equal(signal["w"], grads["w"])
        assert "while" in compiled.as_text() or chunk > 1, "XLA's own was used"


def test_it_is_used_for_large_float32_convolutions_of_one_position_or_few_outputs():
    def used(x_shape, w_shape, dtype=jnp.float32, padding=((1, 1), (1, 1)), **options):
        convolve = lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )
        x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x_shape, w_shape))
        loss = lambda p, x: jnp.sum(convolve(x, p).astype(jnp.float32))
        gradient = lambda p, x: wmkp.value_and_grad(loss, wmkp.kolen_pollack())(p, None, x)
        return "scan[" in str(jax.make_jaxpr(gradient)(w, x))  # a scan over the patches

    assert used((32, 32, 32, 16), (3, 3, 16, 16))
    assert used((32, 16, 16, 64), (1, 1, 64, 64)), "one position"
    assert not used((32, 16, 16, 64), (3, 3, 64, 64)), "many outputs"
    assert not used((4, 16, 16, 16), (3, 3, 16, 16)), "small"
    assert not used((32, 32, 32, 16), (3, 3, 16, 16), jnp.bfloat16), "not float32"
    assert not used((32, 32, 32, 16), (3, 3, 4, 16), feature_group_count=4), "grouped"
    assert not used((32, 32, 32, 16), (3, 3, 16, 16), batch_group_count=2), "grouped by batch"
    assert not used((32, 32, 32, 16), (3, 3, 16, 16), lhs_dilation=(2, 2)), "transposed"
    assert not used((32, 32, 32, 16), (3, 3, 16, 16), padding=((-1, 1), (1, 1))), "cropped"


def test_under_vmap_scan_and_over_devices(always, monkeypatch):
    monkeypatch.setattr(patches, "CHUNK", 1)
    convolve = convolution(("NHWC", "HWIO"), {})
    x, w = normal(0, 16, 6, 6, 3), normal(1, 3, 3, 3, 4)
    loss = lambda w, x: jnp.mean(jnp.sin(convolve(x, w)))
    ours = lambda w, x: wmkp.value_and_grad(loss, wmkp.kolen_pollack())(w, None, x)[1][0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    parts = x.reshape(4, 4, *x.shape[1:])
    alone = lambda w, x: (jax.grad(loss)(w, x.reshape(16, *x.shape[2:])), jax.vmap(ours, (None, 0))(w, x).mean(0),
                          jax.lax.map(lambda x: ours(w, x), x).mean(0))  # fmt: skip
    expected, by_vmap, by_map = jax.jit(alone)(w, parts)
    close(by_vmap, expected)
    close(by_map, expected)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    close(jax.jit(ours)(w, divided), expected)
    for vma in (True, False):
        own = lambda w, x: jax.lax.pmean(ours(jax.lax.pcast(w, "d", to="varying") if vma else w, x), "d")
        mapped = jax.shard_map(
            own, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec(), check_vma=vma
        )
        close(jax.jit(mapped)(w, divided), expected)
