"""``syncbn.verify``: whether a model computes over several processes what one computes on the union of their inputs."""

from .result import Verification
from .verify import verify

__all__ = ["Verification", "verify"]
