"""The wire types of the OpenAI-compatible routes.

Requests keep the fields that they do not declare in ``model_extra``; ``server/fields.py`` decides about those. Answers are
written with the fields that were set and no others, so a null on the wire was put there on purpose.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictInt, Tag, model_validator

from engine import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from server.json_values import check_body

MAX_STOP_STRINGS = 16
MAX_PROMPTS = 4096
MAX_MESSAGES = 16_384
MAX_CHOICES = 1024
MAX_TOOLS = 128
MAX_TOKEN_IDS = 2**22
"""No context is this long; the served one's limit is checked later, when it is known which of the lists are prompts."""

TokenId = StrictInt
# Every list ends at its first error and has a limit: a body of a million wrong elements must not become as many errors.
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
StopStrings = str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
LogitBias = Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)]
ContentParts = Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True)]


def _prompt_kind(value: Any) -> str:
    """Which of a prompt's four forms is meant: its first element tells."""
    if not isinstance(value, list):
        return "text"
    match value[:1]:
        case [str()]:
            return "texts"
        case [list()]:
            return "token_lists"
    return "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("token_lists")],
    Discriminator(_prompt_kind),
]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Request(BaseModel):
    """A null means the same as an absent field."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_body(cls, body: Any) -> Any:
        """Before anything looks into the values. Its ApiError is no ValueError, so it goes to the client as it is."""
        if isinstance(body, dict):
            check_body(body)
        return body

    @property
    def extra(self) -> dict[str, Any]:
        """The fields that are not declared."""
        return self.model_extra or {}


class GenerationFields(_Request):
    """The fields that chat and text completions share."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True)] | None = None
    guided_grammar: str | None = None
    stop: StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    decoding: str | None = None
    cache_salt: str | None = None


class ChatMessage(BaseModel):
    """One message of the conversation; fields that only templates know stay in ``model_extra``."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ContentParts | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCompletionRequest(GenerationFields):
    """``POST /v1/chat/completions``."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: StrictInt | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(_Request):
    """``POST /tokenize``: a text or a conversation. ``add_special_tokens`` null: for a text only, templates write their own."""

    prompt: str | None = None
    messages: Messages | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeRequest(_Request):
    """``POST /detokenize``."""

    tokens: TokenIds


class _Answer(BaseModel):
    def json_line(self) -> str:
        """JSON text on one line, with the fields that were set."""
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(BaseModel):
    """How much of the prompt was found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of the request; the prompt counts once, whatever ``n``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class SpeculativeDecoding(BaseModel):
    """What drafting did, over all choices. The first two are null where nothing was drafted."""

    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    tokens_per_forward: float | None


class ResponseMetrics(BaseModel):
    """Measurements of this one request."""

    speculative_decoding: SpeculativeDecoding


class _ChoiceEnd(BaseModel):
    index: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class TopLogprob(BaseModel):
    """A token that could have come, and its log-probability before any processing."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that came, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Lists of one length; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """vLLM's form: entries by token id."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(BaseModel):
    """A call's function; in a stream the arguments come in pieces, and the name in the first of them."""

    name: str | None = None
    arguments: str


class ToolCall(BaseModel):
    """A call, or in a stream a part of the one with this ``index``."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class AssistantMessage(BaseModel):
    """The answer of a chat choice, or a part of it in a stream. ``reasoning`` and ``reasoning_content`` are the same."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_ChoiceEnd):
    """One finished chat choice."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None = None


class ChatChunkChoice(_ChoiceEnd):
    """What a chunk adds to one chat choice."""

    delta: AssistantMessage
    logprobs: ChatLogprobs | None = None


class CompletionChoice(_ChoiceEnd):
    """One text choice, or what a chunk adds to it."""

    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class Completion(_Answer):
    """The frame of every answer and chunk."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatChunkChoice] | list[CompletionChoice]
    usage: Usage | None = None
    metrics: ResponseMetrics | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(_Answer):
    """One served model name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int


class ModelList(_Answer):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
