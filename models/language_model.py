"""The base class of our models; `models/contract.py` says how little a foreign model must have.

Shape legend: batch, seq, vocab.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernels.cross_entropy import Weights
from kernels.philox import NoiseKey
from models.cache import State

Give = Literal["loss", "logits", "hidden"]


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of a batch.

    Args:
        total: sum over target tokens, nats, with gradient; divide it by their global count.
        nll: negative log-likelihood of each target, nats, without gradient; 0 where no target is.
        reported: sum that is logged and watched for divergence, nats (None: the sum of `nll`).
        statistics: scalars for the log, by name (auxiliary losses, router entropy, ...).
    """

    total: Float[Tensor, ""]
    nll: Float[Tensor, "batch seq"]
    reported: Float[Tensor, ""] | None = None
    statistics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


# FSDP and torch.compile find the tensors in a module's output through pytree.
pytree.register_dataclass(TokenLoss)


def flat_weights(weights: Weights | None) -> Weights | None:
    """Return token weights [batch, seq] as [batch * seq]; None and functions are returned as is."""
    return weights.flatten() if isinstance(weights, Tensor) else weights


class LanguageModel(nn.Module):
    """Base of our models.

    Training and decoding both go through `forward`, so that the hooks of DDP and FSDP always run.
    """

    cfg: "ModelConfig"
    vocab_size: int
    added_rows: int = 0  # see `models.contract.with_added_rows`

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        *,
        documents: Int64[Tensor, "batch seq"] | None = None,
        noise: NoiseKey | None = None,
        state: State | None = None,
        counts: Int64[Tensor, " batch"] | None = None,
        every: bool = False,
        weights: Weights | None = None,
        give: Give | None = None,
    ) -> (
        Float[Tensor, "batch seq vocab"]
        | Float[Tensor, "batch vocab"]
        | Float[Tensor, "batch seq dim"]
        | TokenLoss
    ):
        """Return logits [batch, seq, vocab] in fp32 at least, or with `targets` a `TokenLoss`.

        With `state` the tokens continue the text that it has read, and the logits after the last
        token of each row are returned, [batch, vocab], or after each token with `every`.

        Args:
            targets: ids, -100 where there is no target.
            documents: index of each token's document; tokens see their own document only.
            noise: key of dropout's random bits (None: no dropout).
            state: from `start`; it is updated.
            counts: with `state`, number of real tokens in each row, the rest being padding (None:
                all are real). A row with 0 stays as it is, and its logits mean nothing.
            every: with `state`, return the logits after every new token, [batch, seq, vocab].
            weights: of the targets in the loss; see `kernels.cross_entropy.Weights`.
            give: "loss" or "logits" by name, or "hidden", the normed last hidden state that the
                head reads [batch, seq, dim].
        """
        raise NotImplementedError

    def start(self, batch: int, capacity: int, *, static: bool = False) -> State:
        """Return the state of `batch` rows before their first token.

        Args:
            capacity: tokens to make room for at first.
            static: never grow, and keep the same shapes at every length: for a compiled step.

        Raises:
            NotImplementedError: the model has no state; each token takes a forward pass over all
                text.
        """
        raise NotImplementedError

    def unembed(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """Return the logits of a residual stream read in mid-model (the logit lens).

        Raises:
            NotImplementedError: the model has no residual stream.
        """
        raise NotImplementedError

    def for_inference(self, *, compiled: bool = False) -> "LanguageModel":
        """Return self with its weights laid out for decoding; do not train or save it afterwards.

        Args:
            compiled: the decoding step will be compiled.
        """
        return self

    def blocks(self) -> list[nn.Module]:
        """Return the layers in order: the units of activation checkpointing and FSDP sharding."""
        raise NotImplementedError


@runtime_checkable
class ModelConfig(Protocol):
    """The config of a model: it builds the model, and counts it without building it.

    A foreign class needs `build` only; `models/sizes.py` has defaults for the rest.
    """

    def build(self, vocab_size: int, seed: int) -> LanguageModel:
        """Return the model, initialised; the same seed gives the same weights."""
        ...

    def num_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters; a tied head and its embedding count once."""
        ...

    def num_active_parameters(self, vocab_size: int) -> int:
        """Return how many parameters one token is multiplied with: experts may be idle."""
        ...

    def num_embedding_parameters(self, vocab_size: int) -> int:
        """Return the number of embedding parameters, token and position, not tied to the head."""
        ...

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return the forward FLOPs of one sequence: (all pairs, causal half of attention)."""
        ...

    def check(self, vocab_size: int, seq: int) -> None:
        """Raise ValueError if the model cannot read sequences of `seq` tokens."""
        ...
