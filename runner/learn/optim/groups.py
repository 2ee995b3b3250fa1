"""Parameter groups of AdamW and Muon: optimiser, learning rate and decay of each parameter."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.contract import embeddings, filters, heads, learning_rate_scales, lookups
from runner.learn.optim.groups_config import AdamWConfig, MuonConfig

Groups = list[dict[str, Any]]


def adamw(cfg: AdamWConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters of `model`."""
    return [_adamw(cfg, _groups(cfg, model, _trained(model)))]


def muon_and_adamw(cfg: MuonConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return [Muon for the matrices of the layers, AdamW for all other parameters]."""
    from runner.learn.optim.muon import Muon  # noqa: PLC0415  (its DTensor takes 0.8 s)

    matrices: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    others = lookups(model) | embeddings(model) | heads(model) | filters(model)
    for name, parameter in _trained(model):
        inner = parameter.ndim == 2 and name not in others
        (matrices if inner else rest).append((name, parameter))
    groups = _groups(cfg, model, matrices, lr=cfg.muon_lr)
    muon = Muon(groups, lr=cfg.muon_lr, momentum=cfg.momentum)
    return [muon, _adamw(cfg, _groups(cfg, model, rest))]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _adamw(cfg: AdamWConfig, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def _groups(
    cfg: AdamWConfig,
    model: nn.Module,
    named: Iterable[tuple[str, nn.Parameter]],
    lr: float | None = None,
) -> Groups:
    """Group by (decay, learning-rate scale); `base_lr` is what the schedule multiplies."""
    scales, tables, embedded = learning_rate_scales(model), lookups(model), embeddings(model)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        decays = parameter.ndim >= 2 or cfg.decay_vectors
        if name in embedded and not cfg.decay_embeddings:
            decays = False
        decays = decays and name not in tables
        key = (cfg.weight_decay if decays else 0.0, scales.get(name, 1.0))
        groups.setdefault(key, []).append(parameter)
    base = cfg.lr if lr is None else lr
    return [
        {"params": params, "weight_decay": decay, "lr": base * scale, "base_lr": base * scale}
        for (decay, scale), params in groups.items()
    ]
