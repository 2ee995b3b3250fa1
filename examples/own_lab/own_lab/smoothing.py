"""Next-token prediction with smoothed labels; validation is plain, so that runs compare."""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from models.config import config
from models.language_model import TokenLoss


@config
class SmoothedConfig:
    """Label smoothing (Szegedy et al., arXiv 1512.00567).

    Args:
        smoothing: probability that is spread over the whole vocabulary.
    """

    smoothing: float = 0.1

    def build(self, model: Any, tokenizer: Any, inputs: Any) -> "Smoothed":
        """Return the task."""
        return Smoothed(self.smoothing)


class Smoothed:
    """See `SmoothedConfig`; the best checkpoint is that of the lowest val_loss, as by default."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def loss(self, model: Any, batch: dict[str, Tensor], noise: Any) -> TokenLoss:
        """Return the summed loss of a batch; targets of -100 do not count."""
        logits = model(batch["tokens"]).mT
        given = {"target": batch["targets"], "reduction": "none"}
        total = cross_entropy(logits, label_smoothing=self.smoothing, **given).sum()
        return TokenLoss(total=total, nll=cross_entropy(logits.detach(), **given))

    def validate(self, model: Any, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Return `val_loss`: (nats, tokens)."""
        targets = batch["targets"]
        nats = cross_entropy(model(batch["tokens"]).mT, targets, reduction="sum")
        return {"val_loss": (float(nats), int((targets >= 0).sum()))}
