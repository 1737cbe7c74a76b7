"""Launching Triton kernels with little Python: each variant is compiled once, found again by its key, and called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor


class Kernel:
    """A Triton kernel and its compiled variants.

    Triton's own launch binds and inspects every argument each time, which takes longer than a small layer's kernel
    runs. Here the compiled kernel is found by what its code depends on, and called directly.

    Numbers are never specialized on their values. Whole tensors are specialized on 16-byte alignment only where the
    caller has seen that all of them have it; vectors of channels never.

    Args:
        function: the kernel. Its parameters are pointers (``*_ptr``) first, then numbers with annotated types, then
            constants.
        tensors: the names of the pointers to whole tensors.

    Attributes:
        variants: the compiled kernels, by device, alignment, constants, and each pointer's dtype, or None.
    """

    def __init__(self, function: Callable[..., None], tensors: tuple[str, ...]) -> None:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        pointers = [name for name in names if name.endswith("_ptr")]
        vectors = [name for name in pointers if name not in tensors]
        numbers = [name for name in names if name not in pointers and "constexpr" not in function.__annotations__[name]]
        self.aligned = triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=vectors)
        self.unaligned = triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=pointers)
        self.variants: dict[Any, Any] = {}

    def __call__(
        self,
        programs: int,
        aligned: bool,
        warps: int,
        pointers: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Launches ``programs`` programs on the current stream of the tensors' device.

        Args:
            programs: how many.
            aligned: whether all whole tensors begin at multiples of 16 bytes.
            warps: how many each program has; the same for the same constants.
            pointers: tensors, or None; the first is always there.
            numbers: integers and floats, as annotated.
            constants: what the code is compiled for.
        """
        device = pointers[0].device.index  # type: ignore[union-attr]
        if device is not None and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(programs, aligned, warps, pointers, numbers, constants)
        key = (device, aligned, constants, *[None if each is None else each.dtype for each in pointers])
        compiled = self.variants.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*pointers, *numbers, *constants)
        else:
            function = self.aligned if aligned else self.unaligned
            # TRITON_INTERPRET=1 compiles nothing and returns None: then the function is called each time.
            self.variants[key] = function[programs, 1, 1](
                *pointers, *numbers, *constants, num_warps=warps, enable_fp_fusion=True
            )
        return None
