"""One rank of a training: `python -m tuneward_trainer.train PLAN`, started by the launcher (or torchrun).

`train` below is the whole of it: steps (`step.py`) of forward_backward over this rank's micro-batches, one reduction that
gives all ranks the same bytes, one optimizer step, and what is due after it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils.logging import disable_progress_bar

from tuneward_api import names
from tuneward_api.files import Plan, canonical_json
from tuneward_trainer import endings, memory, patches, probe, rundir, trial
from tuneward_trainer.compare import choose, compare, evaluation_due, start
from tuneward_trainer.distributed import Gang, join, pick_device
from tuneward_trainer.feed import Feed
from tuneward_trainer.machine import processors
from tuneward_trainer.nccl import hang_seconds
from tuneward_trainer.patches import Patched
from tuneward_trainer.progress import ENV_STATUS_DIR, Clock, Reporter, dump_stacks_on_signal
from tuneward_trainer.saving import checkpoint_due, save, write_proved
from tuneward_trainer.session import Session, Stop, begin, conclude, device_memory
from tuneward_trainer.step import Done, begin_step, finish_step, outcome

_LOG_SECONDS: Final = 2.0
_YIELD_SECONDS: Final = 0.5

logger = logging.getLogger("tuneward_trainer")


# -- the loop --------------------------------------------------------------------------------------------------------


def train(session: Session) -> None:
    """From the session's step to the last one, or to the step after which all agree to stop."""
    chosen, recompute = probe.usable(session), session.choice.recompute
    with patches.applied(session.engine.model, chosen, recompute=recompute) as forward:
        start(session, forward)
        session.reporter.update(phase="Training", step=session.engine.step)
        session.saved_at = time.monotonic()
        with Feed.of(session) as feed:
            steps(session, forward, feed)
        if not (session.stopped or session.best.spent):
            compare(session, forward)
        if session.profile is not None:
            session.profile.close()
        choose(session, forward)


def steps(session: Session, forward: Patched, feed: Feed) -> None:
    clock = Clock(session.plan.prepared.hyperparameters.steps)
    done: Done | None = None
    while unfinished(session):
        with session.profile.around(session.engine.step + 1) if session.profile else nullcontext():
            done = one_step(session, forward, feed, clock, done)
        if done is not None and not session.ahead:
            settle(session, forward, clock, done)
            done = None
    if done is not None:
        settle(session, forward, clock, done)


def one_step(session: Session, forward: Patched, feed: Feed, clock: Clock, before: Done | None) -> Done | None:
    """`before`: the last one, where the host runs ahead of the device; it is settled when this one has begun, and may be the
    last. Then what this one has computed is dropped, and None comes back."""
    begun = begin_step(session, forward, feed)
    if before is not None:
        settle(session, forward, clock, before)
    return finish_step(session, forward, feed, begun) if unfinished(session) else None


def unfinished(session: Session) -> bool:
    steps = session.plan.prepared.hyperparameters.steps
    return session.engine.step < steps and not (session.stopped or session.best.spent)


def settle(session: Session, forward: Patched, clock: Clock, done: Done) -> None:
    """Everything that is due after a step. Raises DivergedError or FencedError on all ranks at once."""
    facts = outcome(session, done)
    write_proved(session)
    tell(session, facts, clock.tick(session.engine.step, facts["tokens"]))
    if evaluation_due(session):
        compare(session, forward)
        # What comes next is a step, which may take as long as one may.
        session.reporter.update(phase="Training", step=session.engine.step)
        clock.reset()
    if checkpoint_due(session):
        save(session)


# -- what is said after a step ------------------------------------------------------------------------------------------


def tell(session: Session, facts: dict[str, Any], timing: dict[str, Any]) -> None:
    """Progress, metrics.jsonl and a line for people."""
    step, steps = session.engine.step, session.plan.prepared.hyperparameters.steps
    session.train_loss = facts["train_loss"]
    shown = {name: value for name, value in facts.items() if name not in ("grad_norm", "tokens")}
    shown |= {name: timing[name] for name in ("tokens_per_second", "eta_seconds")}
    saved = session.saver.last if session.saver is not None else None
    taken = memory.taken(session.gang.device.type)
    share = session.utilization.share(timing["tokens_per_second"]) if session.utilization is not None else None
    shown |= {"memory_bytes": taken, "mfu": share, "epoch": session.schedule.epoch(step)}
    session.reporter.update(phase="Training", step=step, checkpoint=saved, **shown)
    if session.log is not None:
        session.log.write(step=step, **facts, **timing, memory_bytes=taken, mfu=share)
        _say(step, steps, facts, timing)


_last_line = 0.0


def _say(step: int, steps: int, facts: dict[str, Any], timing: dict[str, Any]) -> None:
    global _last_line
    if time.monotonic() - _last_line < _LOG_SECONDS and step < steps:
        return
    _last_line = time.monotonic()
    logger.info(
        "step %d/%d  loss %.4f  %s%.0f tokens/s  %d s left",
        step,
        steps,
        facts["train_loss"],
        f"{facts['reward_accuracy']:.0%} of the pairs right  " if "reward_accuracy" in facts else "",
        timing["tokens_per_second"],
        timing["eta_seconds"],
    )


# -- from the plan to a result -----------------------------------------------------------------------------------------


def run_rank(plan: Plan, gang: Gang, stop: Stop, reporter: Reporter) -> int:
    """Trains and, on the leader, leaves the result. Returns the exit code of a rank that did not fail."""
    began = time.monotonic()
    session = begin(plan, gang, stop, reporter)
    trial.before(session)
    train(session)
    trial.after(session)
    result = conclude(session, seconds=time.monotonic() - began)
    # Nobody leaves before the result is there: every worker reports it.
    gang.barrier()
    code: int = gang.broadcast(result.exit_code if result is not None else 0)
    reporter.update(phase="Done")
    gang.close()
    return code


# -- the process -------------------------------------------------------------------------------------------------------


def main(plan_path: Path) -> int:
    """Returns the exit code. A failure is left in the status folder for the launcher, with its reason."""
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(os.environ[ENV_STATUS_DIR]) if os.environ.get(ENV_STATUS_DIR) else None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    # About calls between libraries, and bars for a person at a terminal: no news in a log.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # Dynamo asks each tensor for one.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    disable_progress_bar()
    stop = Stop()
    stop.listen()
    reporter = Reporter(folder, rank)
    reporter.update(phase="Starting")
    dump_stacks_on_signal(folder, rank)
    try:
        plan = rundir.load_plan(plan_path)
        return run_rank(plan, join(hang_seconds(plan)), stop, reporter)
    except Exception as error:  # noqa: BLE001 - every end is reported with its reason
        ending = endings.classify(error, lambda: memory_remedy(plan_path))
        logger.error("%s\n%s", ending.message, "".join(traceback.format_exception(error)).rstrip())
        leave(folder, rank, ending)
        if ending.secondary:
            # The launcher knows ranks by the first that it sees gone, which must not be one that only lost another.
            time.sleep(_YIELD_SECONDS)
        return ending.exit_code


def memory_remedy(plan_path: Path) -> str:
    """What to lower where memory ran out."""
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    return memory.remedy(rundir.load_plan(plan_path), rundir.directory(names.ENV_MODEL_DIR), device_memory(device))


def leave(folder: Path | None, rank: int, ending: endings.Ending) -> None:
    """For the launcher: which rank failed first, and why."""
    if folder is None:
        return
    body = {**vars(ending), "exit_code": int(ending.exit_code), "rank": rank, "at": time.time()}
    temporary = folder / f"ending-{rank}.tmp"
    try:
        temporary.write_text(canonical_json(body))
        temporary.replace(folder / f"ending-{rank}.json")
    except OSError as error:
        # The exit code alone tells then.
        logger.error("%s was not written: %s", temporary.name, error)


def die_with_parent() -> None:
    """A launcher that is killed takes its ranks along: left behind, they would train beside the next gang."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(plan_path: Path) -> int:
    """`main` as a process of its own. The caller ends by os._exit: after a failure the process group's threads may wait
    for peers that are gone."""
    die_with_parent()
    # Where the launcher was forked, torch was loaded before it was known how many ranks share the processors.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or processors()))
    code = main(plan_path)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    os._exit(run(Path(sys.argv[1])))
