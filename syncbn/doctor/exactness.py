"""Whether layers do over the processes what they do in one: a small model, and a mistake that must be noticed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..surgery import convert
from ..verification import verify
from .checks import FAILED, OK, Check, ranks_in_words

Facts = dict[str, Any]


def exactness(device: torch.device) -> Facts:
    """One layer between two others, on parts of unequal size and unlike statistics, against one process with all."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3)).to(device)
    generator = torch.Generator().manual_seed(1 + rank)
    images = torch.randn(1 + rank % 3, 3, 12, 12, generator=generator) * (1 + rank % 5) + rank % 7
    found = verify(convert(model), images.to(device))
    worst = found.worst
    return {"ok": found.ok, "error": worst.error if worst else None, "summary": found.summary, "causes": found.causes}


def judge_exactness(said: list[Facts]) -> Check:
    first = said[0]
    if not first["ok"]:
        causes = "".join(f"; {cause}" for cause in first["causes"][:1])
        return Check("exactness", FAILED, f"{first['summary']}{causes}", said)
    summary = f"a layer over all ranks is one process with the union batch, within {first['error']:.0e} (float64)"
    return Check("exactness", OK, summary, said)


def strays(device: torch.device) -> Facts:
    """Two layers of one size in another order on rank 0: the result must be NaN, or an error, on every process."""
    layers = convert(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).to(device))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(dist.get_rank())).to(device)
    layers(x)
    order = (0, 1) if dist.get_rank() == 0 else (1, 0)
    try:
        outputs = [layers[number](x) for number in order]
    except RuntimeError as error:  # SYNCBN_CHECK=1 compares before it exchanges
        return {"noticed": "different exchanges" in str(error)}
    return {"noticed": all(bool(output.isnan().all()) for output in outputs)}


def judge_strays(said: list[Facts]) -> Check:
    unnoticed = [rank for rank, each in enumerate(said) if not each["noticed"]]
    if unnoticed:
        text = f"processes in different layers are mixed up without notice on {ranks_in_words(unnoticed)}"
        return Check("mismatches", FAILED, text, said)
    return Check("mismatches", OK, "processes in different layers are noticed on every rank", said)
