"""Next-token prediction."""

from typing import Any

import torch
from torch import Tensor

from kernels.philox import NoiseKey
from models.contract import token_loss
from models.language_model import TokenLoss
from runner.data.corpus import bytes_per_id
from runner.records.contracts import Batch, Measure


class LanguageModelling:
    """Next-token prediction in which all targets have the same weight.

    A batch has `tokens`, `targets` (-100: none) and, if attention is masked by document,
    `documents`; with data.bidirectional_prompt also `spans`.
    """

    measure: Measure = ("val_loss", "min")

    def __init__(self, tokenizer: Any) -> None:
        self.bytes_per_id = torch.from_numpy(bytes_per_id(tokenizer))

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the summed loss of a batch."""
        return token_loss(
            model,
            batch["tokens"],
            batch["targets"],
            documents=batch.get("documents"),
            noise=noise,
            spans=batch.get("spans"),
        )

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return `val_loss` (nats, tokens) and `val_bits_per_byte` (nats, bytes)."""
        loss = token_loss(
            model,
            batch["tokens"],
            batch["targets"],
            documents=batch.get("documents"),
            spans=batch.get("spans"),
        )
        nats, targets = float(loss.nll.double().sum()), batch["targets"].cpu()
        return {
            "val_loss": (nats, int((targets >= 0).sum())),
            "val_bits_per_byte": (nats, self._num_bytes(targets)),
        }

    def _num_bytes(self, targets: Tensor) -> int:
        return int(self.bytes_per_id[targets[targets >= 0]].sum())
