"""A task's generation_kwargs in lm-eval's own reading, as parameters of our sampling."""

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from runner.generate.denoising import Denoising
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError

_CUTS = ("top_k", "top_p", "min_p", "repetition_penalty")
# Settings of transformers at the values at which they change nothing.
_DOES_NOTHING = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "early_stopping": False,
}


def sampling_of(
    generation_kwargs: Mapping[str, Any], tokenizer: Any = None, seed: int = 0
) -> Sampling:
    """Return the sampling parameters that a task's generation_kwargs mean to lm-eval.

    Args:
        tokenizer: of the model. What its end of a document is written as ends a text too, and the
            generation_config.json of its folder says what a task leaves open, as in transformers.

    Raises:
        ConfigError: a key is of something that is not done here, or a value is out of range.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(generation_kwargs)))
    stop = dict.fromkeys([*settings.pop("until"), getattr(tokenizer, "eos_token", None)])
    temperature = float(settings.pop("temperature", None) or 0.0)
    greedy = not settings.pop("do_sample") or temperature == 0.0
    values = {name: settings.pop(name, _default(tokenizer, name)) for name in _CUTS}
    penalty, max_new_tokens = values["repetition_penalty"], int(settings.pop("max_gen_toks"))
    unknown = {k: v for k, v in settings.items() if v not in (None, _DOES_NOTHING.get(k))}
    if unknown:
        others = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise ConfigError(
            f"generation_kwargs of a task: {others} is not done here; done are until, "
            "max_gen_toks, do_sample, temperature, top_k, top_p, min_p and repetition_penalty"
        )
    try:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=0.0 if greedy else temperature,
            top_k=values["top_k"] or None,  # 0: all tokens
            top_p=values["top_p"],
            min_p=values["min_p"],
            repetition_penalty=1.0 if penalty is None else float(penalty),
            stop=tuple(text for text in stop if text),  # lm-eval passes over empty ones
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(f"generation_kwargs of a task: {error}") from error


def denoising_of(how: Sampling, prompt: int, context: int, fill: Mapping[str, Any]) -> Denoising:
    """Return the settings of a model that fills in a canvas for those that a task asks for.

    Args:
        prompt: tokens before the canvas, which ends with the context at the latest.
        fill: further settings of `Denoising`.

    Raises:
        ConfigError: the task asks for something that a canvas has not, or `fill` is out of range.
    """
    if how.repetition_penalty != 1.0:
        raise ConfigError(
            "generation_kwargs of a task: repetition_penalty is not done by a model that fills in "
            "a canvas; leave it out"
        )
    length = max(1, min(how.max_new_tokens, context - prompt))
    kept = ("temperature", "top_k", "top_p", "min_p", "stop", "seed")
    given = {name: getattr(how, name) for name in kept} | dict(fill)
    if given.get("steps"):
        given["steps"] = min(given["steps"], length)
    try:
        return Denoising(max_new_tokens=length, max_canvas=length, **given)
    except ValueError as error:
        raise ConfigError(f"eval.harness: {error}") from error


def _default(tokenizer: Any, name: str) -> Any:
    """Return what the generation_config.json of a tokenizer's folder sets `name` to, else None."""
    files = getattr(getattr(tokenizer, "beside", None), "files", {})
    return files.get("generation_config.json", {}).get(name)
