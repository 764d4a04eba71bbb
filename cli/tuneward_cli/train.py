"""The way of a job on a workstation, read from top to bottom: lay out, prepare, attempts, finish."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tuneward_api import curves, names
from tuneward_api.conditions import FailureClass, Phase
from tuneward_api.failures import Failure, hang
from tuneward_api.files import FinishedAdapter, FinishReport, Plan, Result
from tuneward_api.finetunejob import FineTuneJob, RunPolicy
from tuneward_api.names import ExitCode
from tuneward_cli import workstation
from tuneward_cli.documents import load_valid, the_job
from tuneward_cli.errors import CommandError
from tuneward_cli.finished import Finished
from tuneward_cli.gang import Gang, HangError, failure_of
from tuneward_cli.tries import Tries, budget
from tuneward_cli.voice import Bar, Voice
from tuneward_cli.words import (
    Seen,
    accuracy_line,
    chosen_line,
    losses_line,
    perplexity_line,
    phase_line,
    progress_line,
    score_line,
    stopping_line,
    tracker_line,
)
from tuneward_cli.workstation import Place


@dataclass(frozen=True)
class Options:
    """What `tuneward train` was asked for."""

    file: Path
    store: Path
    name: str | None = None
    claims: tuple[tuple[str, Path], ...] = ()
    restart: bool = False
    workers: int | None = None
    profile: str | None = None
    """FROM-TO: steps to keep a trace of."""


def train(options: Options, voice: Voice) -> int:
    """Exit code. Raises CommandError with a sentence for everything that ends without a model."""
    loaded = load_valid(options.file)
    job = workstation.with_workers(the_job(loaded, options.name), options.workers)
    place = workstation.place_of(job, options.store, {**loaded.claims, **dict(options.claims)})
    name = str(job.metadata["name"])
    for note in loaded.notes:
        voice.line(f"  {note}")
    for item in workstation.skipped(loaded, job):
        voice.line(f"  {item} is skipped: a workstation trains and serves nothing")
    tries = Tries(name, budget(job.spec.run_policy), voice)
    try:
        request = workstation.lay_out(place, loaded, job, restart=options.restart)
        plan = tries.until_done(lambda: workstation.prepare(place, request, voice))
        _attempts(place, plan, job, tries, {names.ENV_PROFILE: options.profile} if options.profile else {})
        report = _finish(place, plan, tries)
    except KeyboardInterrupt as stopped:
        raise CommandError(
            f"{phase_line(name, Phase.SUSPENDED)}: stopped on request; what was saved is in {place.run}",
            paste=_again(options),
            code=ExitCode.STOPPED,
        ) from stopped
    _tell(place, plan, report, voice)
    return ExitCode.OK


def _finish(place: Place, plan: Plan, tries: Tries) -> FinishReport:
    try:
        return tries.until_done(lambda: workstation.finish(place, plan, tries.voice), Phase.REGISTERING)
    except CommandError:
        # What a gate refuses is worth a look.
        show_losses(place, tries.voice)
        raise


def _attempts(place: Place, plan: Plan, job: FineTuneJob, tries: Tries, extra: Mapping[str, str]) -> None:
    """Gangs, one after the other, until one succeeds or a budget is spent. A gang restarts whole."""
    policy = job.spec.run_policy or RunPolicy()
    patience = policy.hang_timeout_seconds or names.DEFAULT_HANG_SECONDS
    while (failure := _attempt(place, plan, tries.job, tries.voice, extra, patience)) is not None:
        if not tries.again(failure):
            show_losses(place, tries.voice)
            raise CommandError(
                f"{phase_line(tries.job, Phase.FAILED)}: {failure.reason}: {failure.sentence}",
                paste=f"tail -50 {place.run / 'workers' / 'worker-0.log'}",
                code=_code_of(failure),
            )


def _attempt(place: Place, plan: Plan, name: str, voice: Voice, extra: Mapping[str, str], patience: int) -> Failure | None:
    """One gang, from start to end; None when it succeeded."""
    gang, said = Gang.start(plan=place.plan, run=place.run, extra={**workstation.mounts(place, plan), **extra}), set[str]()

    def show(seen: Seen | None) -> None:
        tell_news(seen.trackers if seen is not None else (), said, voice)
        _show(bar, name, seen)

    try:
        with voice.bar(name) as bar:
            code, result = gang.watch(show, hang_seconds=patience)
            if result is not None and result.step > bar.seen.step:
                _show(bar, name, ended(bar.seen, result))
        tell_news((tracker_line(tracker.to_json()) for tracker in (result.trackers if result else ())), said, voice)
    except HangError as error:
        return hang(step=error.step, seconds=patience)
    except KeyboardInterrupt:
        voice.line(f"… {stopping_line(gang.progress())}")
        raise
    finally:
        gang.close()
    return failure_of(code, result) if code else None


def tell_news(lines: Iterable[str], said: set[str], voice: Voice) -> None:
    """What was not said before: a tracker's address is of use while it trains, and its failure must not wait for the end."""
    for line in lines:
        if line not in said:
            said.add(line)
            voice.line(f"  {line}")


def _show(bar: Bar, name: str, seen: Seen | None) -> None:
    """What was seen last stays when nobody answers: at its end the launcher is gone before we know."""
    last = seen or bar.seen
    phase = Phase.RUNNING if last.steps else Phase.STARTING
    bar.phase(phase, phase_line(name, phase, progress_line(last) if last.steps else None))
    bar.update(last)


def ended(last: Seen, result: Result) -> Seen:
    """The last look at a leader misses its last steps; the result does not."""
    loss = result.metrics.train_loss
    return replace(last, step=result.step, steps=result.steps, loss=last.loss if loss is None else loss, eta_seconds=None)


def _code_of(failure: Failure) -> int:
    """Exit codes as a worker has them; 1 for what has none."""
    return {
        FailureClass.INVALID_INPUT: int(ExitCode.DATA_BAD),
        FailureClass.INVALID_CONFIG: int(ExitCode.CONFIG_BAD),
        FailureClass.INFRASTRUCTURE: int(ExitCode.TRY_AGAIN),
    }.get(failure.failure_class, 1)


def _again(options: Options) -> str:
    name = f" --name {options.name}" if options.name else ""
    claims = workstation.claim_flags(dict(options.claims))
    workers = f" --workers {options.workers}" if options.workers else ""
    return f"tuneward train {options.file}{name} --store {options.store}{claims}{workers}"


def show_losses(place: Place, voice: Voice) -> None:
    """The curve on a terminal, and where the same is for a browser."""
    if voice.terminal:
        width = min(curves.COLUMNS, voice.console.width - curves.MARGIN)
        for line in curves.picture(curves.read(place.run), width=width, unicode=voice.unicode):
            voice.line(line)
    if (place.run / "loss.svg").exists():
        voice.line(f"  loss curve: {place.run / 'loss.svg'}")
    for trace in sorted(place.run.glob("attempts/*/trace-*.json.gz")):
        voice.line(f"  trace, for ui.perfetto.dev: {trace}")


def _measured(place: Place, plan: Plan, adapter: FinishedAdapter) -> Iterator[str]:
    metrics = adapter.metrics
    before, after = metrics.validation_loss_before, metrics.validation_loss_after
    yield losses_line(before, after, metrics.train_loss)
    if (chosen := chosen_line(adapter.step, plan.prepared.hyperparameters.steps)) is not None:
        yield chosen
    if (tokens := accuracy_line(metrics.validation_accuracy_before, metrics.validation_accuracy_after)) is not None:
        # Of preferences there is neither.
        yield f"{tokens}; {perplexity_line(before, after)}" if before is not None and after is not None else tokens
    if (scores := score_line(metrics.task_score_before, metrics.task_score_after)) is not None:
        yield f"{scores}; all of them: {place.run / f'attempts/{adapter.attempt}/generations.jsonl'}"


def next_steps(place: Place, plan: Plan, adapter: FinishedAdapter) -> Iterator[str]:
    """What the model is good for, in commands to paste."""
    model = Finished(plan, adapter).name
    yield f"  model {model}: another job goes on from it with spec.model.uri: model://{model}"
    if adapter.type == "DoRA":
        base = workstation.mounts(place, plan)[names.ENV_MODEL_DIR]
        merge = shlex.join(["tuneward", "merge", str(place.store / adapter.sub_path), model, "--model", base])
        yield f"  vLLM loads no DoRA; it serves the model that this makes: {merge}"
    yield f"next: tuneward chat --store {place.store}"


def _tell(place: Place, plan: Plan, report: FinishReport, voice: Voice) -> None:
    """Where the adapter is, what was measured, what to do next."""
    adapter, name = report.adapter, plan.request.job.name
    if adapter is None:
        raise CommandError(f"finish reported no adapter: {report.message}", paste=f"ls {place.run}")
    metrics = adapter.metrics
    path = place.store / adapter.folder
    voice.done(phase_line(name, Phase.SUCCEEDED, report.message))
    show_losses(place, voice)
    for line in _measured(place, plan, adapter):
        voice.line(f"  {line}")
    kind = "model" if adapter.whole else "adapter"
    voice.line(f"  {kind}: {path}")
    for line in next_steps(place, plan, adapter):
        voice.line(line)
    voice.result(
        {
            "job": name,
            "phase": str(Phase.SUCCEEDED),
            "model": Finished(plan, adapter).name,
            "folder" if adapter.whole else "adapter": str(path),
            "digest": adapter.digest,
            "servedName": adapter.served_name,
            "metrics": metrics.to_json(),
        }
    )
