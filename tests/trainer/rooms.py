"""What prepare and validate stand in: a store, a claim with the model, a ConfigMap with data, and where reports go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer.__main__ import main

UNVERIFIED = ResolvedPacking(mode="OneDocument", reason="not asked in this test")


@dataclass
class Room:
    root: Path
    request: dict[str, Any]

    def write_request(self) -> Path:
        file = self.root / "request.json"
        file.write_text(json.dumps(self.request))
        return file

    def run(self, command: str = "prepare") -> tuple[int, dict[str, Any]]:
        code = main([command, "--request", str(self.write_request())])
        return code, json.loads((self.root / "termination-log").read_text())

    @property
    def data(self) -> Path:
        return self.root / "configmaps/chats/train.jsonl"

    @property
    def run_directory(self) -> Path:
        return self.root / "store/jobs/bot-01234567"


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"How heavy is {i}?"},
                {"role": "assistant", "content": f"It is {i} grams."},
            ]
        }
        for i in range(count)
    ]


def write(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def furnish(root: Path, model: Path) -> Room:
    """20 chats, and a job that trains `model` on them."""
    (root / "store").mkdir()
    write(root / "configmaps/chats/train.jsonl", chats(20))
    request = {
        "job": {"namespace": "team", "name": "bot", "uid": "01234567-89ab"},
        "spec": {
            "model": {"uri": f"pvc://{model.parent.name}/{model.name}"},
            "datasets": {"training": [{"uri": "configmap://chats/train.jsonl"}]},
            "workers": {"gpusPerWorker": 0},
        },
        "images": {"trainer": "tuneward"},
        "storeClaim": "tuneward-store",
        "runDirectory": "jobs/bot-01234567",
    }
    return Room(root, request)
