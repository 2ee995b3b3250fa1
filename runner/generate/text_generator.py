"""Text generation by a trained cell."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.contract import for_inference
from runner.data.corpus import encode_with_special, end_ids, prompt_ids, prompt_sees_itself
from runner.generate.adapted import load_adapters, refuse_beside_adapters
from runner.generate.as_trained import compute_under, in_words, recipe_of_training
from runner.generate.beam import beam_search
from runner.generate.canvas_row import around
from runner.generate.denoising import Denoising
from runner.generate.drafts import Draft, make_draft
from runner.generate.generate import (
    Completion,
    Settings,
    completions,
    generate,
    make_engine,
    requests_of,
)
from runner.generate.kv_cache import store_keys_and_values
from runner.generate.sampling import Sampling
from runner.generate.tools import Tools
from runner.machine.errors import ConfigError
from runner.records.cells import load_cell
from runner.records.contracts import strategy
from runner.records.trained_model import load_model

Prompt = str | Sequence[int] | None  # text, ids, or the beginning of a document
PRECISIONS = ("weights", "training")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextGenerator:
    """The newest weights of a run folder, generating text from text.

    Args:
        folder: of the run.
        average: take the averaged weights (train.average).
        dtype: of the weights: fp32, bf16 or fp16.
        precision: `weights` computes in `dtype`, `training` under the recipe of the run, see
            `runner.generate.as_trained`.
        compiled: decode by a compiled step.
        kv_cache: keep keys and values in it, see `runner.generate.kv_cache` (None: in `dtype`).
        draft: proposes tokens; see `runner.generate.drafts.make_draft`.
        adapters: folders of the runs whose adapters requests may choose, by name.

    Attributes:
        computes: what products are computed in, in words.
        strategy: how the model generates (None: one token after the other).
        settings: the class of a request's settings.

    Raises:
        ConfigError: `dtype` or `precision` is not one of these, or the recipe of the run has its
            own dtypes and is not compiled.
    """

    def __init__(
        self,
        folder: Path,
        *,
        average: bool = False,
        dtype: str = "fp32",
        precision: str = "weights",
        compiled: bool = False,
        kv_cache: str | None = None,
        draft: str | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is none of: {', '.join(DTYPES)}")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision!r} is none of: {', '.join(PRECISIONS)}")
        as_trained = precision == "training"
        if as_trained and (dtype != "fp32" or compiled):
            raise ConfigError(
                "precision=training has the dtypes of the run's recipe and is not compiled; leave "
                f"{'--compile' if compiled else f'dtype={dtype}'} out"
            )
        model, self.tokenizer, self.context = load_model(folder, average=average)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiled, self.computes = compiled, dtype
        model = model.to(device, DTYPES[dtype])
        if kv_cache is not None:
            store_keys_and_values(model, kv_cache)
        config = load_cell(folder).config
        task, self.bidirectional = config.task, prompt_sees_itself(config.data)
        self.adapters = None
        if adapters:
            asked = {"--precision training": as_trained, "--compile": compiled}
            asked[f"--draft {draft}"] = draft is not None
            own_way = strategy(task, model, self.tokenizer, self.context) is not None
            refuse_beside_adapters(adapters, asked, folder, own_way or self.bidirectional)
            self.adapters = load_adapters(model, self.tokenizer, adapters, average=average)
        recipe = recipe_of_training(folder, model, device) if as_trained else None
        self.model = for_inference(model, compiled=compiled)
        if recipe is not None:
            compute_under(recipe, self.model)
            self.computes = in_words(recipe)
        self.strategy = strategy(task, self.model, self.tokenizer, self.context)
        self.settings = getattr(self.strategy, "settings", Sampling)
        if compiled and self.strategy is not None:
            raise ConfigError(
                "--compile compiles the step of one token after the other, which this model does "
                "not take; leave it out"
            )
        self.draft = None if draft is None else self._draft(draft)

    def _draft(self, given: str) -> Draft:
        plain = self.strategy is None and not self.bidirectional
        if not plain or self.compiled or self.computes not in DTYPES:
            raise ConfigError(
                f"--draft {given}: tokens are proposed to a model that adds one after the other, "
                "not compiled, in the dtype of its weights; leave one out"
            )
        with _as_config_error():
            return make_draft(given, self.model, self.tokenizer, self.context)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Settings | Sequence[Settings], **more: Any
    ) -> list[Completion]:
        """Return a continuation of each prompt.

        Further keyword arguments are those of `generate`.

        Raises:
            ConfigError: a prompt is empty or too long.
        """
        with _as_config_error():
            ids = [self._ids(prompt) for prompt in prompts]
            return generate(
                self.model,
                ids,
                sampling,
                compiled=self.compiled,
                strategy=self.strategy,
                bidirectional=self.bidirectional,
                draft=self.draft,
                **self._text_options(),
                **more,
            )

    def complete(
        self,
        prompts: Sequence[Prompt],
        samplings: Sequence[Settings],
        *,
        rows: int,
        slide: bool = False,
        tools: Tools | None = None,
    ) -> Iterator[Completion]:
        """Yield a continuation of each prompt in their order, at most `rows` at a time.

        Raises:
            ConfigError: a prompt is empty or too long; nothing has been generated.
        """
        with _as_config_error():
            engine = make_engine(
                self.model,
                rows=rows,
                compiled=self.compiled,
                strategy=self.strategy,
                bidirectional=self.bidirectional,
                draft=self.draft,
                **self._text_options(),
            )
            ids = [self._ids(prompt) for prompt in prompts]
            yield from completions(
                engine, requests_of(engine, ids, samplings, slide=slide, tools=tools)
            )

    def infill(
        self, texts: Sequence[tuple[str, str]], how: Sequence[Denoising], *, rows: int = 16
    ) -> Iterator[Completion]:
        """Yield the middle of each (prefix, suffix) in their order, at most `rows` at a time.

        Raises:
            ConfigError: the model fills in no canvas, or a text is too long.
        """
        with _as_config_error():
            engine = make_engine(
                self.model, rows=rows, strategy=self.strategy, **self._text_options()
            )
            ids = [around(self.tokenizer, *pair) for pair in texts]
            settings = [
                replace(one, suffix=tuple(after)) for one, (_, after) in zip(how, ids, strict=True)
            ]
            prompts = [torch.tensor(before) for before, _ in ids]
            yield from completions(engine, requests_of(engine, prompts, settings))

    def beam_search(self, prompt: Prompt, sampling: Sampling, beams: int) -> list[Completion]:
        """Return the `beams` continuations of beam search, the best first.

        Raises:
            ConfigError: `beams` is below 1, or the prompt is empty or too long.
        """
        with _as_config_error():
            if self.bidirectional:
                raise ValueError(
                    "the tokens of a prompt see each other in this model, which beam search does "
                    "not do; leave --beams out"
                )
            return beam_search(
                self.model,
                self._ids(prompt),
                beams=beams,
                max_new_tokens=sampling.max_new_tokens,
                stop=sampling.stop,
                **self._text_options(),
            )

    def _ids(self, prompt: Prompt) -> Tensor:
        if prompt is None:
            return torch.tensor(prompt_ids(self.tokenizer, ""))
        if not isinstance(prompt, str):
            return torch.tensor(list(prompt))
        return torch.from_numpy(encode_with_special(self.tokenizer, prompt).astype("int64"))

    def _text_options(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {
            "context": self.context,
            "decode": tokenizer.decode,
            "ends": end_ids(tokenizer),
        }


@contextmanager
def _as_config_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
