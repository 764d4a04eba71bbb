"""What Prometheus reads from the agent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from tuneward_api.files import AgentReport


class AgentMetrics:
    """Its own registry: two agents in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.base_ready = Gauge("tuneward_agent_base_ready", "1 when the engine answers.", registry=self.registry)
        self.wanted = Gauge("tuneward_agent_wanted_adapters", "Adapters of the wanted list.", registry=self.registry)
        self.ready = Gauge("tuneward_agent_ready_adapters", "Adapters that were proved.", registry=self.registry)
        self.proofs = Counter("tuneward_agent_proofs", "Verdicts, by reason.", ["reason"], registry=self.registry)

    def show(self, report: AgentReport) -> None:
        self.base_ready.set(report.base_ready)
        self.wanted.set(len(report.adapters))
        self.ready.set(sum(one.ready for one in report.adapters))
