"""wmkp: neural networks trained without weight transport, in JAX."""

from wmkp import updates
from wmkp.angles import delta_angles, matrix_angles
from wmkp.grad import engage, init_feedback, value_and_grad
from wmkp.mirror import mirror_angle, mirror_gain, mirror_signals, samples_for_angle
from wmkp.projections import Projection, WeightTransportError, projections
from wmkp.rules import Mirror, Rule, backprop, feedback_alignment, kolen_pollack, sign_symmetry, weight_mirror
from wmkp.training import Steps, TrainState, make_steps

__version__ = "0.1.0"
