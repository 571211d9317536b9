"""The library's functions with every call one compiled program.

Called plainly, each of their operations is compiled by itself: dozens of programs, which take longer to compile than to run.
"""

import jax

import wmkp


def value_and_grad(fun, rule, **options):
    """``wmkp.value_and_grad``."""
    return jax.jit(wmkp.value_and_grad(fun, rule, **options))


def init_feedback(key, rule, fun, params, *args):
    """``wmkp.init_feedback``."""
    return jax.jit(lambda params: wmkp.init_feedback(key, rule, fun, params, *args))(params)


def mirror_signals(key, rule, fun, params, *args, **named):
    """``wmkp.mirror_signals``."""
    return jax.jit(lambda params: wmkp.mirror_signals(key, rule, fun, params, *args, **named))(params)


def input_covariances(fun, params, *args):
    """``wmkp.input_covariances``."""
    return jax.jit(lambda params, *args: wmkp.input_covariances(fun, params, *args))(params, *args)
