"""The YAML that the command is given: every problem at once, in the words of the API server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneward_api.base import Model
from tuneward_api.finetunejob import FineTuneJob
from tuneward_api.loader import Document, YamlError, load_documents
from tuneward_api.names import ExitCode
from tuneward_api.validate import Problem, validate_document
from tuneward_cli import mistral_finetune
from tuneward_cli.errors import CommandError


@dataclass(frozen=True)
class Loaded:
    """A file's documents: all as they are, ours also as models. `notes` and `claims` are of a job that was translated
    from mistral-finetune's YAML."""

    file: Path
    documents: list[Document]
    resources: list[Model]
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)
    claims: dict[str, Path] = field(default_factory=dict)

    @property
    def jobs(self) -> list[FineTuneJob]:
        return [resource for resource in self.resources if isinstance(resource, FineTuneJob)]

    def values(self) -> list[dict[str, Any]]:
        return [document.value for document in self.documents]

    def config_maps(self) -> dict[str, dict[str, str]]:
        """name -> key -> text."""
        found = [value for value in self.values() if value.get("apiVersion") == "v1" and value.get("kind") == "ConfigMap"]
        return {str((value.get("metadata") or {}).get("name")): dict(value.get("data") or {}) for value in found}


def load(file: Path) -> Loaded:
    """Raises CommandError when the file is not there or is no YAML; other problems are in `problems`."""
    try:
        documents = load_documents(file.read_text(), file=str(file))
    except OSError as error:
        raise CommandError(
            f"{file} cannot be read: {error.strerror}", paste="ls examples/", code=ExitCode.INPUT_MISSING
        ) from error
    except (YamlError, UnicodeDecodeError) as error:
        raise CommandError(str(error), paste=f"tuneward validate {file}", code=ExitCode.CONFIG_BAD) from error
    if len(documents) == 1 and mistral_finetune.is_one(documents[0]):
        return _translated(file, documents[0])
    resources: list[Model] = []
    problems: list[Problem] = []
    for document in documents:
        resource, found = validate_document(document)
        problems += found
        if resource is not None:
            resources.append(resource)
    return Loaded(file=file, documents=documents, resources=resources, problems=problems)


def _translated(file: Path, document: Document) -> Loaded:
    translation, problems = mistral_finetune.translate(document)
    if translation is None:
        return Loaded(file=file, documents=[document], resources=[], problems=problems)
    job = FineTuneJob.model_validate(translation.job.value)
    return Loaded(file, [translation.job], [job], [], translation.notes, translation.claims)


def load_valid(file: Path) -> Loaded:
    """Raises CommandError with every problem on a line of its own."""
    loaded = load(file)
    if loaded.problems:
        raise CommandError("\n".join(map(str, loaded.problems)), paste=f"tuneward validate {file}", code=ExitCode.CONFIG_BAD)
    return loaded


def the_job(loaded: Loaded, name: str | None = None) -> FineTuneJob:
    """The one FineTuneJob, or the one called `name`."""
    jobs = [job for job in loaded.jobs if name in (None, job.metadata.get("name"))]
    if len(jobs) == 1:
        return jobs[0]
    known = ", ".join(str(job.metadata.get("name")) for job in loaded.jobs) or "none"
    asked = f"called {name}" if name else "to train"
    raise CommandError(
        f"{loaded.file} must hold one FineTuneJob {asked}; it holds: {known}",
        paste=f"tuneward train {loaded.file} --name {loaded.jobs[0].metadata['name'] if loaded.jobs else 'NAME'}",
        code=ExitCode.CONFIG_BAD,
    )
