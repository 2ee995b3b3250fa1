"""The configs of AdamW and Muon."""

from math import inf
from typing import TYPE_CHECKING, Any

from models.config import config

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from models.language_model import LanguageModel


@config
class AdamWConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) by torch's fused implementation.

    Args:
        lr: peak learning rate; the schedule multiplies it.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the averaged square.
        weight_decay: decoupled, times the learning rate.
        decay_vectors: decay norms and biases too.
        decay_embeddings: decay token embeddings too.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_vectors: bool = False
    decay_embeddings: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.lr < inf:
            raise ValueError(f"lr={self.lr} must be positive and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must each lie in [0, 1)")
        for name in ("eps", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative or infinite")

    def build(self, model: "LanguageModel") -> "list[Optimizer]":
        """Return the optimisers of all parameters of `model`."""
        from runner.learn.optim.groups import adamw  # noqa: PLC0415

        return adamw(self, model)


@config
class MuonConfig(AdamWConfig):
    """Muon on the layers' matrices, AdamW (lr = `lr`) on embeddings, head and vectors.

    Args:
        muon_lr: learning rate of the orthogonalised update, scaled by 0.2 sqrt(max(rows, cols)) so
            that its size matches AdamW's (Liu et al., arXiv 2502.16982).
        momentum: of the gradients that are orthogonalised, after Nesterov.
    """

    muon_lr: float = 3e-3
    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.muon_lr < inf:
            raise ValueError(f"muon_lr={self.muon_lr} must be positive and finite")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")

    def numerics_with(self, model: Any) -> int:
        """Return the numerics revision for a model's config.

        Revision 1 applied Muon to the filters of convolutions.
        """
        return 2 if getattr(model, "has_filters", False) else 1

    def build(self, model: "LanguageModel") -> "list[Optimizer]":
        """Return [Muon, AdamW]; each parameter is in exactly one of them."""
        from runner.learn.optim.groups import muon_and_adamw  # noqa: PLC0415

        return muon_and_adamw(self, model)
