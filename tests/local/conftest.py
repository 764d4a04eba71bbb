"""One cluster with its node for each kind of user and test process; tests that break a cluster make their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.local.machine import ME, USERS, Machine, Namespace, User, machine


@pytest.fixture(scope="session", params=USERS, ids=lambda user: user.name)
def shared(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A running cluster that tests share, by each user in turn."""
    user: User = request.param
    with machine(user) as made:
        made.up("--fake-gpus", "3")
        yield made


@pytest.fixture
def ns(shared: Machine) -> Namespace:
    """A fresh namespace of the shared cluster."""
    return Namespace.fresh(shared)


@pytest.fixture(params=USERS, ids=lambda user: user.name)
def own(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A directory of the test's own, not started, by each user in turn."""
    with machine(request.param) as made:
        yield made


@pytest.fixture
def mine() -> Iterator[Machine]:
    """A directory of the test's own, not started, of the user of the tests."""
    with machine(ME) as made:
        yield made
