"""One table of bad YAML, through both doors: `tuneward validate` and the API server refuse the same, at the same field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from tests.support.cluster import Cluster

from tuneward_api.crd import NAMES
from tuneward_api.loader import load_documents
from tuneward_api.names import GROUP, VERSION
from tuneward_api.validate import validate_document

GOOD_JOB = """
apiVersion: tuneward.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot}
spec:
  model: {uri: "hf://mistralai/Mistral-7B-Instruct-v0.3", secretRef: {name: hf-token}}
  datasets:
    training:
    - {uri: "pvc://data/chats.jsonl", weight: 2}
    - {uri: "configmap://chats/more.jsonl", format: Messages}
    validation:
    - {uri: "pvc://data/held-out.jsonl.gz", fields: {question: prompt, answer: completion}}
    invalidSampleSkipPercentage: 0.5
  method: {type: LoRA, rank: 16, alpha: 32, dropout: 0, rsLoRA: false, targetModules: [q_proj, v_proj]}
  hyperparameters: {epochs: 3, learningRate: 1e-4, scheduler: Cosine, warmupFraction: 0.05, sequenceLength: 2048}
  workers:
    replicas: 2
    gpusPerWorker: 8
    resources: {requests: {cpu: "8", memory: 64Gi}, limits: {memory: 64Gi}}
    baseWeights: Sharded
    nodeSelector: {gpu: h100}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  checkpoint: {everySeconds: 600, keep: 3}
  evaluation:
    everySteps: 50
    patience: 3
    task: {grader: JSONSchema, jsonSchema: '{"type": "object"}', samples: 16, maxTokens: 128}
    gate: {maxLoss: 2.0, minImprovement: 0.05, minScore: 0.8}
  trackers:
    wandb: {project: support, entity: acme, group: bots, baseUrl: "https://wandb.acme.com", secretRef: {name: wandb}}
    mlflow: {trackingUri: "https://mlflow.acme.com", experiment: support, secretRef: {name: mlflow}}
    trackio: {project: support, space: acme/trackio, secretRef: {name: hf-token}}
  store: {claimName: models}
  register: {name: support, suffix: support-v1}
  serve: {server: mistral}
  runPolicy: {retries: {infrastructure: 3, outOfMemory: 0}, ttlSecondsAfterFinished: 3600}
"""
GOOD_SERVER = """
apiVersion: tuneward.dev/v1alpha1
kind: ModelServer
metadata: {name: mistral}
spec:
  model: {uri: "pvc://models/imports/mistral"}
  replicas: 1
  maxAdapters: 8
"""


@dataclass(frozen=True)
class Bad:
    """`change` at `at` of the good object; both doors must name `field`, and ours must say `remedy`."""

    name: str
    at: str
    change: Any
    field: str
    remedy: str
    kind: str = "FineTuneJob"


REMOVE = object()
PREFERENCE: dict[str, Any] = {"training": [{"uri": "pvc://data/pairs.jsonl", "format": "PreferredOutput"}]}
PRETRAINING: dict[str, Any] = {"training": [{"uri": "pvc://data/text.jsonl", "format": "Text"}]}
CASES = [
    Bad("no model", "spec.model", REMOVE, "spec.model", "required"),
    Bad("no model uri", "spec.model.uri", REMOVE, "spec.model.uri", "required"),
    Bad("model scheme", "spec.model.uri", "ftp://a/b", "spec.model.uri", "must be hf://"),
    Bad("model uri climbs", "spec.model.uri", "pvc://a/../b", "spec.model.uri", ".."),
    Bad("model with a path", "spec.model.uri", "model://support-0a1b2c3d/1", "spec.model.uri", "or model://NAME"),
    Bad("model of no name", "spec.model.uri", "model://Support", "spec.model.uri", "or model://NAME"),
    Bad("model uri wrong type", "spec.model.uri", 3, "spec.model.uri", "must be a string"),
    Bad("unknown field in model", "spec.model.url", "x", "spec.model.url", "allowed here: uri, secretRef"),
    Bad("secret name", "spec.model.secretRef.name", "Not_A_Name", "spec.model.secretRef.name", "must match"),
    Bad("secret without name", "spec.model.secretRef.name", REMOVE, "spec.model.secretRef.name", "required"),
    Bad("unknown field in spec", "spec.modle", {}, "spec.modle", "allowed here: model, datasets"),
    Bad("no such tracker", "spec.trackers.comet", {}, "spec.trackers.comet", "allowed here: wandb, mlflow, trackio"),
    Bad("MLflow nowhere", "spec.trackers.mlflow.trackingUri", REMOVE, "spec.trackers.mlflow.trackingUri", "required"),
    Bad(
        "a password in an address",
        "spec.trackers.mlflow.trackingUri",
        "https://me:secret@mlflow.acme.com",
        "spec.trackers.mlflow.trackingUri",
        "must match",
    ),
    Bad("a Space of nobody", "spec.trackers.trackio.space", "trackio", "spec.trackers.trackio.space", "must match"),
    Bad("a key in the job", "spec.trackers.wandb.apiKey", "x", "spec.trackers.wandb.apiKey", "allowed here: project"),
    Bad("no datasets", "spec.datasets", REMOVE, "spec.datasets", "required"),
    Bad("no training", "spec.datasets.training", REMOVE, "spec.datasets.training", "required"),
    Bad("training empty", "spec.datasets.training", [], "spec.datasets.training", "at least 1"),
    Bad("training no list", "spec.datasets.training", "a.jsonl", "spec.datasets.training", "must be a list"),
    Bad("too many sources", "spec.datasets.training", [{"uri": "pvc://a/b"}] * 65, "spec.datasets.training", "at most 64"),
    Bad("no dataset uri", "spec.datasets.training.0.uri", REMOVE, "spec.datasets.training[0].uri", "required"),
    Bad(
        "dataset scheme",
        "spec.datasets.training.1.uri",
        "https://a/b",
        "spec.datasets.training[1].uri",
        "must be configmap://",
    ),
    Bad(
        "column of no pair",
        "spec.datasets.training.0.fields",
        {"a": "better"},
        "spec.datasets.training[0].fields.a",
        "'chosen'",
    ),
    Bad("dataset format", "spec.datasets.training.0.format", "chat", "spec.datasets.training[0].format", "'Messages'"),
    Bad("weight as text", "spec.datasets.training.0.weight", "2", "spec.datasets.training[0].weight", "whole number"),
    Bad("weight zero", "spec.datasets.training.0.weight", 0, "spec.datasets.training[0].weight", "at least 1"),
    Bad(
        "column of no field",
        "spec.datasets.training.0.fields",
        {"frage": "question"},
        "spec.datasets.training[0].fields.frage",
        "'prompt'",
    ),
    Bad(
        "two columns of one field",
        "spec.datasets.training.0.fields",
        {"a": "prompt", "b": "prompt"},
        "spec.datasets.training[0].fields",
        "two columns",
    ),
    Bad("no columns", "spec.datasets.training.0.fields", {}, "spec.datasets.training[0].fields", "at least 1"),
    Bad(
        "share of invalid samples",
        "spec.datasets.invalidSampleSkipPercentage",
        101,
        "spec.datasets.invalidSampleSkipPercentage",
        "at most 100",
    ),
    Bad("null model uri", "spec.model.uri", None, "spec.model.uri", "required"),
    Bad("two validations", "spec.datasets.validationFraction", 0.1, "spec.datasets", "not both"),
    Bad(
        "validation scheme",
        "spec.datasets.validation.0.uri",
        "data.jsonl",
        "spec.datasets.validation[0].uri",
        "must be configmap://",
    ),
    Bad("onTooLong", "spec.datasets.onTooLong", "Cut", "spec.datasets.onTooLong", "'Truncate'"),
    Bad("lossOn", "spec.datasets.lossOn", "User", "spec.datasets.lossOn", "'LastAssistant'"),
    Bad("objective", "spec.objective.type", "RLHF", "spec.objective.type", "'Pretraining'"),
    Bad("beta zero", "spec.objective", {"type": "DPO", "dpo": {"beta": 0}}, "spec.objective.dpo.beta", "greater than 0"),
    Bad("beta huge", "spec.objective", {"type": "DPO", "dpo": {"beta": 101}}, "spec.objective.dpo.beta", "at most 100"),
    Bad("unknown of dpo", "spec.objective.dpo", {"gamma": 1}, "spec.objective.dpo.gamma", "allowed here: beta"),
    Bad("dpo without its type", "spec.objective.dpo", {"beta": 0.1}, "spec.objective", "set type to DPO"),
    Bad("dpo of SFT", "spec.objective", {"type": "SFT", "dpo": {}}, "spec.objective", "set type to DPO"),
    Bad("chats to compare", "spec.objective.type", "DPO", "spec", "learns from pairs"),
    Bad("pairs to imitate", "spec.datasets.training.0.format", "Preference", "spec", "set objective.type to DPO"),
    Bad(
        "lossOn to compare with",
        "spec",
        {"model": {"uri": "pvc://a/b"}, "objective": {"type": "DPO"}, "datasets": PREFERENCE | {"lossOn": "All"}},
        "spec",
        "leave datasets.lossOn out",
    ),
    Bad("chats to pretrain on", "spec.objective.type", "Pretraining", "spec", "learns Text samples"),
    Bad(
        "lossOn to pretrain with",
        "spec",
        {"model": {"uri": "pvc://a/b"}, "objective": {"type": "Pretraining"}, "datasets": PRETRAINING | {"lossOn": "All"}},
        "spec",
        "leave datasets.lossOn out",
    ),
    Bad("method", "spec.method.type", "IA3", "spec.method.type", "'DoRA'"),
    Bad("rank zero", "spec.method.rank", 0, "spec.method.rank", "at least 1"),
    Bad("rank fraction", "spec.method.rank", 1.5, "spec.method.rank", "whole number"),
    Bad("rank huge", "spec.method.rank", 1000, "spec.method.rank", "at most 512"),
    Bad("alpha zero", "spec.method.alpha", 0, "spec.method.alpha", "greater than 0"),
    Bad("dropout one", "spec.method.dropout", 1, "spec.method.dropout", "less than 1"),
    Bad("rsLoRA text", "spec.method.rsLoRA", "yes", "spec.method.rsLoRA", "true or false"),
    Bad("no targets", "spec.method.targetModules", [], "spec.method.targetModules", "at least 1"),
    Bad("target pattern", "spec.method.targetModules", ["q*"], "spec.method.targetModules", "name of a Linear"),
    Bad("QLoRA in other letters", "spec.method.type", "Qlora", "spec.method.type", "'LoRA', 'QLoRA', 'DoRA'"),
    Bad("method like Full", "spec.method.type", "FullFT", "spec.method.type", "'Full'"),
    Bad("shape of Full", "spec.method.type", "Full", "spec.method", "rank, alpha, dropout, rsLoRA and targetModules"),
    Bad("rank of Full", "spec.method", {"type": "Full", "rank": 8}, "spec.method", "leave them out"),
    Bad("Full served by another base", "spec.method", {"type": "Full"}, "spec", "leave serve out"),
    Bad("epochs and steps", "spec.hyperparameters.steps", 10, "spec.hyperparameters", "epochs or steps, not both"),
    Bad("epochs zero", "spec.hyperparameters.epochs", 0, "spec.hyperparameters.epochs", "at least 1"),
    Bad("steps negative", "spec.hyperparameters", {"steps": -1}, "spec.hyperparameters.steps", "at least 1"),
    Bad(
        "negative learning rate",
        "spec.hyperparameters.learningRate",
        -1e-4,
        "spec.hyperparameters.learningRate",
        "greater than 0",
    ),
    Bad(
        "learning rate text",
        "spec.hyperparameters.learningRate",
        "1e-4",
        "spec.hyperparameters.learningRate",
        "must be a number",
    ),
    Bad("scheduler", "spec.hyperparameters.scheduler", "cosine", "spec.hyperparameters.scheduler", "'Cosine'"),
    Bad("warm-up", "spec.hyperparameters.warmupFraction", 1, "spec.hyperparameters.warmupFraction", "less than 1"),
    Bad("decay", "spec.hyperparameters.weightDecay", -1, "spec.hyperparameters.weightDecay", "at least 0"),
    Bad("clip", "spec.hyperparameters.maxGradNorm", 0, "spec.hyperparameters.maxGradNorm", "greater than 0"),
    Bad("short rows", "spec.hyperparameters.sequenceLength", 8, "spec.hyperparameters.sequenceLength", "at least 16"),
    Bad("small batch", "spec.hyperparameters.batchTokens", 1, "spec.hyperparameters.batchTokens", "at least 16"),
    Bad("seed", "spec.hyperparameters.seed", -1, "spec.hyperparameters.seed", "at least 0"),
    Bad("deterministic", "spec.hyperparameters.deterministic", "yes", "spec.hyperparameters.deterministic", "true or false"),
    Bad("no worker", "spec.workers.replicas", 0, "spec.workers.replicas", "at least 1"),
    Bad("base elsewhere", "spec.workers.baseWeights", "Offloaded", "spec.workers.baseWeights", "'Replicated' or 'Sharded'"),
    Bad("nobody to share with", "spec.workers", {"baseWeights": "Sharded"}, "spec.workers", "set replicas or gpusPerWorker"),
    Bad("one CPU to share", "spec.workers", {"gpusPerWorker": 0, "baseWeights": "Sharded"}, "spec.workers", "to 2 or more"),
    Bad(
        "Full says where its base is",
        "spec",
        {
            "model": {"uri": "pvc://a/b"},
            "datasets": PRETRAINING,
            "method": {"type": "Full"},
            "workers": {"baseWeights": "Replicated"},
        },
        "spec",
        "leave workers.baseWeights out",
    ),
    Bad("GPUs negative", "spec.workers.gpusPerWorker", -1, "spec.workers.gpusPerWorker", "at least 0"),
    Bad(
        "GPU key in resources",
        "spec.workers.resources.limits",
        {"nvidia.com/gpu": 1},
        "spec.workers.resources.limits",
        "workers.gpusPerWorker",
    ),
    Bad("quantity", "spec.workers.resources.requests.memory", "64 GB", "spec.workers.resources.requests.memory", "quantity"),
    Bad("selector", "spec.workers.nodeSelector.gpu", 1, "spec.workers.nodeSelector.gpu", "must be a string"),
    Bad("toleration", "spec.workers.tolerations.0.effect", "Never", "spec.workers.tolerations[0].effect", "'NoSchedule'"),
    Bad("two intervals", "spec.checkpoint.everySteps", 10, "spec.checkpoint", "not both"),
    Bad("keep none", "spec.checkpoint.keep", 0, "spec.checkpoint.keep", "at least 1"),
    Bad("evaluation", "spec.evaluation.everySteps", 0, "spec.evaluation.everySteps", "at least 1"),
    Bad("gate without validation", "spec.datasets.validation", REMOVE, "spec", "gate need datasets.validation"),
    Bad("gate loss", "spec.evaluation.gate.maxLoss", 0, "spec.evaluation.gate.maxLoss", "greater than 0"),
    Bad("gate score", "spec.evaluation.gate.minScore", 2, "spec.evaluation.gate.minScore", "at most 1"),
    Bad("score of nothing", "spec.evaluation.task", REMOVE, "spec.evaluation", "gate.minScore needs task.grader"),
    Bad("impatience", "spec.evaluation.patience", 0, "spec.evaluation.patience", "at least 1"),
    Bad("patience for nothing", "spec.evaluation.everySteps", REMOVE, "spec.evaluation", "patience needs everySteps"),
    Bad("grader", "spec.evaluation.task.grader", "exact", "spec.evaluation.task.grader", "'Exact'"),
    Bad("no schema", "spec.evaluation.task.jsonSchema", REMOVE, "spec.evaluation.task", "belong together"),
    Bad("schema of another grader", "spec.evaluation.task.grader", "Exact", "spec.evaluation.task", "belong together"),
    Bad(
        "schema that is none",
        "spec.evaluation.task.jsonSchema",
        "object",
        "spec.evaluation.task.jsonSchema",
        "must be a JSON Schema",
    ),
    Bad("nobody asked", "spec.evaluation.task.samples", 0, "spec.evaluation.task.samples", "at least 1"),
    Bad("no answer", "spec.evaluation.task.maxTokens", 0, "spec.evaluation.task.maxTokens", "at least 1"),
    Bad("gate share", "spec.evaluation.gate.minImprovement", 2, "spec.evaluation.gate.minImprovement", "at most 1"),
    Bad("claim", "spec.store.claimName", "My Claim", "spec.store.claimName", "must match"),
    Bad("register name", "spec.register.name", "Support", "spec.register.name", "must match"),
    Bad("suffix", "spec.register.suffix", "a b", "spec.register.suffix", "must match"),
    Bad("serve without server", "spec.serve.server", REMOVE, "spec.serve.server", "required"),
    Bad("suspend", "spec.suspend", "true", "spec.suspend", "true or false"),
    Bad("cancel", "spec.cancel", 1, "spec.cancel", "true or false"),
    Bad("retries", "spec.runPolicy.retries.infrastructure", -1, "spec.runPolicy.retries.infrastructure", "at least 0"),
    Bad("unknown retry", "spec.runPolicy.retries.gpu", 1, "spec.runPolicy.retries.gpu", "allowed here: infrastructure"),
    Bad("start timeout", "spec.runPolicy.startTimeoutSeconds", 1, "spec.runPolicy.startTimeoutSeconds", "at least 10"),
    Bad("hang timeout", "spec.runPolicy.hangTimeoutSeconds", 1, "spec.runPolicy.hangTimeoutSeconds", "at least 10"),
    Bad("deadline", "spec.runPolicy.activeDeadlineSeconds", 0, "spec.runPolicy.activeDeadlineSeconds", "at least 1"),
    Bad("ttl", "spec.runPolicy.ttlSecondsAfterFinished", -1, "spec.runPolicy.ttlSecondsAfterFinished", "at least 0"),
    Bad("name too long", "metadata.name", "a" * 49, "", "at most 48 characters"),
    Bad("name with a dot", "metadata.name", "a.b", "", "begin with a letter"),
    Bad(
        "server of an adapter",
        "spec.model.uri",
        "model://support-0a1b2c3d",
        "spec.model.uri",
        "must be hf://",
        "ModelServer",
    ),
    Bad("server engine", "spec.engine", "VLLM", "spec.engine", "'Embedded'", "ModelServer"),
    Bad("server adapters", "spec.maxAdapters", 0, "spec.maxAdapters", "at least 1", "ModelServer"),
    Bad("server rank", "spec.maxRank", 0, "spec.maxRank", "at least 1", "ModelServer"),
    Bad("server replicas", "spec.replicas", -1, "spec.replicas", "at least 0", "ModelServer"),
    Bad("server key", "spec.apiKeySecretRef.name", "A", "spec.apiKeySecretRef.name", "must match", "ModelServer"),
    Bad("server name", "metadata.name", "1server", "", "begin with a letter", "ModelServer"),
]
GOOD_PREFERENCE = """
apiVersion: tuneward.dev/v1alpha1
kind: FineTuneJob
metadata: {name: brief}
spec:
  model: {uri: "model://support-0a1b2c3d"}
  objective: {type: DPO, dpo: {beta: 0.2}}
  datasets: {training: [{uri: "pvc://data/pairs.jsonl"}, {uri: "pvc://data/more.jsonl", format: PreferredOutput}]}
"""
GOOD_PREFERENCES = [GOOD_PREFERENCE, f"{GOOD_PREFERENCE}  method: {{type: Full}}\n"]
GOOD = {"FineTuneJob": GOOD_JOB, "ModelServer": GOOD_SERVER}


def changed(case: Bad) -> dict[str, Any]:
    value: dict[str, Any] = load_documents(GOOD[case.kind])[0].value
    parts = [int(part) if part.isdigit() else part for part in case.at.split(".")]
    parent: Any = value
    for part in parts[:-1]:
        parent = parent.setdefault(part, {}) if isinstance(parent, dict) else parent[part]
    if case.change is REMOVE:
        del parent[parts[-1]]
    else:
        parent[parts[-1]] = case.change
    return value


@pytest.fixture(scope="module")
def objects(control_plane: Cluster) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(config.new_client_from_config(str(control_plane.kubeconfig)))


def refusal(api: client.CustomObjectsApi, value: dict[str, Any]) -> str:
    """What the API server says to a strict dry run; empty if it takes it."""
    plural = NAMES[value["kind"]][1]
    try:
        api.create_namespaced_custom_object(
            GROUP, VERSION, "default", plural, value, dry_run="All", field_validation="Strict"
        )
    except ApiException as error:
        return str(json.loads(error.body)["message"])
    return ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_validate_names_line_field_and_remedy(case: Bad) -> None:
    text = json.dumps(changed(case), indent=1)  # JSON is YAML: the loader finds the lines
    document = load_documents(text, file="job.yaml")[0]
    _, problems = validate_document(document)
    assert [problem.field for problem in problems] == [case.field]
    assert case.remedy in problems[0].message
    assert str(problems[0]).startswith("job.yaml:")


@pytest.mark.cluster
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_api_server_refuses_at_the_same_field(objects: client.CustomObjectsApi, case: Bad) -> None:
    message = refusal(objects, changed(case))
    assert message, "the API server took it"
    # The API server writes a map's keys as m[key] or m.key, and Go's decoder names only the leaf of a wrong type.
    wanted = case.field or "at most 48 characters"
    spellings = {wanted, "[".join(wanted.rsplit(".", 1)) + "]" if "." in wanted else wanted}
    assert any(spelling in message for spelling in spellings), message


@pytest.mark.cluster
@pytest.mark.parametrize("text", [GOOD_JOB, GOOD_SERVER, *GOOD_PREFERENCES, GOOD_JOB.replace("weight: 2", "weight: null")])
def test_both_doors_take_what_is_right(objects: client.CustomObjectsApi, text: str) -> None:
    document = load_documents(text)[0]
    _, problems = validate_document(document)
    assert problems == []
    assert refusal(objects, document.value) == ""


@pytest.mark.cluster
def test_a_changed_spec_is_refused_with_the_way_out(
    objects: client.CustomObjectsApi, control_plane: Cluster, namespace: str
) -> None:
    value = load_documents(GOOD_JOB)[0].value
    arguments = (GROUP, VERSION, namespace, "finetunejobs")
    objects.create_namespaced_custom_object(*arguments, value)

    def patch(spec: dict[str, Any]) -> str:
        body = json.dumps({"spec": spec})
        done = control_plane.try_kubectl("-n", namespace, "patch", "ftj", "support-bot", "--type=merge", "-p", body)
        return done.stderr

    for field, change in {
        "model": {"uri": "pvc://a/b"},
        "datasets": {"lossOn": "All"},
        "objective": {"type": "SFT"},
        "method": {"rank": 8},
        "hyperparameters": {"seed": 4},
        "workers": {"replicas": 1},
        "checkpoint": {"keep": 1},
        "evaluation": None,
        "store": {"claimName": "other"},
        "register": {"suffix": "x"},
    }.items():
        said = patch({field: change})
        assert f"{field} cannot be changed after creation; make a new FineTuneJob under another name" in said
    assert patch({"suspend": True, "serve": None, "runPolicy": {"activeDeadlineSeconds": 60}}) == ""
    assert patch({"cancel": True}) == ""
    assert "cancel is one way" in patch({"cancel": None})
    assert "cancel is one way" in patch({"cancel": False})
