"""An n-gram baseline on a run's data: the same tokens, held-out text and benchmarks."""

from typing import Any

import numpy as np
import torch

from models.ngram import Ngram
from models.ngram_config import NgramConfig
from models.precision_config import PrecisionConfig
from runner.data.tokens import TextCorpus
from runner.evaluate.config import HarnessConfig
from runner.evaluate.validation import validate
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import Cell
from runner.records.contracts import Trained
from runner.records.run_data import build_corpus


def ngram_baseline(cell: Cell, order: int, harness: HarnessConfig) -> dict[str, Any]:
    """Return `order`, `val_loss`, `val_bits_per_byte` and `scores` (as in evals/*.json).

    Raises:
        ConfigError: the order is too high for the vocabulary, or the data are no text.
    """
    cfg = cell.config
    hashes = [source["content"] for source in cell.science["data.sources"]]
    corpus = build_corpus(cfg, cell.inputs, hashes, None)
    if not isinstance(corpus, TextCorpus):
        raise ConfigError(
            f"n-grams of data={type(cfg.data).__name__} are not counted, only of text"
        )
    try:
        model = Ngram(NgramConfig(order=order), corpus.tokenizer.vocab_size)
    except ValueError as error:
        raise ConfigError(f"--order: {error}") from error
    model.fit(np.concatenate([file.ids for file in corpus.train]))
    precision = PrecisionConfig().build(torch.device("cpu"))
    trained = Trained(
        model=model,
        task=cfg.task.build(model, corpus.tokenizer, {}),
        corpus=corpus,
        cfg=cfg,
        precision=precision,
        ranks=Ranks("cpu"),
        step=0,
        last=True,
        folder=None,
    )
    results: dict[str, Any] = {"order": order} | validate(trained)
    if harness.tasks:
        from runner.evaluate.harness import HarnessModel, evaluate  # noqa: PLC0415

        wrapped = HarnessModel(
            model,
            corpus.tokenizer,
            context=harness.context_in(cfg),
            batch_size=harness.batch_size,
        )
        results["scores"] = evaluate(wrapped, harness).scores
    return results
