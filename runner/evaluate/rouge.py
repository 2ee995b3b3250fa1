"""ROUGE-1, -2 and -Lsum of texts that a model writes (Lin, 2004), by the package rouge-score.

Values are F1, the mean over texts, with a standard error. Words are stemmed; of Lsum each line of a
text is a sentence, and one line is split at the ends of sentences.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from runner.evaluate.answer_metrics import mean_and_error
from runner.evaluate.rouge_config import RougeConfig
from runner.evaluate.solving import Solver
from runner.evaluate.solving_config import SolvingConfig
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained

KINDS = ("rouge1", "rouge2", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def summarise(cfg: RougeConfig, trained: Trained) -> dict[str, float]:
    """Return the values of this file's head by NAME/kind; write texts_NAME.jsonl.

    Every rank computes everything.

    Raises:
        ConfigError: rouge-score is not installed, or the model cannot write the texts.
        DataError: the data hold no problems.
    """
    scores_of = _scorer()
    writing = SolvingConfig(
        problems=cfg.problems,
        max_new_tokens=cfg.max_new_tokens,
        stop=cfg.stop,
        shots=cfg.shots,
        shots_seed=cfg.shots_seed,
        rows=cfg.rows,
    )
    solver = Solver(writing, trained)
    asked = list(solver.prompts())
    done = solver.continued(
        [solver.after_examples(ids) for ids, _ in asked], [solver.sampling(0.0)] * len(asked)
    )
    texts = [(reference, one.text) for (_, reference), one in zip(asked, done, strict=True)]
    scores = [scores_of(*pair) for pair in texts]
    if trained.folder is not None:
        lines = [
            json.dumps({"reference": reference, "text": text} | row)
            for (reference, text), row in zip(texts, scores, strict=True)
        ]
        file = trained.folder / f"texts_{cfg.name}.jsonl"
        write_atomically(file, "".join(f"{line}\n" for line in lines))
    values = {"tokens": sum(len(one.ids) for one in done) / len(done)}
    for kind in KINDS:
        mean, error = mean_and_error([row[kind] for row in scores])
        values |= {kind: mean} | ({f"{kind}_stderr": error} if len(scores) > 1 else {})
    return {f"{cfg.name}/{key}{trained.suffix}": value for key, value in values.items()}


def _scorer() -> Any:
    """Return a function of (reference, text) that gives F1 by kind."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415
    except ImportError:
        raise ConfigError("ROUGE needs rouge-score: pip install -e '.[rouge]'") from None
    scorer = RougeScorer(list(KINDS), use_stemmer=True)

    def scores(reference: str, text: str) -> dict[str, float]:
        found = scorer.score(*map(in_lines, (reference, text)))
        return {kind: float(found[kind].fmeasure) for kind in KINDS}

    return scores


def in_lines(text: str) -> str:
    """Return a text with a sentence to a line, as Lsum reads it."""
    lines: Sequence[str] = text.strip().split("\n")
    if len(lines) == 1:
        lines = _SENTENCE_END.split(lines[0])
    return "\n".join(lines)
