"""A server as curl, lm-eval and a browser see it."""

import json
import shutil
import subprocess
from typing import Any

import openai
import pytest

from runner.records.trained_model import load_model
from tests.runner.serve.running import HI, Server

CHROMIUM = shutil.which("chromium")


def test_curl_gets_server_sent_events(server: Server) -> None:
    breaks = "\x85\u2028\u2029"  # a line's end to many clients, though not to these events
    body = {
        "messages": HI,
        "stream": True,
        "max_tokens": 9,
        "structured_outputs": {"regex": breaks},
    }
    url = f"{server.url}/v1/chat/completions"
    head = "content-type: application/json"
    line = ["curl", "-sSNi", url, "-H", head, "-d", json.dumps(body)]
    told = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    headers, _, events = "\n".join(told.splitlines()).partition("\n\n")
    assert "text/event-stream" in headers
    assert "no-cache" in headers
    assert "X-Accel-Buffering: no" in headers.replace("x-accel-buffering", "X-Accel-Buffering")
    *chunks, done = events.rstrip().split("\n\n")
    assert done == "data: [DONE]"
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == breaks


def test_lm_eval_gets_through_the_port_what_the_harness_gets(server: Server) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from runner.evaluate.harness import HarnessModel

    def asked(kind: Any, *arguments: Any) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=given, idx=index)
            for index, given in enumerate(arguments)
        ]

    model, tokenizer, context = load_model(server.run)
    harness = HarnessModel(model, tokenizer, context=context)
    folder = str(server.run.parents[1] / "hf")
    about = {"model": "tiny", "tokenizer": folder, "max_length": context, "max_retries": 1}
    completions = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", **about)
    pairs = asked(
        "loglikelihood",
        ("The quick brown", " fox jumps"),
        ("A cat", " sat on the mat"),
        ("x", " 日本"),
    )
    theirs = completions.loglikelihood(pairs)
    for (nats, greedy), (other, also) in zip(harness.loglikelihood(pairs), theirs, strict=True):
        assert nats == pytest.approx(other, abs=1e-3)
        assert greedy == also
    wanted = {"until": ["zz"], "max_gen_toks": 8, "do_sample": False}
    texts = asked("generate_until", ("The quick", dict(wanted)), ("A cat", dict(wanted)))
    own = harness.generate_until(texts)
    texts = asked("generate_until", ("The quick", dict(wanted)), ("A cat", dict(wanted)))
    assert completions.generate_until(texts) == own
    chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", **about)
    said = JsonChatStr(json.dumps(HI))
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    answers = chat.generate_until(asked("generate_until", (said, dict(wanted))))
    expected = harness.generate_until(asked("generate_until", (rendered, dict(wanted))))
    assert answers == expected


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_a_browser_chats_on_a_phones_screen(server: Server) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 640})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_label("temperature").fill("0")
        page.get_by_label("tokens").fill("8")
        page.get_by_label("Your text").fill("hi")
        page.get_by_label("Your text").press("Enter")
        page.get_by_role("button", name="Send").wait_for()
        assert page.inner_text("h1") == "tiny"
        shown = page.locator(".assistant").text_content()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = client.chat.completions.create(
                model="tiny", messages=HI, max_completion_tokens=8, temperature=0.0
            )
        assert shown == answer.choices[0].message.content
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not errors
        browser.close()
