"""How far a layout's gradients are from one process's: the measure that every layout is held to.

Per tensor, ||difference|| / max(||reference||, 1e-3 x the global gradient norm). The floor is there
for gradients that are zero in exact arithmetic (a key bias), where a plain ratio would compare
rounding noise with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Sums of up to 1e4 terms taken in another order differ by about eps x sqrt(terms), 1.2e-5 at most.
TOLERANCE_FP32 = 1e-5


def gradient_errors(
    gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """The measure for each tensor, computed in float64.

    Raises ValueError when the two do not name the same tensors.
    """
    if gradients.keys() != reference.keys():
        odd = sorted(gradients.keys() ^ reference.keys())
        raise ValueError(f"gradients of different tensors: {', '.join(odd[:5])}")
    norms = {name: float(torch.linalg.vector_norm(g.double())) for name, g in reference.items()}
    floor = 1e-3 * math.sqrt(sum(norm**2 for norm in norms.values()))
    errors = {}
    for name, gradient in gradients.items():
        difference = torch.linalg.vector_norm(gradient.double() - reference[name].double())
        errors[name] = float(difference) / max(norms[name], floor, 1e-300)
    return errors
