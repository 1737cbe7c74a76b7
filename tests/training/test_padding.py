"""A detector pads its images by itself; the padding counts in no synchronized layer's statistics."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.calls import entered
from syncbn.training.models import count_valid_region, detection_model, small_fcos
from syncbn.training.models.padding import _Padding

# Of each process: the first pads its second image, the second neither, the third both, to a multiple of 32.
SIZES = [[(64, 96), (40, 70)], [(64, 64), (64, 64)], [(33, 50)]]


def detector(**options):
    torch.manual_seed(1)
    return small_fcos(3, widths=(8, 8), channels=32, head_convs=1, _skip_resize=True, **options).double().train()


def batch(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in sizes]
    boxes = torch.tensor([[4.0, 4.0, 24.0, 20.0]], dtype=torch.float64)
    return images, [{"boxes": boxes.clone(), "labels": torch.tensor([1])} for _ in images]


def without_hooks(model):
    for part in model.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Padding)]:
                del hooks[key]
    return model


def running(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


def expected(model, batches):
    """The first layer's running statistics after one step: of the values that belong to images alone."""
    values = []
    for images, _ in batches:
        padded = model.transform(images)[0]
        y = model.backbone.body.conv1(padded.tensors).detach()
        for image, (height, width) in zip(y, padded.image_sizes, strict=True):
            # Of stride 2: output i has its centre at 2i.
            values.append(image[:, : (height + 1) // 2, : (width + 1) // 2].flatten(1))
    values = torch.cat(values, 1)
    return 0.1 * values.mean(1), 0.9 + 0.1 * values.var(1)


def step(sizes, seed, hooked):
    model = detector() if hooked else without_hooks(detector())
    syncbn.convert(model)
    together = DistributedDataParallel(model)
    sum(together(*batch(sizes, seed)).values()).backward()
    assert not entered()
    return running(model.backbone.body.bn1)


@pytest.mark.parametrize("hooked", [True, False])
def test_statistics_are_those_of_the_images_of_all_processes(processes, hooked):
    per_rank = [(sizes, seed) for seed, sizes in enumerate(SIZES)]
    results = processes(3).run(step, hooked, per_rank=per_rank)
    judge = expected(detector(), [batch(*arguments) for arguments in per_rank])
    for result in results:
        for found, truth in zip(result, judge, strict=True):
            if hooked:
                torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
            else:  # or else this test would prove nothing
                assert (found - truth).abs().max() > 1e-3


def test_the_detectors_of_the_configuration_do_so():
    for name in ("fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2"):
        model = detection_model(name, 3, skip_resize=True).train().double()
        seen = []
        model.backbone.register_forward_pre_hook(lambda *_, seen=seen: seen.append(len(entered())))
        with torch.no_grad():
            model.backbone.forward = stop
            with pytest.raises(StoppedError):
                model(*batch(SIZES[0]))
        assert seen == [1], name
        assert not entered()


class StoppedError(Exception):
    pass


def stop(*_):
    raise StoppedError


def test_nothing_is_done_where_nothing_is_padded_or_learns():
    model = syncbn.convert(detector())
    seen = []
    model.backbone.register_forward_pre_hook(lambda *_: seen.append(len(entered())))
    model(*batch(SIZES[1]))
    with torch.no_grad():
        model.eval()(batch(SIZES[0])[0])
    assert seen == [0, 0]


@pytest.mark.parametrize("part", ["backbone", "backbone.fpn", "head.classification_head"])
def test_an_exception_leaves_no_region_open(part):
    model = syncbn.convert(detector())
    broken = model.get_submodule(part)
    broken.forward = stop
    with pytest.raises(StoppedError):
        model(*batch(SIZES[0]))
    assert not entered()
    del broken.forward
    model(*batch(SIZES[0]))
    assert not entered()


def test_an_exception_of_another_hook_before_it_is_entered():
    model = syncbn.convert(detector())
    handle = model.backbone.register_forward_pre_hook(stop, prepend=True)
    with pytest.raises(StoppedError):
        model(*batch(SIZES[0]))
    assert not entered()
    handle.remove()
    model(*batch(SIZES[0]))


def test_a_part_that_is_called_by_itself_does_not_see_the_last_batch():
    model = syncbn.convert(detector())
    model(*batch(SIZES[0]))
    alone = copy.deepcopy(model)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    model.backbone(images)
    without_hooks(alone).backbone(images)
    assert torch.equal(model.backbone.body.bn1.running_mean, alone.backbone.body.bn1.running_mean)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_hooks_of_their_own(copied):
    model = syncbn.convert(detector())
    other = copied(model)
    truth = expected(detector(), [batch(SIZES[0])])
    other(*batch(SIZES[0]))
    torch.testing.assert_close(running(other.backbone.body.bn1), truth)
    assert not torch.equal(model.backbone.body.bn1.running_mean, other.backbone.body.bn1.running_mean)
    del model
    other(*batch(SIZES[0]))


def test_a_second_call_and_the_state_dict_change_nothing():
    model = detector()
    hooks = [len(part._forward_hooks) for part in model.modules()]
    assert count_valid_region(model) is model
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    assert model.state_dict().keys() == without_hooks(detector()).state_dict().keys()
    with pytest.raises(TypeError, match="expected a detector with transform, backbone and head, got Linear"):
        count_valid_region(nn.Linear(1, 1))


def test_population_statistics_leave_the_padding_out_too():
    model = detector()
    # In one batch and in two: the images are padded to other sizes.
    images = batch([(64, 96), (20, 30)])[0]
    values = []
    for batches in ([images], [images[:1], images[1:]]):
        syncbn.recalibrate(model, batches, forward=lambda model, batch: model(batch))
        values.append(running(model.backbone.body.bn1))
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


def test_a_compiled_backbone_leaves_the_padding_out():
    model = syncbn.convert(detector())
    model.backbone.compile(backend="eager")
    truth = expected(detector(), [batch(SIZES[0])])
    model(*batch(SIZES[0]))
    torch.testing.assert_close(running(model.backbone.body.bn1), truth)
    assert not entered()
