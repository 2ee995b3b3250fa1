"""AdamW and Muon: which parameter goes to which optimiser, with which rate and decay."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.config import config
from models.language_model import LanguageModel

Groups = list[dict[str, Any]]


@config
class AdamWConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), torch's own, fused.

    Args:
        decay_vectors: also decay norms and biases; decay_embeddings: also token embeddings.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_vectors: bool = False
    decay_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")

    def build(self, model: LanguageModel) -> list[torch.optim.Optimizer]:
        """Return the optimisers of all parameters of `model`."""
        return [self._adamw(_groups(self, model, model.named_parameters()))]

    def _adamw(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@config
class MuonConfig(AdamWConfig):
    """Muon on the layers' matrices, AdamW (lr = `lr`) on embeddings, head and vectors.

    Args:
        muon_lr: learning rate of the orthogonalised update, scaled by 0.2 sqrt(max(rows, cols)) so
            that its size matches AdamW's (Liu et al., arXiv 2502.16982).
    """

    muon_lr: float = 3e-3
    momentum: float = 0.95

    def build(self, model: LanguageModel) -> list[torch.optim.Optimizer]:
        """Return [Muon, AdamW], each parameter in exactly one."""
        from runner.learn.optim.muon import Muon  # noqa: PLC0415  (its DTensor takes 0.8 s)

        matrices: list[tuple[str, nn.Parameter]] = []
        rest: list[tuple[str, nn.Parameter]] = []
        lookups = model.lookup_parameters()
        for name, parameter in model.named_parameters():
            inner = parameter.ndim == 2 and not name.startswith(("embedding", "positions", "head"))
            inner = inner and name not in lookups
            (matrices if inner else rest).append((name, parameter))
        muon = Muon(
            _groups(self, model, matrices, lr=self.muon_lr), lr=self.muon_lr, momentum=self.momentum
        )
        return [muon, self._adamw(_groups(self, model, rest))]


def _groups(
    cfg: AdamWConfig, model: LanguageModel, named: Iterable[tuple[str, nn.Parameter]],
    lr: float | None = None,
) -> Groups:  # fmt: skip
    """Group by (decay, learning-rate scale); `base_lr` is what the schedule multiplies."""
    scales, lookups = model.learning_rate_scales(), model.lookup_parameters()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        decays = parameter.ndim >= 2 or cfg.decay_vectors
        if name.startswith(("embedding", "positions")) and not cfg.decay_embeddings:
            decays = False
        decays = decays and name not in lookups
        key = (cfg.weight_decay if decays else 0.0, scales.get(name, 1.0))
        groups.setdefault(key, []).append(parameter)
    base = cfg.lr if lr is None else lr
    return [
        {"params": params, "weight_decay": decay, "lr": base * scale, "base_lr": base * scale}
        for (decay, scale), params in groups.items()
    ]
