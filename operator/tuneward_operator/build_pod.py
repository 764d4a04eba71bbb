"""What all our pods share: mounts, security, and the constants that keep a cluster's machinery off a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tuneward_api.names import claim_label
from tuneward_operator.kube import Object
from tuneward_operator.settings import Settings

DOCUMENTS: Final = "/etc/tuneward"
TMP: Final = "/mnt/tmp"
"""Not /tmp: on the local Kubernetes the caller's virtual environment may lie there, and a mount would hide it."""

POD_ANNOTATIONS: Final = {
    # A mesh's sidecar breaks the rendezvous of a gang, and keeps a finished pod alive.
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
    # Consolidation of nodes evicts trainings that are hours old.
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}


class Mounts:
    """Collects volumes and where the main container sees them; a claim is one volume, however often it is mounted."""

    def __init__(self) -> None:
        self._volumes: dict[str, Object] = {"tmp": {"emptyDir": {}}}
        self._claims: dict[str, str] = {}
        self._mounts: list[Object] = [{"name": "tmp", "mountPath": TMP}]

    def claim(self, claim: str, path: str, *, read_only: bool = False, sub_path: str = "") -> None:
        volume = self._claims.setdefault(claim, f"claim-{len(self._claims)}")
        self._volumes[volume] = {"persistentVolumeClaim": {"claimName": claim}}
        self._mount(volume, path, read_only=read_only, sub_path=sub_path)

    def configmap(self, name: str, path: str) -> None:
        # Names of ConfigMaps may hold dots and 253 characters, names of volumes may not.
        volume = f"configmap-{len(self._volumes)}"
        self._volumes[volume] = {"configMap": {"name": name}}
        self._mount(volume, path, read_only=True)

    def shared_memory(self) -> None:
        """NCCL moves data between the GPUs of a pod through it; a container's own has 64 MB."""
        self._volumes["shm"] = {"emptyDir": {"medium": "Memory"}}
        self._mount("shm", "/dev/shm")

    def volumes(self) -> list[Object]:
        return [{"name": name, **source} for name, source in self._volumes.items()]

    def mounts(self) -> list[Object]:
        return list(self._mounts)

    def _mount(self, volume: str, path: str, *, read_only: bool = False, sub_path: str = "") -> None:
        mount: Object = {"name": volume, "mountPath": path}
        if read_only:
            mount["readOnly"] = True
        if sub_path:
            mount["subPath"] = sub_path.strip("/")
        self._mounts.append(mount)


def field_env(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def container(
    name: str, image: str, command: Sequence[str], env: Sequence[Object], resources: Object, mounts: Mounts
) -> dict[str, Any]:
    """HOME, USER and TMPDIR are set because a uid that the cluster chose has no entry in /etc/passwd."""
    home = [{"name": "HOME", "value": TMP}, {"name": "USER", "value": "tuneward"}, {"name": "TMPDIR", "value": TMP}]
    return {
        "name": name,
        "image": image,
        "command": list(command),
        "env": [*home, *env],
        "resources": resources,
        "volumeMounts": mounts.mounts(),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def security(settings: Settings) -> Object:
    """The restricted Pod Security level; uid and group can be left to the cluster."""
    found: Object = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if settings.run_as_user >= 0:
        found |= {"runAsUser": settings.run_as_user, "runAsGroup": settings.run_as_user}
    if settings.fs_group >= 0:
        # OnRootMismatch: else every start walks a store of terabytes.
        found |= {"fsGroup": settings.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    return found


def beside(template: Object, held: Sequence[str]) -> Object:
    """The pod template, kept on the node of all other pods that use the first of its claims that is `held`: a ReadWriteOnce
    volume is on one node at a time, and nothing in Kubernetes itself keeps its pods together. The first pod may go
    to any: it matches its own term, and so waits for nobody. One term, since of several only pods that match all count."""
    volumes = template["spec"]["volumes"]
    mounted = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
    labels = [claim_label(claim) for claim in held if claim in mounted]
    if labels:
        template["metadata"]["labels"] |= dict.fromkeys(labels, "")
        term = {"labelSelector": {"matchLabels": {labels[0]: ""}}, "topologyKey": "kubernetes.io/hostname"}
        template["spec"]["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return template


def pod_spec(main: Object, mounts: Mounts, settings: Settings) -> Object:
    pull = {"imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets]}
    return {
        **(pull if settings.image_pull_secrets else {}),
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        # A Service called `master` would inject MASTER_PORT.
        "enableServiceLinks": False,
        "securityContext": security(settings),
        "containers": [main],
        "volumes": mounts.volumes(),
    }
