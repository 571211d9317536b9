"""Spiking networks of spyx with three kinds of neuron, trained by surrogate gradients through time."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from flax import nnx
from harness import KEY, Case, Model, check, drawn, normal, parametrize, through_gain

import wmkp.nnx

spyx = pytest.importorskip("spyx.nn", reason="pip install -e '.[integration]'")

pytestmark = pytest.mark.usefixtures("quick_compile")

SPIKING = 3.0  # scales the currents so that neurons spike


class Network(nnx.Module):
    """A layer of spiking neurons and a readout by leaky integrators, run over time."""

    def __init__(self, neurons: Callable[..., Any], rngs: nnx.Rngs):
        hidden = nnx.Linear(6, 8, rngs=rngs), neurons((8,), rngs=rngs)
        self.layers = spyx.Sequential(*hidden, nnx.Linear(8, 5, rngs=rngs), spyx.LI((5,), rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return spyx.run(self.layers, SPIKING * x)[0].sum(0)


def network(neurons: Callable[..., Any]) -> Case:
    """A case of a network on 4 sequences of 7 steps."""

    def make() -> Model:
        apply, params, state = wmkp.nnx.pure(nnx.eval_shape(lambda: Network(neurons, nnx.Rngs(KEY))))
        run = lambda params, x, state: apply(params, state, x)[0]
        return through_gain(run, drawn(params), normal(7, 4, 6, seed=1), drawn(state))

    return Case(make, local="bias|beta|gamma|alpha")


CASES = {
    "ALIF": network(spyx.ALIF),
    "recurrent CuBaLIF": network(spyx.RCuBaLIF),
    "PSU_LIF": network(spyx.PSU_LIF),
}


@parametrize(CASES)
def test_spyx(case):
    check(case)
