"""Learning from preferences: pairs of answers under a policy and a frozen reference.

The loss of a pair hangs on two sums of log-probabilities. Its gradient is that of the sum of
w x nll over tokens, w the derivative of the loss by the answer's log-probability, which is known
when all nll are: no logits are kept.

Shape legend: rows = 2 x pairs, chosen and rejected in turn; seq.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch import distributed as dist

from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey
from models.adapter import adapters_off
from models.contract import token_loss
from models.language_model import TokenLoss
from runner.learn.tasks.frozen import frozen_like
from runner.learn.tasks.preference_config import ADAPTER, PreferenceConfig
from runner.learn.tasks.preference_losses import Pairs, pair_losses
from runner.records.contracts import Batch, Inputs, Measure


@dataclass(frozen=True)
class _Weigher:
    """Turns the nll of all tokens into their weights; see `kernels.cross_entropy.Weights`."""

    cfg: PreferenceConfig
    targets: Int64[Tensor, "rows seq"]
    reference: Float[Tensor, " rows"]
    kl: Float[Tensor, ""]

    def weigh(self, nll: Tensor, rows: Tensor) -> Tensor:
        """Return the weights of the tokens `rows`."""
        every = nll.new_zeros(self.targets.numel()).index_copy(0, rows, nll)
        _, slopes = pair_losses(self.cfg, self.pairs(every.view(self.targets.shape)))
        weights: Tensor = -slopes.flatten()[rows // self.targets.shape[1]]
        return weights

    def pairs(self, nll: Float[Tensor, "rows seq"]) -> Pairs:
        """Return what the losses are made of."""
        lengths = (self.targets != IGNORE).sum(-1).double()
        logp, reference = -nll.double().sum(-1), self.reference
        return Pairs(
            logp=logp.view(-1, 2),
            reference=reference.view(-1, 2),
            lengths=lengths.view(-1, 2),
            kl=self.kl,
        )


class Preference:
    """Learning from preferences; see `PreferenceConfig`."""

    measure: Measure = ("val_preference_loss", "min")

    def __init__(self, cfg: PreferenceConfig, model: Any, tokenizer: Any, inputs: Inputs) -> None:
        self.cfg, self.policy = cfg, model
        self.reference = None
        if cfg.has_reference and cfg.reference != ADAPTER:
            self.reference = frozen_like(model, "task.reference", cfg.reference, inputs, tokenizer)

    def draw(self, model: Any, batches: Sequence[Batch], noise: NoiseKey) -> Sequence[Batch]:
        """Return the batches with their pairs as rows and the reference's log-probabilities.

        Both answers of a pair and the reference have the same noise: at the first step all
        log-ratios are 0, whatever the dropout.
        """
        rows = [as_rows(batch) for batch in batches]
        keys = [replace(noise, samples=batch["index"]) for batch in rows]
        compared = [
            batch | {"reference": self._reference_logp(model, batch, key)}
            for batch, key in zip(rows, keys, strict=True)
        ]
        if self.cfg.loss != "kto":
            return compared
        kl = self._mismatched_ratio(model, rows, keys)
        return [batch | {"kl": kl} for batch in compared]

    def count(self, batch: Batch) -> Tensor:
        """Return the number of pairs."""
        return torch.tensor(len(batch["tokens"]) // 2, device=batch["tokens"].device)

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the loss of the pairs in a batch of `draw`; `reported` is their sum."""
        weigher = self._weigher(batch)
        out = token_loss(
            model,
            batch["tokens"],
            batch["targets"],
            noise=noise,
            weights=weigher.weigh,
            divisor=self.count(batch),
        )
        pairs = weigher.pairs(out.nll)
        measures = {name: values.mean() for name, values in self._measures(pairs).items()}
        reported = pair_losses(self.cfg, pairs)[0].sum()
        return replace(out, reported=reported, statistics=out.statistics | measures)

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return the loss of a pair, its margin, and the log-probabilities of its answers."""
        pairs = self._held_out(model, batch)
        measures = {"preference_loss": pair_losses(self.cfg, pairs)[0], **self._measures(pairs)}
        return {f"val_{k}": (float(v.sum()), len(v)) for k, v in measures.items()}

    def margins(self, model: Any, batch: Batch) -> Float[Tensor, " pairs"]:
        """Return how much more the chosen answer of each pair is rewarded than the rejected one."""
        return self._measures(self._held_out(model, batch))["reward_margin"]

    def _held_out(self, model: Any, batch: Batch) -> Pairs:
        """Return what the losses of a batch without noise are made of."""
        rows = as_rows(batch)
        compared = rows | {"reference": self._reference_logp(model, rows, None)}
        if self.cfg.loss == "kto" and len(rows["tokens"]) > 2:
            compared["kl"] = self._mismatched_ratio(model, [rows], [None])
        nll = token_loss(model, rows["tokens"], rows["targets"]).nll
        return self._weigher(compared).pairs(nll)

    def _weigher(self, batch: Batch) -> _Weigher:
        kl = batch.get("kl", batch["reference"].new_zeros(()))
        return _Weigher(self.cfg, batch["targets"], batch["reference"], kl)

    def _measures(self, pairs: Pairs) -> dict[str, Float[Tensor, " pairs"]]:
        """Return what tells of the pairs beside their loss; rewards are beta x log-ratio."""
        rewards = self.cfg.beta * pairs.ratios(normalised=self.cfg.normalised)
        margin = rewards[:, 0] - rewards[:, 1]
        ties = 0.5 * (margin == 0)
        return {
            "reward_margin": margin,
            "reward_accuracy": (margin > 0) + ties,
            "logp_chosen": pairs.logp[:, 0],
            "logp_rejected": pairs.logp[:, 1],
        }

    def _reference_logp(
        self, model: Any, batch: Batch, noise: NoiseKey | None
    ) -> Float[Tensor, " rows"]:
        if not self.cfg.has_reference:
            return torch.zeros(len(batch["tokens"]), device=batch["tokens"].device).double()
        switched_off = adapters_off(model) if self.reference is None else nullcontext()
        with torch.no_grad(), switched_off:
            return _logp(self.reference or model, batch, noise)

    def _mismatched_ratio(
        self, model: Any, batches: Sequence[Batch], keys: Sequence[NoiseKey | None]
    ) -> Float[Tensor, ""]:
        """Return KTO's kl: the mean log-ratio of the answers to other prompts, at least 0."""
        tokens, targets = (torch.cat([b[key] for b in batches]) for key in ("tokens", "targets"))
        sizes = [len(batch["tokens"]) for batch in batches]
        both = mismatched(tokens, targets)
        parts = zip(*(torch.split(part, sizes) for part in both), strict=True)
        ratios = []
        for (others, theirs), batch, noise in zip(parts, batches, keys, strict=True):
            other = batch | {"tokens": others, "targets": theirs}
            with torch.no_grad():
                policy = _logp(model, other, noise)
            ratios.append(policy - self._reference_logp(model, other, noise))
        mean = torch.cat(ratios).mean()
        if dist.is_initialized() and noise is not None:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return mean.clamp(min=0.0)


def as_rows(batch: Batch) -> Batch:
    """Return a batch of pairs [pairs, 2, seq] as [rows, seq], the index of each pair repeated."""
    return {
        "tokens": batch["tokens"].flatten(0, 1),
        "targets": batch["targets"].flatten(0, 1),
        "index": batch["index"].repeat_interleave(2),
    }


def mismatched(
    tokens: Int64[Tensor, "rows seq"], targets: Int64[Tensor, "rows seq"]
) -> tuple[Int64[Tensor, "rows seq"], Int64[Tensor, "rows seq"]]:
    """Return (tokens, targets) of each prompt with the answer of the next pair's same side.

    What does not fit into seq is cut off.
    """
    seq = tokens.shape[1]
    places = torch.arange(seq, device=tokens.device)
    learnt = targets != IGNORE
    prompts = learnt.int().argmax(-1, keepdim=True) + 1  # ids before the answer
    following = torch.arange(len(tokens), device=tokens.device).roll(-2)
    shift = prompts[following] - prompts  # of the other answer's ids
    source = (places + shift).clamp(min=0, max=seq - 1)
    others = tokens[following].gather(1, source)
    predicted = targets[following].gather(1, source)
    in_reach = (places + shift >= 0) & (places + shift < seq)
    answered = (places >= prompts - 1) & in_reach
    return (
        torch.where(places < prompts, tokens, others),
        torch.where(answered, predicted, torch.full_like(predicted, IGNORE)),
    )


def _logp(model: Any, batch: Batch, noise: NoiseKey | None) -> Float[Tensor, " rows"]:
    """Return the summed log-probability of each row's answer."""
    out = token_loss(model, batch["tokens"], batch["targets"], noise=noise)
    return -out.nll.double().sum(-1)
