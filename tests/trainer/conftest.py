"""What trainer tests share: the demo's base model, and models small enough to train in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneward_trainer import gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; made at the first use, then kept in the repository's cache."""
    folder = ROOT / ".cache/models/smollm2-135m-instruct"
    assert gguf.main(None, folder) == 0
    return folder
