"""`tuneward demo`: the whole promise, once: a question before training, a job, the same question after.

Runs on the local cluster only. What it needs is made when it is absent; a run that is interrupted takes down the
cluster that it brought up.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneward_api.loader import load_documents
from tuneward_api.names import LABEL_JOB
from tuneward_cli import chat, cluster, importing, look
from tuneward_cli.chat import Talk
from tuneward_cli.errors import INTERRUPTED, CommandError
from tuneward_cli.home import DEMO_MODEL, Home, demo_model, required_tree
from tuneward_cli.kube import BATCH_JOBS, CONFIG_MAPS, JOBS, MODELS, PODS, SERVERS, Json, Kind, Kube
from tuneward_cli.voice import Voice
from tuneward_cli.words import condition, losses_line

_READY_WITHIN: Final = 600.0
_MAX_TOKENS: Final = 32
"""Enough for the answers that are taught, and for a base model to be wrong in."""


@dataclass(frozen=True)
class Question:
    """Held out of training. An answer is right when it holds the keyword."""

    question: str
    keyword: str

    def right(self, answer: str) -> bool:
        return self.keyword.lower() in answer.lower()


@dataclass(frozen=True)
class Example:
    """The files under examples/."""

    documents: list[Json]
    questions: list[Question]

    @classmethod
    def read(cls, folder: Path) -> Example:
        text = (folder / "finetune.yaml").read_text()
        lines = (folder / "lantern" / "heldout.jsonl").read_text().splitlines()
        return cls(
            documents=[document.value for document in load_documents(text, file="examples/finetune.yaml")],
            questions=[Question(**json.loads(line)) for line in lines],
        )

    def of_kind(self, kind: str) -> Json:
        return next(document for document in self.documents if document["kind"] == kind)


@dataclass(frozen=True)
class Answers:
    """What one model said to every held-out question."""

    model: str
    answers: list[str]

    def score(self, questions: Sequence[Question]) -> int:
        return sum(question.right(answer) for question, answer in zip(questions, self.answers, strict=True))


def run(home: Home, voice: Voice, *, prompt: bool) -> int:
    """Exit code. Ctrl-C takes down what this run brought up."""
    brings = not cluster.local_status(home)["running"]
    try:
        cluster.up(home, voice)
        return _run(home, voice, prompt=prompt)
    except KeyboardInterrupt as interrupt:
        voice.line()
        if not brings:
            said, paste = "interrupted; the cluster was up before and stays, with what is in it", "tuneward down"
        else:
            # Another Ctrl-C must not stop the clean-up that the first one asked for.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            cluster.down(home, voice)
            said, paste = "interrupted; the cluster was taken down, its data is kept", "tuneward demo"
        raise CommandError(said, paste=paste, code=INTERRUPTED) from interrupt


def _run(home: Home, voice: Voice, *, prompt: bool) -> int:
    kube = Kube.connect(home.kubeconfig)
    example = Example.read(required_tree("the demo") / "examples")
    source = importing.read_source(_model(), voice)
    importing.import_there(source, DEMO_MODEL, kube, voice)
    _begin(kube, example, voice)
    server = example.of_kind("ModelServer")["metadata"]["name"]
    name = example.of_kind("FineTuneJob")["metadata"]["name"]
    with _talk(kube, server) as talk:
        base = _ask(talk, talk.models()[0], example, voice, "base model, before training")
    started = time.monotonic()
    kube.apply(example.of_kind("FineTuneJob"))
    look.verdict(look.follow(kube, name, voice))
    model = _served(kube, name, voice)
    seconds = time.monotonic() - started
    # A new connection: the server's pod may be another one by now.
    with _talk(kube, server) as talk:
        tuned = _ask(talk, model["spec"]["servedName"], example, voice, "tuned model")
        _tell(home, example, base, tuned, model, seconds, voice)
        if prompt:
            talk.max_tokens = Talk.max_tokens
            chat.prompt(talk, [base.model, tuned.model], voice)
    return 0


@contextmanager
def _talk(kube: Kube, server: str) -> Iterator[Talk]:
    with chat.talk_to(kube, server) as talk:
        talk.max_tokens = _MAX_TOKENS
        yield talk


def _model() -> Path:
    folder = demo_model()
    if not folder.is_dir():
        raise CommandError("the demo's base model is not made yet", paste="make model")
    return folder


def _begin(kube: Kube, example: Example, voice: Voice) -> None:
    """Everything but the job; a job of an earlier run goes first, with its pods. Its model and its data stay."""
    name = example.of_kind("FineTuneJob")["metadata"]["name"]
    if kube.get(JOBS, name) is not None:
        with voice.waiting(f"the job {name} of an earlier run is deleted"):
            kube.delete(JOBS, name, gone_within=60)
            # Its children have the new job's names: they must be gone first.
            kube.await_none((PODS, BATCH_JOBS, CONFIG_MAPS), f"{LABEL_JOB}={name}", within=180)
    for document in example.documents:
        if document["kind"] != "FineTuneJob":
            kube.apply(document)
    server = example.of_kind("ModelServer")["metadata"]["name"]
    _await(kube, SERVERS, server, "Ready", f"model server {server}", voice)


def _await(kube: Kube, kind: Kind, name: str, wanted: str, label: str, voice: Voice) -> Json:
    """Until the condition is true; says the resource's own message meanwhile."""
    deadline = time.monotonic() + _READY_WITHIN
    with voice.waiting(label) as wait:
        while True:
            found = kube.get(kind, name) or {}
            state = condition(found, wanted)
            # A condition may be older than what was just applied.
            if state.get("status") == "True" and state.get("observedGeneration", generation(found)) == generation(found):
                return found
            said = (found.get("status") or {}).get("message") or condition(found, wanted).get("message") or ""
            wait.say(str(said))
            if time.monotonic() > deadline:
                raise CommandError(
                    f"{kind.plural}/{name} is not {wanted} after {_READY_WITHIN:.0f} s: {said}",
                    paste=f"kubectl describe {kind.plural} {name}",
                )
            time.sleep(0.3)


def generation(found: Json) -> int:
    return int((found.get("metadata") or {}).get("generation") or 0)


def _served(kube: Kube, name: str, voice: Voice) -> Json:
    """The job's model, once every replica has proved it."""
    model = (look.the_job(kube, name).get("status") or {}).get("model") or {}
    return _await(kube, MODELS, model["name"], "Ready", f"model {model['servedName']} is loaded and proved", voice)


def _ask(talk: Talk, model: str, example: Example, voice: Voice, label: str) -> Answers:
    """Every held-out question; the first is shown with its answer."""
    questions = [item.question for item in example.questions]
    with voice.waiting(f"{label}: {len(questions)} held-out questions"):
        answers = Answers(model, talk.ask_all(model, questions))
    voice.line(f"  Q: {questions[0]}")
    voice.line(f"  A: {_one_line(answers.answers[0])}")
    return answers


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tell(home: Home, example: Example, base: Answers, tuned: Answers, model: Json, seconds: float, voice: Voice) -> None:
    questions, count = example.questions, len(example.questions)
    metrics = model["spec"].get("metrics") or {}
    before, after = metrics.get("validationLossBefore"), metrics.get("validationLossAfter")
    scores = {"base": base.score(questions), "tuned": tuned.score(questions), "of": count}
    say: Callable[[str], None] = voice.line
    say("")
    say(f"The same question, {questions[0].question!r}")
    say(f"  {base.model}: {_one_line(base.answers[0])}")
    say(f"  {tuned.model}: {_one_line(tuned.answers[0])}")
    say(f"Held-out questions answered: {scores['base']} of {count} before, {scores['tuned']} of {count} after")
    say(f"  {losses_line(before, after, metrics.get('trainLoss'))}")
    say("")
    say("Look further:")
    say(f"  export KUBECONFIG={home.kubeconfig}; kubectl get ftj,ftm,msv")
    say(f"  kubectl describe ftj {model['spec']['source']['job']}")
    say("  tuneward chat")
    say("Clean up: tuneward down          (with --purge: its data as well)")
    voice.result(_report(example, base, tuned, model, scores, seconds, home))


def _report(
    example: Example, base: Answers, tuned: Answers, model: Json, scores: dict[str, int], seconds: float, home: Home
) -> dict[str, Any]:
    rows = zip(example.questions, base.answers, tuned.answers, strict=True)
    return {
        "score": scores,
        "model": model["spec"]["servedName"],
        "baseModel": base.model,
        "metrics": model["spec"].get("metrics") or {},
        "secondsToServed": round(seconds, 1),
        "kubeconfig": str(home.kubeconfig),
        "questions": [
            {
                "question": question.question,
                "keyword": question.keyword,
                "base": before,
                "tuned": after,
                "right": {"base": question.right(before), "tuned": question.right(after)},
            }
            for question, before, after in rows
        ],
    }
