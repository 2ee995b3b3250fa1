"""Held-out pairs of answers one by one: which of the two the model is rewarded for."""

import json
from typing import Any

import torch
from torch import Tensor

from kernels.logit_rows import IGNORE
from runner.evaluate.answer_metrics import mean_and_error
from runner.evaluate.pairs_config import PairsConfig
from runner.evaluate.validation import to_device
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained


@torch.no_grad()
def look_at_pairs(cfg: PairsConfig, trained: Trained) -> dict[str, float]:
    """Return NAME/violations and NAME/margin; write answers_NAME.jsonl, a line for each pair.

    A pair whose answers are rewarded alike is no violation. Every rank computes everything.

    Raises:
        ConfigError: the task has no pairs.
    """
    margins = getattr(trained.task, "margins", None)
    if margins is None:
        raise ConfigError(
            f"the pairs of answers are those of task=preference, and the task is "
            f"{type(trained.cfg.task).__name__}; leave the evaluation out"
        )
    run, tokenizer = trained.cfg, trained.corpus.tokenizer
    seq, lines = run.train.sequence_length, []
    for batch in trained.corpus.held_out(seq, run.eval.batch_size, 2 * seq * cfg.limit):
        placed = to_device(batch, trained.ranks.device, masked=False)
        with trained.precision.autocast():
            found = margins(trained.model, placed).tolist()
        for tokens, targets, margin in zip(batch["tokens"], batch["targets"], found, strict=True):
            lines.append(_line(tokenizer, tokens, targets, margin))
    lines = lines[: cfg.limit]
    if trained.folder is not None:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        write_atomically(trained.folder / f"answers_{cfg.name}.jsonl", text)
    share, error = mean_and_error([float(line["margin"] < 0) for line in lines])
    values = {"violations": share} | ({"violations_stderr": error} if len(lines) > 1 else {})
    values["margin"] = sum(line["margin"] for line in lines) / len(lines)
    return {f"{cfg.name}/{key}{trained.suffix}": value for key, value in values.items()}


def _line(tokenizer: Any, tokens: Tensor, targets: Tensor, margin: float) -> dict[str, Any]:
    """Return the texts of a pair, tokens and targets [2, seq], and its margin."""
    answers = [targets[side][targets[side] != IGNORE].tolist() for side in range(2)]
    first = int((targets[0] != IGNORE).nonzero()[0]) + 1
    texts = [tokenizer.decode([i for i in ids if i != tokenizer.eos]) for ids in answers]
    prompt = tokenizer.decode(tokens[0, :first].tolist())
    return {"prompt": prompt, "reference": texts[0], "rejected": texts[1], "margin": margin}
