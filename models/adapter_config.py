"""The config of a low-rank adapter; see `models/adapter.py`."""

import hashlib
import math
from pathlib import Path
from typing import Literal

from models.config import config, execution

Base = Literal["full", "nf4", "nvfp4", "int8"]


@config
class AdapterConfig:
    """Low-rank adapters on the linear layers of a model whose own weights are frozen.

    Args:
        kind: lora (Hu et al., arXiv 2106.09685); rslora, whose scale is alpha / sqrt(rank)
            (Kalajdzievski, 2312.03732); dora, which learns each row's length too (Liu et al.,
            2402.09353).
        rank: of the update B A.
        alpha: the update's scale is alpha / rank.
        targets: patterns of the layers' names, of which those of one product have names of their
            own: `*.attn.qkv.q`, `*.attn.out`, `*.mlp.up.gate`.
        base: what the frozen weights of all layers are held in; nf4 is QLoRA's (2305.14314).
        start: a folder of peft from which the adapter starts.
    """

    kind: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)
    base: Base = "full"
    start: str | None = execution(None)  # its content is hashed, not its path

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"adapter.alpha={self.alpha} must be positive and finite")
        if not self.targets:
            raise ValueError("adapter.targets is empty; name at least one pattern, '*' for all")
        if self.start is not None:  # a job may start in another directory
            object.__setattr__(self, "start", str(Path(self.start).expanduser().resolve()))

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)

    def content_hash(self) -> str:
        """Return the hash of the tensors in `start`, "" without one."""
        if self.start is None:
            return ""
        file = Path(self.start, "adapter_model.safetensors")
        if not file.exists():
            raise ValueError(f"adapter.start: {file} does not exist; give a folder of peft")
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
