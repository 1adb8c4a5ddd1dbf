"""Whether a local checkpoint holds a point's tensors; asked in a process of its own, up front."""

import torch

from measure.checkpoint_files import load_state
from measure.checkpoints import weights_from_state
from measure.engine import TORCH_DTYPES, check_shapes
from measure.points import MeasurePoint
from measure.sessions import numerics_of_point


def check(point: MeasurePoint) -> None:
    """Raise ``LccostError`` with what is wrong; only headers are read.

    Raises ``ConfigError`` for files that cannot be used, tensors that are missing or of other
    shapes, ``NotApplicableError`` for a family whose checkpoints are not read.
    """
    assert point.weights is not None
    model, numerics = point.executed, numerics_of_point(point)
    dtype = TORCH_DTYPES[point.dtype]
    state = load_state(point.weights, dtype, torch.device("meta"), model.n_layers)
    check_shapes(model, weights_from_state(model, state), numerics=numerics)
