"""`python -m tuneward_serving engine|agent`: the two containers of a ModelServer's pod."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tuneward_api.names import AGENT_PORT, DEFAULT_DIRS, ENGINE_PORT, ENV_ADAPTERS_DIR, ENV_MODEL_DIR, WANTED_FILE

API_KEY_ENV = "TUNEWARD_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuneward_serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_engine(commands.add_parser("engine", help="serve a base model and adapters over OpenAI's API"))
    _add_agent(commands.add_parser("agent", help="keep an engine's adapters as the wanted list says, and prove them"))
    return parser


def _add_common(parser: argparse.ArgumentParser, *, port: int) -> None:
    parser.add_argument("--host", default=os.environ.get("POD_IP", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--max-adapters", type=int, default=16)
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--model", type=Path, default=_folder(ENV_MODEL_DIR), help="folder of the base model")
    parser.add_argument("--api-key-env", default=API_KEY_ENV, help="variable with the key; unset or empty: no key")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, port=ENGINE_PORT)
    parser.add_argument("--served-base-name", help="name of the base model for clients; default: the folder's name")


def _add_agent(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, port=AGENT_PORT)
    parser.add_argument("--engine", help="base URL of the engine; default: port 8000 of --host")
    parser.add_argument("--adapters", type=Path, default=_folder(ENV_ADAPTERS_DIR), help="the store's adapters folder")
    parser.add_argument("--wanted", type=Path, default=Path(WANTED_FILE), help="adapters.json")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="least tolerance of a proof, for an engine that computes in bfloat16 and does not say so (vLLM)",
    )


def _beside(host: str) -> str:
    """The engine of the same pod; an IPv6 address goes in brackets."""
    return f"http://[{host}]:{ENGINE_PORT}" if ":" in host else f"http://{host}:{ENGINE_PORT}"


def _folder(variable: str) -> Path:
    return Path(os.environ.get(variable, DEFAULT_DIRS[variable]))


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=os.environ.get("TUNEWARD_LOG_LEVEL", "INFO"), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return _engine(options) if options.command == "engine" else _agent(options)


def _engine(options: argparse.Namespace) -> int:
    # Before torch is loaded: libgomp's threads spin for a millisecond at each barrier, and where processors are shared
    # (a quota, other pods) a token then takes several times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    from tuneward_serving.engine.server import EngineOptions, serve_engine
    from tuneward_serving.engine.service import Settings

    settings = Settings(
        base_name=options.served_base_name or options.model.resolve().name,
        max_adapters=options.max_adapters,
        max_rank=options.max_rank,
        api_key=os.environ.get(options.api_key_env) or None,
    )
    return serve_engine(EngineOptions(model=options.model, host=options.host, port=options.port, settings=settings))


def _agent(options: argparse.Namespace) -> int:
    from tuneward_serving.agent.adapter_check import Limits
    from tuneward_serving.agent.server import AgentOptions, serve_agent

    return serve_agent(
        AgentOptions(
            engine=options.engine or _beside(options.host),
            adapters=options.adapters,
            wanted=options.wanted,
            model=options.model,
            limits=Limits(max_adapters=options.max_adapters, max_rank=options.max_rank),
            host=options.host,
            port=options.port,
            interval=options.interval,
            tolerance=options.tolerance,
            api_key=os.environ.get(options.api_key_env) or None,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
