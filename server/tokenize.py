"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.completions import encode_prompts
from server.conversation import LONG_TEXT, encode_conversation, template_kwargs
from server.errors import invalid
from server.fields import refuse_unsupported
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.services import Services


def tokenize_routes(services: Services) -> APIRouter:
    """The routes, bound to their services."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation with the beginning of its answer."""
        _check_fields(services, body)
        ids = await _encode(services, body)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": services.engine.info.max_model_len, "tokens": ids}
        answer["token_strs"] = services.tokenizer.token_strings(ids) if body.return_token_strs else None
        return JSONResponse(answer)

    @router.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        _check_fields(services, body)
        return JSONResponse({"prompt": await _decode(services, body.tokens)})

    return router


def _check_fields(services: Services, body: TokenizeRequest | DetokenizeRequest) -> None:
    services.resolve_model(body.model)
    refuse_unsupported(body.extra, 1)
    services.unknown_fields.note(body.extra)


async def _encode(services: Services, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    if body.messages is not None:
        return await encode_conversation(
            services,
            body.messages,
            template_kwargs(body),
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
    text = body.prompt or ""
    return (await encode_prompts(services.tokenizer, [text], add_special_tokens=body.add_special_tokens is not False))[0]


async def _decode(services: Services, token_ids: list[int]) -> str:
    size = services.engine.info.vocab_size
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
        raise invalid(f"tokens must be from 0 to {size - 1}", "tokens")
    if len(token_ids) < LONG_TEXT:
        return services.tokenizer.decode(token_ids, skip_special_tokens=False)
    return await asyncio.to_thread(services.tokenizer.decode, token_ids, skip_special_tokens=False)
