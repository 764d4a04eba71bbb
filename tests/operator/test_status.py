"""What status says: attempts, checkpoint, progress and its budget, stable conditions."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.operator.pictures import NOW, SETTINGS, accepted, ago, gang, heard, owner, result, worker
from tests.operator.world import saved

from tuneward_api.conditions import Phase, Reason
from tuneward_api.files import Progress
from tuneward_operator.observe import Served
from tuneward_operator.status import Say, absorb, close, conclude, in_words, mirrored, progress_status

RUNNING: dict[str, Any] = {"phase": "Running"}


def absorbed(picture: Any, later: float = 0) -> Any:
    return absorb(picture, NOW + timedelta(seconds=later), progress_every=SETTINGS.progress_seconds)


def test_an_attempt_enters_status_when_its_number_and_pod_were_seen() -> None:
    unnumbered = accepted(status=RUNNING, gang=gang(worker(heard=heard(attempt=0, step=0))))
    assert absorbed(unnumbered).attempts is None
    picture = accepted(status=RUNNING, gang=gang(worker(heard=heard(step=7, fromStep=5, resume="exact"))))
    status = absorbed(picture)
    (attempt,) = status.attempts
    assert (attempt.number, attempt.pod_uid, attempt.from_step, attempt.last_step) == (1, "pod-1-0", 5, 7)
    assert (status.attempt_count, attempt.node, attempt.started_at) == (1, "n1", "2026-11-25T11:59:10Z")


def test_trackers_are_as_their_leader_said_last() -> None:
    url = {"name": "wandb", "url": "https://wandb.ai/acme/support/runs/1"}
    picture = accepted(status=RUNNING, gang=gang(worker(heard=heard(step=7, trackers=[url]))))
    (known,) = absorbed(picture).trackers
    assert (known.url, known.message) == (url["url"], None)
    late = result(trackers=[{**url, "message": "ended after 8 s"}])
    picture = accepted(status={**RUNNING, "trackers": [url]}, workers=(worker(phase="Succeeded", result=late),))
    assert absorbed(picture).trackers[0].message == "ended after 8 s"
    # Nobody says anything between two attempts.
    assert absorbed(accepted(status={**RUNNING, "trackers": [url]})).trackers[0].url == url["url"]


def test_a_terminal_result_that_is_reported_again_is_no_new_attempt() -> None:
    first = {"number": 1, "launch": 1, "podUID": "pod-1-0", "cause": "Succeeded"}
    again = worker(launch=2, phase="Succeeded", result=result(1))
    status = absorbed(accepted(status={**RUNNING, "attempts": [first], "launches": 1}, workers=(again,)))
    assert [(found.number, found.launch) for found in status.attempts] == [(1, 1)]


def test_only_the_newest_ten_attempts_stay_and_all_are_counted() -> None:
    attempts = [{"number": n, "launch": n, "podUID": f"p{n}", "cause": "x"} for n in range(3, 13)]
    leader = worker(launch=13, uid="p13", heard=heard(attempt=13, step=1))
    picture = accepted(status={**RUNNING, "attempts": attempts, "attemptCount": 12}, gang=gang(leader, launch=13))
    status = absorbed(picture)
    assert [found.number for found in status.attempts] == list(range(4, 14))
    assert status.attempt_count == 13


def test_the_last_words_of_a_stopped_leader_are_heard_after_its_attempt_was_closed() -> None:
    closed = {"number": 1, "launch": 1, "podUID": "pod-1-0", "cause": "suspended", "lastStep": 30, "lostSteps": 30}
    said = result(outcome="Stopped", exitCode=143, reason="Preempted", step=33, checkpoint=saved(33))
    stopped = worker(phase="Failed", deleting=True, result=said)
    status = absorbed(accepted(status={"phase": "Suspended", "attempts": [closed]}, workers=(stopped,)))
    assert (status.attempts[0].last_step, status.attempts[0].lost_steps, status.checkpoint.step) == (33, 0, 33)


def test_the_checkpoint_never_goes_back() -> None:
    known = {"step": 50, "digest": "x", "savedAt": "2026-11-25T11:00:00Z"}
    leader = worker(heard=heard(step=41, checkpoint=saved(40)))
    assert absorbed(accepted(status={**RUNNING, "checkpoint": known}, gang=gang(leader))).checkpoint.step == 50


@pytest.mark.parametrize("left", [20, None])
def test_after_a_divergence_the_checkpoint_is_what_it_left(left: int | None) -> None:
    """The leader's last answer still names the one that was removed, and so does status."""
    known = {"step": 40, "digest": "x", "savedAt": "2026-11-25T11:00:00Z"}
    closed = {"number": 1, "launch": 1, "podUID": "pod-1-0", "cause": "diverged", "fromStep": 30, "lastStep": 45}
    last = saved(left) if left else None
    said = result(outcome="Failed", exitCode=1, reason="NumericalDivergence", step=45, fromStep=30, checkpoint=last)
    ended = worker(phase="Failed", result=said, heard=heard(step=45, checkpoint=saved(40)))
    status = absorbed(accepted(status={**RUNNING, "checkpoint": known, "attempts": [closed]}, workers=(ended,)))
    assert (status.checkpoint.step if status.checkpoint else None) == left
    assert status.attempts[0].lost_steps == 45 - (left or 0)
    # Its pod may stay while the next attempt comes further.
    after = worker(launch=2, uid="pod-2-0", heard=heard(attempt=2, step=39, checkpoint=saved(35)))
    picture = accepted(status={**RUNNING, "checkpoint": known | {"step": 20}, "attempts": [closed]}, workers=(ended, after))
    assert absorbed(picture).checkpoint.step == 35


@pytest.mark.parametrize(
    ("step", "steps", "later", "written"),
    [(9, 1000, 5, False), (9, 1000, 31, True), (20, 1000, 5, True), (1, 25, 5, True)],
    ids=["less-than-a-percent", "after-30-s", "a-percent", "a-step-of-25"],
)
def test_progress_is_written_each_percent_or_each_half_minute(step: int, steps: int, later: float, written: bool) -> None:
    before = accepted(status=RUNNING, gang=gang(worker(heard=heard(step=step - 1, steps=steps))))
    status = absorbed(before)
    leader = worker(heard=heard(NOW + timedelta(seconds=later), step=step, steps=steps))
    picture = replace(before, status=status, gang=gang(leader), workers=(leader,))
    assert (absorbed(picture, later) != status) is written


def test_the_last_steps_come_from_the_result() -> None:
    before = absorbed(accepted(status=RUNNING, gang=gang(worker(heard=heard(step=97, tokensPerSecond=5.0)))))
    done = worker(phase="Succeeded", result=result(metrics={"trainLoss": 0.25}))
    picture = replace(accepted(status=RUNNING, gang=gang(done, outcome="Succeeded")), status=before)
    progress = absorbed(picture).progress
    assert (progress.percent, progress.summary, progress.loss, progress.tokens_per_second) == (100, "100/100", "0.250", 5.0)
    assert progress.eta is None


def test_closing_counts_the_steps_that_are_done_again() -> None:
    leader = worker(heard=heard(step=37, checkpoint=saved(30)))
    status = close(absorbed(accepted(status=RUNNING, gang=gang(leader))), "killed")
    (ended,) = status.attempts or []
    assert (ended.cause, ended.lost_steps) == ("killed", 7)
    (same,) = close(status, "other").attempts or []
    assert same.cause == "killed"


def test_a_condition_keeps_its_time_while_its_truth_stays() -> None:
    picture = accepted(status=RUNNING, gang=gang(worker()))
    running = Say(phase=Phase.RUNNING, reason=Reason.TRAINING, message="training")
    first = conclude(picture, picture.status, running, ago(100))
    picture = replace(picture, status=first)
    stale = conclude(picture, first, replace(running, stale=True, message="no answer"), NOW)
    times = {found.type: found.last_transition_time for found in stale.conditions or ()}
    assert set(times.values()) == {"2026-11-25T11:58:20Z"}
    ended = Say(phase=Phase.FAILED, reason=Reason.UNKNOWN, message="why")
    changed = conclude(picture, first, ended, NOW).conditions or []
    moved = {found.type for found in changed if found.last_transition_time == "2026-11-25T12:00:00Z"}
    assert moved == {"Stalled", "Running", "Failed", "Finished", "Admitted"}


def test_no_condition_ready_which_would_block_gitops() -> None:
    status = conclude(accepted(), accepted().status, Say(phase=Phase.RUNNING, reason=Reason.TRAINING, message=""), NOW)
    assert "Ready" not in {found.type for found in status.conditions or ()}


def test_served_follows_the_model_after_the_end() -> None:
    of = owner(serve={"server": "assistant"})
    served = Served(ready=True, reason="Served", message="answers on 1 of 1 replicas")
    picture = accepted(of, status={"phase": "Succeeded"}, served=served, model_server="assistant")
    (condition,) = mirrored(picture, NOW).conditions or []
    assert (condition.type, condition.status, condition.reason) == ("Served", "True", "Served")


@pytest.mark.parametrize(("label", "said"), [("", "is not there"), ("other", "names other")])
def test_a_model_that_is_ready_without_the_jobs_server_is_not_served_by_it(label: str, said: str) -> None:
    of = owner(serve={"server": "assistant"})
    verified = Served(ready=True, reason="Verified", message="its files were verified")
    picture = accepted(of, status={"phase": "Succeeded"}, served=verified, model_server=label)
    (condition,) = mirrored(picture, NOW).conditions or []
    assert (condition.status, condition.reason) == ("False", "NotServed")
    assert condition.message == f"the model's label tuneward.dev/server {said}; set it to assistant to have it served there"


def test_progress_texts_for_columns() -> None:
    status = progress_status(Progress(step=3, steps=7, train_loss=1.23456, eta_seconds=3725), NOW)
    assert (status.percent, status.summary, status.loss, status.eta) == (42, "3/7", "1.235", "1h2m")


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (90, "1m30s"), (7260, "2h1m"), (90000, "1d1h")])
def test_in_words(seconds: int, text: str) -> None:
    assert in_words(seconds) == text
