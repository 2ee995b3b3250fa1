"""pass@1 of HumanEval and MBPP: run a model's program with its tests in a sandbox.

lm-eval calls each function with a row of the benchmark and the texts of the model.
"""

import os
from typing import Any

from runner.evaluate.sandbox import choose_wall, run

ALLOW = "ESPALIER_ALLOW_UNSAFE_CODE"  # set by the harness from eval.harness.allow_unsafe_code


def humaneval(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return pass_at_1 of the prompt's continuation under the row's `check`."""
    return _score(f"{row['prompt']}{texts[0]}\n{row['test']}\ncheck({row['entry_point']})")


def mbpp(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return pass_at_1 of a program under the row's assertions."""
    tests = "\n".join(row["test_list"])
    return _score(f"{texts[0]}\n{row.get('test_setup_code') or ''}\n{tests}")


def _score(program: str) -> dict[str, float]:
    wall = choose_wall(os.environ.get(ALLOW) == "true")
    return {"pass_at_1": float(run(program, wall=wall).passed)}
