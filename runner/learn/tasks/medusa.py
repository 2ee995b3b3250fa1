"""Heads ahead: head k of a frozen decoder learns the token k after the next one."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey
from models.language_model import TokenLoss
from runner.learn.tasks.frozen import load_frozen
from runner.learn.tasks.medusa_config import MedusaTaskConfig
from runner.records.contracts import Batch, Inputs, Measure


class MedusaTask:
    """See `MedusaTaskConfig`."""

    measure: Measure = ("val_ahead_loss", "min")

    def __init__(self, cfg: MedusaTaskConfig, model: Any, tokenizer: Any, inputs: Inputs) -> None:
        self.cfg = cfg
        load_frozen(model.trunk, "task=medusa", "trunk", inputs, tokenizer)

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the weighted sum of the heads' losses; dropout has no part in it."""
        nll = self._nll(model(batch["tokens"], documents=batch.get("documents"), ahead=True), batch)
        weights = self.cfg.decay ** torch.arange(1, len(nll) + 1, device=nll.device)
        total = (nll.sum(dim=(1, 2)) * weights).sum()
        return TokenLoss(total=total, nll=nll[0].detach(), reported=nll.detach().sum() / len(nll))

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return the trunk's loss, the heads', and how often each is right."""
        tokens, documents = batch["tokens"], batch.get("documents")
        trunk = model(tokens, batch["targets"], documents=documents)
        scores = model(tokens, documents=documents, ahead=True)
        nll, later = self._nll(scores, batch), _later(batch, len(scores))
        counted = later != IGNORE
        values: dict[str, tuple[float, float]] = {
            "val_loss": (float(trunk.nll.double().sum()), int((batch["targets"] != IGNORE).sum())),
            "val_ahead_loss": (float(nll.double().sum()), int(counted.sum())),
        }
        for k, (own, target) in enumerate(zip(scores, later, strict=True), start=1):
            right = int((own.argmax(dim=-1) == target).sum())
            values[f"val_ahead_accuracy_{k}"] = (float(right), int((target != IGNORE).sum()))
        return values

    def _nll(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the nats of each head at each position, [heads, batch, seq]."""
        later = _later(batch, len(scores))
        flat = functional.cross_entropy(
            scores.float().flatten(0, 2), later.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return flat.view(later.shape)


def _later(batch: Batch, heads: int) -> Tensor:
    """Return what each head should tell at each position, [heads, batch, seq]."""
    targets = batch["targets"]
    ends = [functional.pad(targets[:, k:], (0, k), value=IGNORE) for k in range(1, heads + 1)]
    return torch.stack([end[:, : targets.shape[1]] for end in ends])
