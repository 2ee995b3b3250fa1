"""The config of masked diffusion."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.config import config, neutral
from runner.data.corpus import end_ids, refuse_several_sequences, token_id
from runner.data.tokenizer_folder import MASK
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.generate.denoise import Denoise
    from runner.learn.tasks.diffusion import Diffusion
    from runner.records.config import RunConfig


def refuse_causal(run: "RunConfig", task: str) -> None:
    """Raise ValueError if the model of a run is causal, which `task` cannot train."""
    if getattr(run.model, "causal", False):
        raise ValueError(
            f"task={task} predicts a token from both sides, which model.causal=true hides; "
            "add model.causal=false"
        )


@config
class DiffusionConfig:
    """Masked diffusion: tokens are hidden at random and predicted from all others, on both sides.

    Each sample draws a time t in (0, 1), and each token is hidden with probability
    p = (1 - min_probability) t + min_probability. The first token of a sample is given, as in
    next-token prediction, and so are tokens without a target. Validation logs `val_bound`, an upper
    bound on the negative log-likelihood in nats per token; it is no `val_loss`.

    Args:
        weight: of the loss of a hidden token. `bound`: 1 / p, an upper bound on the negative
            log-likelihood (LLaDA, arXiv 2502.09992). `linear`: 1 - t. `cart`: the nearer the given
            tokens, the more (Dream). `none`: 1. The loss is divided by the number of tokens that
            can be hidden, whatever the weight.
        strata: so many consecutive samples share out the times (1: each draws its own).
        times: of samples that share: one draw for each in its own stratum (`stratified`: MDLM,
            arXiv 2406.07524) or one draw for all (`shifted`: Dream's evaluation).
        min_probability: the least probability of being hidden.
        cart_p: of the geometric distribution in `cart`.
        shift: the output at a token predicts the next one, as in a model that was pre-trained on
            next tokens.
        never_mask: give `<mask>` itself the probability 0 (SUBS of MDLM); it holds the logits of
            a whole micro-batch in memory.
        anneal_steps: steps over which a model that started as a causal one learns to look ahead: at
            step s each token sees a random part (s + 1) / anneal_steps of those after it
            (DiffuLLaMA, arXiv 2410.17891). 0: all of them from the first step.
        ends_together: a run of several ends of documents is hidden whole or not at all, so that
            padding by them is not learnt from itself (Dream-Coder).
        cut_padding: each micro-batch ends where its longest sample does: padding after it costs
            nothing and is not seen. Samples differ in length with data=conversations.
        draws: ways of hiding each sample in validation, stratified by the number of tokens hidden.
    """

    tokens: ClassVar[tuple[str, ...]] = (MASK,)

    weight: Literal["bound", "linear", "cart", "none"] = "bound"
    strata: int = 1
    times: Literal["stratified", "shifted"] = "stratified"
    min_probability: float = 1e-3
    cart_p: float = 0.1
    shift: bool = False
    never_mask: bool = False
    anneal_steps: int = neutral(0)
    ends_together: bool = neutral(False)
    cut_padding: bool = neutral(False)
    draws: int = 4

    def __post_init__(self) -> None:
        checks = {
            "strata": (self.strata >= 1, "at least 1"),
            "min_probability": (0 < self.min_probability < 1, "in (0, 1)"),
            "cart_p": (0 < self.cart_p < 1, "in (0, 1)"),
            "anneal_steps": (self.anneal_steps >= 0, "at least 0"),
            "draws": (self.draws >= 2, "at least 2: their spread is the standard error"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"task.{name}={getattr(self, name)} must be {wanted}")

    def check(self, run: "RunConfig") -> None:
        """Refuse a causal model, and strata that no batch holds whole.

        Raises:
            ValueError: one of the two.
        """
        refuse_causal(run, "diffusion")
        refuse_several_sequences(run.data, "diffusion")
        batch = run.train.batch_size if run.train is not None else self.strata
        if batch % self.strata:
            raise ValueError(
                f"task.strata={self.strata} must divide train.batch_size={batch}; give "
                f"task.strata={batch}, or 1"
            )

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "Diffusion":
        """Return the task."""
        from runner.learn.tasks.diffusion import Diffusion  # noqa: PLC0415

        return Diffusion(self, tokenizer)

    def strategy(self, model: Any, tokenizer: Any, context: int) -> "Denoise":
        """Return how the model generates: by filling in a masked canvas."""
        from runner.generate.denoise import Denoise  # noqa: PLC0415

        mask, ends = token_id(tokenizer, MASK), end_ids(tokenizer)
        assert mask is not None
        return Denoise(
            model,
            context=context,
            decode=tokenizer.decode,
            mask=mask,
            ends=ends,
            shift=self.shift,
        )
