"""The `tuneward` command: arguments, and one shape for every error. Each command's code is imported when it is asked for."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from tuneward_api.names import ExitCode
from tuneward_cli.errors import INTERRUPTED, NOT_RUNNING, USAGE, CommandError, RefusedError
from tuneward_cli.home import Home
from tuneward_cli.voice import Voice

_EPILOG: Final = """exit codes:
  0 done    1 failed    2 wrong arguments    3 no local cluster runs
  65 the data is bad    66 an input is missing    75 try again    78 the configuration is bad
  130 interrupted       143 stopped on request, with a checkpoint saved
"""

Arguments = argparse.Namespace


class _Parser(argparse.ArgumentParser):
    """Its errors have the shape of all others: a sentence and a command."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message, paste=f"{self.prog} --help", code=USAGE)


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="tuneward",
        description="Fine-tunes language models on Kubernetes, or on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _cluster_commands(commands)
    _work_commands(commands)
    _look_commands(commands)
    return top


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"
"""What `add_subparsers` returns; argparse has no public name for it."""


def _cluster_commands(commands: Commands) -> None:
    _command(commands, "up", _up, "start a local Kubernetes with the operator", "data", "output")
    down = _command(commands, "down", _down, "end it and everything in it", "data", "output")
    down.add_argument("--purge", action="store_true", help="remove its data as well: models, adapters, jobs")
    _command(commands, "status", _status, "what runs here, and the one next thing to do", "data", "output")
    demo = _command(commands, "demo", _demo, "from nothing to a chat answer of a tuned model", "data", "output")
    demo.add_argument("--no-prompt", action="store_true", help="end without a prompt, as where there is no terminal")
    operator = _command(commands, "operator", _operator, "the operator in the foreground", "cluster")
    operator.add_argument("flags", nargs=argparse.REMAINDER, metavar="-- FLAG...", help="flags of the operator itself")


def _work_commands(commands: Commands) -> None:
    bring = _command(commands, "import", _import, "bring a model folder into a store", "cluster", "output")
    bring.add_argument("folder", type=Path, metavar="DIR", help="config.json, *.safetensors, tokenizer")
    bring.add_argument("name", metavar="NAME", help="it becomes pvc://tuneward-store/imports/NAME")
    bring.add_argument("--store", type=Path, metavar="DIR", help="a workstation's store instead of a cluster's")
    bring.add_argument("--replace", action="store_true", help="even if another model of this name is there")
    bring.add_argument("--image", default="", help="image of the receiving pod; default: the operator's trainer image")
    train = _command(commands, "train", _train, "train on this machine, without Kubernetes", "output")
    train.add_argument("file", type=Path, metavar="FILE", help="YAML with a FineTuneJob")
    train.add_argument("--store", type=Path, metavar="DIR", default=Path("tuneward-store"), help="default: ./tuneward-store")
    train.add_argument("--name", help="which FineTuneJob of FILE; default: the only one")
    train.add_argument(
        "--claim", action="append", default=[], type=_pair, metavar="NAME=DIR", help="folder of another claim"
    )
    train.add_argument(
        "--profile", type=_steps, metavar="FROM-TO", help="keep torch.profiler's trace of these steps (a few: it is large)"
    )
    train.add_argument("--restart", action="store_true", help="begin anew: removes the job's run directory")
    train.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; any number gives the same result, up to rounding"
    )
    merge = _command(commands, "merge", _merge, "add an adapter to its base model's weights: a model of its own", "output")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder of the store's adapters/")
    merge.add_argument("folder", type=Path, metavar="DIR", help="where the model goes; must not be there")
    merge.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    _add_estimate(commands)
    _add_init(commands)
    _add_validate(commands)


def _add_validate(commands: Commands) -> None:
    check = _command(commands, "validate", _validate, "show every error of YAML or data files", "output")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML, or with --model files of samples")
    check.add_argument("--store", type=Path, metavar="DIR", help="look at the data of the jobs too, as tuneward train would")
    check.add_argument(
        "--claim", action="append", default=[], type=_pair, metavar="NAME=DIR", help="folder of another claim"
    )
    check.add_argument("--model", type=Path, metavar="DIR", help="check data with this model's chat template")
    check.add_argument(
        "--validation", action="append", default=[], type=Path, metavar="FILE", help="held-out samples beside FILE"
    )
    check.add_argument("--sequence-length", type=_positive, metavar="TOKENS", help="longest sample that is allowed")
    check.add_argument("--show", type=_positive, metavar="N", help="tokens of N samples of each source, those learnt marked")
    check.add_argument(
        "--write-corrected", type=Path, metavar="DIR", help="write the files without bad samples; overwrites nothing"
    )


def _add_estimate(commands: Commands) -> None:
    costs = _command(commands, "estimate", _estimate, "memory, steps and time of a job, without training it", "output")
    costs.add_argument("file", type=Path, metavar="FILE", help="YAML with a FineTuneJob")
    costs.add_argument("--store", type=Path, metavar="DIR", default=Path("tuneward-store"), help="default: ./tuneward-store")
    costs.add_argument("--name", help="which FineTuneJob of FILE; default: the only one")
    costs.add_argument(
        "--claim", action="append", default=[], type=_pair, metavar="NAME=DIR", help="folder of another claim"
    )
    costs.add_argument("--gpu-memory", type=_amount, metavar="GIB", help="ask about a GPU with so much memory")


def _add_init(commands: Commands) -> None:
    first = _command(commands, "init", _init, "write a first job.yaml for a model and data", "output")
    first.add_argument("--model", required=True, metavar="DIR|URI", help="a model's folder, or hf://… or pvc://…")
    first.add_argument("--data", required=True, nargs="+", metavar="FILE|URI", help="samples; checked and counted")
    first.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("job.yaml"), help="default: job.yaml; never overwritten"
    )
    first.add_argument("--store", type=Path, metavar="DIR", default=Path("tuneward-store"), help="default: ./tuneward-store")
    first.add_argument("--name", help="of the job; default: the first file's")


def _look_commands(commands: Commands) -> None:
    watch = _command(commands, "watch", _watch, "follow a job to its end", "cluster", "output")
    watch.add_argument("job", metavar="JOB")
    logs = _command(commands, "logs", _logs, "log of a job's newest pods", "cluster")
    logs.add_argument("job", metavar="JOB")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the pod ends")
    logs.add_argument("--worker", type=int, default=0, metavar="N", help="which worker; default: 0, the leader")
    chat = _command(commands, "chat", _chat, "talk to the served models, side by side", "cluster", "output")
    chat.add_argument("--model", action="append", default=[], help="name of a model; may be repeated; default: all")
    chat.add_argument("--server", help="which ModelServer; default: the only one")
    chat.add_argument("--ask", metavar="QUESTION", help="one question, no prompt")
    chat.add_argument("--store", type=Path, metavar="DIR", help="adapters of a workstation's store, no cluster")


def _command(
    commands: Commands, name: str, action: Callable[[Arguments], int], text: str, *options: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
    command.set_defaults(action=action)
    if "data" in options:
        command.add_argument(
            "--data", metavar="DIR", help="the cluster's folder; default: $TUNEWARD_HOME, else ~/.local/share/tuneward"
        )
    if "cluster" in options:
        command.add_argument("--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, else the local cluster")
        command.add_argument("-n", "--namespace", help="default: the kubeconfig's, else default")
    if "output" in options:
        command.add_argument("-o", "--output", choices=("text", "json"), default="text", help="json: one object on stdout")
    return command


def _pair(text: str) -> tuple[str, Path]:
    name, found, folder = text.partition("=")
    if not (name and found and folder):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=DIR")
    return name, Path(folder)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def _steps(text: str) -> str:
    """FROM-TO, or one step."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"{text!r} must be FROM-TO, such as 3-5; steps are counted from 1")
    return text


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of GiB, such as 80")
    return value


def _up(options: Arguments) -> int:
    from tuneward_cli import cluster

    voice, home = Voice(options.output), Home.at(options.data)
    found = cluster.up(home, voice)
    voice.line(f"export KUBECONFIG={home.kubeconfig}")
    voice.line(f"next: {cluster.status(home)['next']}")
    voice.result({"kubeconfig": str(home.kubeconfig), "started": found.started, "version": found.version})
    return ExitCode.OK


def _down(options: Arguments) -> int:
    from tuneward_cli import cluster

    voice, home = Voice(options.output), Home.at(options.data)
    cluster.down(home, voice, purge=options.purge)
    voice.line(
        "next: tuneward up"
        if options.purge
        else "next: tuneward up   (what was trained is kept; tuneward down --purge removes it)"
    )
    voice.result({"running": False, "data": str(home.data), "purged": options.purge})
    return ExitCode.OK


def _status(options: Arguments) -> int:
    from tuneward_cli import cluster

    voice = Voice(options.output)
    report = cluster.status(Home.at(options.data))
    for line in [] if voice.json else cluster.status_lines(report):
        voice.line(line)
    voice.result(report)
    return ExitCode.OK if report["running"] else NOT_RUNNING


def _demo(options: Arguments) -> int:
    from tuneward_cli import demo

    voice = Voice(options.output)
    return demo.run(Home.at(options.data), voice, prompt=not options.no_prompt and voice.terminal and sys.stdin.isatty())


def _operator(options: Arguments) -> int:
    from tuneward_cli import cluster
    from tuneward_cli.kube import Kube

    kube = Kube.connect(options.kubeconfig, options.namespace)
    flags = [flag for flag in options.flags if flag != "--"]
    command = cluster.operator_command(kube.kubeconfig, *flags)
    # The operator takes this process's place: signals and exit code are its own.
    os.execv(command[0], command)


def _import(options: Arguments) -> int:
    from tuneward_cli import importing
    from tuneward_cli.kube import Kube

    voice = Voice(options.output)
    name = importing.check_name(options.name)
    source = importing.read_source(options.folder, voice)
    if options.store:
        uri = importing.import_here(source, name, options.store, voice, replace=options.replace)
    else:
        kube = Kube.connect(options.kubeconfig, options.namespace)
        uri = importing.import_there(source, name, kube, voice, image=options.image, replace=options.replace)
    voice.line(f"next: put it into a job: spec.model.uri: {uri}")
    voice.result({"uri": uri, "digest": source.digest, "bytes": source.bytes})
    return ExitCode.OK


def _train(options: Arguments) -> int:
    from tuneward_cli import train

    chosen = train.Options(
        file=options.file,
        store=options.store,
        name=options.name,
        claims=tuple(options.claim),
        restart=options.restart,
        workers=options.workers,
        profile=options.profile,
    )
    return train.train(chosen, Voice(options.output))


def _init(options: Arguments) -> int:
    from tuneward_cli import starting

    asked = starting.Options(options.model, tuple(options.data), options.out, options.store, options.name)
    return starting.start(asked, Voice(options.output))


def _merge(options: Arguments) -> int:
    from tuneward_cli import merging

    return merging.merge(options.adapter, options.model, options.folder, Voice(options.output))


def _estimate(options: Arguments) -> int:
    from tuneward_cli import estimating

    asked = estimating.Options(options.file, options.store, options.name, tuple(options.claim), options.gpu_memory)
    return estimating.estimate(asked, Voice(options.output))


def _validate(options: Arguments) -> int:
    from tuneward_cli import checks

    wanted = checks.Wanted(
        files=options.files,
        store=options.store,
        claims=dict(options.claim),
        model=options.model,
        validation=options.validation,
        sequence_length=options.sequence_length,
        show=options.show,
        corrected=options.write_corrected,
    )
    return checks.validate(wanted, Voice(options.output))


def _watch(options: Arguments) -> int:
    from tuneward_cli import look
    from tuneward_cli.kube import Kube

    return look.watch(Kube.connect(options.kubeconfig, options.namespace), options.job, Voice(options.output))


def _logs(options: Arguments) -> int:
    from tuneward_cli import look
    from tuneward_cli.kube import Kube

    kube = Kube.connect(options.kubeconfig, options.namespace)
    return look.logs(kube, options.job, worker=options.worker, follow=options.follow)


def _chat(options: Arguments) -> int:
    from tuneward_cli import chat
    from tuneward_cli.kube import Kube

    voice = Voice(options.output)
    if options.store:
        return chat.chat_here(options.store, options.model, options.ask, voice)
    kube = Kube.connect(options.kubeconfig, options.namespace)
    return chat.chat_there(kube, options.server, options.model, options.ask, voice)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code. Errors go to stderr: a sentence, then the command to paste."""
    if threading.current_thread() is threading.main_thread():
        # Whoever ends us by SIGTERM gets the same care as a person at Ctrl-C: nothing is left behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = parser().parse_args(arguments)
        if options.command is None:
            options = parser().parse_args(["status"])
            options.action(options)
            return ExitCode.OK
        return int(options.action(options))
    except CommandError as fail:
        sys.stderr.write(f"✗ {fail.sentence}\n")
        if fail.paste:
            sys.stderr.write(f"  next: {fail.paste}\n")
        return fail.code
    except RefusedError as refused:
        sys.stderr.write(f"✗ the API server refused: {refused.message}\n  next: tuneward status\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\n✗ interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
