"""Docs tell of every setting and metric, and every link and path in them leads somewhere."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

from tuneward_cli.main import parser
from tuneward_operator.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = [path for part in ("api", "operator", "trainer", "serving", "cli") for path in (ROOT / part).rglob("*.py")]


def everything() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def test_every_setting_of_the_operator_is_told_with_its_meaning() -> None:
    text = (ROOT / "docs" / "operator.md").read_text()
    missing = [item.name for item in fields(Settings) if f"`TUNEWARD_{item.name.upper()}`" not in text]
    stale = [item.name for item in fields(Settings) if item.metadata["help"] not in text]
    assert (missing, stale) == ([], [])


def test_every_metric_is_told() -> None:
    found = {name for path in CODE for name in re.findall(r'"(tuneward_[a-z_]+)"', path.read_text())}
    metrics = {
        name
        for name in found
        if not name.startswith(
            ("tuneward_api", "tuneward_operator", "tuneward_trainer", "tuneward_serving", "tuneward_packed")
        )
    }
    assert len(metrics) > 10
    text = everything()
    assert sorted(name for name in metrics if name not in text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_fields_that_are_named_exist(page: Path) -> None:
    reference = (ROOT / "docs" / "reference.md").read_text().replace("[]", "")
    named = re.findall(r"`((?:spec|status)(?:\.[a-zA-Z]+)+)", page.read_text().replace("[]", ""))
    assert [path for path in named if f"`{path}`" not in reference] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_true_about_files() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:docs|examples|charts|local|api)/[\w./-]+)`|(?<=apply -f )(\S+\.yaml)", text)
    paths = {first or second for first, second in named}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_way_of_a_job_names_files_that_exist() -> None:
    """Each cell of the table begins with a folder or with a file of the part that its row is about."""
    table = (ROOT / "docs" / "architecture.md").read_text().split("| step | file |")[1].split("\n\n")[0]
    missing = []
    part = ROOT
    for named in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        found = next((path for path in (ROOT / named, part / named, *part.rglob(named)) if path.exists()), None)
        missing += [] if found else [named]
        if "/" in named.rstrip("/") and found is not None:
            part = next(ROOT.glob(f"{named.split('/')[0]}/tuneward_*"))
    assert missing == []


def test_every_command_that_a_sentence_names_exists() -> None:
    (commands,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    named = {
        (path.relative_to(ROOT).as_posix(), word)
        for path in [*CODE, *PAGES]
        for word in re.findall(r"`tuneward ([a-z-]+)", path.read_text())
    }
    assert len(named) > 10
    assert sorted(pair for pair in named if pair[1] not in commands.choices) == []
