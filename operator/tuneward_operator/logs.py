"""One JSON object a line, so that logs can be searched by job; plain lines for people on request."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson

EXTRAS = ("kind", "namespace", "name_", "phase", "reason", "seconds")


class JsonFormatter(logging.Formatter):
    """Level, time, logger and message, and whichever of EXTRAS the caller gave by `extra=`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for extra in EXTRAS:
            if extra in vars(record):
                line[extra.rstrip("_")] = getattr(record, extra)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(*, form: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Kopf speaks of every event; what matters of it is a warning.
    logging.getLogger("kopf").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
