"""``checkpoint_contexts``: activation checkpointing that repeats no exchange and no update of running statistics."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from .calls import Surrounding, enter_only, entered
from .tape import OnTape, Playing, Recording, Tape


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``.

    Checkpointing runs a part of the model a second time in backward. By itself, that exchanges the statistics of each
    SyncBatchNorm layer a second time, and moves the running ones twice (PyTorch issues 96136 and 43946, fairscale 694).
    With these contexts, the forward keeps each layer's summed message, 2C+3 numbers, and the recomputation takes that:
    nothing is exchanged or updated, and the results are the same bits. The blocks of this package that the call of
    ``checkpoint`` stood in, such as ``valid_region``, hold in its recomputation, too, wherever backward runs.

    In what torch.compile traces, these are selective-checkpoint contexts that save the sums.

    Returns:
        What checkpoint enters around the forward, and what around each recomputation.

    Raises:
        RuntimeError: in backward: the recomputation calls other layers than the forward did.
    """
    if get_proxy_mode() is not None:  # on this thread, whereas torch.compiler.is_compiling() speaks for all
        return create_selective_checkpoint_contexts(_save_sums)
    tape = Tape()
    # Of nested tapes, only this one is played in its recomputation, and those around it have these calls already.
    surroundings = tuple(block for block in entered() if not isinstance(block, OnTape))
    return Recording(tape), _Recomputation(tape, surroundings)


class _Recomputation:
    """What checkpoint enters around a recomputation: as often as there are any, on any threads, also at once."""

    def __init__(self, tape: Tape, surroundings: tuple[Surrounding, ...]) -> None:
        self._tape = tape
        self._surroundings = surroundings

    def __enter__(self) -> None:
        # The blocks that backward happens to stand in have no part in it. Those of the forward are not entered again:
        # whatever else they do, such as to install hooks, did not reach into the checkpointed part either.
        enter_only((*self._surroundings, Playing(self._tape, before=entered())))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        [*_, playing] = [block for block in entered() if isinstance(block, Playing) and block.tape is self._tape]
        enter_only(playing.before)


_collectives = torch.ops._c10d_functional
_SUMS = (_collectives.all_reduce.default, _collectives.all_reduce_.default, _collectives.wait_tensor.default)


def _save_sums(context: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # What a layer sums is a vector of float64, unlike activations that a model may sum, too.
    output = context.op_output
    if operation in _SUMS and isinstance(output, Tensor) and output.dtype == torch.float64 and output.dim() == 1:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
