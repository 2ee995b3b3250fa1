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
CACHES = ("none", "prefix", "dual")
MAX_PLACES = (1 << 16) - 1  # of a text: noise is keyed by (step, place) in 32 bits
MAX_STEPS = 1 << 15  # the other half of the steps' numbers is that of remasking


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How the masked tokens of one text are filled in.

    Args:
        max_new_tokens: the length of the canvas, all of it masked at first.
        suffix: ids that follow the canvas and are given.
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
        cache: within a block, compute anew only the block and what follows it (`prefix`), or the
            block alone (`dual`): what they see of the rest is as at the first step of the block, so
            that later steps are approximate (Fast-dLLM).
        remask: with `origin`, the most probability with which a step masks a token of the block
            again that is revealed, so that it can be mended (ReMDM-cap, arXiv 2503.00307).
        guidance: w of classifier-free guidance by the prompt: u + (1 + w) (c - u) of the logits c,
            and u of a prompt that is masked but for its first token. It doubles the passes.
        end_penalty: is taken from the logits of the ids that end a text, less from step to step and
            nothing at the last (Dream-Coder: 3.0), against answers that end too early.
        expansions: of a model with `<expand>`: so often may a masked token become two.
        max_canvas: and up to this length of the canvas (None: 64, or what the context leaves).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p, min_p: see `Sampling`.
        order_temperature: draw what is revealed from softmax(confidence / order_temperature); 0
            takes the greatest.
        ends: ids that end the text, which are not part of it (None: those of the tokenizer).
        stop: the text ends before the first of these strings.
        seed, sample: every draw of the text is keyed by them, its step and its place.
    """

    max_new_tokens: int = 64
    suffix: tuple[int, ...] = ()
    steps: int | None = None
    algorithm: str = "entropy"
    block: int | None = None
    threshold: float | None = None
    cache: str = "none"
    remask: float = 0.0
    guidance: float = 0.0
    end_penalty: float = 0.0
    expansions: int = 64
    max_canvas: int | None = None
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
                self.steps is None or self.num_blocks <= self.steps <= self._most_steps,
                f"in {self.num_blocks} (one for each block) to {self._bound_of_steps}",
            ),
            "cache": (self.cache in CACHES, f"one of {', '.join(CACHES)}"),
            "remask": (0 <= self.remask <= 1, "in [0, 1]"),
            "guidance": (0 <= self.guidance < math.inf, "a number from 0 (none)"),
            "end_penalty": (0 <= self.end_penalty < math.inf, "a number from 0 (none)"),
            "expansions": (self.expansions >= 0, "at least 0"),
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
        if self.remask and self.algorithm != "origin":
            raise ValueError(
                f"remask={self.remask} needs algorithm=origin, whose probabilities it changes; "
                f"leave it out with algorithm={self.algorithm}"
            )
        if self.guidance and self.cache != "none":
            raise ValueError(
                f"guidance={self.guidance} takes whole passes with a masked prompt, which "
                f"cache={self.cache} does not keep; leave one of them out"
            )
        if self.threshold is not None and self.algorithm in ("origin", "random", "entropy"):
            raise ValueError(
                f"threshold={self.threshold} needs a confidence between 0 and 1, which "
                f"algorithm={self.algorithm} has not; use maskgit_plus or low_confidence"
            )

    @property
    def _most_steps(self) -> int:
        return MAX_STEPS if self.algorithm == "origin" else self.max_new_tokens

    @property
    def _bound_of_steps(self) -> str:
        if self.algorithm == "origin":
            return str(MAX_STEPS)
        return f"max_new_tokens={self.max_new_tokens}"

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
