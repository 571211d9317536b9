"""The library's functions under ``jax.jit``, so that each call compiles one program.

Without ``jax.jit`` each operation compiles by itself. These dozens of programs take longer to compile than to run.
"""

import jax

import wmkp


def value_and_grad(fun, rule, **options):
    """``wmkp.value_and_grad`` under ``jax.jit``."""
    return jax.jit(wmkp.value_and_grad(fun, rule, **options))


def init_feedback(key, rule, fun, params, *args):
    """``wmkp.init_feedback`` under ``jax.jit``."""
    return jax.jit(lambda params: wmkp.init_feedback(key, rule, fun, params, *args))(params)


def mirror_signals(key, rule, fun, params, *args, **named):
    """``wmkp.mirror_signals`` under ``jax.jit``."""
    return jax.jit(lambda params: wmkp.mirror_signals(key, rule, fun, params, *args, **named))(params)


def input_covariances(fun, params, *args):
    """``wmkp.input_covariances`` under ``jax.jit``."""
    return jax.jit(lambda params, *args: wmkp.input_covariances(fun, params, *args))(params, *args)
