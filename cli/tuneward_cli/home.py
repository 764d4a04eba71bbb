"""Where things are: the cluster's data directory, the source checkout, the programs, the kubeconfig."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuneward_cli.errors import CommandError

ENV_HOME: Final = "TUNEWARD_HOME"
DEMO_MODEL: Final = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Home:
    """One local cluster: everything it has lies under `data`."""

    data: Path

    @classmethod
    def at(cls, option: str | None = None) -> Home:
        """--data, else $TUNEWARD_HOME, else the user's data folder."""
        share = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        chosen = option or os.environ.get(ENV_HOME) or f"{share}/tuneward"
        return cls(Path(chosen).expanduser().absolute())

    @property
    def kubeconfig(self) -> Path:
        return self.data / "kubeconfig"


def source_tree() -> Path | None:
    """The checkout that this package lies in, if it does."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "local" / "build.sh").is_file() and (root / "crds").is_dir() else None


def required_tree(what: str) -> Path:
    """The checkout, for what has only been built from source so far."""
    root = source_tree()
    if root is None:
        raise CommandError(f"{what} is found in a source checkout only", paste="git clone the repository, then: make setup")
    return root


def find_program(name: str) -> Path | None:
    """A built program: beside the checkout first, since that one is of this version."""
    root = source_tree()
    built = root / ".build" / "bin" / name if root else None
    if built and os.access(built, os.X_OK):
        return built
    found = shutil.which(name)
    return Path(found) if found else None


def demo_model() -> Path:
    """The converted base model of the demo."""
    return required_tree("the demo's base model") / ".cache" / "models" / DEMO_MODEL
