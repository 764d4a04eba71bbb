"""`tuneward merge`: what the trainer says of it is the command's sentence and exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneward_api.names import ExitCode
from tuneward_cli.errors import CommandError
from tuneward_cli.merging import merge
from tuneward_cli.voice import Voice


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is no adapter as tuneward files it") as refused:
        merge(tmp_path, tmp_path, tmp_path / "model", Voice("json"))
    assert refused.value.code == ExitCode.INPUT_MISSING and str(refused.value).startswith(str(tmp_path))
