"""The HTTP API: OpenAI's /v1/models, /v1/chat/completions and /v1/completions, vLLM's two adapter routes."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tuneward_serving.engine import errors
from tuneward_serving.engine.errors import INTERNAL, ApiError
from tuneward_serving.engine.generation import Piece
from tuneward_serving.engine.metrics import CountRequests
from tuneward_serving.engine.responses import (
    Answer,
    Head,
    Json,
    Words,
    chat_logprobs,
    completion_logprobs,
    new_head,
    prompt_logprobs,
    usage,
)
from tuneward_serving.engine.schemas import ChatBody, CompletionBody, LoadBody, UnloadBody
from tuneward_serving.engine.service import Service


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="Tuneward embedded engine", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    errors.install(app)
    app.include_router(open_routes)
    app.include_router(guarded_routes)
    app.add_middleware(CountRequests, metrics=service.metrics)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _authorized(request: Request) -> None:
    key = _service(request).settings.api_key
    if key is None:
        return
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secrets.compare_digest(token.encode(), key.encode()):
        raise ApiError("the API key is missing or wrong; send it as Authorization: Bearer KEY", status=401)


def _from_this_pod(request: Request) -> None:
    """Clients share the engine's address and key with the agent; only the agent shares its network."""
    client = request.client.host if request.client is not None else ""
    own = request.scope.get("server") or ("", 0)
    if client != own[0] and not ip_address(client).is_loopback:
        raise ApiError("adapters are loaded by the agent beside the engine alone; make a FineTunedModel", status=403)


open_routes = APIRouter()
guarded_routes = APIRouter(prefix="/v1", dependencies=[Depends(_authorized)])
TheService = Annotated[Service, Depends(_service)]


@open_routes.get("/health")
async def health(service: TheService) -> Response:
    service.ready()
    return Response()


@open_routes.get("/metrics")
async def metrics(service: TheService) -> Response:
    found = service.metrics
    found.adapters.set(len(service.adapters))
    if service.model is not None:
        found.running.set(service.model[1].running)
        found.waiting.set(service.model[1].waiting)
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


@guarded_routes.get("/models")
async def models(service: TheService) -> Json:
    runner, _ = service.ready()
    base = service.settings.base_name
    facts: Json = {"max_model_len": runner.max_length, "dtype": runner.dtype}
    cards: list[Json] = [
        {"id": base, "created": service.started, "root": base, "parent": None} | facts,
        *(
            {"id": adapter.name, "created": adapter.created, "root": adapter.path, "parent": base}
            for adapter in service.adapters.values()
            if adapter.slot is not None
        ),
    ]
    return {"object": "list", "data": [{"object": "model", "owned_by": "tuneward", **card} for card in cards]}


@guarded_routes.post("/load_lora_adapter", dependencies=[Depends(_from_this_pod)])
async def load_lora_adapter(body: LoadBody, service: TheService) -> PlainTextResponse:
    await service.load(body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@guarded_routes.post("/unload_lora_adapter", dependencies=[Depends(_from_this_pod)])
async def unload_lora_adapter(body: UnloadBody, service: TheService) -> PlainTextResponse:
    service.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@guarded_routes.post("/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: TheService) -> Response:
    service.slot_of(body.model)
    prompts = service.prompts(body)
    if body.stream:
        head = new_head("chatcmpl", "chat.completion.chunk", body.model)
        return _stream(service, body, prompts, request, head, _chat_chunks(service))
    answers = await _gather(service, body, prompts, request)
    words = Words(service.ready()[0].tokenizer)
    head = new_head("chatcmpl", "chat.completion", body.model)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answers[0].text},
        "logprobs": chat_logprobs(answers[0].scored, words) if body.logprobs else None,
        "finish_reason": answers[0].finish,
    }
    more = {"prompt_logprobs": prompt_logprobs(answers[0].prompt, words)} if answers[0].prompt is not None else {}
    return JSONResponse(head.body([choice], usage=_usage(prompts, answers), **more))


@guarded_routes.post("/completions")
async def completions(body: CompletionBody, request: Request, service: TheService) -> Response:
    service.slot_of(body.model)
    prompts = service.prompts(body)
    head = new_head("cmpl", "text_completion", body.model)
    if body.stream:
        return _stream(service, body, prompts, request, head, _completion_chunks(service, body))
    answers = await _gather(service, body, prompts, request)
    choices = [
        _completion_choice(service, body, index, prompt, answer)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return JSONResponse(head.body(choices, usage=_usage(prompts, answers)))


def _completion_choice(service: Service, body: CompletionBody, index: int, prompt: list[int], answer: Answer) -> Json:
    tokenizer = service.ready()[0].tokenizer
    words = Words(tokenizer)
    choice: Json = {"index": index, "text": answer.text, "logprobs": None, "finish_reason": answer.finish}
    if body.echo:
        choice["text"] = tokenizer.decode(prompt, skip_special_tokens=True) + answer.text
    if body.logprobs is not None:
        choice["logprobs"] = completion_logprobs(
            answer.scored, words, echoed=prompt if body.echo else (), prompt=answer.prompt or ()
        )
    if body.prompt_logprobs is not None and answer.prompt is not None:
        choice["prompt_logprobs"] = prompt_logprobs(answer.prompt, words)
    return choice


def _usage(prompts: list[list[int]], answers: list[Answer]) -> Json:
    return usage(sum(map(len, prompts)), sum(answer.tokens for answer in answers))


async def _gather(
    service: Service, body: ChatBody | CompletionBody, prompts: list[list[int]], request: Request
) -> list[Answer]:
    answers = [Answer() for _ in prompts]
    async with service.texts(body, prompts, request) as pieces:
        async for index, piece in pieces:
            answers[index].add(piece)
    return answers


Chunk = Callable[[int, Piece, bool], Json]
"""(index of the text, piece, whether it is the text's first) -> a choice."""


def _chat_chunks(service: Service) -> Chunk:
    words = Words(service.ready()[0].tokenizer)

    def chunk(index: int, piece: Piece, first: bool) -> Json:
        delta = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
        scored = chat_logprobs([piece.scored], words) if piece.scored else None
        return {"index": index, "delta": delta, "logprobs": scored, "finish_reason": piece.finish}

    return chunk


def _completion_chunks(service: Service, body: CompletionBody) -> Chunk:
    tokenizer = service.ready()[0].tokenizer
    words = Words(tokenizer)
    prompts = service.prompts(body)

    def chunk(index: int, piece: Piece, first: bool) -> Json:
        echoed = tokenizer.decode(prompts[index], skip_special_tokens=True) if first and body.echo else ""
        scored = completion_logprobs([piece.scored], words) if piece.scored else None
        return {"index": index, "text": echoed + piece.text, "logprobs": scored, "finish_reason": piece.finish}

    return chunk


def _stream(
    service: Service,
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    request: Request,
    head: Head,
    chunk: Chunk,
) -> StreamingResponse:
    if body.prompt_logprobs is not None:
        raise ApiError("prompt_logprobs do not come in a stream; leave stream out", param="prompt_logprobs")
    events = _events(service, body, prompts, request, head, chunk)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _events(
    service: Service,
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    request: Request,
    head: Head,
    chunk: Chunk,
) -> AsyncIterator[str]:
    """Server-sent events. The answer has begun, so an error can only be an event."""
    seen: set[int] = set()
    tokens = 0
    try:
        async with service.texts(body, prompts, request) as pieces:
            async for index, piece in pieces:
                tokens += 1
                if piece.text or piece.scored or piece.finish or index not in seen:
                    yield _event(head.body([chunk(index, piece, index not in seen)]))
                seen.add(index)
    except ApiError as error:
        yield _event(error.body())
        return
    except Exception:
        yield _event(ApiError(INTERNAL, status=500).body())
        raise
    if body.wants_usage():
        yield _event(head.body([], usage=usage(sum(map(len, prompts)), tokens)))
    yield "data: [DONE]\n\n"


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
