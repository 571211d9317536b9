"""NumPy arrays for the tests. JAX would compile a program for each shape that it draws."""

import math

import jax
import numpy as np

import wmkp


def normal(seed, *shape):
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(seed, shapes, scale=0.4):
    """Normal numbers of the shapes and dtypes of a tree, as from ``jax.eval_shape``."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def drawn_feedback(rule, fun, params, *args):
    """Feedback weights of the structure that ``wmkp.init_feedback`` returns."""
    init = lambda params: wmkp.init_feedback(jax.random.key(0), rule, fun, params, *args)
    return drawn(7, jax.eval_shape(init, params))


def angle(a, b):
    """The angle between two arrays as vectors, in degrees."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return math.degrees(2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))
