"""Whole vision networks of Equimo: a transformer, a convolutional network and a state space model."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from harness import KEY, Case, check, normal, parametrize, through_gain
from test_equinox import split

eqx = pytest.importorskip("equinox", reason="pip install -e '.[integration]'")
models = pytest.importorskip("equimo.models", reason="pip install -e '.[integration]'")

pytestmark = pytest.mark.usefixtures("quick_compile")


def network(build: Callable[[Any], Any], **options: Any) -> Case:
    """A case of a network that takes one image of shape (3, 32, 32) and a key. The batch has two images."""

    def make() -> Any:
        params, static = split(eqx.filter_eval_shape(build, KEY))
        run = lambda model, x: jax.vmap(lambda image: model(image, key=KEY, inference=True))(x)
        return through_gain(lambda params, x: run(eqx.combine(params, static), x), params, normal(2, 3, 32, 32, seed=1))

    return Case(make, **options)


# Learned tokens and positions are activities, not weights between neurons.
CASES = {
    "VisionTransformer": network(
        lambda key: models.VisionTransformer(
            32, 3, 12, 16, 2, [1], key=key, num_classes=5, qk_norm=True, init_values=0.1, reg_tokens=2
        ),
        local="bias|token|pos_embed",
    ),
    "ConvNeXt": network(lambda key: models.ConvNeXt(depths=[1, 1], dims=[8, 12], num_classes=5, key=key), local="bias"),
    "Vssd": network(
        lambda key: models.Vssd(
            32, 3, key=key, dim=8, d_state=4, depths=[1], num_heads=[2], attentions_layers=("mamba2mixer",), num_classes=5,
        ),
        local="bias",
    ),
}  # fmt: skip


@parametrize(CASES)
def test_equimo(case):
    check(case)
