"""A tape of summed messages: recorded in one run of a part of a model, played in another run of the same part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Call, Surrounding, entered
from .exchange import Exchange
from .peers import Peers, Source


class Caller(NamedTuple):
    """Which layer a message is of."""

    exchange: int  # its number; 0 where it is none
    layer: str

    @classmethod
    def of(cls, source: Source, number: int) -> Caller:
        if isinstance(source, Exchange):
            return cls(source.number, source._layers[number])
        return cls(0, f"layer {number} of {type(source).__name__}")


_NOBODY = Caller(0, "no layer")


class Tape:
    """The summed messages of one run, in the order of the layers' calls."""

    def __init__(self) -> None:
        self.messages: list[tuple[Caller, Tensor]] = []


class OnTape(Surrounding):
    """A block in which a tape is recorded or played.

    Where checkpoints are nested, the innermost one that is being recomputed gives the sums: whoever plays a tape takes
    the thread out of all others (``enter_only``). Each one inside of it, whose forward runs anew, records these.
    """

    def changed(self, call: Call) -> Call:
        innermost = [block for block in entered() if isinstance(block, OnTape)][-1]
        if innermost is not self:  # it acts for all
            return call
        if torch.compiler.is_dynamo_compiling():
            from .compiled_tape import taped

            return taped(call)
        player, recorders = tapes()
        source = _Taped(call.source, player, recorders)
        return call._replace(source=source, running=call.running if player is None else None)


class Recording(OnTape):
    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def record(self, caller: Caller, message: Tensor) -> None:
        # A copy: whoever else stands between the layer and its peers may change the sum in place.
        self.tape.messages.append((caller, message.clone()))


class Playing(OnTape):
    """One playing, from the tape's start."""

    def __init__(self, tape: Tape, before: tuple[Surrounding, ...]) -> None:
        self.tape = tape
        self.before = before  # the blocks that the thread was in
        self._played = 0

    def play(self, caller: Caller, message: Tensor) -> Tensor:
        """``message``, having become its sum.

        Raises:
            RuntimeError: it is not this layer's turn.
        """
        at, messages = self._played, self.tape.messages
        recorded, summed = messages[at] if at < len(messages) else (_NOBODY, message.new_empty(0))
        if recorded != caller or summed.shape != message.shape:
            raise RuntimeError(
                f"the recomputation of a checkpointed part differs from its forward: call {at + 1} of a synchronized "
                f"layer is now of {caller.layer}, a message of {message.numel()} numbers, and was of {recorded.layer}, "
                f"a message of {summed.numel()}. What is checkpointed must run the same layers in the same order both "
                f"times"
            )
        self._played += 1
        return message.copy_(summed)


def tapes() -> tuple[Playing | None, tuple[Recording, ...]]:
    """The tape that gives the sums on this thread, and those that record them."""
    players = [block for block in entered() if isinstance(block, Playing)]
    return players[0] if players else None, tuple(block for block in entered() if isinstance(block, Recording))


class _Taped(NamedTuple):
    """A source whose forward sums come from a tape, or go onto some."""

    source: Source
    player: Playing | None
    recorders: tuple[Recording, ...]

    def peers(self, index: int, x: Tensor) -> Peers:
        peers = self.source.peers(index, x)
        caller = Caller.of(self.source, index)
        return _TapedPeers(peers.world_size, peers.forward_tag, peers.backward_tag, peers, caller, *self[1:])


class _TapedPeers(NamedTuple):
    world_size: int
    forward_tag: int
    backward_tag: int
    peers: Peers
    caller: Caller
    player: Playing | None
    recorders: tuple[Recording, ...]

    @property
    def joint(self) -> Any:
        """A tape takes a message of several layers for one."""
        joint = getattr(self.peers, "joint", None)
        return None if joint is None else (joint, self.player, self.recorders)

    def sum_moments(self, message: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # double backward, which forms the statistics anew
            return self.peers.sum_moments(message)
        player = self.player
        summed = self.peers.sum_moments(message) if player is None else player.play(self.caller, message)
        for recorder in self.recorders:
            recorder.record(self.caller, summed)
        return summed

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        return self.peers.sum_grad_moments(message)
