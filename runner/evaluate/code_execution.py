"""Whether programs pass their tests: what HumanEval and MBPP score. lm-eval hands over a row and the model's text."""

import os
from typing import Any

from runner.evaluate.sandbox import choose_wall, run

ALLOW = "ESPALIER_ALLOW_UNSAFE_CODE"  # set by the harness from eval.harness.allow_unsafe_code


def humaneval(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Score the continuation of the prompt by the row's `check`."""
    return _score(f"{row['prompt']}{texts[0]}\n{row['test']}\ncheck({row['entry_point']})")


def mbpp(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Score a program by the row's assertions."""
    tests = "\n".join(row["test_list"])
    return _score(f"{texts[0]}\n{row.get('test_setup_code') or ''}\n{tests}")


def _score(program: str) -> dict[str, float]:
    wall = choose_wall(os.environ.get(ALLOW) == "true")
    return {"pass_at_1": float(run(program, wall=wall).passed)}
