"""The level-triggered loop: look at what is wanted and at what the engine has, and close the gap.

Nothing is remembered that cannot be found out again: an agent that starts beside a full engine proves what is there,
and an engine that lost its adapters gets them back, whoever restarted.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import monotonic

from tuneward_api.conditions import Reason
from tuneward_api.files import AdapterProof, AgentReport, WantedAdapter, WantedAdapters
from tuneward_serving.agent.adapter_check import (
    ADAPTER_DIR,
    Limits,
    Refused,
    base_shapes,
    check_files,
    check_structure,
)
from tuneward_serving.agent.engine_client import EngineClient, EngineGone, EngineRefused, Served
from tuneward_serving.agent.metrics import AgentMetrics
from tuneward_serving.agent.proof import judge, measure
from tuneward_serving.agent.weights import WeightsError, read_model_header

log = logging.getLogger(__name__)
_FIRST_RETRY, _LAST_RETRY = 5.0, 60.0
_TOO_MANY = "the server holds {limit} adapters; raise spec.maxAdapters or archive a FineTunedModel"

Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about `wanted`, and when to look again if it was refused."""

    wanted: WantedAdapter
    reason: Reason
    message: str = ""
    ready: bool = False
    fingerprint: Fingerprint = ()
    failures: int = 0
    retry_at: float = 0.0

    def report(self) -> AdapterProof:
        return AdapterProof(
            name=self.wanted.name,
            digest=self.wanted.digest,
            ready=self.ready,
            reason=self.reason,
            message=self.message,
        )


@dataclass(kw_only=True)
class Agent:
    """`look` is one pass; `report` may be asked at any time, also in the middle of one."""

    engine: EngineClient
    adapters: Path
    wanted_file: Path
    model: Path
    limits: Limits
    least_tolerance: float = 0.0
    metrics: AgentMetrics = field(default_factory=AgentMetrics)
    base_ready: bool = False
    wanted: WantedAdapters = field(default_factory=WantedAdapters)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    looked_at: float = field(default_factory=monotonic)

    def report(self) -> AgentReport:
        return AgentReport(
            base_ready=self.base_ready,
            wanted_digest=self.wanted.digest(),
            adapters=[self._verdict(wanted).report() for wanted in self.wanted.adapters],
        )

    def _verdict(self, wanted: WantedAdapter) -> Verdict:
        known = self.verdicts.get(wanted.name)
        if known is not None and known.wanted == wanted and (self.base_ready or not known.ready):
            return known
        message = "being loaded and proved" if self.base_ready else "the engine is not ready"
        return Verdict(wanted=wanted, reason=Reason.LOADING, message=message)

    async def run(self, interval: float) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # the next pass starts from what is there
                log.exception("a pass failed")
            self.looked_at = monotonic()
            await asyncio.sleep(interval)

    async def look(self) -> None:
        self.wanted = read_wanted(self.wanted_file, self.wanted)
        self.verdicts = {one.name: self.verdicts[one.name] for one in self.wanted.adapters if one.name in self.verdicts}
        try:
            served = await self.engine.served()
            self._engine_is_back()
            await self._close_gap(served)
        except EngineGone as error:
            self._engine_is_gone(str(error))
        except EngineRefused as error:
            self._engine_is_gone(f"the engine refuses the agent: {error}")
        self.metrics.show(self.report())

    def _engine_is_back(self) -> None:
        if not self.base_ready:
            log.info("the engine is ready")
        self.base_ready = True

    def _engine_is_gone(self, why: str) -> None:
        """It may come back without its adapters, or with other weights: everything is to be proved again."""
        if self.base_ready:
            log.warning("%s", why)
        self.base_ready = False
        self.verdicts = {name: verdict for name, verdict in self.verdicts.items() if not verdict.ready}

    async def _close_gap(self, served: Served) -> None:
        wanted = self.wanted.adapters[: self.limits.max_adapters]
        names = {one.name for one in wanted}
        for name in served.adapters.keys() - names:
            await self._unload(name)
        for one in self.wanted.adapters[self.limits.max_adapters :]:
            message = _TOO_MANY.format(limit=self.limits.max_adapters)
            self.verdicts[one.name] = Verdict(wanted=one, reason=Reason.TOO_MANY_ADAPTERS, message=message)
        for one in wanted:
            await self._settle(one, served)

    async def _settle(self, wanted: WantedAdapter, served: Served) -> None:
        folder = self.adapters / wanted.path
        root = str(folder / ADAPTER_DIR)
        known = self.verdicts.get(wanted.name)
        known = known if known is not None and known.wanted == wanted else None
        if known is not None and known.ready and served.adapters.get(wanted.name) == root:
            return
        seen = await asyncio.to_thread(fingerprint, folder)
        if known is not None and not known.ready and known.fingerprint == seen and monotonic() < known.retry_at:
            return
        try:
            await self._load_and_prove(wanted, served, root)
        except Refused as refused:
            await self._refuse(wanted, refused, known, seen)
        else:
            log.info("%s: proved", wanted.name)
            self.metrics.proofs.labels(reason=Reason.VERIFIED).inc()
            self.verdicts[wanted.name] = Verdict(wanted=wanted, reason=Reason.VERIFIED, ready=True)

    async def _load_and_prove(self, wanted: WantedAdapter, served: Served, root: str) -> None:
        folder = self.adapters / wanted.path
        proof = await asyncio.to_thread(check_files, folder, wanted)
        shapes = await asyncio.to_thread(self._base_shapes)
        await asyncio.to_thread(check_structure, folder / ADAPTER_DIR, shapes, self.limits)
        try:
            if served.adapters.get(wanted.name) not in (None, root):
                await self.engine.unload(wanted.name)
            if served.adapters.get(wanted.name) != root:
                await self.engine.load(wanted.name, root)
        except EngineRefused as error:
            raise Refused(Reason.LOAD_FAILED, not_loaded(str(error), folder, self.model)) from error
        measured = await measure(self.engine, proof, base=served.base, name=wanted.name)
        judge(proof, measured, dtype=served.dtype, least_tolerance=self.least_tolerance)

    async def _refuse(self, wanted: WantedAdapter, refused: Refused, known: Verdict | None, seen: Fingerprint) -> None:
        """An adapter that is not proved must not answer either."""
        failures = 1 if known is None else known.failures + 1
        if known is None or known.reason != refused.reason:
            log.warning("%s: %s: %s", wanted.name, refused.reason, refused.message)
        self.metrics.proofs.labels(reason=refused.reason).inc()
        self.verdicts[wanted.name] = Verdict(
            wanted=wanted,
            reason=refused.reason,
            message=refused.message[:512],
            fingerprint=seen,
            failures=failures,
            retry_at=monotonic() + min(_LAST_RETRY, _FIRST_RETRY * 2 ** (failures - 1)),
        )
        if wanted.name in (await self.engine.served()).adapters:
            await self._unload(wanted.name)

    async def _unload(self, name: str) -> None:
        try:
            await self.engine.unload(name)
            log.info("%s: unloaded", name)
        except EngineRefused as error:
            log.warning("%s: not unloaded: %s", name, error)

    def _base_shapes(self) -> Mapping[str, tuple[int, ...]]:
        try:
            return _shapes_of(self.model)
        except WeightsError as error:
            raise Refused(Reason.LOAD_FAILED, f"the base model's weights cannot be read: {error}") from error


@cache
def _shapes_of(model: Path) -> Mapping[str, tuple[int, ...]]:
    """Once: the base of a server never changes."""
    return base_shapes(read_model_header(model))


def not_loaded(said: str, folder: Path, model: Path) -> str:
    """The engine's own words, and behind the command that helps where they name the kind of adapter, as vLLM's do."""
    if "DoRA" not in said:
        return f"the engine refused to load it: {said}"
    merge = shlex.join(["tuneward", "merge", str(folder), "DIR", "--model", str(model)])
    return f"the engine loads no DoRA; to serve it as a base model of its own: {merge} (the engine says: {said})"


def read_wanted(path: Path, last: WantedAdapters) -> WantedAdapters:
    """The list, empty when the file is absent; `last` while it cannot be read."""
    try:
        return WantedAdapters.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return WantedAdapters()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read, the last list holds: %s", path, error)
        return last


def fingerprint(folder: Path) -> Fingerprint:
    """Changes when a file comes, goes or is written: then a refused adapter is looked at again at once."""
    try:
        files = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    except OSError:
        return ()
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files)
