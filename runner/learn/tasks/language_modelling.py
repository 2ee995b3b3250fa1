"""Next-token prediction."""

from typing import TYPE_CHECKING

from models.config import config

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.philox import NoiseKey
    from models.language_model import LanguageModel, TokenLoss


@config
class LanguageModellingConfig:
    """Every next token is a target."""

    def loss(
        self, model: "LanguageModel", batch: "dict[str, Tensor]", *, mask_documents: bool,
        noise: "NoiseKey | None",
    ) -> "TokenLoss":  # fmt: skip
        """Return the summed loss of a batch of samples (`tokens`, `targets`, `documents`)."""
        documents = batch["documents"] if mask_documents else None
        loss: TokenLoss = model(batch["tokens"], batch["targets"], documents=documents, noise=noise)
        return loss
