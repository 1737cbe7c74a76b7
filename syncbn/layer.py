"""``SyncBatchNorm``, the layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .exchange import Exchange
from .functional import moved_by, normalize_in_training, sync_batch_norm
from .kernels import Layer
from .kernels.activation import require_activation
from .moments import Running
from .peers import Source


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the union of all processes' batches.

    N processes with their parts of a batch compute what one process with the whole batch would compute with
    ``torch.nn.BatchNorm``: outputs, gradients and running statistics. In training, every process of the group runs the
    same layers in the same order, forward and backward; a process without data runs an empty batch. In eval, and with
    one process, nothing is exchanged.

    Args:
        num_features: C, the size of the input's dimension 1.
        eps: ε, added to the variance for stability.
        momentum: the factor of the running statistics' moving average; None for the average of all batches.
        affine: whether there are a scale γ (``weight``) and a shift β (``bias``) to learn.
        track_running_stats: whether to estimate population statistics for eval. Without them, eval normalizes by the
            statistics of this process's batch, as torch.nn.BatchNorm does.
        process_group: over whom to form the statistics: a ProcessGroup, a one-dimensional DeviceMesh, or an Exchange
            that several layers share; None for all processes.
        device: where the parameters and buffers are.
        dtype: of the parameters and buffers.
        activation: None, "relu", "leaky_relu" or "silu", applied to the output in the same pass over memory.
        negative_slope: of "leaky_relu".
        **kwargs: what else the installed ``torch.nn.BatchNorm2d`` takes; newer ones, ``bias``.

    Shape:
        [N, C, ...] of 2 to 5 dimensions, any strides; the output has the input's shape, dtype and memory format. So
        has ``residual``, the second argument of the call: the layer is activation(BN(x) + residual). ``mask``, the
        third, has one channel, or broadcasts to that: the weight of each place in the statistics.

    Raises:
        ValueError: there is no such activation. At the call: the input has less than 2 or more than 5 dimensions, or 0
            channels; or there is one process and it has one value per channel; or the mask does not fit.
        RuntimeError: at the first call in training: the processes' layers differ, or the group cannot reduce tensors of
            the input's device.
    """

    _exchange: Exchange
    _index: int
    # Not "activation": a subclass that convert has found may have an attribute of that name.
    _fused_activation: str | None = None
    _fused_slope: float = 0.01

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.fuse_activation(activation, negative_slope)
        self.synchronize(process_group if isinstance(process_group, Exchange) else Exchange(process_group))

    def synchronize(self, exchange: Exchange, name: str = "SyncBatchNorm") -> None:
        """Forms statistics through ``exchange`` from now on; ``name`` is the layer's in errors."""
        self._exchange = exchange
        self._index = exchange.register(describe_layer(self, name))

    def fuse_activation(self, activation: str | None, negative_slope: float = 0.01) -> None:
        """Applies this activation to the output from now on; None for none."""
        require_activation(activation, negative_slope)
        self._fused_activation, self._fused_slope = activation, negative_slope

    @property
    def process_group(self) -> Any:
        """Over whom the statistics are formed: a ProcessGroup, or None for all processes."""
        return self._exchange.process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")

    def _check_channels(self, input: Tensor) -> None:
        if input.shape[1] == 0:
            raise ValueError("expected at least 1 channel in dimension 1, got none")
        if input.shape[1] != self.num_features:
            raise RuntimeError(f"expected {self.num_features} channels in dimension 1, got input size {input.size()}")

    def __prepare_scriptable__(self) -> SyncBatchNorm:
        raise TypeError(
            "torch.jit.script cannot compile a SyncBatchNorm, which exchanges statistics between processes: call "
            "syncbn.revert(model) first, or use torch.jit.trace on a model in eval"
        )

    def extra_repr(self) -> str:
        slope = f", negative_slope={self._fused_slope}" if self._fused_activation == "leaky_relu" else ""
        fused = f", activation={self._fused_activation}{slope}" if self._fused_activation else ""
        return super().extra_repr() + fused

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        self._check_channels(input)
        if self.training:
            return normalize_in_training(input, residual, mask, *self._in_training())
        return sync_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.running_mean is None and self.running_var is None,
            momentum=self.momentum,
            eps=self.eps,
            residual=residual,
            mask=mask,
            activation=self._fused_activation,
            negative_slope=self._fused_slope,
        )

    def _in_training(self) -> tuple[Layer, Running | None, Source, int]:
        """What a call in training does, what it moves, over whom, and as which of their layers."""
        layer = Layer(self.weight, self.bias, self.eps, self._fused_activation, self._fused_slope)
        running = None
        if self.track_running_stats:
            running = moved_by(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        return layer, running, self._exchange, self._index


def describe_layer(layer: _BatchNorm, name: str) -> str:
    """What must be equal on all processes for their statistics to belong together."""
    activation = layer._fused_activation if isinstance(layer, SyncBatchNorm) else None
    if isinstance(layer, SyncBatchNorm) and activation == "leaky_relu":
        activation += f"({layer._fused_slope})"
    frozen = ", frozen" if "train" in vars(layer) else ""  # a train() of its own: it exchanges nothing
    return (
        f"{name}(channels={layer.num_features}, eps={layer.eps}, momentum={layer.momentum}, "
        f"affine={layer.affine}, track_running_stats={layer.track_running_stats}, activation={activation}{frozen})"
    )
