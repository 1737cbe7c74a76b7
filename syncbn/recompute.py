"""``recompute_activations``: what normalization can compute again from its input is not kept for backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from .calls import Call, Surrounding
from .kernels import Backend, Layer
from .moments import Running

DEPTH = 2  # layers that one output is computed from at most: its own, and the one whose output is its residual


class recompute_activations(Surrounding):  # noqa: N801, used like a function
    """A ``with`` block around the forward, in which outputs of SyncBatchNorm layers are not kept for backward.

    A layer keeps its input x. What comes behind it, such as a convolution, keeps the layer's output y as well, which
    is activation(BN(x) + residual) and so follows from x and the statistics. Inside of this block autograd keeps a
    recipe in place of y (``torch.autograd.graph.saved_tensors_hooks``), and backward computes y again, by the same
    operations: all gradients have the same bits, and nothing is exchanged a second time. (In-Place ABN, Rota Bulò et
    al., 2018, keeps y and computes x from it, which asks for an activation that can be inverted, and rounds.)

    It needs the activation in the layer (``syncbn.fuse``): behind a separate ReLU, the next layer's input is another
    tensor. A residual layer's y is dropped if its residual is kept anyway, or can be computed again from something that
    is; y is kept after two such layers in a row, so that no recomputation starts a long chain.

    It holds on the thread that enters it, in training, for the forward: backward may run inside or after it. Of several
    hooks of this kind (those of ``torch.utils.checkpoint`` and ``save_on_cpu`` are others) autograd asks only the
    innermost. Compiled code keeps what its compiler has chosen.

    Raises:
        RuntimeError: in backward, something that is needed has been changed in place since the forward, by autograd's
            own count of versions; also y, though it need not be there any more.
    """

    def __init__(self) -> None:
        self._outputs: _Outputs | None = None
        self._entered: list[saved_tensors_hooks | None] = []

    def changed(self, call: Call) -> Call:
        if self._outputs is None or torch.compiler.is_compiling() or not _is_recorded(call):
            return call
        return call._replace(backend=_Noting(call.backend, self._outputs))

    def __enter__(self) -> Self:
        hooks = None
        if not torch.compiler.is_compiling():
            self._outputs = self._outputs or _Outputs()
            hooks = saved_tensors_hooks(self._outputs.pack, _unpack)
            hooks.__enter__()
        self._entered.append(hooks)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if (hooks := self._entered.pop()) is not None:
            hooks.__exit__(kind, error, trace)


def _is_recorded(call: Call) -> bool:
    """Whether autograd records the call: nobody else would ask for its output."""
    tensors = (call.x, call.residual, call.layer.weight, call.layer.bias)
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


# ---- noting the layers' outputs


class _Noting:
    """A backend that notes what it has normalized, and how."""

    def __init__(self, backend: Backend, outputs: _Outputs) -> None:
        self._backend = backend
        self._outputs = outputs
        self.grad_moments = backend.grad_moments
        self.grad_input = backend.grad_input

    def moments(self, x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, _Left]:
        message, scratch = self._backend.moments(x, mask, tag)
        return message, _Left(scratch, mask)

    def normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        message: Tensor,
        layer: Layer,
        running: Running | None,
        scratch: _Left,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        left, mask = scratch
        y, stats = self._backend.normalize(x, residual, message, layer, running, left)
        again = _Again(self._backend, message, layer, left is not None and left is not x)
        self._outputs.note(y, x, residual, mask, again)
        return y, stats


class _Left(NamedTuple):
    """What moments leaves for normalize."""

    scratch: Any  # the backend's own
    mask: Tensor | None


class _Outputs:
    """The layers' outputs that can be computed again. Knows them, without keeping any alive, by their memory."""

    def __init__(self) -> None:
        self._recipes = WeakIdKeyDictionary()  # of y, by y's storage
        self._kept = WeakIdKeyDictionary()  # storages of which somebody keeps something
        self._latest = _Latest()

    def note(self, y: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, again: _Again) -> None:
        """Takes y for one that need not be kept, unless that would cost as much memory, or a long chain."""
        if y.numel() == 0 or not all(each is None or _has_plain_memory(each) for each in (y, x, residual, mask)):
            return
        if residual is not None and not self._is_there_anyway(residual, again.layer):
            return
        inputs = _Inputs(
            self.pack(x.detach()),
            None if residual is None else self.pack(residual.detach()),
            None if mask is None else self.pack(mask),
        )
        depth = 1 + max(each.depth for each in inputs if each is not None)
        if depth <= DEPTH:
            self._recipes[y.untyped_storage()] = _Recipe(y, inputs, again, depth, self._latest)

    def pack(self, tensor: Tensor) -> _Packed:
        """What autograd is to keep for backward in place of the tensor, which has no part in the graph."""
        if not _has_plain_memory(tensor):
            return _Kept(tensor)
        recipe = self._recipe_of(tensor)
        if recipe is not None:
            return _Computed(recipe, tensor)
        self._kept[tensor.untyped_storage()] = True
        return _Kept(tensor)

    def _recipe_of(self, tensor: Tensor) -> _Recipe | None:
        recipe: _Recipe | None = self._recipes.get(tensor.untyped_storage())
        return recipe if recipe is not None and recipe.gives(tensor) else None

    def _is_there_anyway(self, residual: Tensor, layer: Layer) -> bool:
        """Whether a recipe that needs the residual makes nobody keep what would else be gone."""
        if layer.activation == "silu":  # whose gradient needs it
            return True
        return residual.untyped_storage() in self._kept or self._recipe_of(residual) is not None


def _has_plain_memory(tensor: Tensor) -> bool:
    """Subclasses and sparse tensors have memory of their own kinds, and inference tensors no versions."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_nested and not tensor.is_inference()


# ---- what is kept in place of a tensor


class _Kept:
    """A tensor that stays. With hooks, autograd leaves it to them to notice that it has been changed."""

    depth = 0

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def unpacked(self) -> Tensor:
        _require_version(self._tensor, self._version, self._tensor.shape)
        return self._tensor


class _Computed:
    """A layer's output, or a view of it."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        self.depth = recipe.depth
        self._recipe = recipe
        self._place = tensor.storage_offset(), tensor.size(), tensor.stride()

    def unpacked(self) -> Tensor:
        storage: Any = self._recipe.storage()  # which set_'s annotations do not know
        return torch.empty_like(self._recipe.witness).set_(storage, *self._place)


_Packed = _Kept | _Computed


def _unpack(packed: _Packed) -> Tensor:
    with torch.no_grad():  # autograd connects it to the graph
        return packed.unpacked()


class _Inputs(NamedTuple):
    """Of a layer, as they are kept."""

    x: _Packed
    residual: _Packed | None
    mask: _Packed | None


class _Again(NamedTuple):
    """How a layer's output has been computed, beside from what."""

    backend: Backend
    message: Tensor  # summed over the processes
    layer: Layer
    needs_moments: bool  # whether normalize has used more than x itself of what moments has left

    def compute(self, inputs: _Inputs) -> Tensor:
        x = inputs.x.unpacked()
        residual, mask = (None if each is None else each.unpacked() for each in inputs[1:])
        # The message of this process alone is of no use: the summed one is here.
        scratch = self.backend.moments(x, mask, 0)[1] if self.needs_moments else None
        return self.backend.normalize(x, residual, self.message, self.layer, None, scratch)[0]


class _Recipe:
    """How to have a layer's output y again. There as long as y is, or somebody's backward that needs it."""

    def __init__(self, y: Tensor, inputs: _Inputs, again: _Again, depth: int, latest: _Latest) -> None:
        # What gathers parameters for the forward alone, such as FSDP, will have let go of them: hence copies.
        layer = again.layer._replace(weight=_copied(again.layer.weight), bias=_copied(again.layer.bias))
        self._again = again._replace(layer=layer)
        self._inputs = inputs
        self.depth = depth
        self.witness = _without_values(y)
        self._version, self._shape = y._version, y.shape
        self._stream = _stream(y)
        self._storage = weakref.ref(y.untyped_storage())
        self._nbytes = y.untyped_storage().nbytes()
        self._latest = latest
        self.held: UntypedStorage | None = None  # by ``latest``

    def gives(self, tensor: Tensor) -> bool:
        """Whether ``tensor``, which lies in y's memory, has values of what this computes.

        And on which stream: backward runs on the forward's, so that what y was computed from is ready there.
        """
        unchanged = tensor._version == self.witness._version == self._version
        return unchanged and tensor.dtype == self.witness.dtype and _stream(tensor) == self._stream

    def storage(self) -> UntypedStorage:
        """y's memory: its own while anybody has it, or another one with the same values."""
        _require_version(self.witness, self._version, self._shape)
        storage: UntypedStorage | None = self._storage()
        if storage is None or storage.nbytes() != self._nbytes:  # resized: how pipelines let go of what they have sent
            storage = self._again.compute(self._inputs).untyped_storage()
            self._storage = weakref.ref(storage)
            self._latest.hold(self, storage)
        return storage


class _Latest:
    """Holds what has been computed last until something else is.

    A residual layer's output is wanted twice in a row: by the next layer's backward, then by its own.
    """

    def __init__(self) -> None:
        self._recipe: weakref.ref[_Recipe] | None = None

    def hold(self, recipe: _Recipe, storage: UntypedStorage) -> None:
        before = None if self._recipe is None else self._recipe()
        if before is not None:
            before.held = None
        recipe.held = storage
        self._recipe = weakref.ref(recipe)


def _copied(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().clone()


def _without_values(tensor: Tensor) -> Tensor:
    """A tensor without memory that counts versions together with ``tensor``, and goes on to when that is gone."""
    witness = tensor.detach()
    witness.data = tensor.new_empty(0)
    return witness


def _stream(tensor: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _require_version(tensor: Tensor, version: int, shape: torch.Size) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor that backward needs has been modified by an inplace operation: [{tensor.dtype}, "
            f"{list(shape)}] was at version {version} in the forward, and is at version {tensor._version} now. Use "
            f"an operation that is not in place, or run backward before it. Inside of recompute_activations() this "
            f"goes for a layer's output as well, which backward computes again as it was"
        )
