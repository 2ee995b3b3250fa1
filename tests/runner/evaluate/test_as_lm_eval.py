"""Imported models are evaluated as lm-eval's own HFLM evaluates them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.pretrained import load_pretrained
from runner.data.pretrained import with_pretrained
from runner.data.tokenizers_config import TokenizerConfig
from runner.evaluate.generation_settings import sampling_of
from runner.evaluate.harness import HarnessModel
from runner.machine.errors import ConfigError
from tests.folders import llama2, llama3, qwen

PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The mat ", "was flat"),
    ("", "A cat sat on the mat"),
    ("", " dog"),
    ("{bos}The dog", " doesn't mind"),
    ("Zwölf", " 日本語"),
]
PROMPTS = ["The quick", "def f(x):\n", "{bos}A cat", "Zwölf Boxkämpfer and", "日本"]


def _ask(model: Any, kind: str, *rows: tuple[Any, ...]) -> list[Any]:
    requests = [SimpleNamespace(args=row, task_name="t") for row in rows]
    found: list[Any] = getattr(model, kind)(requests, disable_tqdm=True)
    return found


@pytest.mark.parametrize("style", [llama3, llama2, qwen])
def test_an_imported_model_scores_and_says_what_hflm_says(
    style: Callable[[Path], Path], compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate, of the dev extra")
    from lm_eval.models.huggingface import HFLM

    folder = style(tmp_path / "m")
    node = with_pretrained(compose(f"init=hf:{folder}"))["tokenizer"]
    del node["_target_"]
    tokenizer, theirs = TokenizerConfig(**node).build([]), AutoTokenizer.from_pretrained(folder)
    ours = HarnessModel(load_pretrained(folder), tokenizer, context=96, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    hflm = HFLM(pretrained=model, tokenizer=theirs, batch_size=1, max_length=96)
    bos = theirs.bos_token or theirs.eos_token
    pairs = [(a.format(bos=bos), b) for a, b in PAIRS]
    for (nats, greedy), (own, own_greedy) in zip(
        _ask(hflm, "loglikelihood", *pairs), _ask(ours, "loglikelihood", *pairs), strict=True
    ):
        assert own == pytest.approx(nats, abs=1e-3)
        assert own_greedy == greedy
    text = ("The lazy dog sat. " * 20,)
    assert _ask(ours, "loglikelihood_rolling", text) == pytest.approx(
        _ask(hflm, "loglikelihood_rolling", text), abs=1e-2
    )
    for settings in (
        {"until": ["\n"], "max_new_tokens": 5},
        {"until": "at", "max_tokens": 12, "do_sample": False, "temperature": 0.7},
        {"until": [], "max_gen_toks": 20, "repetition_penalty": 1.5},
        {"max_gen_toks": 20, "temperature": 0.0},
    ):
        rows = [(prompt.format(bos=bos), settings) for prompt in PROMPTS]
        said = _ask(ours, "generate_until", *rows)
        assert said == _ask(hflm, "generate_until", *rows)
        assert any(said)


def test_a_tasks_settings_are_those_of_lm_eval() -> None:
    sampled = sampling_of({"temperature": 0.6, "min_p": 0.1, "top_k": 5, "top_p": 0.9})
    assert (sampled.temperature, sampled.min_p, sampled.top_k) == (0.6, 0.1, 5)
    assert (sampled.top_p, sampled.max_new_tokens) == (0.9, 256)
    assert sampling_of({"max_completion_tokens": 7}).max_new_tokens == 7
    for greedy in (
        {},
        {"do_sample": True},  # lm-eval's temperature is 0 where a task names none
        {"do_sample": False, "temperature": 0.6},
        {"temperature": 0},
    ):
        assert sampling_of(greedy).temperature == 0.0
    assert sampling_of({"num_beams": 1, "until": ["", "\n"]}).stop == ("\n",)
    with pytest.raises(ConfigError, match="num_beams=10 is not done here"):
        sampling_of({"num_beams": 10})
    with pytest.raises(ConfigError, match=r"top_p=1.5 must be in"):
        sampling_of({"top_p": 1.5})
