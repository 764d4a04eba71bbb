"""The engine as the agent sees it: vLLM's HTTP API, which the embedded engine has too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


class EngineGone(Exception):  # noqa: N818 - a state, not a mishap
    """The engine does not answer, or says that it is not ready."""


class EngineRefused(Exception):  # noqa: N818 - its word, not a mishap
    """The engine answered with an error; the text is its sentence."""


@dataclass(frozen=True)
class Served:
    """What the engine serves: its base model's name, and adapters with the folder each came from. `dtype`: what it computes
    in; empty: it does not say, as vLLM does not."""

    base: str
    adapters: dict[str, str] = field(default_factory=dict)
    dtype: str = ""


class EngineClient:
    """`timeout` bounds every call, loading and proving too: an engine that hangs must not hang the agent."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 120) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy of the environment must not stand between two containers of one pod.
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=httpx.Timeout(timeout, connect=5), trust_env=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def served(self) -> Served:
        cards = (await self._call("GET", "/v1/models"))["data"]
        base = next((card for card in cards if not card.get("parent")), None)
        if base is None:
            raise EngineGone("the engine serves no base model")
        adapters = {str(card["id"]): str(card["root"]) for card in cards if card.get("parent")}
        return Served(str(base["id"]), adapters, str(base.get("dtype") or ""))

    async def load(self, name: str, path: str) -> None:
        await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, name: str) -> None:
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def logprobs(self, model: str, ids: Sequence[int]) -> list[float]:
        """log p(ids[i + 1] | ids[: i + 1]) for each i. Raises EngineRefused when one is missing."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await self._call("POST", "/v1/completions", body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"][1:]
            return [_number(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], entries, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineRefused(f"the engine gave no prompt_logprobs for {model}: {error!r}") from error

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer; None when it is no JSON, as a success of loading is."""
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineGone(f"the engine does not answer: {error!r}") from error
        if response.status_code == 503:
            raise EngineGone("the engine is not ready yet")
        if response.is_error:
            raise EngineRefused(_sentence(response))
        return response.json() if "json" in response.headers.get("content-type", "") else None


def _number(value: Any) -> float:
    """JSON has no NaN; engines write null."""
    return math.nan if value is None else float(value)


def _sentence(response: httpx.Response) -> str:
    """OpenAI's shape, vLLM's older one, or what there is."""
    try:
        body = response.json()
        message = body["error"]["message"] if "error" in body else body["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text or f"HTTP {response.status_code}"
    return str(message)[:500]
