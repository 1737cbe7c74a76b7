"""``sync_batch_norm``: where local work meets the exchange between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Call, surrounded
from .kernels import Backend, Layer, backend_for, reference
from .kernels.activation import activate, kept_for_backward, require_activation
from .kernels.precision import computing_dtype
from .moments import Running, settle
from .observed import named, sum_of
from .peers import ALONE, Peers, Source


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
    exchange: Source | None = None,
    index: int = 0,
) -> Tensor:
    """Batch normalization (Ioffe and Szegedy, 2015) over the union of all processes' batches.

    Like ``torch.nn.functional.batch_norm``; in training the statistics, and in backward the gradient's, are summed over
    the processes of ``exchange``: one all-reduce in each direction. A residual and an activation can follow in the
    same pass over memory.

    Args:
        x: [N, C, ...] of 2 to 5 dimensions, floating. N and the places may differ between processes, and be 0.
        running_mean: [C] floating, updated in place in training, used otherwise; the same for ``running_var``.
        weight: γ, [C] floating, or None for 1.
        bias: β, [C] floating, or None for 0.
        training: whether to normalize by the batch's statistics, not by the running ones.
        momentum: the factor of the running statistics' moving average; None for the average of all batches.
        eps: ε, added to the variance.
        residual: added before the activation; of x's shape and dtype, or whatever can be added to x.
        mask: the weight of each place in the batch's statistics, bool or at least 0: of x's shape with one channel, or
            what broadcasts to that. The count is the sum of the weights. All places are normalized, whatever their
            weight, so that x must be finite there, too. It takes no gradient.
        activation: None, "relu", "leaky_relu" or "silu".
        negative_slope: of "leaky_relu", at least 0.
        num_batches_tracked: [] int64, incremented with each update of the running statistics.
        exchange: how to reach the other processes; None for the statistics of this one alone.
        index: which of the exchange's layers this is, as ``exchange.register`` said.

    Returns:
        activation(γ·(x − mean)/√(var + ε) + β + residual) in x's shape, dtype and memory format.

    Raises:
        ValueError: in training, there is one process and it has one value per channel, or ε is not positive, or the
            mask does not fit; or there is no such activation.
        RuntimeError: the exchange cannot be set up; see ``Exchange.connect``.
        TypeError: in training, x is not floating, or the mask is complex.
    """
    require_activation(activation, negative_slope)
    if not training:
        mean, var, weight, bias = _of_one_dtype(x, running_mean, running_var, weight, bias)
        y = F.batch_norm(x, _unmoved(mean), _unmoved(var), weight, bias, False, momentum or 0.0, eps)
        return _add_and_activate(y, residual, activation, negative_slope)
    running = moved_by(running_mean, running_var, num_batches_tracked, momentum)
    layer = Layer(weight, bias, eps, activation, negative_slope)
    return normalize_in_training(x, residual, mask, layer, running, exchange or ALONE, index)


def normalize_in_training(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    layer: Layer,
    running: Running | None,
    source: Source,
    index: int,
) -> Tensor:
    """The same in training, of arguments that stand together."""
    if torch.compiler.is_exporting():
        from .exported import exported  # which imports torch._dynamo

        y = exported(begin(x, None, mask, layer, running, source, index))
        return _add_and_activate(y, residual, layer.activation, layer.negative_slope)
    if residual is None or _is_like(residual, x):
        return _Normalize.apply(*operands(begin(x, residual, mask, layer, running, source, index)))
    # A sum of another shape or dtype, or with a number, is PyTorch's to form.
    y = _Normalize.apply(*operands(begin(x, None, mask, Layer(*layer[:3]), running, source, index)))
    return _add_and_activate(y, residual, layer.activation, layer.negative_slope)


def _of_one_dtype(x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """The vectors in a dtype that ``F.batch_norm`` takes beside x: x's, or the one it computes in.

    FSDP's mixed precision casts parameters and no buffers, and PyTorch refuses what comes of it.
    """
    fit = all(vector is None or vector.dtype == x.dtype for vector in vectors)
    dtype = x.dtype if fit else computing_dtype(x)
    return [vector if vector is None or vector.dtype == dtype else vector.to(dtype) for vector in vectors]


def _unmoved(running: Tensor | None) -> Tensor | None:
    """A copy where ``F.batch_norm`` keeps it for backward, until which it may be moved.

    DistributedDataParallel may broadcast the buffer, or a forward in training move it (PyTorch issues 24397 and 65907).
    A traced graph shows the buffer itself.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return running if running is None or traced or not torch.is_grad_enabled() else running.clone()


def _is_like(residual: Any, x: Tensor) -> bool:
    return isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype


def _add_and_activate(y: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float) -> Tensor:
    return activate(y if residual is None else y + residual, activation, negative_slope)


def begin(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    layer: Layer,
    running: Running | None,
    source: Source,
    index: int,
) -> Call:
    """One call in training as the blocks around it have it. What is wrong with its tensors is said here."""
    _require_floating(x)
    _require_positive(layer.eps)
    _require_vectors_of(x, layer.weight, layer.bias, *(running[:2] if running is not None else ()))
    call = surrounded(Call(x, residual, mask, layer, running, backend_for(x), source, index))
    _require_device_of(x, residual, call.mask)
    return call if call.mask is None else call._replace(mask=_of_one_channel(call.mask, x))


def operands(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Frame]:
    """The tensors of a call that autograd follows, and the rest. May be the first exchange."""
    peers = call.source.peers(call.number, call.x)
    if peers.world_size == 1:
        _require_more_than_one_value(call.x)
    weight, bias, *numbers, _ = call.layer
    numbers.append(peers.world_size)
    x, residual, weight, bias, mask = distinct([call.x, call.residual, weight, bias, call.mask])
    assert x is not None
    # A graph has no use for its source, which is more than constants.
    source = None if torch.compiler.is_dynamo_compiling() else call.source
    return x, residual, weight, bias, mask, Frame(numbers, call.running, call.backend, peers, source, call.number)


def distinct(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Views in place of what comes again: torch.compile takes no tensor twice as an argument of one function."""
    if not torch.compiler.is_dynamo_compiling():
        return tensors
    return [
        each.view_as(each) if each is not None and any(each is before for before in tensors[:place]) else each
        for place, each in enumerate(tensors)
    ]


class Frame(NamedTuple):
    """What a call needs beside the tensors that autograd follows."""

    numbers: list[Any]  # of the Layer, beside γ and β
    running: Running | None
    backend: Backend
    peers: Peers
    source: Source | None = None  # where these are from; None in what is traced
    number: int = 0  # of the layer, there


class _Normalize(torch.autograd.Function):
    """y = activation(γ·x̂ + β + residual). Its backward knows that mean and var came from x, on all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        frame: Frame,
    ) -> Tensor:
        with named("forward", frame):
            message, outputs = begin_forward(frame, x, residual, weight, bias, mask)
            y, saved = outputs(sum_of("forward", (frame,), message))
        ctx.save_for_backward(*saved)
        ctx.frame = frame
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        frame, saved = ctx.frame, ctx.saved_tensors
        with named("backward", frame):
            if torch.is_grad_enabled():  # gradients of these gradients will be asked for
                frame, saved = differentiable(frame, saved, sum_of("forward", (frame,), moments_again(frame, saved)))
            message, gradients = begin_backward(frame, saved, dy, ctx.needs_input_grad)
            if ctx.needs_input_grad[0]:
                message = sum_of("backward", (frame,), message)
            return *gradients(message), None


# ---- the two halves of each direction, between which messages are summed


Saved = tuple[Any, ...]  # x, γ, β, mask and what else is kept for backward; then the backend's statistics


def begin_forward(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Saved]]]:
    """The forward message; and what makes of its sum y and all that backward needs."""
    numbers, running, backend, peers, *_ = frame
    message, scratch = backend.moments(x, mask, peers.forward_tag)

    def outputs(message: Tensor) -> tuple[Tensor, Saved]:
        layer = Layer(weight, bias, *numbers)
        y, stats = backend.normalize(x, residual, message, layer, running, scratch)
        return y, (x, weight, bias, mask, kept_for_backward(layer.activation, residual, y), *stats)

    return message, outputs


def begin_backward(
    frame: Frame, saved: Saved, dy: Tensor, needs_input_grad: Sequence[bool]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor | None, ...]]]:
    """The backward message; and what makes of its sum the gradients of x, residual, γ, β and mask.

    Where x needs none, the message need not be summed.
    """
    x, weight, bias, mask, kept, *stats = saved
    numbers, _, backend, peers, *_ = frame
    layer = Layer(weight, bias, *numbers)
    needs_dx, needs_dresidual, *_ = needs_input_grad
    # γ's and β's gradients are this process's own sums: DistributedDataParallel averages them with all others.
    message, dweight, dbias, scratch = backend.grad_moments(dy, x, kept, stats, layer, peers.backward_tag)

    def gradients(message: Tensor) -> tuple[Tensor | None, ...]:
        if not needs_dx and not needs_dresidual:
            return None, None, dweight, dbias, None
        dx, dresidual = backend.grad_input(dy, x, kept, mask, stats, layer, message, needs_dresidual, scratch)
        return dx if needs_dx else None, dresidual, dweight, dbias, None

    return message, gradients


def moments_again(frame: Frame, saved: Saved) -> Tensor:
    """The forward message as a function of x: formed by the reference."""
    x, _, _, mask, *_ = saved
    return reference.moments(x, mask, frame.peers.forward_tag)[0]


def differentiable(frame: Frame, saved: Saved, message: Tensor) -> tuple[Frame, Saved]:
    """What ``begin_backward`` makes gradients of that are functions of every process's x themselves.

    Args:
        frame: as the forward had it.
        saved: what that has saved.
        message: ``moments_again``, summed.
    """
    _, _, eps, _, _, world_size = Layer(None, None, *frame.numbers)
    return frame._replace(backend=reference), (*saved[:5], *settle(message, world_size, eps, None))


def moved_by(
    mean: Tensor | None, var: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None
) -> Running | None:
    """The running statistics that a call in training moves; None where there are none."""
    if mean is None or var is None:
        return None
    if momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None averages over all batches, which needs num_batches_tracked: got None")
    return Running(mean, var, num_batches_tracked, momentum)


def require_weights(mask: Tensor) -> None:
    """Raises TypeError or ValueError unless the mask can weight places."""
    if mask.is_complex():
        raise TypeError(f"expected a mask of bool or real weights, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("the mask takes no gradient, but requires one: pass mask.detach()")


def _of_one_channel(mask: Tensor, x: Tensor) -> Tensor:
    """The mask expanded to [N, 1, ...], which is x's shape with one channel."""
    require_weights(mask)
    try:
        return mask.expand(x.shape[0], 1, *x.shape[2:])
    except RuntimeError:
        raise ValueError(
            f"expected a mask that broadcasts to the input's shape with one channel, "
            f"{[x.shape[0], 1, *x.shape[2:]]}, got {list(mask.shape)}"
        ) from None


def _require_more_than_one_value(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def _require_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"expected a floating input (float16, bfloat16, float32 or float64), got {x.dtype}")


def _require_vectors_of(x: Tensor, *vectors: Tensor | None) -> None:
    """Kernels read C values of each, whatever its size is, and on x's device."""
    for vector in vectors:
        if vector is not None and (vector.numel() != x.shape[1] or vector.device != x.device):
            raise RuntimeError(
                f"expected weight, bias and running statistics of {x.shape[1]} elements on {x.device}, as the input "
                f"has {x.shape[1]} channels there, got one of {vector.numel()} elements on {vector.device}"
            )


def _require_device_of(x: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"expected residual and mask on {x.device}, where the input is, got one on {other.device}"
            )


def _require_positive(eps: float) -> None:
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
