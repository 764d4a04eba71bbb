"""`tuneward chat`: the same question to every served model, answers side by side.

Each question stands alone: what one model said must not colour what another is asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from tuneward_cli import local_engine
from tuneward_cli.errors import USAGE, CommandError
from tuneward_cli.kube import Kube
from tuneward_cli.reach import api_key, base_url, ready_pod, the_server
from tuneward_cli.voice import Voice

CHAT: Final = "/v1/chat/completions"


@dataclass
class Talk:
    """A connection to one engine."""

    url: str
    key: str = ""
    max_tokens: int = 128
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=900, trust_env=False))

    def models(self) -> list[str]:
        """Base model first, as the engine lists them."""
        found = self._call("GET", "/v1/models")["data"]
        return [str(item["id"]) for item in found]

    def ask(self, model: str, question: str) -> str:
        choices = self._call("POST", CHAT, self._question(model, question))["choices"]
        return str(choices[0]["message"]["content"]).strip()

    def pieces(self, model: str, question: str) -> Iterator[str]:
        """The answer as it is made."""
        body = {**self._question(model, question), "stream": True}
        with self._reached(), self.client.stream("POST", self.url + CHAT, json=body, headers=self._headers()) as answer:
            if answer.is_error:
                answer.read()
                raise _refused(_message(answer))
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise _refused(str(event["error"]["message"]))
                    yield str(event["choices"][0]["delta"].get("content") or "") if event["choices"] else ""

    def _question(self, model: str, question: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def ask_all(self, model: str, questions: Sequence[str]) -> list[str]:
        """At once: the engine answers several in one batch."""
        with ThreadPoolExecutor(max_workers=max(1, len(questions))) as pool:
            return list(pool.map(lambda question: self.ask(model, question), questions))

    def ask_each(self, models: Sequence[str], question: str) -> dict[str, str]:
        with ThreadPoolExecutor(max_workers=max(1, len(models))) as pool:
            return dict(zip(models, pool.map(lambda model: self.ask(model, question), models), strict=True))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        with self._reached():
            answer = self.client.request(method, self.url + path, json=body, headers=self._headers())
        if answer.is_error:
            raise _refused(_message(answer))
        return answer.json()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise CommandError(f"the engine at {self.url} gives no answer ({error})", paste="tuneward status") from error


def _refused(message: str) -> CommandError:
    return CommandError(f"the engine refused: {message}", paste="kubectl get ftm,msv")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:300]}"


@contextmanager
def talk_to(kube: Kube, server: str | None) -> Iterator[Talk]:
    """The engine of a ModelServer's ready replica."""
    found = the_server(kube, server)
    pod = ready_pod(kube, found["metadata"]["name"])
    with base_url(kube, pod) as url:
        talk = Talk(url, api_key(kube, found))
        with talk.client:
            yield talk


def chat_there(kube: Kube, server: str | None, models: Sequence[str], question: str | None, voice: Voice) -> int:
    """On a cluster."""
    with talk_to(kube, server) as talk:
        return converse(talk, models, question, voice)


def chat_here(store: Path, models: Sequence[str], question: str | None, voice: Voice) -> int:
    """With what `tuneward train` left in a store: an engine of this machine, for as long as the talk lasts."""
    with local_engine.running(store, voice) as url:
        talk = Talk(url)
        with talk.client:
            return converse(talk, models, question, voice)


def converse(talk: Talk, models: Sequence[str], question: str | None, voice: Voice) -> int:
    chosen = _chosen(talk.models(), models)
    if question is None and not voice.terminal:
        raise CommandError("there is no terminal to ask at", paste='tuneward chat --ask "..."', code=USAGE)
    if question is None:
        prompt(talk, chosen, voice)
        return 0
    answers = talk.ask_each(chosen, question)
    show(answers, voice)
    voice.result({"question": question, "answers": answers})
    return 0


def _chosen(known: Sequence[str], asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in known:
            raise CommandError(
                f"{name} is not served; served are {', '.join(known)}", paste=f"tuneward chat --model {known[0]}"
            )
    return list(asked) or list(known)


def show(answers: dict[str, str], voice: Voice) -> None:
    """A column a model on a terminal, a paragraph a model elsewhere."""
    if voice.json:
        return
    if not voice.terminal or len(answers) == 1:
        for model, answer in answers.items():
            voice.line(f"{model}: {answer}")
        return
    voice.console.print(_columns(answers))


def _columns(answers: dict[str, str]) -> Table:
    table = Table(*(Column(Text(model)) for model in answers), expand=True, show_lines=True)
    table.add_row(*(Text(answer) for answer in answers.values()))
    return table


def show_live(talk: Talk, models: Sequence[str], question: str, voice: Voice) -> None:
    """The answers side by side while they are made. Ctrl-C ends them."""
    answers, ended = dict.fromkeys(models, ""), threading.Event()

    def listen(model: str) -> None:
        for piece in talk.pieces(model, question):
            answers[model] = (answers[model] + piece).lstrip()
            if ended.is_set():
                return

    with Live(console=voice.console, vertical_overflow="visible") as live, ThreadPoolExecutor(len(models)) as pool:
        listeners = [pool.submit(listen, model) for model in models]
        try:
            while wait(listeners, timeout=0.1).not_done:
                live.update(_columns(answers))
        finally:
            ended.set()
            live.update(_columns(answers))
    for listener in listeners:
        listener.result()


def prompt(talk: Talk, models: Sequence[str], voice: Voice) -> None:
    """Until an empty line, Ctrl-D or Ctrl-C."""
    voice.line(f"Ask {' and '.join(models)}; each question stands alone; an empty line ends.")
    while True:
        try:
            question = voice.console.input("> ").strip()
            if not question:
                return
            show_live(talk, models, question, voice)
        except (EOFError, KeyboardInterrupt):
            voice.line()
            return
