"""`tuneward chat` on a workstation: an engine with room for all that the store's jobs made."""

from __future__ import annotations

from tests.operator.pictures import finished as filed
from tests.operator.pictures import owner, plan

from tuneward_api.files import FinishReport
from tuneward_cli.finished import Finished
from tuneward_cli.local_engine import adapters_beside, options


def job(name: str, *, rank: int = 16, base: str | None = None) -> Finished:
    report, whole = filed().report, plan(owner())
    assert isinstance(report, FinishReport)
    assert report.adapter is not None
    adapter = report.adapter.model_copy(update={"served_name": name, "rank": rank})
    if base is not None:
        other = whole.prepared.base.model_copy(update={"digest": base})
        whole = whole.model_copy(update={"prepared": whole.prepared.model_copy(update={"base": other})})
    return Finished(whole, adapter)


def test_many_jobs_and_large_ranks_find_room() -> None:
    """An engine's own limits are 16 adapters of rank 64."""
    jobs = [job(f"ft:{number}", rank=number * 8) for number in range(1, 21)]
    adapters = adapters_beside(jobs[-1], [*jobs, job("ft:3", rank=24), job("ft:other", base="sha256:other")])
    assert [adapter.served_name for adapter in adapters] == [f"ft:{number}" for number in range(1, 21)]
    assert options(jobs[-1], adapters) == ["--max-adapters", "20", "--max-rank", "160"]


def test_a_model_that_was_trained_whole_is_served_alone_under_its_name() -> None:
    newest = job("ft:whole")
    newest = Finished(newest.plan, newest.adapter.model_copy(update={"type": "Full", "rank": None}))
    adapters = adapters_beside(newest, [job("ft:1"), newest])
    assert adapters == []
    assert options(newest, adapters) == ["--served-base-name", "ft:whole", "--max-adapters", "1", "--max-rank", "1"]
