"""What the four operations are to compute, beside the tensors that flow through them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """What one call of a normalization layer is to compute: activation(γ·x̂ + β + residual)."""

    weight: Tensor | None  # γ, [C], any floating dtype; None for 1
    bias: Tensor | None  # β, likewise; None for 0
    eps: float = 1e-5
    activation: str | None = None  # "relu", "leaky_relu" or "silu"
    negative_slope: float = 0.01  # of leaky_relu
    world_size: int = 1  # how many processes' messages are summed
