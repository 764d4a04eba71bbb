"""Which Go compiler the builds of local/ take: GO, the PATH's, or one of their own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sourced(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The result of sourcing `root`'s goenv.sh and printing GO and its version."""
    script = 'set -euo pipefail; . ./goenv.sh; echo "$GO"; "$GO" version'
    own = {"HOME": os.environ["HOME"], **environment}
    return subprocess.run(
        ["bash", "-c", script], cwd=root / "local", env=own, capture_output=True, text=True, check=False, timeout=120
    )


def old_go(folder: Path) -> Path:
    """A `go` that says it is Go 1.19, as Debian 12 has it."""
    go = folder / "go"
    go.write_text("#!/bin/sh\necho go1.19.8\n")
    go.chmod(0o755)
    return go


def test_the_path_s_go_is_taken_where_it_is_new_enough() -> None:
    result = sourced(ROOT, PATH=os.environ["PATH"])
    assert (result.returncode, result.stderr) == (0, "")
    assert " go1." in result.stdout


def test_a_named_go_that_is_too_old_is_refused(tmp_path: Path) -> None:
    go = old_go(tmp_path)
    result = sourced(ROOT, PATH="/usr/bin:/bin", GO=str(go))
    assert result.returncode == 1
    assert result.stderr == (
        f"GO={go} is not Go 1.26 or later; name one that is, or unset GO: then one is installed in .build/go\n"
    )


@pytest.mark.slow  # downloads 70 MB
def test_a_machine_with_an_old_go_gets_its_own(tmp_path: Path) -> None:
    root = tmp_path / "clone"
    for part in (".ci", "local", "requirements"):
        shutil.copytree(ROOT / part, root / part)
    old_go(tmp_path)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_", "HTTP"))}
    path = f"{tmp_path}:/usr/bin:/bin"
    first = sourced(root, PATH=path, **kept)
    assert first.returncode == 0, first.stderr
    assert f"{root}/.build/go/bin/go\ngo version go1.26." in first.stdout
    assert sourced(root, PATH=path).stdout.startswith(f"{root}/.build/go/bin/go\n"), "installed once"
