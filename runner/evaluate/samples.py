"""Samples of a model's text, taken at evaluations."""

import math

import torch

from runner.data.corpus import prompt_ids, prompt_sees_itself
from runner.evaluate.config import SamplesConfig
from runner.evaluate.scores import repetition
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from runner.records.contracts import Trained, strategy


def sample(cfg: SamplesConfig, trained: Trained, step: int) -> dict[str, float]:
    """Append a continuation of `cfg.prompt` to samples.txt; return its `sample_repetition`.

    The result is empty if the sample is too short for a 4-gram. A prompt without tokens is replaced
    by the beginning of a document.
    """
    tokenizer, run = trained.corpus.tokenizer, trained.cfg
    ids = prompt_ids(tokenizer, cfg.prompt)
    context = run.train.sequence_length
    own = strategy(run.task, trained.model, tokenizer, context)
    if own is None:
        how = Sampling(max_new_tokens=cfg.tokens, temperature=0.8, seed=run.seed)
    else:  # a canvas does not slide
        ids = ids[-max(1, context // 2) :]
        canvas = min(cfg.tokens, context - len(ids))
        how = own.settings(max_new_tokens=canvas, temperature=0.8, ends=(), seed=run.seed)
    (done,) = generate(
        trained.model,
        [torch.tensor(ids, device=trained.ranks.device)],
        how,
        context=context,
        decode=tokenizer.decode,
        ends=(),
        slide=True,
        strategy=own,
        bidirectional=prompt_sees_itself(run.data),
    )
    if trained.folder is not None:
        with open(trained.folder / "samples.txt", "a", encoding="utf-8") as stream:
            text = tokenizer.decode([*ids, *done.ids])
            stream.write(f"--- step {step}\n{text}\n")
    repeated = repetition(done.ids)
    return {"sample_repetition": repeated} if math.isfinite(repeated) else {}
