"""The sampling parameters of a request; `choosing.py` applies them."""

import math
from dataclasses import dataclass

_COLDEST = 1e-6  # logits divided by less overflow in fp32
_STRONGEST = 1000.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one request are chosen.

    Penalties, bias and what may not end the text apply to the logits in this order; then `top_k`,
    `top_p` and `min_p`, after the temperature, in this order.

    Args:
        max_new_tokens: the most tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_k: sample from the k most likely tokens.
        top_p: nucleus sampling: the smallest set of tokens whose probability is at least top_p.
        min_p: drop tokens less than min_p times as likely as the most likely one.
        repetition_penalty: logits of tokens in the prompt or the text so far are divided by it
            where positive, multiplied where negative (Keskar et al., arXiv 1909.05858).
        presence_penalty: subtracted from the logit of each token that the new text has.
        frequency_penalty: subtracted from it once for each time.
        logit_bias: (id, what is added to its logit), each id once.
        min_tokens: no id ends the text before it has this many tokens.
        ends: ids that end the text, which are not part of it (None: those of the tokenizer).
        stop: the text ends before the first of these strings.
        top_logprobs: give the log-probabilities of so many likeliest tokens at each place.
        seed, sample: token i of the text is drawn by the key (seed, sample, i) alone.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ends: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    seed: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        biased = [index for index, _ in self.logit_bias]
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "at least 0"),
            "temperature": (
                self.temperature == 0 or _COLDEST <= self.temperature < math.inf,
                f"0 (greedy) or a number from {_COLDEST:g}",
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (
                1 / _STRONGEST <= self.repetition_penalty <= _STRONGEST,
                f"in {1 / _STRONGEST:g} to {_STRONGEST:g}",  # so that logits stay finite
            ),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number"),
            "logit_bias": (
                len(set(biased)) == len(biased)
                and not any(math.isnan(bias) or bias == math.inf for _, bias in self.logit_bias),
                "numbers (or -inf, to forbid a token) for ids that differ",
            ),
            "min_tokens": (
                0 <= self.min_tokens <= self.max_new_tokens,
                f"in 0 to max_new_tokens={self.max_new_tokens}",
            ),
            "seed": (0 <= self.seed < 2**63, "in 0 to 2**63 - 1"),
            "sample": (0 <= self.sample < 2**63, "in 0 to 2**63 - 1"),
            "stop": ("" not in self.stop, "strings of at least one character"),
            "top_logprobs": (self.top_logprobs >= 0, "at least 0"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if an id is none of a vocabulary, or more of it is asked for than is."""
        for name, ids in (("logit_bias", [i for i, _ in self.logit_bias]), ("ends", self.ends)):
            for index in ids or ():
                if not 0 <= index < vocab_size:
                    raise ValueError(
                        f"{name} has the id {index}; those of this model are 0 to {vocab_size - 1}"
                    )
        if self.top_logprobs > vocab_size:
            raise ValueError(
                f"top_logprobs={self.top_logprobs} is more than the vocabulary of {vocab_size}"
            )
