"""Whether a Triton kernel computes on a device: where it gives what its reference gives."""

import os
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch


@lru_cache
def triton_agrees(device: torch.device, compare: Callable[[torch.device], None]) -> bool:
    """Return whether Triton runs on `device` and `compare` finds its kernel right; tested once.

    Where it is not a warning says why, and the reference runs.

    Args:
        compare: raises where the kernel differs from the reference: in a bit, or, where sums have
            another order, by more than their rounding.
    """
    if device.type != "cuda" or os.environ.get("ESPALIER_EAGER_KERNELS"):
        return False
    # Whatever asks first: a pass without gradients, under autocast or in inference mode.
    plain = torch.autocast("cuda", enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), plain:
            compare(device)
    except Exception as error:
        warnings.warn(f"a Triton kernel is passed over, which is slower: {error}", stacklevel=2)
        return False
    return True
