"""The whole interface of a model of ours; what is asked of anybody's, `models/contract.py` says.

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
    """What a model says of a batch with targets.

    Args:
        total: differentiable sum over target tokens, nats; divide by their global count.
        nll: negative log-likelihood of each target, nats, 0 where there is none, no gradient.
        reported: the sum that is logged and that divergence is told by (None: that of `nll`).
        statistics: named scalars for the log (auxiliary losses, router entropy, ...).
    """

    total: Float[Tensor, ""]
    nll: Float[Tensor, "batch seq"]
    reported: Float[Tensor, ""] | None = None
    statistics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


# FSDP and torch.compile look for the tensors of a module's output through pytree.
pytree.register_dataclass(TokenLoss)


def flat_weights(weights: Weights | None) -> Weights | None:
    """Return weights of tokens, [batch, seq], as those of rows."""
    return weights.flatten() if isinstance(weights, Tensor) else weights


class LanguageModel(nn.Module):
    """Base of all models; `forward` serves both directions so that DDP and FSDP hooks always run."""

    cfg: "ModelConfig"
    vocab_size: int

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        *,
        documents: Int64[Tensor, "batch seq"] | None = None,
        noise: NoiseKey | None = None,
        state: State | None = None,
        counts: Int64[Tensor, " batch"] | None = None,
        weights: Weights | None = None,
        give: Give | None = None,
    ) -> (
        Float[Tensor, "batch seq vocab"]
        | Float[Tensor, "batch vocab"]
        | Float[Tensor, "batch seq dim"]
        | TokenLoss
    ):
        """Return fp32 logits, or with `targets` (-100 = no target) the loss, or what `give` names.

        `give` is "logits", "loss" or "hidden": the last hidden state, normed, which the head reads. `weights` are
        those of the targets in the loss, in the order of `tokens.flatten()`: see `kernels.cross_entropy.Weights`.

        `documents` keeps tokens within their document; `noise` turns dropout on. With `state` the tokens follow
        what it has read: it reads the first `counts` of each row (None: all; the rest is padding), and the
        logits of the token after them are returned, [batch, vocab].
        """
        raise NotImplementedError

    def start(self, batch: int, capacity: int, *, static: bool = False) -> State:
        """Return the state of `batch` rows that have read nothing, with room for `capacity` tokens.

        A `static` one never grows, and has the same shapes at every length: for a compiled step.

        Raises:
            NotImplementedError: the model keeps none; it is asked to read its text anew for each token.
        """
        raise NotImplementedError

    def unembed(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """Return the logits that a residual stream would give if it ended here (the logit lens).

        Raises:
            NotImplementedError: the model has no such stream.
        """
        raise NotImplementedError

    def for_inference(self, *, compiled: bool = False) -> "LanguageModel":
        """Return self, its weights laid out for decoding on their device; it is not to be trained or saved after.

        Args:
            compiled: a compiled step decodes: the weights stay as they lie.
        """
        return self

    def blocks(self) -> list[nn.Module]:
        """Return the layers in order: the units of activation checkpointing and FSDP sharding."""
        raise NotImplementedError


@runtime_checkable
class ModelConfig(Protocol):
    """What a model's config says, all of it without building the model.

    Of somebody else's only `build` is asked; what it leaves out has a default in `models/sizes.py`.
    """

    def build(self, vocab_size: int, seed: int) -> LanguageModel:
        """Return the initialised model; the same seed gives the same weights."""
        ...

    def num_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters, embeddings and tied head counted once."""
        ...

    def num_active_parameters(self, vocab_size: int) -> int:
        """Return how many of them one token is multiplied with: all, but where experts or tables lie idle."""
        ...

    def num_embedding_parameters(self, vocab_size: int) -> int:
        """Return the parameters of token and position embeddings that are not also the head."""
        ...

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return forward FLOPs of one sequence, (full attention, causal half counted)."""
        ...

    def check(self, vocab_size: int, seq: int) -> None:
        """Raise ValueError where this model cannot run on sequences of `seq` tokens."""
        ...
