"""Start and end of the engine's process.

HTTP answers from the first second (/health with 503), while the model's own thread imports torch and loads the
weights; a folder that holds no model ends the process with one sentence and exit code 66.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tuneward_api.names import ExitCode
from tuneward_serving.engine.routes import create_app
from tuneward_serving.engine.service import Service, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the command line says."""

    model: Path
    host: str
    port: int
    settings: Settings


class _ModelThread(threading.Thread):
    """Owns the model. `failure` is why it ended early."""

    def __init__(self, options: EngineOptions, service: Service, server: uvicorn.Server) -> None:
        super().__init__(name="model", daemon=True)
        self._options = options
        self._service = service
        self._server = server
        self.failure: str | None = None

    def run(self) -> None:
        try:
            self._serve()
        except (OSError, ValueError) as error:
            self.failure = f"{self._options.model} cannot be loaded as a language model: {str(error).splitlines()[0]}"
        except Exception as error:  # a dead model thread must not leave a server that answers nothing
            log.exception("the model's thread ended")
            self.failure = f"the engine failed: {error!r}"
        finally:
            self._service.model = None
            self._server.should_exit = True

    def _serve(self) -> None:
        from tuneward_serving.engine.batch import Batcher
        from tuneward_serving.engine.runner import load_runner

        runner = load_runner(self._options.model)
        batcher = Batcher(runner)
        self._service.model = (runner, batcher)
        log.info("ready: %s on %s", self._options.settings.base_name, runner.device)
        batcher.run()

    def end(self) -> None:
        if self._service.model is not None:
            self._service.model[1].stop()
            self.join(timeout=30)


def serve_engine(options: EngineOptions) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    if not (options.model / "config.json").is_file():
        log.error("%s holds no config.json; it is not a model's folder", options.model)
        return ExitCode.INPUT_MISSING
    service = Service(options.settings)
    config = uvicorn.Config(
        create_app(service),
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=20,
    )
    server = uvicorn.Server(config)
    thread = _ModelThread(options, service, server)
    thread.start()
    with suppress(KeyboardInterrupt):
        asyncio.run(server.serve())
    thread.end()
    if thread.failure is not None:
        log.error("%s", thread.failure)
        return ExitCode.INPUT_MISSING
    return ExitCode.OK
