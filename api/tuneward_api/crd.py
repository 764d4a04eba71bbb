"""pydantic models -> structural CRDs: what `make generate` writes to crds/ and the chart.

A structural schema has no `$ref`, no `anyOf` with null, no `title`. We also write no `default:`: inside lists it
shows as eternal drift in GitOps tools. Descriptions say the defaults, and the plan holds what was chosen.
"""

from __future__ import annotations

from typing import Any

import yaml

from tuneward_api.base import Model
from tuneward_api.finetunedmodel import FineTunedModel
from tuneward_api.finetunejob import FineTuneJob
from tuneward_api.modelserver import ModelServer
from tuneward_api.names import GROUP, VERSION

Schema = dict[str, Any]

_COMPARISONS = {"ge": "minimum", "le": "maximum"}
_KEPT = {
    "type", "description", "properties", "required", "items", "additionalProperties", "enum", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems",
    "minProperties", "maxProperties", "anyOf",
}  # fmt: skip


def _column(name: str, path: str, kind: str = "string", *, wide: bool = False, description: str = "") -> Schema:
    column: Schema = {"name": name, "jsonPath": path, "type": kind}
    if description:
        column["description"] = description
    if wide:
        column["priority"] = 1
    return column


_READY = ".status.conditions[?(@.type=='Ready')]"
COLUMNS: dict[str, list[Schema]] = {
    "FineTuneJob": [
        _column("Phase", ".status.phase"),
        _column("Progress", ".status.progress.summary"),
        _column("Loss", ".status.progress.loss"),
        _column("ETA", ".status.progress.eta"),
        _column("Model", ".status.model.name"),
        _column("Age", ".metadata.creationTimestamp", "date"),
        _column("Tokens/s", ".status.progress.tokensPerSecond", "number", wide=True),
        _column("Attempt", ".status.attemptCount", "integer", wide=True),
        _column("Queue", ".status.queue", wide=True),
        _column("Message", ".status.message", wide=True),
    ],
    "FineTunedModel": [
        _column("Ready", f"{_READY}.status"),
        _column("Reason", f"{_READY}.reason"),
        _column("Served-Name", ".spec.servedName"),
        _column("Server", ".status.server"),
        _column("Age", ".metadata.creationTimestamp", "date"),
        _column("Job", ".spec.source.job", wide=True),
        _column("Message", ".status.message", wide=True),
    ],
    "ModelServer": [
        _column("Ready", f"{_READY}.status"),
        _column("Replicas", ".status.readyReplicas", "integer"),
        _column("Adapters", ".status.readyAdapters", "integer"),
        _column("Address", ".status.address"),
        _column("Age", ".metadata.creationTimestamp", "date"),
        _column("Base", ".status.baseUri", wide=True),
        _column("Message", ".status.message", wide=True),
    ],
}

NAMES: dict[str, tuple[type[Model], str, str]] = {
    "FineTuneJob": (FineTuneJob, "finetunejobs", "ftj"),
    "FineTunedModel": (FineTunedModel, "finetunedmodels", "ftm"),
    "ModelServer": (ModelServer, "modelservers", "msv"),
}


def structural(model: type[Model]) -> Schema:
    """The whole object's schema. Rules of the models become x-kubernetes-validations."""
    raw = model.model_json_schema(by_alias=True)
    definitions = raw.pop("$defs", {})
    rules = _rules_by_title(model)
    schema = _convert(raw, definitions, rules)
    properties = schema["properties"]
    properties["apiVersion"] = {"type": "string"}
    properties["kind"] = {"type": "string"}
    properties["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    return schema


def _rules_by_title(model: type[Model]) -> dict[str, list[Schema]]:
    """Rules of every model that can be reached, by class name (pydantic's `title`)."""
    found: dict[str, list[Schema]] = {}
    for cls in [model, *_all_models(Model)]:
        rules = [rule.as_cel() for rule in cls.RULES] + [rule.as_cel() for rule in cls.TRANSITIONS]
        if rules:
            found[cls.__name__] = rules
    return found


def _all_models(base: type[Model]) -> list[type[Model]]:
    return [cls for child in base.__subclasses__() for cls in (child, *_all_models(child))]


def _convert(raw: Schema, definitions: Schema, rules: dict[str, list[Schema]]) -> Schema:
    schema = _resolve(raw, definitions)
    held = [*schema.get("x-kubernetes-validations", []), *rules.get(schema.get("title", ""), ())]
    kept = {key: value for key, value in schema.items() if key in _KEPT or key.startswith("x-kubernetes-")}
    kept.update({_COMPARISONS[key]: value for key, value in schema.items() if key in _COMPARISONS})
    if "const" in schema:
        kept["enum"] = [schema["const"]]
    if "properties" in kept:
        kept["properties"] = {name: _convert(item, definitions, rules) for name, item in kept["properties"].items()}
        kept.pop("additionalProperties", None)
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = _convert(kept["additionalProperties"], definitions, rules)
    if "items" in kept:
        kept["items"] = _convert(kept["items"], definitions, rules)
    if held:
        kept["x-kubernetes-validations"] = held
    return _openapi_v3(kept)


def _resolve(raw: Schema, definitions: Schema) -> Schema:
    """Inlines `$ref`, and takes the one branch of an Optional. What stands beside them wins (descriptions)."""
    if "$ref" in raw:
        target = definitions[raw["$ref"].rsplit("/", 1)[-1]]
        return {**_resolve(target, definitions), **{key: value for key, value in raw.items() if key != "$ref"}}
    branches = [branch for branch in raw.get("anyOf", ()) if branch.get("type") != "null"]
    if len(branches) == 1:
        outside = {key: value for key, value in raw.items() if key not in ("anyOf", "title")}
        return {**_resolve(branches[0], definitions), **outside}
    return raw


def _openapi_v3(schema: Schema) -> Schema:
    """JSON Schema 2020 writes exclusive bounds as numbers, Kubernetes' OpenAPI v3.0 as a flag beside the bound.

    Integers are int64: the API server then prunes nothing and CEL knows their size.
    """
    for flag, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if flag in schema:
            schema[bound] = schema.pop(flag)
            schema[flag] = True
    if schema.get("type") == "integer":
        schema["format"] = "int64"
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


def crd(kind: str) -> Schema:
    """The CustomResourceDefinition of `kind`."""
    model, plural, short = NAMES[kind]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["tuneward"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": structural(model)},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": COLUMNS[kind],
                }
            ],
        },
    }


def to_yaml(value: Any) -> str:
    """Keys in our order, long lines whole: a diff of the generated file shows what changed and no more."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


class _Dumper(yaml.SafeDumper):
    """No anchors: equal parts are written out each time, as a person reads them."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True
