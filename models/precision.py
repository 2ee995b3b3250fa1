"""The precision recipe of a run: which dtype the matrix products of a forward pass use.

Master weights, optimiser states and the loss are fp32 under every recipe.
"""

import time
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

    def notice(self, device_type: str) -> str | None:
        """Return what a user should know of this recipe on this machine, None if there is nothing.

        On a CPU one bf16 product is timed: without AMX or AVX512-BF16 it can be many times slower.
        """
        if self.compute != "bf16" or device_type != "cpu":
            return None
        bf16, fp32 = (_product_s(dtype) for dtype in (torch.bfloat16, torch.float32))
        if bf16 < 1.5 * fp32:
            return None
        return (
            f"precision=bf16: on this CPU a bf16 product takes {bf16 / fp32:.1f} times as long as fp32; "
            "expect these cells to be slower"
        )


def _product_s(dtype: torch.dtype) -> float:
    """Return the seconds of one 512 x 512 x 512 product, the best of three."""
    a = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return best


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
