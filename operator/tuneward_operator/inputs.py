"""What a job reads from, by the field that names it, and why it cannot be read now: what is missing is waited for, with a
sentence, before any pod is made that could only hang.

Secrets are not looked at: the operator has no right to read one, and the kubelet says which it misses.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from tuneward_api.files import Parent
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_api.uris import Uri, parse_uri


class Input(NamedTuple):
    """`field`: path of what names it."""

    field: str
    uri: Uri


def inputs_of(spec: FineTuneJobSpec, parent: Parent | None) -> Iterator[Input]:
    """The base model first. Of a model to go on from the base model and the adapter's files."""
    models = [spec.model.uri] if parent is None else [parent.starts_from, parent.artifact_uri]
    yield from (Input("spec.model.uri", parse_uri(uri)) for uri in models)
    for part, datasets in (("training", spec.datasets.training), ("validation", spec.datasets.validation or ())):
        for index, dataset in enumerate(datasets):
            yield Input(f"spec.datasets.{part}[{index}].uri", parse_uri(dataset.uri))


def claims(inputs: Iterable[Input], store: str) -> tuple[str, ...]:
    """Names of all claims, each once; the store comes first and then the base model's."""
    return tuple(dict.fromkeys([store, *(found.uri.authority for found in inputs if found.uri.scheme == "pvc")]))


def of_gang(held: Iterable[str], inputs: Sequence[Input], store: str) -> str:
    """The first of `held` that the workers mount: the store's, or the base model's; empty: none."""
    base = inputs[0].uri
    mounted = {store, base.authority if base.scheme == "pvc" else store}
    return next((claim for claim in held if claim in mounted), "")


def configmaps(inputs: Iterable[Input]) -> dict[str, str]:
    """Name to the first field that names it."""
    found: dict[str, str] = {}
    for one in inputs:
        if one.uri.scheme == "configmap":
            found.setdefault(one.uri.authority, one.field)
    return found


def missing_claim(inputs: Iterable[Input], store: str, there: Container[str]) -> str:
    """A sentence about the first claim beside the store that is not `there`; empty: all are."""
    for field, uri in inputs:
        if uri.scheme == "pvc" and uri.authority != store and uri.authority not in there:
            return missing("PersistentVolumeClaim", uri.authority, field)
    return ""


def missing(kind: str, name: str, field: str) -> str:
    return f"{kind} {name} ({field}) does not exist in this namespace; create it"
