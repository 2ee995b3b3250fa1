"""The fields of requests: honoured, harmless and ignored, or refused by name.

A field that is declared as None is known and refused: the error names it. Any other that is not
declared is unknown, and refused too: to ignore what a client asks for would be a wrong answer.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEQUENCES = 128  # of a request: n times its prompts
_MAX_TOKENS = 1 << 31
_Id = Annotated[int, Field(ge=0, lt=_MAX_TOKENS)]
_Text = Annotated[str, Field(max_length=1 << 20)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
_Bias = dict[
    Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
]
Ids = Annotated[list[_Id], Field(min_length=1, max_length=1 << 20)]
Refused = Annotated[None, Field(description="refused by name")]


class Fields(BaseModel):
    """Base: no other fields, no conversion of a type into another, no NaN and no infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(Fields):
    """What a stream has besides the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # harmless


class JsonSchema(Fields):
    """A named schema that the text obeys."""

    name: Annotated[str, Field(max_length=64)] = "schema"
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = True
    description: str | None = None
    strict: bool | None = None  # it always is


class ResponseFormat(Fields):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: Annotated[str, Field(max_length=1 << 14)] | None = None


class StructuredOutputs(Fields):
    """The same in vLLM's words; exactly one is given."""

    json_: Annotated[dict[str, Any] | bool | None, Field(alias="json")] = None
    regex: Annotated[str, Field(max_length=1 << 14)] | None = None
    choice: Annotated[list[_Stop], Field(min_length=1, max_length=1024)] | None = None


class Generation(Fields):
    """What completions and chat completions have in common."""

    model: Annotated[str, Field(max_length=256)] | None = None
    # Honoured.
    frequency_penalty: _Penalty | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[_Bias, Field(max_length=1024)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=_MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # Of a masked-diffusion model.
    algorithm: Annotated[str, Field(max_length=64)] | None = None
    block: Annotated[int, Field(ge=1, lt=_MAX_TOKENS)] | None = None
    steps: Annotated[int, Field(ge=1, lt=_MAX_TOKENS)] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    # Harmless and ignored.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_SEQUENCES)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=_MAX_TOKENS)] | None = None
    suffix: _Text | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None  # n, or refused


class TextPart(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class ToolFunction(Fields):
    """What a call names: its arguments are JSON."""

    name: Annotated[str, Field(max_length=256)]
    arguments: _Text


class ToolCall(Fields):
    """A call that the model has made."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: ToolFunction


class Message(Fields):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: str | None = None  # harmless: what another server answered


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class FunctionTool(Fields):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: _Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """What the model may use; the server runs none."""

    type: Literal["function"]
    function: FunctionTool


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_MAX_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_MAX_TOKENS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Honoured by a model that was trained to use tools.
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    # Harmless: one text, and calls one after the other, are all that there is.
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    # Known and refused.
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    prediction: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None


class TokenizeBody(Fields):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: _Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Fields):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[_Id], Field(max_length=1 << 20)]


class InfillBody(Fields):
    """POST /infill, in llama.cpp's words."""

    model: Annotated[str, Field(max_length=256)] | None = None
    input_prefix: _Text
    input_suffix: _Text
    n_predict: Annotated[int, Field(ge=1, lt=_MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[list[_Stop], Field(max_length=4)] | None = None
