"""wmkp: neural networks trained without weight transport, in JAX."""

from wmkp import updates
from wmkp.alignment import activation_alignment, activity_mirror, alignment, information_alignment, symmetric_alignment
from wmkp.angles import delta_angles, delta_norms, input_covariances, matrix_angles, stream_growth
from wmkp.direct import direct_feedback_alignment, direct_kolen_pollack, forward_direct_feedback_alignment
from wmkp.engaged import engage, init_feedback, value_and_grad
from wmkp.law import mirror_angle, mirror_gain, samples_for_angle
from wmkp.mirror import mirror_signals
from wmkp.program.pathways import Synapses, hebbian
from wmkp.program.products import WeightTransportError
from wmkp.program.projections import Projection, projections, roles
from wmkp.rule import Fixed, Mirror, Rule
from wmkp.rules import (
    backprop,
    feedback_alignment,
    kolen_pollack,
    kolen_pollack_transported,
    local,
    mirrored_kolen_pollack,
    product_feedback_alignment,
    sign_symmetry,
    weight_mirror,
)
from wmkp.training import Steps, TrainState, make_steps
from wmkp.transport import Moved, Transport, transport

__version__ = "0.2.0"

__all__ = [
    "Fixed",
    "Mirror",
    "Moved",
    "Projection",
    "Rule",
    "Steps",
    "Synapses",
    "TrainState",
    "Transport",
    "WeightTransportError",
    "activation_alignment",
    "activity_mirror",
    "alignment",
    "backprop",
    "delta_angles",
    "delta_norms",
    "direct_feedback_alignment",
    "direct_kolen_pollack",
    "engage",
    "feedback_alignment",
    "forward_direct_feedback_alignment",
    "hebbian",
    "information_alignment",
    "init_feedback",
    "input_covariances",
    "kolen_pollack",
    "kolen_pollack_transported",
    "local",
    "make_steps",
    "matrix_angles",
    "mirror_angle",
    "mirror_gain",
    "mirror_signals",
    "mirrored_kolen_pollack",
    "product_feedback_alignment",
    "projections",
    "roles",
    "samples_for_angle",
    "sign_symmetry",
    "stream_growth",
    "symmetric_alignment",
    "transport",
    "updates",
    "value_and_grad",
    "weight_mirror",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # without the modules: their names are all here
