"""What a pass decides, and what all decisions are made with: the picture, the status so far, the time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum, auto

from tuneward_api.conditions import Phase, Reason
from tuneward_api.files import FinishedAdapter
from tuneward_api.finetunejob import FineTuneJobStatus, RunPolicy
from tuneward_operator import status as texts
from tuneward_operator.observe import Seen
from tuneward_operator.settings import Settings
from tuneward_operator.status import Say, stamp
from tuneward_operator.views import JobView

LOOK_AGAIN_SECONDS = 10.0
"""For what no event tells of: a claim that somebody makes, a node that comes back or goes."""


class Step(Enum):
    """What a pass may make. Each is idempotent: what is there already is taken."""

    PREPARE = auto()
    LAUNCH = auto()
    FINISH = auto()
    REGISTER = auto()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`wake`: seconds until the clock alone may change something. `needs_plan`: decide again with the plan at hand."""

    status: FineTuneJobStatus
    reason: Reason
    step: Step | None = None
    launch: int = 0
    adapter: FinishedAdapter | None = None
    delete: tuple[JobView, ...] = ()
    wake: float | None = None
    needs_plan: bool = False
    relabel: str | None = None
    """The server that the model's label shall name; empty: none. None: it stays."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One decision in the making."""

    seen: Seen
    status: FineTuneJobStatus
    now: datetime
    settings: Settings

    @property
    def policy(self) -> RunPolicy:
        return self.seen.owner.spec.run_policy or RunPolicy()

    def with_status(self, **update: object) -> Context:
        return replace(self, status=self.status.model_copy(update=update))

    def say(
        self,
        say: Say,
        *,
        step: Step | None = None,
        launch: int = 0,
        adapter: FinishedAdapter | None = None,
        delete: tuple[JobView, ...] = (),
        wake: float | None = None,
    ) -> Decision:
        return Decision(
            status=texts.conclude(self.seen, self.status, say, self.now),
            reason=say.reason,
            step=step,
            launch=launch,
            adapter=adapter,
            delete=delete,
            wake=wake,
        )


def ended(context: Context, launch: int, cause: str) -> Context:
    """The write that records a launch's end; its Job is deleted only after it."""
    return replace(context, status=texts.close(context.status, cause)).with_status(launches=launch)


def end(context: Context, phase: Phase, reason: Reason, message: str) -> Decision:
    gang = context.seen.gang
    if gang is not None and gang.launch > (context.status.launches or 0):
        context = ended(context, gang.launch, message)
    context = context.with_status(finished_at=stamp(context.now), retry_at=None)
    return context.say(Say(phase=phase, reason=reason, message=message), wake=0)


def needs_plan(context: Context) -> Decision:
    return Decision(status=context.status, reason=Reason.PENDING, needs_plan=True)


def living(jobs: list[JobView] | tuple[JobView, ...]) -> tuple[JobView, ...]:
    return tuple(job for job in jobs if job.deleting_since is None)
