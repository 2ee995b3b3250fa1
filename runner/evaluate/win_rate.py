"""Answers of a model beside those of the one it started from, judged by a scorer.

Values, each NAME/...:

    wins, wins_stderr         share of prompts whose answer has the higher score; a tie is half
    score, score_start        mean scores
    tokens, tokens_start      mean tokens of an answer: a judge may like long ones

Both answer greedily. texts_NAME.jsonl has both answers to each prompt and their scores.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch

from runner.data.corpus import end_ids, prompt_ids
from runner.data.dialogue_format import dialogue_format
from runner.data.judged_answers import held_out_prompts
from runner.data.judged_answers_config import JudgedAnswersConfig
from runner.evaluate.answer_metrics import mean_and_error
from runner.evaluate.forgetting import start_model
from runner.evaluate.win_rate_config import WinRateConfig
from runner.generate.generate import Completion, generate
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained


@torch.no_grad()
def compare_answers(cfg: WinRateConfig, trained: Trained) -> dict[str, float]:
    """Return the values of this file's head; write texts_NAME.jsonl, a line for each prompt.

    Every rank computes everything.

    Raises:
        ConfigError: the data are no answers to prompts, no held-out prompt is a single question
            that fits, or the scorer cannot be built.
    """
    prompts, ids = _prompts(cfg, trained)
    start = start_model(trained).to(trained.ranks.device)
    answers = [_answers(cfg, trained, model, ids) for model in (trained.model, start)]
    scorer = cfg.scorer.build(trained)
    texts = [[one.text for one in given] for given in answers]
    scores = [list(map(float, scorer.score(prompts, given))) for given in texts]
    pairs = list(zip(*scores, strict=True))
    wins = [1.0 if own > first else 0.5 if own == first else 0.0 for own, first in pairs]
    if trained.folder is not None:
        lines = [
            json.dumps({"prompt": prompt, "answer": own, "start": first, "scores": pair})
            for prompt, own, first, pair in zip(prompts, *texts, pairs, strict=True)
        ]
        file = trained.folder / f"texts_{cfg.name}.jsonl"
        write_atomically(file, "".join(f"{line}\n" for line in lines))
    share, error = mean_and_error(wins)
    values = {"wins": share} | ({"wins_stderr": error} if len(wins) > 1 else {})
    for place, suffix in enumerate(("", "_start")):
        values[f"score{suffix}"] = sum(scores[place]) / len(wins)
        values[f"tokens{suffix}"] = sum(len(one.ids) for one in answers[place]) / len(wins)
    return {f"{cfg.name}/{key}{trained.suffix}": value for key, value in values.items()}


def _prompts(cfg: WinRateConfig, trained: Trained) -> tuple[list[str], list[list[int]]]:
    """Return held-out questions and their ids, with room for an answer."""
    data, tokenizer = trained.cfg.data, trained.corpus.tokenizer
    if not isinstance(data, JudgedAnswersConfig):
        raise ConfigError(
            f"answers are compared on the prompts of data=preferences, and the data are "
            f"{type(data).__name__}; leave the evaluation out"
        )
    form = dialogue_format(tokenizer) if data.form == "chat" else None
    texts: list[str] = []
    ids: list[list[int]] = []
    for prompt in held_out_prompts(data):
        if len(prompt) != 1 or len(texts) == cfg.prompts:  # a scorer reads one question
            continue
        text = prompt[0]["content"]
        own = prompt_ids(tokenizer, text) if form is None else form.prompt(prompt)
        if len(own) < trained.cfg.train.sequence_length:
            texts.append(text)
            ids.append(own)
    if not texts:
        raise ConfigError(
            "no held-out prompt is a single question that fits into train.sequence_length="
            f"{trained.cfg.train.sequence_length}; raise it, or leave the evaluation out"
        )
    return texts, ids


def _answers(
    cfg: WinRateConfig, trained: Trained, model: Any, ids: Sequence[list[int]]
) -> list[Completion]:
    context, tokenizer = trained.cfg.train.sequence_length + 1, trained.corpus.tokenizer
    how = [
        Sampling(max_new_tokens=min(cfg.max_new_tokens, context - len(one)), temperature=0.0)
        for one in ids
    ]
    with trained.precision.autocast():
        return generate(
            model,
            [torch.tensor(one, device=trained.ranks.device) for one in ids],
            how,
            context=context,
            decode=tokenizer.decode,
            ends=end_ids(tokenizer),
            rows=cfg.rows,
        )
