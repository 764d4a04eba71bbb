"""What trainer tests share: the demo's base model, and models small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rooms import UNVERIFIED, Room, furnish
from tests.trainer.sessions import sessions_here
from tests.trainer.templates import FOLDER, MARKS, NAMES
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tuneward_api import names
from tuneward_trainer import gguf, prepare
from tuneward_trainer.session import Session

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; made at the first use, then kept in the repository's cache."""
    folder = ROOT / ".cache/models/smollm2-135m-instruct"
    assert gguf.main(None, folder) == 0
    return folder


@pytest.fixture
def room(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    """A job on SmolLM2, as a pod of prepare sees it."""
    for name, folder in [
        (names.ENV_STORE_DIR, tmp_path / "store"),
        (names.ENV_CLAIMS_DIR, smollm2.parents[1]),
        (names.ENV_CONFIGMAPS_DIR, tmp_path / "configmaps"),
        (names.ENV_TERMINATION_LOG, tmp_path / "termination-log"),
    ]:
        monkeypatch.setenv(name, str(folder))
    return furnish(tmp_path, smollm2)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the patches takes seconds and has its own tests."""
    monkeypatch.setattr(prepare, "verify", lambda found, method, **_: UNVERIFIED)


@pytest.fixture(scope="session")
def plain(smollm2: Path) -> Any:
    """SmolLM2's tokenizer with the special tokens of all templates."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    marks = sorted({mark for name in NAMES for mark in MARKS.findall((FOLDER / f"{name}.jinja").read_text())})
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    return tokenizer


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """A rank's session in this process, of which it is the only one."""
    with sessions_here(monkeypatch) as make:
        yield make
