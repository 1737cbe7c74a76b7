"""What is wrong with a model's batch normalization, by the readings of its layers, in words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from .readings import Reading

_CAUGHT_UP = 3  # averaging times: after so many, e⁻³ = 5% is left of what the running statistics were before
_MOST_NAMES = 4  # of layers in one sentence


class Thresholds(NamedTuple):
    """From where on a reading is a finding.

    A channel whose variance is below ε is divided by √ε rather than by its standard deviation: at V = ε its output has
    0.71 of the scale that it should have, at ε/100 a tenth, and noise is magnified by up to 1/√ε, 316 for the usual
    1e-5. Some dead channels are common (weight decay, ReLU); half of a layer is not. Running statistics are far off
    where eval would shift a layer's channels by a standard deviation, or scale them by a factor of e, typically.
    """

    collapsed_below: float = 1.0  # variance, in units of the layer's ε
    collapsed_share: float = 0.5  # of a layer's channels
    far: float = 1.0  # standard deviations of the mean; factors of e of the variance


class Finding(NamedTuple):
    """Something wrong with one layer."""

    kind: str
    layer: str
    step: int  # at which it was found
    detail: str  # figures


class Window(NamedTuple):
    """What has happened in a layer between two sampled steps."""

    batches: int
    exchanged: int  # forward, by this process
    updates: float


# What each kind of finding means and what is to be done about it, after "in LAYERS (DETAIL)".
MEANING = {
    "collapsed": "the variance has collapsed: most channels are constant, are divided by √eps instead of a standard "
    "deviation, and magnify noise. Look for weights that have decayed to zero, dead activations before the layer or a "
    "learning rate that is too high; where values are meant to be this small, give the layer a smaller eps",
    "far": "the running statistics are far from those of the batches, though they have had time to follow: eval will "
    "normalize by them. Give the layer a larger momentum, or run syncbn.recalibrate(model, batches) before eval",
    "still": "the running statistics do not move, though the layer is in training mode: it is not called, or all of "
    "its batches are not finite. Freeze it (syncbn.freeze) if that is meant; if not, eval will use old statistics",
    "skipped": "batches were not finite and have moved no running statistics. Look for NaN in the data, or for a "
    "learning rate that is too high; with float16, for overflow in the forward",
    "broken": "the running statistics are not finite, so that eval gives NaN: call reset_running_stats() on the layer, "
    "then syncbn.recalibrate(model, batches)",
    "unseen": "the layers run in a compiled graph, which has no Python at its exchanges: their time, effective batch "
    "and distance between processes are not known, and only the running statistics are watched",
}


class Findings:
    """Judges the readings of one sampled step after another. Each kind of finding is told once per layer."""

    def __init__(self, names: Sequence[str], layers: Sequence[Any], thresholds: Thresholds) -> None:
        self.all: list[Finding] = []
        self.skipped = [0.0] * len(names)  # updates that were not made, as far as that is known
        self._names, self._layers, self._thresholds = names, layers, thresholds
        self._told: set[tuple[str, str]] = set()
        self._far_since: dict[int, float] = {}  # layer -> updates when it was first found far off
        self._counts_agree: dict[int, bool] = {}  # whether a layer updates once per exchange
        self._rates: dict[int, float] = {}  # updates per batch, where each window so far had the same whole number

    def of_step(self, step: int, readings: Sequence[Reading], exchanged: Sequence[int]) -> list[Finding]:
        """What is new in a sampled step.

        Args:
            step: its number.
            readings: of the layers.
            exchanged: how often each of them has exchanged in the forward of this step.
        """
        new: list[Finding] = []
        for i, reading in enumerate(readings):
            if reading.seen and reading.finite and exchanged[i]:
                self._counts_agree[i] = reading.moved == exchanged[i] and self._counts_agree.get(i, True)
            if self._layers[i].training:  # or else it is frozen, and meant to be
                new += self._new(i, step, self._of_layer(i, self._layers[i], reading))
        return new

    def of_windows(self, step: int, windows: Sequence[Window]) -> list[Finding]:
        """What is new in the time since the sampled step before."""
        new: list[Finding] = []
        for i, window in enumerate(windows):
            if self._layers[i].training:
                new += self._new(i, step, self._of_window(i, self._layers[i], window))
        return new

    def _new(self, i: int, step: int, faults: dict[str, str]) -> list[Finding]:
        name = self._names[i]
        new = [Finding(kind, name, step, detail) for kind, detail in faults.items() if (kind, name) not in self._told]
        self._told.update((finding.kind, name) for finding in new)
        self.all += new
        return new

    def _of_layer(self, i: int, layer: Any, reading: Reading) -> dict[str, str]:
        faults = {}
        if reading.collapsed >= self._thresholds.collapsed_share:
            faults["collapsed"] = f"{100 * reading.collapsed:.0f}% of {layer.num_features} channels"
        if not reading.sound:
            faults["broken"] = f"after {reading.updates:.0f} updates"
        if not reading.seen and reading.moved > 0 and getattr(layer, "_exchange", None) is not None:
            faults["unseen"] = "compiled"
        if not reading.finite:
            faults["skipped"] = "in the sampled step"
        averaging = 1 / layer.momentum if layer.momentum else 10  # batches
        if math.isnan(reading.mean_lag + reading.var_lag):
            return faults
        if max(reading.mean_lag, reading.var_lag) <= self._thresholds.far:
            self._far_since.pop(i, None)
            return faults
        since = self._far_since.setdefault(i, max(reading.updates, _CAUGHT_UP * averaging))
        if reading.updates - since >= _CAUGHT_UP * averaging:
            faults["far"] = (
                f"{reading.mean_lag:.1f} standard deviations in the mean, a factor of {math.exp(reading.var_lag):.1f} "
                f"in the variance, after {reading.updates:.0f} updates"
            )
        return faults

    def _of_window(self, i: int, layer: Any, window: Window) -> dict[str, str]:
        if math.isnan(window.updates) or layer.momentum == 0 or window.batches == 0:
            return {}
        expected = self._expected(i, window)
        skipped = 0.0 if expected is None else max(0.0, expected - window.updates)
        self.skipped[i] += skipped
        faults = {}
        if window.updates == 0:
            faults["still"] = f"no update in {window.batches} batches"
        if skipped:
            faults["skipped"] = f"{skipped:.0f} of {expected:.0f} updates in {window.batches} batches"
        return faults

    def _expected(self, i: int, window: Window) -> float | None:
        """How many updates there would have been if all batches had been finite; None where that is not known.

        One for each exchange, where sampled steps have shown that. Else, of a layer that has updated equally often in
        every batch until now, as many again.
        """
        if window.exchanged and self._counts_agree.get(i, False):
            return window.exchanged
        rate = window.updates / window.batches
        before = self._rates.setdefault(i, rate)
        if not before.is_integer() or before == 0:
            self._rates[i] = 0.0  # not in every batch: nobody knows
            return None
        return before * window.batches


def in_words(findings: Sequence[Finding]) -> list[str]:
    """A sentence for each kind."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    return [f"in {_layers(each)}: {MEANING[kind]}" for kind, each in by_kind.items()]


def _layers(findings: Sequence[Finding]) -> str:
    texts = [f"{finding.layer} ({finding.detail})" for finding in findings[:_MOST_NAMES]]
    if len(findings) > _MOST_NAMES:
        texts.append(f"{len(findings) - _MOST_NAMES} more layers")
    return ", ".join(texts)
