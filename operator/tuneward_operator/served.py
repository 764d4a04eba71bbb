"""Who shall be served, and what the agents found: pure, for the passes of servers and of models alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, NamedTuple

from pydantic import ValidationError

from tuneward_api.conditions import Reason
from tuneward_api.files import AdapterProof, AgentReport, WantedAdapter, WantedAdapters
from tuneward_api.finetunedmodel import FineTunedModelSpec, ReplicaProof
from tuneward_api.names import adapter_directory
from tuneward_api.uris import parse_uri
from tuneward_operator.build_server import ADAPTERS_FOLDER, Server
from tuneward_operator.tolerant import tolerant
from tuneward_operator.views import ResourceView

MAX_PROOF_MESSAGE: Final = 512
MAX_REPLICAS: Final = 32
_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)


class Verdict(NamedTuple):
    """The Ready of a model."""

    ready: bool
    reason: Reason
    message: str

    @property
    def underway(self) -> bool:
        """Whether waiting is likely to change it."""
        return not self.ready and self.reason in (Reason.LOADING, Reason.SERVER_NOT_READY)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A ready pod of a server, and what its agent said; None: it did not answer."""

    pod: str
    report: AgentReport | None = None


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a server's pass found. `asks` has an entry for each model that names the server, archived ones not."""

    asks: Mapping[str, WantedAdapter | Verdict] = field(default_factory=dict)
    replicas: tuple[Replica, ...] = ()
    waits: Verdict | None = None
    """Why the server serves nothing yet; None: it does."""

    def verdict(self, model: str) -> Verdict | None:
        """None: the server has not seen the model yet."""
        asked = self.asks.get(model)
        if asked is None or isinstance(asked, Verdict):
            return asked
        return self.waits or judge(asked, self.replicas)

    def proofs(self, model: str) -> list[ReplicaProof]:
        asked = self.asks.get(model)
        if not isinstance(asked, WantedAdapter):
            return []
        return [_shown(replica, proof_of(asked, replica)) for replica in self.replicas[:MAX_REPLICAS]]

    def wanted(self) -> WantedAdapters:
        return WantedAdapters(adapters=unique(ask for ask in self.asks.values() if isinstance(ask, WantedAdapter)))


def asks_of(server: Server, base_digest: str, models: Iterable[ResourceView]) -> dict[str, WantedAdapter | Verdict]:
    """By model, newest first: what to serve, or why not. Beyond `maxAdapters` the oldest wait."""
    newest_first = sorted(models, key=lambda model: (model.created_at or _LONG_AGO, model.name), reverse=True)
    found: dict[str, WantedAdapter | Verdict] = {}
    names: set[str] = set()
    for model in newest_first:
        if model.deleting_since is not None or model.spec.get("archived"):
            continue
        asked = ask_of(server, base_digest, model)
        if isinstance(asked, WantedAdapter):
            names.add(asked.name)
            if len(names) > server.max_adapters:
                asked = too_many(server)
        found[model.name] = asked
    return found


def ask_of(server: Server, base_digest: str, model: ResourceView) -> WantedAdapter | Verdict:
    try:
        spec = tolerant(FineTunedModelSpec, model.spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("spec", *first["loc"]))
        return Verdict(False, Reason.CONFIG_INVALID, f"{where}: {first['msg']} (is this operator older than the CRD?)")
    if spec.adapter is None:
        message = f"it is a base model of its own; make a ModelServer whose spec.model.uri is {spec.artifact.uri}/model"
        return Verdict(False, Reason.BASE_MISMATCH, message)
    if spec.base.digest != base_digest:
        message = (
            f"it was trained on the base model {spec.base.uri} ({spec.base.digest}), and ModelServer {server.name} serves "
            f"another one ({base_digest}); name a ModelServer of that base in its label"
        )
        return Verdict(False, Reason.BASE_MISMATCH, message)
    place = parse_uri(spec.artifact.uri)
    folder = adapter_directory(spec.artifact.digest)
    if place.authority != server.store_claim or place.path.strip("/") != folder:
        message = f"its files are at {spec.artifact.uri}; ModelServer {server.name} looks for them at "
        return Verdict(False, Reason.ARTIFACT_MISSING, f"{message}pvc://{server.store_claim}/{folder}")
    return WantedAdapter(
        name=spec.served_name,
        model=model.name,
        path=folder.removeprefix(f"{ADAPTERS_FOLDER}/"),
        digest=spec.artifact.digest,
        rank=spec.adapter.rank,
    )


def too_many(server: Server) -> Verdict:
    message = f"ModelServer {server.name} holds {server.max_adapters} newer adapters; raise its spec.maxAdapters or "
    return Verdict(False, Reason.TOO_MANY_ADAPTERS, f"{message}archive a FineTunedModel")


def unique(adapters: Iterable[WantedAdapter]) -> list[WantedAdapter]:
    """Two models of the same bytes have one name; an engine takes it once."""
    found: dict[str, WantedAdapter] = {}
    for adapter in adapters:
        found.setdefault(adapter.name, adapter)
    return list(found.values())


def proof_of(wanted: WantedAdapter, replica: Replica) -> AdapterProof:
    """What the agent said about this very adapter; Loading while it says nothing."""
    if replica.report is None:
        return _loading(wanted, "its agent does not answer")
    for proof in replica.report.adapters:
        if (proof.name, proof.digest) == (wanted.name, wanted.digest):
            return proof
    return _loading(wanted, "its agent has not seen it yet")


def _loading(wanted: WantedAdapter, message: str) -> AdapterProof:
    return AdapterProof(name=wanted.name, digest=wanted.digest, ready=False, reason=Reason.LOADING, message=message)


def judge(wanted: WantedAdapter, replicas: Sequence[Replica]) -> Verdict:
    """Served when at least one and every ready replica has proved it. A refusal is more telling than a wait."""
    if not replicas:
        return Verdict(False, Reason.SERVER_NOT_READY, "no replica of its ModelServer is ready")
    proofs = [(replica.pod, proof_of(wanted, replica)) for replica in replicas]
    missing = [(pod, proof) for pod, proof in proofs if not proof.ready]
    if not missing:
        return Verdict(True, Reason.SERVED, f"{len(proofs)} of {len(proofs)} replicas proved it; ask for {wanted.name}")
    pod, proof = min(missing, key=lambda item: item[1].reason == Reason.LOADING)
    done = len(proofs) - len(missing)
    return Verdict(False, proof.reason, f"{done} of {len(proofs)} replicas proved it; {pod}: {proof.message}")


def _shown(replica: Replica, proof: AdapterProof) -> ReplicaProof:
    message = proof.message[:MAX_PROOF_MESSAGE] or None
    return ReplicaProof(pod=replica.pod, ready=proof.ready, reason=str(proof.reason), message=message)
