"""``SyncBatchNormHook``: synchronizes the model of an mmengine Runner, from the configuration alone."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from syncbn.inventory import describe
from syncbn.surgery import convert


class SyncBatchNormHook(Hook):
    """Converts the Runner's model when training starts, whatever its layers were built as.

    In the configuration: ``custom_hooks = [dict(type="syncbn.integrations.mmengine.SyncBatchNormHook")]``. By then the
    Runner has initialized the model's weights, by the names of its layers' classes, and loaded what it resumes from; it
    has wrapped the model, too, which does no harm. The model stays converted. ``state_dict`` has the same keys, so that
    checkpoints load with this hook and without.

    Args:
        **options: what ``syncbn.convert`` takes beside the model, such as ``exclude="decode_head.*"`` or
            ``group_size=8``.

    Raises:
        TypeError: there is no such option; or, when training starts, a layer cannot be synchronized.
    """

    def __init__(self, **options: Any) -> None:
        _require_options(options)
        self.options = options

    def before_train(self, runner: Runner) -> None:
        convert(runner.model, **self.options)
        runner.logger.info(describe(runner.model).summary)


_OPTIONS = ("process_group", "include", "exclude", "group_size", "statistics_batch")


def _require_options(options: dict[str, Any]) -> None:
    """Raises at once, rather than when training starts: a Runner is built of many things, which takes its time."""
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise TypeError(f"expected options of syncbn.convert ({', '.join(_OPTIONS)}), got {', '.join(unknown)}")
