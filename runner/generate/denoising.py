"""The settings of a request to a masked-diffusion model; `denoise.py` follows them."""

import math
from dataclasses import dataclass

ALGORITHMS = (
    "origin",
    "maskgit_plus",
    "topk_margin",
    "entropy",
    "low_confidence",
    "random",
)
MAX_PLACES = (1 << 16) - 1  # of a text: noise is keyed by (step, place) in 32 bits


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How the masked tokens of one text are filled in.

    Args:
        max_new_tokens: the length of the canvas, all of it masked at first.
        steps: forward passes over the whole canvas (None: as many as it has tokens); the first
            blocks take one more where they do not divide.
        algorithm: which tokens a step reveals. `origin`: each with the probability that the time
            passed asks for. Those of the greatest confidence: `maskgit_plus` (the probability of
            the chosen token), `topk_margin` (how far the likeliest is ahead), `entropy` (the least
            entropy), as Dream counts them, arXiv 2508.15487; `low_confidence` and `random` share
            the tokens out equally among the steps, as LLaDA, arXiv 2502.09992.
        block: fill in so many tokens at a time, from left to right (None: the whole canvas).
        threshold: reveal every token of the block whose confidence reaches it, at least one; the
            number of steps then varies (Fast-dLLM, arXiv 2505.22618).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p, min_p: see `Sampling`.
        order_temperature: draw what is revealed from softmax(confidence / order_temperature); 0
            takes the greatest.
        ends: ids that end the text, which are not part of it (None: those of the tokenizer).
        stop: the text ends before the first of these strings.
        seed, sample: every draw of the text is keyed by them, its step and its place.
    """

    max_new_tokens: int = 64
    steps: int | None = None
    algorithm: str = "entropy"
    block: int | None = None
    threshold: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    order_temperature: float = 0.0
    ends: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        tokens = self.max_new_tokens
        checks = {
            "max_new_tokens": (1 <= tokens <= MAX_PLACES, f"in 1 to {MAX_PLACES}"),
            "steps": (
                self.steps is None or self.num_blocks <= self.steps <= tokens,
                f"in {self.num_blocks} (one for each block) to max_new_tokens={tokens}",
            ),
            "algorithm": (self.algorithm in ALGORITHMS, f"one of {', '.join(ALGORITHMS)}"),
            "block": (self.block is None or self.block >= 1, "at least 1"),
            "threshold": (self.threshold is None or 0 < self.threshold <= 1, "in (0, 1]"),
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 (greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            "order_temperature": (0 <= self.order_temperature < math.inf, "a number from 0"),
            "stop": ("" not in self.stop, "strings of at least one character"),
            "seed": (0 <= self.seed < 2**63, "in 0 to 2**63 - 1"),
            "sample": (0 <= self.sample < 2**63, "in 0 to 2**63 - 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")
        if self.threshold is not None and self.algorithm in ("origin", "random", "entropy"):
            raise ValueError(
                f"threshold={self.threshold} needs a confidence between 0 and 1, which "
                f"algorithm={self.algorithm} has not; use maskgit_plus or low_confidence"
            )

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the canvas."""
        return -(-self.max_new_tokens // (self.block or max(1, self.max_new_tokens)))

    def block_of(self, place: int) -> slice:
        """Return the places of the block that a place of the canvas lies in."""
        size = self.block or self.max_new_tokens
        begin = place // size * size
        return slice(begin, min(begin + size, self.max_new_tokens))

    def steps_of(self, block: slice) -> int:
        """Return the number of steps of a block; by default it has one for each token."""
        if self.steps is None:
            return int(block.stop - block.start)
        share, more = divmod(self.steps, self.num_blocks)
        number = int(block.start) // (self.block or self.max_new_tokens)
        return share + int(number < more)
