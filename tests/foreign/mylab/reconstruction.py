"""A task whose targets are no next tokens: say what stood where a token is masked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.philox import NoiseKey, keep_mask
from models.language_model import TokenLoss

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Which share of the tokens is masked."""

    share: float = 0.3

    def build(
        self, model: Any, tokenizer: Any, inputs: Mapping[str, tuple[Path, ...]]
    ) -> "Reconstruction":
        """Return the task."""
        return Reconstruction(self.share, tokenizer.eos)


class Reconstruction:
    """Masks are drawn in training, the same at every validation."""

    measure: tuple[str, Literal["min", "max"]] = ("val_recovered", "max")

    def __init__(self, share: float, blank: int) -> None:
        self.share, self.blank = share, blank

    def draw(self, model: Any, batches: Sequence[Batch], noise: NoiseKey) -> list[Batch]:
        """Return the micro-batches with `hidden`, where a token is masked."""
        length = batches[0]["tokens"].shape[1]
        hidden = ~keep_mask(noise, 0, length, self.share)
        parts = torch.split(hidden, [len(batch["tokens"]) for batch in batches])
        return [{**b, "hidden": part} for b, part in zip(batches, parts, strict=True)]

    def count(self, batch: Batch) -> Tensor:
        """Return how many tokens are masked, at least one."""
        return batch["hidden"].sum().clamp(min=1)

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the loss of what is masked."""
        tokens, hidden = batch["tokens"], batch["hidden"]
        logits = model(tokens.masked_fill(hidden, self.blank))
        nll = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens.flatten(), reduction="none"
        )
        nll = nll.view(tokens.shape) * hidden
        return TokenLoss(total=nll.sum(), nll=nll.detach())

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return the share of tokens that is recovered, every third being masked."""
        tokens = batch["tokens"]
        hidden = (torch.arange(tokens.shape[1], device=tokens.device) % 3 == 1).expand_as(tokens)
        said = model(tokens.masked_fill(hidden, self.blank)).argmax(dim=-1)
        return {"val_recovered": (float((said == tokens)[hidden].sum()), float(hidden.sum()))}
