"""Padding must not count in the statistics.

pytorch/pytorch#70529, "BatchNorm on variable-length sequences or batches": padded values of shorter sequences enter the
statistics. pytorch/pytorch#25910, "How to use batch norm when there has padding?": sentences padded to the longest, and
no module that takes a mask.

The judge is torch.nn.BatchNorm on the valid values of all processes alone, joined to one batch without padding.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documentation import blocks
from judge import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import syncbn
from syncbn.calls import entered
from syncbn.region import mask_for

# ---- sentences of different lengths


def sentences(*lengths: int) -> tuple[Tensor, Tensor]:
    """[N, C, L] padded to the longest, and the lengths. Padding is far from 0, so that it would be noticed."""
    x = torch.full((len(lengths), 5, max(lengths)), 100.0, dtype=torch.float64)
    for each, length in zip(x, lengths, strict=True):
        each[:, :length] = torch.randn(5, length, dtype=torch.float64) * 2 + length
    return x, torch.tensor(lengths)


def _normalize_sentences(x: Tensor, lengths: Tensor, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm(5).double()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x = x.requires_grad_()
    valid = syncbn.padding_mask(lengths, x.shape[2])
    with syncbn.valid_region(valid):
        y = run(x)
    y.masked_fill(~valid, 0).sin().sum().backward()
    values = [each[:, :n].T for each, n in zip(y.detach(), lengths, strict=True)]
    gradients = [each[:, :n].T for each, n in zip(x.grad, lengths, strict=True)]
    return {
        "y": torch.cat(values),
        "dx": torch.cat(gradients),
        "dx in the padding": x.grad.masked_select(~valid),
        "dweight": layer.weight.grad,
        "buffers": [layer.running_mean, layer.running_var],
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_variable_length_sequences(processes: Any, compiled: bool) -> None:
    parts = [sentences(7, 3, 1), sentences(12, 2)]
    steps = processes(2).run(_normalize_sentences, compiled, per_rank=parts)
    plain = nn.BatchNorm1d(5).double()
    joined = torch.cat([each[:, :n].T for x, lengths in parts for each, n in zip(x, lengths, strict=True)])
    joined = joined.detach().requires_grad_()
    y = plain(joined)
    y.sin().sum().backward()
    assert_close(torch.cat([step["y"] for step in steps]), y.detach(), 1e-9)
    assert_close(torch.cat([step["dx"] for step in steps]), joined.grad, 1e-9)
    assert_close(steps[0]["dweight"] + steps[1]["dweight"], plain.weight.grad, 1e-9)
    for step in steps:
        assert not step["dx in the padding"].any(), "nothing comes from values that count nowhere"
        assert_close(step["buffers"][0], plain.running_mean, 1e-9)
        assert_close(step["buffers"][1], plain.running_var, 1e-9)


# ---- images of different sizes


def _normalize_images(images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Padded to a common size, through a convolution of stride 2 and a layer: the images' own places, the buffers."""
    torch.manual_seed(3)
    model = syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)).double())
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    x = torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])
    sizes = [image.shape[1:] for image in images]
    with syncbn.valid_region(syncbn.padding_mask(sizes, (height, width))):
        y = model(x)
    own = [each[:, : (h + 1) // 2, : (w + 1) // 2] for each, (h, w) in zip(y, sizes, strict=True)]
    return own, [model[1].running_mean, model[1].running_var]


def test_images_padded_to_a_common_size(processes: Any) -> None:
    """Each image's own places after a stride of 2, at odd and even sizes, have the statistics of the images alone."""
    torch.manual_seed(5)
    images = [torch.randn(3, h, w, dtype=torch.float64) + h for h, w in ((9, 12), (16, 7), (5, 5), (8, 20))]
    results = processes(2).run(_normalize_images, per_rank=[(images[:1],), (images[1:],)])
    torch.manual_seed(3)
    convolution, plain = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), nn.BatchNorm2d(4).double()
    alone = [convolution(image.unsqueeze(0))[0] for image in images]
    expected = plain(torch.cat([each.flatten(1) for each in alone], 1)[None, :, :, None])[0, :, :, 0]
    got = torch.cat([each.flatten(1) for own, _ in results for each in own], 1)
    assert_close(got.detach(), expected.detach(), 1e-9)
    for _, buffers in results:
        assert_close(buffers[0], plain.running_mean, 1e-9)
        assert_close(buffers[1], plain.running_var, 1e-9)


def _segment(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """A small encoder and decoder; with a mask for each layer by hand, or by the block."""
    torch.manual_seed(4)
    down = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    layers = syncbn.convert(nn.ModuleList(nn.BatchNorm2d(n) for n in (3, 4, 4)).double())
    high = layers[0](x, None, mask)
    low = layers[1](down(high), None, None if mask is None else mask[:, :, ::2, ::2])
    y = layers[2](F.interpolate(low, x.shape[2:]), None, mask)
    y.sin().sum().backward()
    return [y.detach(), down.weight.grad, *(b.double() for layer in layers for b in layer.buffers())]


def _segment_in_a_region(x: Tensor, mask: Tensor) -> list[Tensor]:
    with syncbn.valid_region(mask):
        return _segment(x, None)


def test_each_layer_gets_the_mask_at_its_own_resolution(processes: Any) -> None:
    torch.manual_seed(6)
    parts = [
        (torch.randn(2, 3, 10, 8, dtype=torch.float64) + i, torch.rand(2, 1, 10, 8) > 0.3, torch.rand(2, 1, 10, 8))
        for i in range(2)
    ]
    for which in (1, 2):  # a bool mask, then weights
        inputs = [(part[0], part[which].double() if which == 2 else part[which]) for part in parts]
        by_hand = processes(2).run(_segment, per_rank=inputs)
        by_block = processes(2).run(_segment_in_a_region, per_rank=inputs)
        assert all(torch.equal(a, b) for x, y in zip(by_hand, by_block, strict=True) for a, b in zip(x, y, strict=True))


# ---- a process of which nothing counts


def _with_nothing(x: Tensor, nothing: bool) -> list[Tensor]:
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8)).double())
    with syncbn.valid_region(not nothing):
        y = model(x)
    y.sin().sum().backward()
    return [b.double() for b in model.buffers()]


def test_a_process_of_which_nothing_counts(processes: Any) -> None:
    """It takes part in every exchange, and the statistics are those of the others."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    dummy = torch.full((1, 3, 8, 8), 1e3, dtype=torch.float64)
    both = processes(2).run(_with_nothing, per_rank=[(x, False), (dummy, True)])
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8)).double()
    plain(x)
    for buffers in both:
        for mine, theirs in zip(buffers, plain.buffers(), strict=True):
            assert_close(mine, theirs.double(), 1e-9)


def test_a_union_of_nothing_does_not_reach_other_gradients(processes: Any) -> None:
    """Even times 0, NaN would be NaN in everybody's gradients."""
    dummy = torch.full((1, 3, 8, 8), 1e3, dtype=torch.float64)
    for buffers, loss, gradient in processes(2).run(_skip_everywhere, per_rank=[(dummy,), (dummy,)]):
        assert loss.isfinite()
        assert not gradient.any()
        assert [b.tolist() for b in buffers] == [[0.0] * 3, [1.0] * 3, 0.0]


def _skip_everywhere(x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    layer = syncbn.SyncBatchNorm(3).double()
    with syncbn.valid_region(False):
        loss = 0 * layer(x).sum()
    loss.backward()
    return list(layer.buffers()), loss.detach(), layer.weight.grad


# ---- the block itself


def layer_of(mean: float) -> tuple[syncbn.SyncBatchNorm, Tensor]:
    """A layer that remembers its last batch alone, and a batch of two samples: of zeros, and of ``mean``."""
    x = torch.zeros(2, 1, 4, 4)
    x[1] = mean
    return syncbn.SyncBatchNorm(1, momentum=1.0), x


FIRST, SECOND = torch.tensor([True, False]), torch.tensor([False, True])


def test_the_innermost_block_counts_and_none_is_everything() -> None:
    layer, x = layer_of(8.0)

    def mean() -> float:
        layer(x)
        return layer.running_mean.item()

    with syncbn.valid_region(FIRST):
        assert mean() == 0
        with syncbn.valid_region(SECOND):
            assert mean() == 8
            layer(x, None, FIRST.view(2, 1, 1, 1))
            assert layer.running_mean.item() == 0, "the layer's own mask comes first"
        with syncbn.valid_region(None):
            assert mean() == 4
        assert mean() == 0
    assert mean() == 4
    assert entered() == ()


def test_an_exception_leaves_the_block() -> None:
    with pytest.raises(KeyError), syncbn.valid_region(FIRST):
        raise KeyError
    assert entered() == ()


def test_other_threads_are_not_in_the_block() -> None:
    layer, x = layer_of(8.0)
    with syncbn.valid_region(FIRST):
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
    assert layer.running_mean.item() == 4


def test_a_generator_that_is_left_early_takes_its_own_block_along() -> None:
    def batches() -> Any:
        with syncbn.valid_region(FIRST):
            yield

    held = batches()
    next(held)
    with syncbn.valid_region(SECOND) as inner:
        held.close()
        assert entered() == (inner,)


def test_eval_needs_no_mask() -> None:
    layer, x = layer_of(8.0)
    with syncbn.valid_region(torch.ones(5, 4, 4)):
        assert layer.eval()(x).shape == x.shape


def test_inputs_of_another_batch_raise_or_count_in_full() -> None:
    layer, x = layer_of(8.0)
    regions = torch.ones(7, 1, 3, 3)
    with syncbn.valid_region(FIRST.view(2, 1, 1).expand(2, 4, 4)), pytest.raises(ValueError, match=r"strict=False"):
        layer(regions)
    with syncbn.valid_region(FIRST.view(2, 1, 1).expand(2, 4, 4), strict=False):
        layer(regions)
        assert layer.running_mean.item() == 1
        layer(x)
        assert layer.running_mean.item() == 0


def test_the_regions_of_a_single_image_are_no_batch_of_images() -> None:
    """One image on a process is what all this is for: its mask must not be taken for that of 7 regions."""
    layer, _ = layer_of(8.0)
    mask = syncbn.padding_mask([(2, 4)], (4, 4))
    with syncbn.valid_region(mask), pytest.raises(ValueError, match=r"strict=False"):
        layer(torch.randn(7, 1, 3, 3))


@pytest.mark.parametrize("padded", [6, (6, 4)], ids=str)
def test_no_sizes_make_an_empty_mask(padded: Any) -> None:
    expected = (0, 1, 6) if padded == 6 else (0, 1, 6, 4)
    assert syncbn.padding_mask([], padded).shape == expected
    assert syncbn.padding_mask(torch.zeros(0, 2 if padded != 6 else 1), padded).shape == expected


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ("valid", TypeError),
        (torch.ones(2, 4, 4, dtype=torch.complex64), TypeError),
        (torch.ones(2, 4, 4, requires_grad=True), ValueError),
    ],
    ids=["text", "complex", "gradient"],
)
def test_a_mask_that_is_none(mask: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"mask"):
        syncbn.valid_region(mask)
    if isinstance(mask, Tensor):
        with pytest.raises(error, match=r"mask"):
            syncbn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4), None, mask.unsqueeze(1))


def test_sizes_of_another_number_of_dimensions() -> None:
    with pytest.raises(ValueError, match=r"2 numbers for each sample"):
        syncbn.padding_mask([3, 4], (8, 8))


def test_a_block_inside_of_the_compiled_function() -> None:
    layer, x = layer_of(8.0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor, mask: Tensor) -> Tensor:
        with syncbn.valid_region(mask):
            return layer(x)

    run(x, FIRST)
    assert layer.running_mean.item() == 0
    run(x, SECOND)
    assert layer.running_mean.item() == 8
    assert entered() == ()


def test_a_block_around_a_graph_break() -> None:
    layer, x = layer_of(8.0)

    @torch.compile(backend="aot_eager")
    def run(x: Tensor, mask: Tensor) -> Tensor:
        with syncbn.valid_region(mask):
            x = layer(x)
            torch._dynamo.graph_break()
            return layer(x)

    for _ in range(2):
        run(x, SECOND)
        assert layer.running_mean.item() == 0, "its own output's"
        assert entered() == ()


def test_samples_without_places() -> None:
    """[N, C] takes each sample's greatest weight: a sample counts where any of its places does."""
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, 0, 2, 2], mask[2] = 0.5, 0.25
    assert mask_for(mask, torch.zeros(3, 7)).tolist() == [[0.5], [0.0], [0.25]]


def test_checkpointing_without_our_contexts_does_not_lose_the_mask_in_silence() -> None:
    layer, x = layer_of(8.0)
    with syncbn.valid_region(FIRST):
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(CheckpointError):
        y.sum().backward()


def test_the_documentation_s_code_runs() -> None:
    for code in blocks("docs/masks.md"):
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["y"].shape == (2, 8, 32, 48)
