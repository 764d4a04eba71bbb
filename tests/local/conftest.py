"""One cluster with its node for each kind of user and test process; tests that break a cluster make their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.local.machine import CAGED, ME, USERS, Machine, Namespace, User, machine
from tests.support.wait import wait_for

BY_USER = [pytest.param(user, id=user.name, marks=pytest.mark.slow if user is CAGED else ()) for user in USERS]
"""The third way to run containers is rarely taken and its tests repeat the others'."""
BROKEN_BY = [
    pytest.param(
        *found.values, id=found.id, marks=pytest.mark.slow if found.id == "me" and os.geteuid() == 0 else found.marks
    )
    for found in BY_USER
]
"""Every fault costs a start. The unprivileged user's are the harder case; root's cluster is killed end to end too."""


@pytest.fixture(scope="package", params=BY_USER)
def shared(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A running cluster that tests share, by each user in turn; ended with the last of them, since it is never idle."""
    user: User = request.param
    with machine(user) as made:
        made.up("--fake-gpus", "3")
        yield made


@pytest.fixture
def ns(shared: Machine) -> Namespace:
    """A fresh namespace of the shared cluster."""
    return Namespace.fresh(shared)


@pytest.fixture
def separated(ns: Namespace) -> Namespace:
    """`ns` where containers have namespaces. Elsewhere what a pod may not write, it writes: to this machine."""
    if ns.machine.user.caged:
        pytest.skip("without namespaces readOnly, readOnlyRootFilesystem and runAsUser are not enforced")
    return ns


@pytest.fixture(scope="module", params=BROKEN_BY)
def broken(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The directory whose cluster the tests of one module break in turn."""
    with machine(request.param) as made:
        yield made


@pytest.fixture
def breakable(broken: Machine) -> Machine:
    """A running cluster that the test may kill, or take down for good; it holds no container of another test."""
    if not broken.alive():
        broken.up()
    everything = ("jobs,pods", "--all", "--all-namespaces", "--force", "--grace-period=0", "--wait=false")
    broken.cluster.kubectl("delete", *everything)
    wait_for(lambda: not broken.shims(), what="the containers of the test before to end", interval=0.2)
    return broken


@pytest.fixture(params=BY_USER)
def own(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A directory of the test's own, not started, by each user in turn."""
    with machine(request.param) as made:
        yield made


@pytest.fixture
def mine() -> Iterator[Machine]:
    """A directory of the test's own, not started, of the user of the tests."""
    with machine(ME) as made:
        yield made
