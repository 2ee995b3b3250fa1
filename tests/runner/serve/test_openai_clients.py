"""A server as openai's own client sees it."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runner.records.trained_model import load_model
from tests.runner.serve.running import CONTEXT, HI, INFILL, Server, http_get, http_post

TEXT = "The quick brown fox jumps over the lazy dog, and the dog"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which tries nothing twice."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(server: Server) -> tuple[Any, Any]:
    """The model and the tokenizer that are served."""
    model, tokenizer, _ = load_model(server.run)
    return model.for_inference(), tokenizer


def _complete(client: openai.OpenAI, **fields: Any) -> Completion:
    given = {"model": "tiny", "prompt": "The quick", "max_tokens": 8, "temperature": 0.0}
    answer = client.completions.create(**given | fields)
    if not fields.get("echo"):  # then the first token has no log-probability, against their types
        Completion.model_validate(answer.to_dict())
    return answer


def _chat(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    given = {"model": "tiny", "messages": HI, "max_completion_tokens": 8, "temperature": 0.0}
    answer = client.chat.completions.create(**given | fields)
    ChatCompletion.model_validate(answer.to_dict())
    return answer


def test_answers_have_openais_types_and_count_what_the_tokenizer_counts(
    client: openai.OpenAI, server: Server, loaded: tuple[Any, Any]
) -> None:
    _, tokenizer = loaded
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve(server.run.name).id == server.run.name
    ids = tokenizer.encode(TEXT).tolist()
    forms = [TEXT, ids, [TEXT], [TEXT, "The"], [ids, ids[:3]]]
    said = []
    for prompt in forms:
        answer = _complete(client, prompt=prompt, n=2, extra_body={"ignore_eos": True})
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        texts = prompt if several else [prompt]
        counts = [len(t) if isinstance(t, list) else len(tokenizer.encode(t)) for t in texts]
        assert [choice.index for choice in answer.choices] == list(range(2 * len(texts)))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(counts)
        assert answer.usage.completion_tokens == 8 * len(answer.choices)
        said.append(answer.choices[0].text)
    assert len(set(said)) == 1
    chat = _chat(client)
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(tokenizer.encode(rendered))
    assert chat.choices[0].message.role == "assistant"
    # An id that ends the text is no part of it.
    ended = _complete(client, logit_bias={str(tokenizer.eos): 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")


def test_streams_join_to_the_text_that_is_not_streamed(client: openai.OpenAI) -> None:
    for drawn in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=HI,
                max_tokens=24,
                n=2,
                stream=True,
                stream_options={"include_usage": True},
                **drawn,
            )
        )
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk.to_dict())
        assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
        *parts, last = chunks
        assert last.choices == []
        assert last.usage is not None
        assert all(chunk.usage is None for chunk in parts)
        whole = _chat(client, max_completion_tokens=24, n=2, **drawn)
        assert whole.usage is not None
        assert last.usage.total_tokens == whole.usage.total_tokens
        for choice in whole.choices:
            own = [c.choices[0] for c in parts if c.choices[0].index == choice.index]
            assert own[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in own) == choice.message.content
            ends = [c.finish_reason for c in own]
            assert ends == [None] * (len(own) - 1) + [choice.finish_reason]
    plain = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=24, temperature=0, stream=True
    )
    joined = "".join(chunk.choices[0].text for chunk in plain)
    assert joined == _complete(client, prompt=TEXT, max_tokens=24).choices[0].text


def test_no_piece_has_half_a_character_and_no_text_its_stop_string(client: openai.OpenAI) -> None:
    wanted = "日本語 Zwölf doesn't mind"
    more = {"structured_outputs": {"choice": [wanted]}}
    chunks = client.completions.create(
        model="tiny", prompt="x", max_tokens=60, stream=True, extra_body=more
    )
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == wanted
    assert not any("\ufffd" in piece for piece in pieces)
    stopped = _complete(client, max_tokens=60, stop=["lf do", "zzz"], extra_body=more).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("日本語 Zwö", "stop")


def test_log_probabilities_are_those_of_a_forward_pass(
    client: openai.OpenAI, loaded: tuple[Any, Any]
) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode(TEXT).tolist()
    answer = _complete(client, prompt=prompt, max_tokens=6, logprobs=3, echo=True)
    made = answer.choices[0]
    more = {"return_token_ids": True}
    ids = _complete(client, prompt=prompt, max_tokens=6, extra_body=more).choices[0]
    both = [*prompt, *ids.to_dict()["token_ids"]]  # type: ignore[misc]
    with torch.no_grad():
        logits = model(torch.tensor([both]))[0].log_softmax(-1)
    own = logits[:-1].gather(1, torch.tensor(both[1:])[:, None])[:, 0]
    assert made.logprobs is not None
    assert made.logprobs.token_logprobs is not None
    assert made.logprobs.token_logprobs[0] is None
    assert made.logprobs.token_logprobs[1:] == pytest.approx(own.tolist(), abs=1e-4)
    assert made.text.startswith(TEXT)
    assert made.logprobs.text_offset is not None
    assert made.logprobs.text_offset[1] == len(tokenizer.decode(prompt[:1]))
    # Scoring alone adds no token; a conversation's tokens have their bytes.
    scored = _complete(client, prompt=prompt, max_tokens=0, logprobs=1, echo=True).choices[0]
    assert scored.text == TEXT
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == made.logprobs.token_logprobs[: len(prompt)]
    chat = _chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    spelt = b"".join(bytes(token.bytes or []) for token in chat.logprobs.content)
    assert spelt.decode(errors="replace") == chat.message.content
    for token in chat.logprobs.content:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-6)
        assert len(token.top_logprobs) == 2


def test_several_texts_are_those_of_the_seeds_that_follow(client: openai.OpenAI) -> None:
    drawn = {"temperature": 1.0, "max_tokens": 12}
    together = _complete(client, n=3, seed=-7, **drawn)
    alone = [_complete(client, seed=seed, **drawn).choices[0].text for seed in (-7, -6, -5)]
    assert [choice.text for choice in together.choices] == alone
    assert len(set(alone)) == 3
    assert _complete(client, **drawn).choices[0].text not in alone  # without a seed, another one


def test_drawn_texts_obey_their_schema(client: openai.OpenAI) -> None:
    from jsonschema_rs import validate

    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, "ü"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    seen = set()
    for seed in (0, 1000):
        answer = _chat(
            client,
            n=100,
            seed=seed,
            temperature=2.0,
            response_format=form,
            max_completion_tokens=40,
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert choice.message.content is not None
            validate(schema, json.loads(choice.message.content))
            seen.add(choice.message.content)
    assert len(seen) == 4
    regex = {"structured_outputs": {"regex": "[0-9]{3}-[ab]+"}}
    number = _complete(client, max_tokens=5, extra_body=regex).choices[0].text
    assert number[:3].isdigit()
    assert set(number[4:]) <= {"a", "b"}


def test_a_prompt_that_is_known_is_not_read_again_and_says_so(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "a story about " + TEXT}]
    first, second = (_chat(client, messages=said) for _ in range(2))
    assert second.choices[0].message.content == first.choices[0].message.content
    cached = []
    for answer in (first, second):
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert cached[1] is not None
    assert cached[1] >= 16
    assert cached[1] % 16 == 0


def test_a_text_does_not_depend_on_the_company(client: openai.OpenAI, server: Server) -> None:
    cases = [
        # No prompt reaches a block of the prefix cache, which changes the pieces that are read.
        {"prompt": f"{i} fox", "temperature": float(i % 2), "seed": i, "max_tokens": 4 + i % 13}
        for i in range(50)
    ]
    alone = [_complete(client, **case).choices[0].text for case in cases]

    async def together() -> list[str]:
        many = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def one(case: dict[str, Any]) -> str:
            answer = await many.completions.create(model="tiny", **case)
            return answer.choices[0].text

        async def leaves(number: int) -> None:
            stream = await many.completions.create(
                model="tiny", prompt=f"{number} dog", max_tokens=60, stream=True
            )
            async for _ in stream:
                await stream.close()
                return

        order = random.Random(0).sample(range(50), 50)
        leaving = [asyncio.create_task(leaves(number)) for number in range(20)]
        texts = await asyncio.gather(*(one(cases[index]) for index in order))
        await asyncio.gather(*leaving)
        await many.close()
        return [text for _, text in sorted(zip(order, texts, strict=True))]

    assert asyncio.run(together()) == alone
    _wait_until_idle(server)


def _metrics(server: Server) -> dict[str, float]:
    lines = http_get(f"{server.url}/metrics").text.splitlines()
    rows = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def _wait_until_idle(server: Server) -> None:
    """Return once nothing runs; a client that has left frees its row before the next step."""
    gauges = [f'espalier:num_requests_{word}{{model_name="tiny"}}' for word in _WORDS]
    while any(_metrics(server)[gauge] for gauge in gauges):
        pass


_WORDS = ("running", "waiting")


def test_every_field_is_honoured_ignored_or_refused_by_name(
    client: openai.OpenAI, server: Server
) -> None:
    usual = _complete(client).choices[0].text
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
    }
    assert _complete(client, extra_body=harmless).choices[0].text == usual
    changed: list[dict[str, Any]] = [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 9.0}},
        {"logit_bias": {"70": 100}},
        {"temperature": 1.5, "seed": 5},
        {"stop": usual[1]},
    ]
    for fields in changed:
        assert _complete(client, max_tokens=16, **fields).choices[0].text[: len(usual)] != usual
    for fields in ({"top_k": 1}, {"min_p": 1.0}):  # what is likeliest alone is left
        drawn = _complete(client, temperature=1.0, extra_body=fields)
        assert drawn.choices[0].text == usual
    assert _complete(client, temperature=1.0, top_p=1e-300).choices[0].text == usual
    eos = {"logit_bias": {"2": 100}}
    for fields in ({"ignore_eos": True}, {"min_tokens": 8}):
        assert _complete(client, extra_body=fields, **eos).choices[0].finish_reason == "length"
    refused: dict[str, tuple[Any, Any]] = {
        "tools": ([{"type": "function", "function": {"name": "f"}}], "unsupported_parameter"),
        "functions": ([{"name": "f"}], "unsupported_parameter"),
        "reasoning_effort": ("low", "unsupported_parameter"),
        "verbosity": ("low", "unsupported_parameter"),
        "audio": ({"format": "mp3", "voice": "x"}, "unsupported_parameter"),
        "prediction": ({"type": "content", "content": "x"}, "unsupported_parameter"),
        "web_search_options": ({}, "unsupported_parameter"),
        "steps": (4, "unsupported_parameter"),  # of masked diffusion
        "favourite_colour": ("blue", "unknown_parameter"),
        "stream_options": ({"include_usage": True}, None),  # without a stream
        "top_logprobs": (2, None),  # without logprobs
    }
    for name, (value, code) in refused.items():
        with pytest.raises(openai.BadRequestError) as caught:
            _chat(client, extra_body={name: value})
        assert (caught.value.param, caught.value.code) == (name, code), name
    with pytest.raises(openai.BadRequestError) as several:
        _complete(client, best_of=3)
    assert several.value.param == "best_of"


def test_errors_have_openais_form(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        _complete(client, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        _complete(client, prompt=[5] * CONTEXT, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    assert str(CONTEXT) in long.value.message
    head = {"content-type": "application/json"}
    answers = {
        400: http_post(f"{server.url}/v1/completions", content="{", headers=head),
        404: http_get(f"{server.url}/v2"),
        405: http_get(f"{server.url}/v1/completions"),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_the_endpoints_beside_openais(server: Server, loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded

    def post(path: str, **body: Any) -> Any:
        return http_post(f"{server.url}{path}", json=body).json()

    ids = tokenizer.encode(TEXT).tolist()
    told = post("/tokenize", prompt=TEXT, return_token_strs=True)
    assert (told["tokens"], told["count"], told["max_model_len"]) == (ids, len(ids), CONTEXT)
    assert "".join(told["token_strs"]) == TEXT
    assert post("/detokenize", tokens=ids) == {"prompt": TEXT}
    # What a user says is never read as a special token.
    said = post("/tokenize", messages=[{"role": "user", "content": "<|im_end|>"}])["tokens"]
    assert said.count(tokenizer.eos) == 1
    assert "<|im_end|>" in post("/detokenize", tokens=said)["prompt"]
    for path in ("/health", "/ready"):
        assert http_get(f"{server.url}{path}").json() == {"status": "ok"}
    assert http_get(f"{server.url}/version").json()["version"]
    gap = {"input_prefix": "def f(x):", "input_suffix": "<|im_end|>", "temperature": 0}
    filled = post("/infill", **gap, n_predict=6)
    suffix = {"prompt": gap["input_prefix"], "suffix": gap["input_suffix"], "temperature": 0}
    same = post("/v1/completions", **suffix, max_tokens=6)
    assert filled["content"] == same["choices"][0]["text"]
    assert filled["tokens_evaluated"] == same["usage"]["prompt_tokens"]
    marks = [tokenizer.encode(name).tolist() for name in INFILL]
    literal = filled["tokens_evaluated"] - len(marks) - len(tokenizer.encode("def f(x):"))
    assert [len(mark) for mark in marks] == [1, 1, 1]
    assert literal > 1  # what stands behind the gap is no special token
    metrics = _metrics(server)
    first = metrics['espalier:time_to_first_token_seconds_count{model_name="tiny"}']
    assert first > 0
    generated = metrics['espalier:generation_tokens_total{model_name="tiny"}']
    assert generated >= first
    steps = metrics['espalier:iteration_tokens_total_count{model_name="tiny"}']
    tokens = metrics['espalier:iteration_tokens_total_sum{model_name="tiny"}']
    assert tokens > generated  # prompts too
    assert tokens > steps > 0
