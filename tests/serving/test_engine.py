"""The embedded engine as its clients meet it: a process, and OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam
from tests.serving.conftest import KEY
from tests.serving.processes import Engine
from tests.serving.tiny import TEXTS, Reference
from tests.support.wait import wait_for
from transformers import AutoTokenizer

from tuneward_api.files import WantedAdapter
from tuneward_serving.agent.engine_client import EngineClient, Served
from tuneward_serving.engine.routes import create_app
from tuneward_serving.engine.service import Service, Settings

BASE = "tiny-1.0"
PROMPT = list(range(60, 92))


@pytest.fixture(scope="module")
def reference(base_model: Path) -> Reference:
    return Reference(base_model)


@pytest.fixture
def loaded(
    engine: Engine, adapters: Path, good: WantedAdapter, other: WantedAdapter, dora: WantedAdapter
) -> Iterator[dict[str, Path]]:
    """Name -> folder of three adapters that the engine holds; one is a DoRA."""
    found = {wanted.name: adapters / wanted.path / "adapter" for wanted in (good, other, dora)}
    for name, folder in found.items():
        assert engine.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}).is_success
    yield found
    for name in found:
        assert engine.post("/v1/unload_lora_adapter", {"lora_name": name}).is_success


def test_prompt_logprobs_are_those_of_a_plain_forward(engine: Engine, reference: Reference, loaded: dict[str, Path]) -> None:
    for ids in (*TEXTS, [7 * i % 250 for i in range(300)]):
        assert engine.logprobs(BASE, ids) == pytest.approx(reference.logprobs(ids), abs=1e-4)
        for name, folder in loaded.items():
            assert engine.logprobs(name, ids) == pytest.approx(reference.logprobs(ids, folder), abs=1e-4)


def test_the_agent_is_told_what_the_engine_computes_in(engine: Engine) -> None:
    async def ask() -> Served:
        client = EngineClient(engine.url, api_key=KEY)
        try:
            return await client.served()
        finally:
            await client.close()

    assert asyncio.run(ask()) == Served(BASE, {}, "float32")


def test_texts_of_different_adapters_share_a_batch_and_stay_apart(
    engine: Engine, reference: Reference, loaded: dict[str, Path]
) -> None:
    """Prompts and answers of different lengths, begun at once: rows join and leave in the middle of others."""
    asked = [(name, PROMPT[:length], count) for name in (BASE, *loaded) for length, count in ((3, 18), (31, 6), (17, 11))]

    def ask(name: str, prompt: list[int], count: int) -> str:
        body = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        text: str = engine.post("/v1/completions", body).json()["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(lambda one: ask(*one), asked))
    decode = partial(AutoTokenizer.from_pretrained(reference.model).decode, skip_special_tokens=True)
    for text, (name, prompt, count) in zip(texts, asked, strict=True):
        made = reference.continue_greedily(prompt, count, loaded.get(name))
        assert text == decode([*prompt, *made])[len(decode(prompt)) :], (name, prompt, count)


def test_chat_streams_the_same_text_that_it_gives_whole(engine: Engine) -> None:
    messages = [ChatCompletionUserMessageParam(role="user", content="Grüezi")]
    whole = engine.client.chat.completions.create(
        model=BASE, messages=messages, temperature=0, max_completion_tokens=15, logprobs=True, top_logprobs=2
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 15
    assert whole.usage.prompt_tokens == len("user:Grüezi".encode()) + len("assistant:") + 3
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens
    assert len((whole.choices[0].logprobs.content or [])[0].top_logprobs) == 2
    chunks = list(
        engine.client.chat.completions.create(
            model=BASE,
            messages=messages,
            temperature=0,
            max_tokens=15,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_seed_repeats_a_sampled_text_and_another_seed_does_not(engine: Engine) -> None:
    def sample(seed: int) -> str:
        made = engine.client.completions.create(model=BASE, prompt="a", seed=seed, max_tokens=12, top_p=0.95)
        return made.choices[0].text

    assert sample(1) == sample(1) != sample(2)


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = engine.client.completions.create(model=BASE, prompt="stop", temperature=0, max_tokens=20).choices[0].text
    stop = next(whole[i : i + 2] for i in range(5, len(whole)) if whole.index(whole[i : i + 2]) == i)
    cut = engine.client.completions.create(model=BASE, prompt="stop", temperature=0, max_tokens=20, stop=stop)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_echo_with_logprobs_gives_the_prompt_too(engine: Engine, reference: Reference) -> None:
    made = engine.client.completions.create(model=BASE, prompt="echo", echo=True, logprobs=0, max_tokens=2)
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert made.choices[0].text.startswith("echo")
    assert len(logprobs.tokens or []) == 6
    assert [p for p in logprobs.token_logprobs[1:4] if p is not None] == pytest.approx(
        reference.logprobs(tokens_of(reference, "echo")), abs=1e-4
    )


def tokens_of(reference: Reference, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(reference.model)(text)["input_ids"]
    return found


def test_an_adapter_that_is_unloaded_in_the_middle_of_a_text_lets_it_end(
    engine: Engine, adapters: Path, good: WantedAdapter
) -> None:
    load = {"lora_name": "leaving", "lora_path": str(adapters / good.path / "adapter")}
    engine.post("/v1/load_lora_adapter", load).raise_for_status()
    stream = engine.client.completions.create(
        model="leaving", prompt="x", max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    engine.post("/v1/unload_lora_adapter", {"lora_name": "leaving"}).raise_for_status()
    assert "leaving" not in engine.names()
    assert list(stream)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError, match=r"'leaving' is not served here; these are: tiny-1\.0"):
        engine.client.completions.create(model="leaving", prompt="x")


def test_a_client_that_goes_away_frees_its_place(engine: Engine) -> None:
    body = {"model": BASE, "prompt": "x", "max_tokens": 500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{engine.url}/v1/completions", json=body, headers=engine.key, timeout=0.05, trust_env=False)
    with httpx.stream(
        "POST", f"{engine.url}/v1/completions", json={**body, "stream": True}, headers=engine.key, trust_env=False
    ) as stream:
        next(stream.iter_lines())
    wait_for(lambda: "tuneward_engine_running_texts 0.0" in engine.get("/metrics").text, what="an empty batch")


BAD: list[tuple[str, object, int, str]] = [
    ("chat/completions", {"model": BASE, "messages": []}, 400, "messages is []; must"),
    ("chat/completions", {"model": BASE}, 400, "messages is missing"),
    (
        "chat/completions",
        {"model": BASE, "messages": [{"role": "wizard", "content": "x"}]},
        400,
        "the model's chat template refuses these messages: roles are system, user and assistant",
    ),
    ("chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404, "is not served here"),
    (
        "chat/completions",
        {"model": BASE, "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        400,
        "is not supported by the embedded engine; leave it out",
    ),
    ("completions", {"model": BASE, "prompt": "x", "temperature": 3}, 400, "temperature is 3; must be less than"),
    ("completions", {"model": BASE, "prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0; must be greater than"),
    ("completions", {"model": BASE, "prompt": "x", "top_p": 0}, 400, "top_p is 0; must be greater than 0"),
    ("completions", {"model": BASE, "prompt": "x", "n": 2}, 400, "n is 2; this is not supported"),
    ("completions", {"model": BASE, "prompt": []}, 400, "the prompt is empty"),
    ("completions", {"model": BASE, "prompt": [1, 2**40]}, 400, "the prompt holds token 1099511627776"),
    ("completions", {"model": BASE, "prompt": [1, -1]}, 400, "prompt[1] is -1; must be greater than or equal to 0"),
    ("completions", {"model": BASE, "prompt": [5] * 600}, 400, "have room for 512"),
    ("completions", "text", 400, "the body must be a JSON object"),
    ("nothing", {}, 404, "there is no /v1/nothing here"),
    ("models", {}, 405, "/v1/models does not take POST"),
    ("load_lora_adapter", {"lora_name": "x"}, 400, "lora_path is missing"),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}, 400, "/nowhere holds no adapter_config.json"),
    ("load_lora_adapter", {"lora_name": BASE, "lora_path": "/nowhere"}, 400, "the name 'tiny-1.0' is taken"),
    ("unload_lora_adapter", {"lora_name": "x"}, 404, "the adapter 'x' is not loaded"),
]


@pytest.mark.parametrize(("route", "body", "status", "sentence"), BAD)
def test_a_bad_request_gets_one_sentence_in_openais_shape(
    engine: Engine, route: str, body: object, status: int, sentence: str
) -> None:
    answer = engine.post(f"/v1/{route}", body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert sentence in error["message"]
    assert "\n" not in error["message"]


async def test_adapters_are_loaded_from_the_same_pod_alone() -> None:
    """In the process: this machine has no second address to come from."""
    app = create_app(Service(Settings(base_name="tiny", max_adapters=1, max_rank=8)))
    for host, status in (("10.0.0.9", 403), ("10.0.0.7", 503), ("127.0.0.1", 503)):
        transport = httpx.ASGITransport(app, client=(host, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.7:8000") as client:
            answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
        assert answer.status_code == status, answer.text


def test_no_route_of_v1_answers_without_the_key(engine: Engine) -> None:
    for method, path in (("GET", "models"), ("POST", "completions"), ("POST", "load_lora_adapter")):
        answer = httpx.request(method, f"{engine.url}/v1/{path}", json={}, trust_env=False)
        assert answer.status_code == 401
        assert answer.json()["error"]["message"].startswith("the API key is missing or wrong")
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert engine.get("/health").status_code == engine.get("/metrics").status_code == 200
