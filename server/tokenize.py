"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.chat import encode_conversation
from server.completions import encode_prompts
from server.errors import invalid
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.services import Services


def tokenize_routes(services: Services) -> APIRouter:
    """The routes, bound to their services."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation with the beginning of its answer."""
        ids = await _encode(services, body)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": services.engine.info.max_model_len, "tokens": ids}
        answer["token_strs"] = services.tokenizer.token_strings(ids) if body.return_token_strs else None
        return JSONResponse(answer)

    @router.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        size = services.engine.info.vocab_size
        if any(not 0 <= i < size for i in body.tokens):
            raise invalid(f"tokens must be from 0 to {size - 1}", "tokens")
        return JSONResponse({"prompt": services.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return router


async def _encode(services: Services, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (not body.messages):
        raise invalid("send either prompt or messages", "prompt")
    if body.messages:
        return await encode_conversation(services, body.messages, {})
    text = body.prompt or ""
    if body.add_special_tokens:
        return (await encode_prompts(services.tokenizer, [text]))[0]
    return services.tokenizer.encode(text, add_special_tokens=False)
