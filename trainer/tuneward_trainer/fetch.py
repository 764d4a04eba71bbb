"""`fetch`: brings a ModelServer's base model into the store, by the same code as prepare."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from tuneward_api.conditions import Reason
from tuneward_api.files import FetchReport, FetchRequest
from tuneward_api.names import ExitCode
from tuneward_trainer import models
from tuneward_trainer.facts import examine
from tuneward_trainer.prepare import base_of
from tuneward_trainer.report import config_bad, emit, ending, input_missing, start_logging
from tuneward_trainer.store import Places, make_directory
from tuneward_trainer.tokenizer import load_tokenizer


def main(request_file: Path) -> int:
    """Returns the exit code."""
    start_logging()
    report, error = ending(lambda: fetch(read_request(request_file), Places.from_environment()))
    if error is not None:
        return emit(FetchReport(outcome="Failed", reason=error.reason, message=error.message), None, code=error.code)
    assert report is not None
    return emit(report, None, code=ExitCode.OK)


def read_request(file: Path) -> FetchRequest:
    """Raises EndError."""
    try:
        return FetchRequest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise input_missing(f"the request {file} does not exist") from error
    except ValidationError as error:
        raise config_bad(f"the request is not valid: {error.errors(include_url=False)[0]['msg']}") from error


def fetch(request: FetchRequest, places: Places) -> FetchReport:
    """Raises EndError."""
    found = models.find(request.uri, places=places, store_claim=request.store_claim)
    # A server's pods mount it read-only, and a directory that the kubelet makes has the kubelet's own mode.
    make_directory(places.root() / "adapters")
    base = base_of(found, examine(found.folder), load_tokenizer(found.folder))
    message = f"{base.uri} is in the store: {base.architecture}, {base.parameters} parameters"
    return FetchReport(outcome="Done", reason=Reason.AVAILABLE, message=message, base=base)
