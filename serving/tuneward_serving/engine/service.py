"""What the routes share: the model when it is there, the adapters by name, and how a request becomes texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING

from starlette.requests import Request

from tuneward_serving.engine.errors import ApiError
from tuneward_serving.engine.generation import BASE, Generation, Piece, Sampling
from tuneward_serving.engine.metrics import Metrics
from tuneward_serving.engine.schemas import ChatBody, CompletionBody
from tuneward_serving.engine.text import TextStream

if TYPE_CHECKING:
    # Both import torch, which takes seconds: HTTP answers before.
    from tuneward_serving.engine.batch import Batcher
    from tuneward_serving.engine.runner import Runner


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`base_name`: what clients call the base model."""

    base_name: str
    max_adapters: int
    max_rank: int
    api_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """`slot` is None while it loads."""

    name: str
    path: str
    slot: str | None
    created: int


@dataclass
class Service:
    """`model` is None until the weights are in memory."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    model: tuple[Runner, Batcher] | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    started: int = field(default_factory=lambda: int(time()))
    _slots: count[int] = field(default_factory=lambda: count(1))

    def ready(self) -> tuple[Runner, Batcher]:
        if self.model is None:
            raise ApiError("the model is being loaded; ask again in a few seconds", status=503)
        return self.model

    def slot_of(self, name: str) -> str:
        if name == self.settings.base_name:
            return BASE
        adapter = self.adapters.get(name)
        if adapter is None or adapter.slot is None:
            known = ", ".join([self.settings.base_name, *sorted(self.adapters)][:8])
            raise ApiError(
                f"model {name!r} is not served here; these are: {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return adapter.slot

    async def load(self, name: str, path: str) -> None:
        """Two requests for the same name at once: the second is refused."""
        runner, batcher = self.ready()
        if name == self.settings.base_name or name in self.adapters:
            raise ApiError(f"the name {name!r} is taken; unload it first", param="lora_name")
        if len(self.adapters) >= self.settings.max_adapters:
            raise ApiError(f"{len(self.adapters)} adapters are loaded, --max-adapters allows no more")
        _check_folder(Path(path), self.settings.max_rank)
        slot = f"a{next(self._slots)}"
        self.adapters[name] = Adapter(name=name, path=path, slot=None, created=int(time()))
        try:
            await asyncio.wrap_future(batcher.call(lambda: runner.load(slot, Path(path))))
        except BaseException:
            del self.adapters[name]
            raise
        self.adapters[name] = Adapter(name=name, path=path, slot=slot, created=int(time()))

    def unload(self, name: str) -> None:
        _, batcher = self.ready()
        adapter = self.adapters.get(name)
        if adapter is None or adapter.slot is None:
            raise ApiError(f"the adapter {name!r} is not loaded", status=404, param="lora_name")
        del self.adapters[name]
        batcher.retire(adapter.slot)

    def prompts(self, body: ChatBody | CompletionBody) -> list[list[int]]:
        """Token ids, one list for each text that is asked for."""
        runner, _ = self.ready()
        if isinstance(body, ChatBody):
            prompts = [runner.tokenizer.chat([{"role": one.role, "content": one.text()} for one in body.messages])]
        else:
            prompts = [
                runner.tokenizer.prompt(prompt) if isinstance(prompt, str) else list(prompt) for prompt in _each_prompt(body)
            ]
        for prompt in prompts or [[]]:
            _check_prompt(prompt, runner)
        return prompts

    @asynccontextmanager
    async def texts(
        self, body: ChatBody | CompletionBody, prompts: Sequence[list[int]], request: Request
    ) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
        """Starts the texts and yields (index, piece) as they come; leaving ends those that are not finished."""
        runner, batcher = self.ready()
        slot = self.slot_of(body.model)
        arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(index: int, piece: Piece | Exception) -> None:
            # The loop is closed when the server ends before its texts: then nobody listens.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.put_nowait, (index, piece))

        works = [
            Generation(
                prompt=prompt,
                slot=slot,
                sampling=_sampling(body, len(prompt), runner.max_length),
                stream=TextStream(runner.tokenizer, prompt, body.stops()),
                emit=lambda piece, index=index: emit(index, piece),  # type: ignore[misc]
                end_tokens=runner.end_tokens,
            )
            for index, prompt in enumerate(prompts)
        ]
        watcher = asyncio.create_task(_cancel_when_gone(request, works))
        try:
            for work in works:
                batcher.submit(work)
            yield self._pieces(arrived, works)
        finally:
            watcher.cancel()
            _cancel(works)

    async def _pieces(
        self, arrived: asyncio.Queue[tuple[int, Piece | Exception]], works: Sequence[Generation]
    ) -> AsyncIterator[tuple[int, Piece]]:
        begun, open_texts = monotonic(), len(works)
        self.metrics.prompt_tokens.inc(sum(len(work.prompt) for work in works))
        first = True
        while open_texts:
            index, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if first:
                self.metrics.first_token.observe(monotonic() - begun)
                first = False
            self.metrics.generated_tokens.inc()
            open_texts -= piece.finish is not None
            yield index, piece


async def _cancel_when_gone(request: Request, works: Sequence[Generation]) -> None:
    """After the body, ASGI's next message is that the client went away. Then nobody waits on the queue either."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _cancel(works)
    for work in works:
        work.emit(ApiError("the client went away", status=499))


def _cancel(works: Sequence[Generation]) -> None:
    for work in works:
        work.cancelled = True


def _check_folder(folder: Path, max_rank: int) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ApiError(f"{folder} holds no {name}", param="lora_path")
    try:
        rank = json.loads((folder / "adapter_config.json").read_bytes())["r"]
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(f"{folder}/adapter_config.json is not a LoRA's: {error!r}", param="lora_path") from error
    if not isinstance(rank, int) or rank > max_rank:
        raise ApiError(f"the adapter's rank {rank} exceeds --max-rank {max_rank}", param="lora_path")


def _each_prompt(body: CompletionBody) -> Sequence[str | Sequence[int]]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    tokens = [item for item in body.prompt if isinstance(item, int)]
    return [tokens] if tokens else [item for item in body.prompt if not isinstance(item, int)]


def _check_prompt(prompt: Sequence[int], runner: Runner) -> None:
    if not prompt:
        raise ApiError("the prompt is empty", param="prompt")
    if max(prompt) >= runner.vocabulary:
        raise ApiError(
            f"the prompt holds token {max(prompt)}; the model has tokens 0 to {runner.vocabulary - 1}", param="prompt"
        )
    if len(prompt) >= runner.max_length:
        raise ApiError(
            f"the prompt has {len(prompt)} tokens; prompt and answer together have room for {runner.max_length}",
            code="context_length_exceeded",
        )


def _sampling(body: ChatBody | CompletionBody, prompt: int, max_length: int) -> Sampling:
    room = max_length - prompt
    if isinstance(body, ChatBody):
        asked = body.max_completion_tokens or body.max_tokens or room
        top = (body.top_logprobs or 0) if body.logprobs else None
        prompt_top = body.prompt_logprobs
    else:
        asked = body.max_tokens or 16
        top = body.logprobs
        prompt_top = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        max_tokens=min(asked, room),
        stops=body.stops(),
        ignore_end=bool(body.ignore_eos),
        top=top,
        prompt_top=prompt_top,
    )
