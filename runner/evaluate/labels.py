"""Texts with the likeliest of a few labels: zero-shot, after worked examples, or fine-tuned.

Values, each NAME/...:

    accuracy, accuracy_stderr     share of right labels
    f1                            mean over the labels of their F1
    accuracy_calibrated, ...      the same where each label's log-probability has its median over
    f1_calibrated                 the texts subtracted: of two labels, half the texts have each
    log_loss                      mean negative log of the right label's probability, nats

Probabilities are those among the labels. The medians know no label.

Shape legend: texts, labels.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from runner.data.labelled_texts import LabelledFile, LabelledText
from runner.data.problems import encode
from runner.data.problems_config import Problem
from runner.evaluate.answer_metrics import mean_and_error
from runner.evaluate.labels_config import LabelsConfig
from runner.evaluate.likelihoods import couples_rows, log_probabilities
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained, strategy

Scores = Float[np.ndarray, "texts labels"]
Labels = Int64[np.ndarray, " texts"]


def give_labels(cfg: LabelsConfig, trained: Trained) -> dict[str, float]:
    """Return the values of this file's head; write answers_NAME.jsonl, a line for each text.

    Every rank computes everything.

    Raises:
        ConfigError: a text with its worked examples does not fit into the context, or the model
            does not write one token after the other.
        DataError: a file cannot be read.
    """
    every = list(cfg.source.texts())
    texts = [every[index] for index in evenly_spaced(len(every), cfg.limit or len(every))]
    scores = _log_probabilities(cfg, trained, texts)
    right = np.array([text.label for text in texts])
    given, calibrated = scores.argmax(1), (scores - np.median(scores, 0)).argmax(1)
    if trained.folder is not None:
        columns = zip(texts, scores.tolist(), given.tolist(), calibrated.tolist(), strict=True)
        lines = [json.dumps(_line(cfg.source, *column)) for column in columns]
        file = trained.folder / f"answers_{cfg.name}.jsonl"
        write_atomically(file, "".join(f"{line}\n" for line in lines))
    values = _agreement(given, right, len(cfg.source.words))
    after = _agreement(calibrated, right, len(cfg.source.words))
    for key, value in after.items():
        name, _, error = key.partition("_")
        values["_".join(filter(None, (name, "calibrated", error)))] = value
    values["log_loss"] = float(-scores[np.arange(len(texts)), right].mean())
    return {f"{cfg.name}/{key}{trained.suffix}": value for key, value in values.items()}


def macro_f1(given: Labels, right: Labels, labels: int) -> float:
    """Return the mean over `labels` of F1 = 2 TP / (2 TP + FP + FN), 0 of one that never occurs."""
    scores = []
    for label in range(labels):
        hits = int(((given == label) & (right == label)).sum())
        total = int((given == label).sum() + (right == label).sum())
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def _agreement(given: Labels, right: Labels, labels: int) -> dict[str, float]:
    accuracy, error = mean_and_error((given == right).astype(float).tolist())
    values = {"accuracy": accuracy, "f1": macro_f1(given, right, labels)}
    return values | ({"accuracy_stderr": error} if len(right) > 1 else {})


def _log_probabilities(
    cfg: LabelsConfig, trained: Trained, texts: Sequence[LabelledText]
) -> Scores:
    """Return the log-probability of each label among all, nats."""
    tokenizer = trained.corpus.tokenizer
    context = trained.cfg.train.sequence_length + 1
    if strategy(trained.cfg.task, trained.model, tokenizer, context) is not None:
        raise ConfigError(
            "labels are scored one token after the other, and this task's model generates "
            "otherwise; leave the evaluation out"
        )
    before, words = _worked_examples(cfg), cfg.source.words
    asked = []
    for text in texts:
        prompt = before + cfg.source.prompt(text)
        for word in words:
            one = encode(tokenizer, Problem(text.where, prompt, word))
            ids = one.ids[:-1].tolist()  # without the end: all labels are as long as their words
            if len(ids) > context:
                raise ConfigError(
                    f"{text.where} and {cfg.shots} worked examples are {len(ids)} tokens, and "
                    f"train.sequence_length={context - 1}; raise it, or take fewer examples"
                )
            asked.append((ids, one.given))
    with trained.precision.autocast():
        found = log_probabilities(
            trained.model,
            tokenizer,
            asked,
            context=context,
            rows=cfg.rows * len(words),
            shares_prefixes=not couples_rows(trained),
        )
    scores = np.array([sum(one) for one in found]).reshape(len(texts), len(words))
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def _worked_examples(cfg: LabelsConfig) -> str:
    """Return the worked examples, ready to stand before a prompt; "" if there are none."""
    if cfg.examples is None:
        return ""
    every = list(cfg.examples.texts())
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([cfg.shots_seed])))
    order = rng.permutation(len(every)).tolist()
    words = cfg.examples.words
    of_label = [[i for i in order if every[i].label == label] for label in range(len(words))]
    chosen = [i for turn in zip(*of_label, strict=False) for i in turn][: cfg.shots]
    if len(chosen) < cfg.shots:
        raise ConfigError(
            f"{cfg.examples.path} has {len(chosen)} worked examples with labels in turn, and "
            f"shots={cfg.shots}; lower it"
        )
    return "".join(f"{cfg.examples.prompt(every[i])}{words[every[i].label]}\n\n" for i in chosen)


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` of `count` indices, evenly spaced: files are often sorted by kind."""
    return sorted({i * count // min(limit, count) for i in range(min(limit, count))})


def _line(
    source: LabelledFile, text: LabelledText, scores: list[float], given: int, calibrated: int
) -> dict[str, Any]:
    words = [word.strip() for word in source.words]
    return {
        "where": text.where,
        "prompt": text.text,
        "reference": words[text.label],
        "greedy": words[given],
        "calibrated": words[calibrated],
        "log_probabilities": dict(zip(words, scores, strict=True)),
    }
