"""pass@1 of HumanEval, MBPP and LiveCodeBench: run a model's program with its tests in a sandbox.

lm-eval calls each function with a row of the benchmark and the texts of the model.
"""

import json
import os
import re
from typing import Any

from runner.evaluate.sandbox import choose_wall, run
from runner.machine.errors import DataError

ALLOW = "ESPALIER_ALLOW_UNSAFE_CODE"  # set by the harness from eval.harness.allow_unsafe_code

# Runs a program once for each test, in the sandbox: with its stdin, or to call its function.
_JUDGE = """
import contextlib, io, json, sys
given = json.loads({given})

def lines(text):
    return [line.split() for line in text.strip().splitlines()]

for test in given["tests"]:
    names = {{"__name__": "__main__"}}
    called, said = test["testtype"] == "functional", io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"" if called else test["input"].encode()))
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        exec(compile(given["source"], "<program>", "exec"), names)
    if called:
        owner = names["Solution"]() if "Solution" in names else None
        function = getattr(owner, given["name"]) if owner else names[given["name"]]
        result = function(*(json.loads(line) for line in test["input"].splitlines()))
        result = list(result) if isinstance(result, tuple) else result
        assert result == json.loads(test["output"]), (test["input"], result)
    else:
        assert lines(said.getvalue()) == lines(test["output"]), (test["input"], said.getvalue())
"""


def humaneval(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return pass_at_1 of the prompt's continuation under the row's `check`."""
    return _score(f"{row['prompt']}{texts[0]}\n{row['test']}\ncheck({row['entry_point']})")


def mbpp(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return pass_at_1 of a program under the row's assertions."""
    tests = "\n".join(row["test_list"])
    return _score(f"{texts[0]}\n{row.get('test_setup_code') or ''}\n{tests}")


def livecodebench(row: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Return pass_at_1 of the last Python program in a text under all tests of the row.

    Tests are JSON lists in `public_test_cases` and `private_test_cases`, of programs that read
    stdin and of functions that are called.

    Raises:
        DataError: the private tests are a compressed pickle, as on the hub.
    """
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    names = json.loads(row.get("metadata") or "{}")
    given = {"source": _last_program(texts[0]), "tests": tests, "name": names.get("func_name")}
    return _score(_JUDGE.format(given=json.dumps(json.dumps(given))))


def _tests(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    text = row.get(name) or "[]"
    if not text.lstrip().startswith("["):
        raise DataError(
            f"{row.get('question_id')}: {name} is a compressed pickle, which is not opened; write "
            "the file with JSON lists (json.dumps of each question's tests)"
        )
    tests: list[dict[str, str]] = json.loads(text)
    return tests


def _last_program(text: str) -> str:
    """Return the last fenced block of a text, or all of it if there is none."""
    blocks = re.findall(r"```(?:python)?[^\n]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    return blocks[-1] if blocks else text


def _score(program: str) -> dict[str, float]:
    wall = choose_wall(os.environ.get(ALLOW) == "true")
    return {"pass_at_1": float(run(program, wall=wall).passed)}
