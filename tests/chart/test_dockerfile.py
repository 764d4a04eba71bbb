"""The Dockerfile, linted: no image can be built without a container engine, but its mistakes can be read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            current = found.setdefault(rest.rsplit(" AS ", 1)[1], [])
        elif word != "ARG":
            current.append((word, rest))
    return found


def test_every_word_is_an_instruction() -> None:
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} <= known


def test_stages_build_on_each_other() -> None:
    seen: set[str] = set()
    for word, rest in instructions():
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            assert base in seen or base.startswith("python:${PYTHON}-"), base
            seen.add(name)
        if match := re.search(r"--from=(\S+)", rest):
            assert match.group(1) in seen


def test_what_is_copied_exists() -> None:
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            assert (ROOT / rest.split()[0]).exists(), rest


def test_images_run_as_nobody_and_install_by_hash() -> None:
    found = stages()
    assert ("USER", "65532:65532") in found["runtime"]
    for target in ("operator", "trainer"):
        assert not any(word == "USER" for word, _ in found[target])
    installs = [rest for word, rest in instructions() if word == "RUN" and ("pip install" in rest or "pip sync" in rest)]
    assert all("--require-hashes" in rest or rest.endswith("--no-deps .") for rest in installs)
