"""Masked diffusion: the loss of hidden tokens, and an upper bound on the likelihood.

Shape legend: batch, seq.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey, random_words
from models.contract import logits, token_loss
from models.language_model import TokenLoss
from runner.data.corpus import bytes_per_id, end_ids, token_id
from runner.data.tokenizer_folder import MASK
from runner.learn.tasks.diffusion_config import DiffusionConfig
from runner.records.contracts import Batch, Measure

_HIDING, _TIMES, _OPENING = (
    0x68696465,
    0x74696D65,
    0x6F70656E,
)  # Philox streams, beside those of layers


@dataclass(frozen=True)
class Hidden:
    """A batch with tokens hidden.

    Args:
        tokens: ids, with `<mask>` where a token is hidden.
        where: which are hidden.
        weights: of their losses.
    """

    tokens: Int64[Tensor, "batch seq"]
    where: Bool[Tensor, "batch seq"]
    weights: Float[Tensor, "batch seq"]


class Diffusion:
    """Masked diffusion; see `DiffusionConfig`."""

    measure: Measure = ("val_bound", "min")

    def __init__(self, cfg: DiffusionConfig, tokenizer: Any) -> None:
        mask = token_id(tokenizer, MASK)
        assert mask is not None, "the run adds the tokens that the config names"
        self.cfg, self.mask = cfg, mask
        self.ends = torch.tensor(end_ids(tokenizer))
        self.bytes_per_id = torch.from_numpy(bytes_per_id(tokenizer))

    def draw(self, model: Any, batches: Sequence[Batch], noise: NoiseKey) -> Sequence[Batch]:
        """Return the batches, without the padding that all samples of one end with if it is cut."""
        return [without_padding(batch) for batch in batches] if self.cfg.cut_padding else batches

    def planned(self, batch: Batch) -> Batch:
        """Return a batch of the largest shapes: how much is cut depends on values."""
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Return the number of tokens that can be hidden."""
        return maskable(batch).sum()

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the weighted loss of the tokens that `noise` hides."""
        assert noise is not None, "training draws what is hidden"
        tokens, runs = batch["tokens"], None
        if self.cfg.ends_together:
            runs = runs_of(torch.isin(tokens, self.ends.to(tokens.device)))
        hidden = hide(self.cfg, tokens, maskable(batch), self.mask, noise, runs)
        out = self._predict(model, batch, hidden, noise)
        weights = shifted(hidden.weights, 0.0) if self.cfg.shift else hidden.weights
        return replace(out, reported=(weights * out.nll).sum())

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return `val_bound` (nats, tokens), its bits per byte, and its standard error.

        The error is that of the random choice of hidden tokens, for the validation text given.
        """
        can_hide = maskable(batch)
        size = can_hide.sum(-1)
        nats = torch.stack(
            [self._bound(model, batch, draw, can_hide) for draw in range(self.cfg.draws)]
        )
        total, tokens = float(nats.mean(0).sum()), int(size.sum())
        variance = nats.var(0).sum() / self.cfg.draws
        hidden = batch["tokens"][can_hide].cpu()
        return {
            "val_bound": (total, tokens),
            "val_bound_bits_per_byte": (total, int(self.bytes_per_id[hidden].sum())),
            "val_bound_stderr": (float(variance), tokens),
        }

    def _bound(
        self, model: Any, batch: Batch, draw: int, can_hide: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, " batch"]:
        """Return one estimate of each sample's bound, nats."""
        key = NoiseKey(seed=0, step=0, samples=sample_number(batch["tokens"]))
        hidden = hide_counted(batch["tokens"], can_hide, self.mask, key, draw, self.cfg.draws)
        return self._predict(model, batch, hidden, None).nll.double().sum(-1) * (
            can_hide.sum(-1) / hidden.where.sum(-1).clamp(min=1)
        )

    def _predict(
        self, model: Any, batch: Batch, hidden: Hidden, noise: NoiseKey | None
    ) -> TokenLoss:
        targets = torch.where(hidden.where, batch["tokens"], IGNORE)
        weights = hidden.weights.float()
        if self.cfg.shift:
            targets, weights = shifted(targets, IGNORE), shifted(weights, 0.0)
        documents = batch.get("documents")
        if self.cfg.never_mask:
            return self._without_mask(model, hidden.tokens, targets, weights, documents, noise)
        return token_loss(
            model,
            hidden.tokens,
            targets,
            documents=documents,
            noise=noise,
            weights=weights,
            visible=self._visible(noise, targets.shape[1], targets.device),
        )

    def _visible(
        self, noise: NoiseKey | None, seq: int, device: torch.device
    ) -> Bool[Tensor, "seq seq"] | None:
        """Return which tokens see which in training while the mask is annealed, else None."""
        if noise is None or noise.step + 1 >= self.cfg.anneal_steps:
            return None
        of_all = replace(noise, samples=torch.zeros(1, dtype=torch.int64, device=device))
        return opened(of_all, seq, (noise.step + 1) / self.cfg.anneal_steps)

    def _without_mask(
        self,
        model: Any,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor,
        documents: Tensor | None,
        noise: NoiseKey | None,
    ) -> TokenLoss:
        visible = self._visible(noise, tokens.shape[1], tokens.device)
        scores = logits(model, tokens, documents=documents, noise=noise, visible=visible).float()
        ids = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(ids == self.mask, -math.inf)
        nll = functional.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        ).view(targets.shape)
        return TokenLoss(total=(weights * nll).sum(), nll=nll.detach())


def maskable(batch: Batch) -> Bool[Tensor, "batch seq"]:
    """Return which tokens can be hidden: those that are the target of the token before."""
    before = batch["targets"][:, :-1] != IGNORE
    return functional.pad(before, (1, 0), value=False)


def without_padding(batch: Batch) -> Batch:
    """Return a batch that ends at the last token of its samples that can be hidden."""
    places = maskable(batch).any(0).nonzero()[:, 0]
    length = int(places[-1]) + 1 if len(places) else 1
    seq = batch["tokens"].shape[1]
    return {
        name: value[:, :length] if value.shape[1:] == (seq,) else value
        for name, value in batch.items()
    }


def hide(
    cfg: DiffusionConfig,
    tokens: Int64[Tensor, "batch seq"],
    can_hide: Bool[Tensor, "batch seq"],
    mask: int,
    noise: NoiseKey,
    runs: Int64[Tensor, "batch seq"] | None = None,
) -> Hidden:
    """Return `tokens` with each one hidden with its sample's probability, and the weights.

    Args:
        runs: of each token the place whose fate it shares (None: its own).
    """
    times = draw_times(cfg, noise)[:, None]
    probability = (1.0 - cfg.min_probability) * times + cfg.min_probability
    dice = uniform(noise, _HIDING, tokens.shape[1])
    where = can_hide & ((dice if runs is None else dice.gather(1, runs)) < probability)
    if cfg.weight == "bound":
        weights = where / probability
    elif cfg.weight == "linear":
        weights = where * (1.0 - times)
    elif cfg.weight == "cart":
        weights = where * context_weights(~where, cfg.cart_p)
    else:
        weights = where.double()
    return Hidden(torch.where(where, mask, tokens), where, weights)


def runs_of(alike: Bool[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
    """Return the first place of the run of `alike` tokens that each stands in, else its own."""
    places = torch.arange(alike.shape[1], device=alike.device).expand_as(alike)
    goes_on = alike & functional.pad(alike[:, :-1], (1, 0), value=False)
    return torch.where(goes_on, -1, places).cummax(dim=1).values


def opened(noise: NoiseKey, seq: int, share: float) -> Bool[Tensor, "seq seq"]:
    """Return a causal mask in which each token also sees a random `share` of those after it."""
    dice = uniform(noise, _OPENING, seq * seq).view(seq, seq)
    causal = torch.ones(seq, seq, dtype=torch.bool, device=dice.device).tril()
    return causal | (dice < share)


def draw_times(cfg: DiffusionConfig, noise: NoiseKey) -> Float[Tensor, " batch"]:
    """Return the time of each sample, in (0, 1)."""
    place = noise.samples % cfg.strata
    if cfg.times == "stratified":
        return (place + uniform(noise, _TIMES, 1)[:, 0]) / cfg.strata
    shared = replace(noise, samples=noise.samples - place)
    return (uniform(shared, _TIMES, 1)[:, 0] + place / cfg.strata) % 1.0


def context_weights(given: Bool[Tensor, "batch seq"], p: float) -> Float[Tensor, "batch seq"]:
    """Return sum over given j != n of p (1 - p)^(|n - j| - 1) / 2 for each token n (CART)."""
    places = torch.arange(given.shape[1], device=given.device)
    distance = (places[:, None] - places).abs()
    share = torch.where(distance > 0, 0.5 * p * (1.0 - p) ** (distance - 1).double(), 0.0)
    return given.double() @ share


def hide_counted(
    tokens: Int64[Tensor, "batch seq"],
    can_hide: Bool[Tensor, "batch seq"],
    mask: int,
    noise: NoiseKey,
    draw: int,
    draws: int,
) -> Hidden:
    """Return `tokens` with k of the n that can be hidden hidden, k uniform in 1..n.

    n / k times the loss of the hidden tokens is an estimate of the bound of half the spread of that
    at a random time. Of `draws` estimates the k of number `draw` lies in its own stratum.
    """
    size = can_hide.sum(-1)
    share = (uniform(noise, _TIMES, 1)[:, 0] + draw) / draws
    count = torch.minimum((share * size).long() + 1, size)
    words = random_words(noise, _HIDING + 1 + draw, tokens.shape[1])
    order = torch.where(can_hide, words, 1 << 32).argsort(dim=-1, stable=True)
    where = order.argsort(-1) < count[:, None]
    return Hidden(torch.where(where, mask, tokens), where, where.double())


def uniform(noise: NoiseKey, stream: int, n: int) -> Float[Tensor, "batch n"]:
    """Return `n` uniform numbers in (0, 1) of each sample."""
    return (random_words(noise, stream, n).double() + 0.5) / 2**32


def sample_number(tokens: Int64[Tensor, "batch seq"]) -> Int64[Tensor, " batch"]:
    """Return a number of each sample that depends on its tokens alone, not on its batch."""
    powers = torch.full((tokens.shape[1],), 6364136223846793005, device=tokens.device)
    return ((tokens.long() + 1) * powers.cumprod(0)).sum(-1) & (2**63 - 1)


def shifted(values: Tensor, last: float) -> Tensor:
    """Return `values` of each token at the token before it."""
    return functional.pad(values[:, 1:], (0, 1), value=last)
