"""Equinox modules, whose floating-point arrays are the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from harness import KEY, Case, Model, check, drawn, normal, parametrize, through_gain

import wmkp

eqx = pytest.importorskip("equinox", reason="pip install -e '.[integration]'")
nn = eqx.nn

pytestmark = pytest.mark.usefixtures("quick_compile")


def split(shapes: Any) -> tuple[Any, Any]:
    """Splits a module into its floating-point arrays, randomly drawn, and everything else."""
    params, static = eqx.partition(shapes, lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating))
    return drawn(params), jax.tree.map(lambda x: drawn(x) if hasattr(x, "dtype") else x, static)


def module(build: Callable[[Any], Any], *shape: int, call: Any = None, **options: Any) -> Case:
    """A case of a module that takes one sample, on a batch of this shape."""

    def make() -> Model:
        params, static = split(eqx.filter_eval_shape(build, KEY))
        run = call or (lambda model, x: jax.vmap(model)(x))
        apply = lambda params, x: run(eqx.combine(params, static), x)
        return through_gain(apply, params, normal(*shape, seed=1))

    return Case(make, **options)


def stateful(build: Callable[[Any], Any], *shape: int, **options: Any) -> Case:
    """A case of a module with a state (BatchNorm's statistics, a spectral norm's vectors), which is passed as data."""

    def make() -> Model:
        model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(build), KEY)
        params, static = split(model)

        def apply(params: Any, x: Any, state: Any) -> Any:
            batched = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return batched(x, state)[0]

        return through_gain(apply, params, normal(*shape, seed=1), drawn(state))

    return Case(make, **options)


class RNN(eqx.Module):
    cell: Any
    head: Any

    def __init__(self, cell, key):
        self.cell, self.head = cell(4, 6, key=key), nn.Linear(6, 3, key=key)

    def __call__(self, x):
        return self.head(jax.lax.scan(lambda carry, x: (self.cell(x, carry), None), jnp.zeros(6), x)[0])


class Layers(eqx.Module):
    """Layers stacked by filter_vmap and run by scan and filter_checkpoint, as Equinox recommends."""

    layers: Any

    def __init__(self, key):
        self.layers = eqx.filter_vmap(lambda key: nn.MLP(6, 6, 8, 1, key=key))(jax.random.split(key, 3))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        step = eqx.filter_checkpoint(lambda x, layer: x + eqx.combine(layer, static)(x))
        return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, arrays)[0]


class Tied(eqx.Module):
    """An embedding and a linear layer that share one matrix by nn.Shared."""

    shared: Any

    def __init__(self, key):
        embedding, linear = nn.Embedding(7, 6, key=key), nn.Linear(6, 7, key=key)
        self.shared = nn.Shared((embedding, linear), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def __call__(self, x):
        embedding, linear = self.shared()
        return jax.vmap(linear)(jnp.tanh(jax.vmap(embedding)(jnp.arange(len(x)) % 7) + x))


class Normalizations(eqx.Module):
    layers: Any

    def __init__(self, key):
        self.layers = nn.Sequential(
            [nn.Conv2d(3, 4, 3, key=key), nn.BatchNorm(4, "batch", mode="batch"), nn.Lambda(jax.nn.relu), nn.GroupNorm(2, 4),
             nn.Conv2d(4, 4, 2, key=key), nn.LayerNorm((4, 3, 3)), nn.MaxPool2d(3), nn.Lambda(jnp.ravel),
             nn.Linear(4, 3, key=key), nn.RMSNorm(3)]
        )  # fmt: skip

    def __call__(self, x, state):
        return self.layers(x, state)


class NeuralODE(eqx.Module):
    """A differential equation that diffrax solves, with a linear readout."""

    field: Any
    head: Any
    adjoint: Any = eqx.field(static=True)

    def __init__(self, adjoint, key):
        self.field, self.head = nn.MLP(6, 6, 8, 1, activation=jnp.tanh, key=key), nn.Linear(6, 3, key=key)
        self.adjoint = adjoint

    def __call__(self, x):
        diffrax = pytest.importorskip("diffrax", reason="pip install -e '.[integration]'")
        term = diffrax.ODETerm(lambda t, y, field: field(y))
        options = {"args": self.field, "adjoint": getattr(diffrax, self.adjoint)(), "max_steps": 2}
        return self.head(diffrax.diffeqsolve(term, diffrax.Euler(), 0.0, 1.0, 0.5, x, **options).ys[-1])


attention = lambda model, x: jax.vmap(model)(x, x, x)

CASES = {
    "Conv2d": module(lambda key: nn.Conv2d(4, 6, 3, groups=2, padding="SAME", key=key), 2, 4, 6, 6),
    "Conv3d": module(lambda key: nn.Conv3d(3, 3, 2, dilation=2, key=key), 2, 3, 4, 4, 4),
    "ConvTranspose2d": module(lambda key: nn.ConvTranspose2d(3, 5, 3, 2, key=key), 2, 3, 4, 4),
    "GRUCell": module(lambda key: RNN(nn.GRUCell, key), 2, 5, 4),
    "MultiheadAttention": module(lambda key: nn.MultiheadAttention(2, 6, key=key), 2, 4, 6, call=attention),
    "layers under filter_vmap, scan and filter_checkpoint": module(Layers, 4, 6, kept="layers/0/weight"),
    "Shared": module(Tied, 2, 5, 6, in_part="weight"),
    "WeightNorm": module(lambda key: nn.WeightNorm(nn.Linear(6, 5, key=key)), 4, 6, local="bias|/g$", in_part="weight", kept="weight"),
    "SpectralNorm": stateful(lambda key: nn.SpectralNorm(nn.Linear(6, 5, key=key), "weight", key=key), 4, 6, kept="weight"),
    "neural ODE": module(lambda key: NeuralODE("DirectAdjoint", key), 4, 6),
    "normalizations": stateful(Normalizations, 4, 3, 6, 6, local="bias|layers/5", declared="layers/5/weight"),
}  # fmt: skip


@parametrize(CASES)
def test_equinox(case):
    check(case)


def test_a_derivative_of_the_solvers_own_is_refused():
    """B cannot follow the field's parameters through diffrax's ``RecursiveCheckpointAdjoint``."""
    fun, params, args = module(lambda key: NeuralODE("RecursiveCheckpointAdjoint", key), 4, 6).make()
    obstacles = {path: p.obstacle for path, p in wmkp.projections(fun, params, *args).items() if p.obstacle}
    names = "weight", "bias"
    assert obstacles.keys() == {f"model/field/layers/{i}/{name}" for i in (0, 1) for name in names}
    assert all("custom_vjp_call" in obstacle for obstacle in obstacles.values())


def test_a_whole_module_as_params_is_an_error_that_names_what_is_no_array():
    model = eqx.filter_eval_shape(lambda: nn.MLP(6, 3, 8, 2, key=KEY))
    with pytest.raises(TypeError, match=r"params\['activation'\].*parameters must be floating-point arrays"):
        wmkp.projections(lambda model, x: jax.vmap(model)(x).sum(), model, normal(4, 6))
