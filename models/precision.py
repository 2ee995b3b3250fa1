"""The precision recipe of a run: which dtype the matrix products of a forward pass use.

Master weights, optimiser states and the loss are fp32 under every recipe.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from models.config import config


@config
class PrecisionConfig:
    """A compute dtype: `fp32`, or `bf16` by autocast with fp32 master weights."""

    compute: Literal["fp32", "bf16"] = "fp32"

    def build(self, device: torch.device) -> "Precision":
        """Return the recipe on `device`.

        Raises:
            ValueError: the device cannot compute in the dtype asked for.
        """
        cuda = self.compute == "bf16" and device.type == "cuda"
        if cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                "precision.compute=bf16 needs an Ampere GPU or later; "
                f"this is {name}; use precision=fp32"
            )
        return Precision(device_type=device.type, compute=self.compute)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A recipe bound to a device type."""

    device_type: str
    compute: str

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context a forward pass runs in."""
        if self.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16)
