"""The learning rules of direct feedback: the output's error goes straight to each projection's input."""

import dataclasses

import jax

from wmkp import checks
from wmkp.forward import descent, forward_signal
from wmkp.program.interpreter import Direct
from wmkp.program.pathways import hebbian
from wmkp.program.projections import Projection
from wmkp.rule import Rule, named
from wmkp.rules import check_scale, fixed, learned, std_of


@dataclasses.dataclass(frozen=True)
class _RandomDirect:
    """A Gaussian B from the network's outputs, of standard deviation ``scale / sqrt(outputs)``."""

    scale: float

    def __call__(self, key: jax.Array, projection: Projection, w: jax.Array) -> Direct:
        shape = projection.direct_shape()
        std = std_of(self.scale, shape[-1], projection.path, w)
        return Direct((jax.random.normal(key, shape) * std).astype(w.dtype))


@named
def direct_feedback_alignment(scale: float = 1.0) -> Rule:
    """Direct feedback alignment (DFA; Nokland 2016): the output's error goes to each projection's input by its own B.

    ``dL/dx := B_l e``, where e is the error at the network's output (the last projection). B_l is fixed and random, of
    shape (size of x) by (outputs). No error passes between projections, except through what has no weights: activation
    functions, normalizations, skip connections. Nothing is transported, and W's own gradient stays delta x^T (eq. 4).

    If a scan makes the output, each step's error goes to that step's projections. wmkp computes the layers in sequence,
    not in parallel.

    Args:
      scale: B is Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: ``scale`` is not a positive number; from ``init_feedback``, an output without one error (in a
        ``lax.cond``, or on its way to a projection in the next step of a scan), or inputs of different sizes.

    Example:
      >>> rule = wmkp.direct_feedback_alignment()
    """
    check_scale(scale)
    return Rule("direct_feedback_alignment", _RandomDirect(scale), fixed, direct=True)


@named
def direct_kolen_pollack(scale: float = 1.0) -> Rule:
    """Direct Kolen-Pollack (DKP; Webster et al. 2021): direct feedback alignment whose B_l learn.

    ``dB_l = -eta x e^T - lambda B_l``, from the input x that B_l reaches and the output's error e that it carries.
    Learning rate and decay are W's (``wmkp.updates.kolen_pollack``). Nothing is transported.

    Args:
      scale: B starts Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: as ``direct_feedback_alignment``.

    Example:
      >>> rule = wmkp.direct_kolen_pollack()
    """
    check_scale(scale)
    return Rule("direct_kolen_pollack", _RandomDirect(scale), learned, hebbian, direct=True)


@named
def forward_direct_feedback_alignment(rate: float = 0.1, scale: float = 1.0) -> Rule:
    """Forward direct feedback alignment (FDFA; Bacho and Chu 2024): direct feedback that learns the output's derivatives.

    The error goes back as under ``direct_feedback_alignment``: ``dL/dx := B_l e``. At each step noise xi on each input x
    runs forward with the data, and forward-mode differentiation gives its effect on the output, ``J xi``. B_l follows the
    mean of J^T over samples: ``B_l <- B_l + rate (xi (J xi)^T - B_l)``. Nothing is transported.

    ``value_and_grad`` makes the signal, and needs a ``key`` for the noise; ``make_steps`` gives it one. A step costs a
    second forward pass.

    Args:
      rate: the share of B_l that a step replaces.
      scale: B starts Gaussian with standard deviation ``scale / sqrt(outputs)``.

    Raises:
      ValueError: an argument is out of its range; from ``init_feedback``, as ``direct_feedback_alignment``; from a step, an
        output inside a ``lax.scan``.

    Example:
      >>> rule = wmkp.forward_direct_feedback_alignment()
    """
    check_scale(scale)
    checks.number("rate", rate, "lie in (0, 1]", lambda x: 0 < x <= 1)
    optimizer = descent(rate)
    return Rule(
        "forward_direct_feedback_alignment", _RandomDirect(scale), learned, forward_signal, optimizer, direct=True
    )
