"""Programs for contests: what passes, and who may write them."""

import json
from pathlib import Path

import pytest

from models.decoder_config import DecoderConfig
from runner.data.tokenizers import ByteTokenizer
from runner.evaluate.code_execution import livecodebench
from runner.evaluate.config import HarnessConfig
from runner.evaluate.generation_settings import denoising_of
from runner.evaluate.harness import HarnessModel, evaluate
from runner.generate.denoise import Denoise
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError

BYTES = ByteTokenizer()

PROGRAMS = [
    {
        "question_id": "1",
        "question_content": "Add two numbers.",
        "starter_code": "",
        "public_test_cases": json.dumps(
            [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}] * 2
        ),
        "private_test_cases": "[]",
        "metadata": "{}",
    },
    {
        "question_id": "2",
        "question_content": "Reverse a list.",
        "starter_code": "class Solution:\n    def turn(self, x): ...",
        "public_test_cases": json.dumps(
            [{"input": "[1, 2]", "output": "[2, 1]", "testtype": "functional"}]
        ),
        "private_test_cases": json.dumps(
            [{"input": "[]", "output": "[]", "testtype": "functional"}]
        ),
        "metadata": json.dumps({"func_name": "turn"}),
    },
]


@pytest.mark.parametrize(
    ("number", "program", "passes"),
    [
        (0, "a, b = map(int, input().split())\nprint(a + b)", True),
        (0, "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\nsys.exit(0)", True),
        (0, "print(4)", False),
        (0, "input(); input()", False),
        (1, "class Solution:\n    def turn(self, x):\n        return tuple(x[::-1])", True),
        (1, "def turn(x):\n    return sorted(x, reverse=True)", True),
        (1, "def turn(x):\n    return [2, 1]", False),
        (1, "nothing", False),
    ],
)
def test_contest_programs_pass_all_of_their_tests(number: int, program: str, passes: bool) -> None:
    text = f"Here it is:\n```python\n{program}\n```\nDone."
    assert livecodebench(PROGRAMS[number], [text]) == {"pass_at_1": float(passes)}


def test_a_model_of_canvases_writes_programs_and_scores_no_continuations(tmp_path: Path) -> None:
    (tmp_path / "livecodebench_two.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in PROGRAMS)
    )
    cfg = HarnessConfig(tasks=("livecodebench",), data=str(tmp_path), algorithm="low_confidence")
    built = DecoderConfig(depth=1, width=16, num_heads=1, causal=False).build(258, 0)
    denoise = Denoise(built, context=512, decode=BYTES.decode, mask=257, ends=(BYTES.eos,))
    harness = HarnessModel(built, BYTES, context=512, strategy=denoise, fill={"steps": 2})
    report = evaluate(harness, cfg)
    assert report.values["livecodebench/pass_at_1"] == 0.0
    assert len(report.records) == 2
    assert "Add two numbers." in report.records[0]["arguments"]
    with pytest.raises(ConfigError, match="scores no continuations"):
        harness.score([([1], [2])])
    with pytest.raises(ConfigError, match="repetition_penalty"):
        denoising_of(Sampling(repetition_penalty=1.2), 3, 64, {})
    with pytest.raises(ConfigError, match=r"eval\.harness: algorithm=best"):
        denoising_of(Sampling(), 3, 64, {"algorithm": "best"})
