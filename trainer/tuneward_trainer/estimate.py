"""`estimate`: what a plan will cost, in memory, operations and time; nothing is trained.

Prints one JSON object. Time needs a rate, and there is none in a data sheet that a training reaches: on a CPU it is measured
here, by products of matrices for half a second; for any other device it is said to be unknown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Final

from tuneward_api import names
from tuneward_api.estimate import GIB
from tuneward_api.files import Plan
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_api.names import ExitCode
from tuneward_trainer import memory, rundir
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.report import ending, model_unsupported
from tuneward_trainer.schedule import documents_a_unit

EFFICIENCY: Final = 0.5
"""Share of a matrix product's speed that a training reaches on a CPU: 0.48 was seen with rows of 256 tokens, 0.65 with a
thousand. The rest is attention, norms and copies."""
UNKNOWN: Final = "unknown for this device"
_SECONDS: Final = 0.5
_SIDE: Final = 1024


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    found, error = ending(lambda: costs(rundir.load_plan(arguments.plan), arguments.gpu_memory))
    if error is not None:
        sys.stderr.write(f"{error.message}\n")
        return error.code
    sys.stdout.write(json.dumps(found) + "\n")
    return ExitCode.OK


def costs(plan: Plan, gpu_gib: float | None) -> dict[str, Any]:
    """`gpu_gib`: of a GPU to ask about; None: what this machine would train on. Raises EndError."""
    prepared = plan.prepared
    model_dir, data_dir = rundir.directory(names.ENV_MODEL_DIR), rundir.directory(names.ENV_DATA_DIR)
    shape = memory.shape_of(model_dir)
    if shape is None:
        raise model_unsupported(f"{model_dir}/config.json does not say what memory and time depend on")
    room = round(gpu_gib * GIB) if gpu_gib is not None else gpu_room(plan.request.spec)
    summary, hyper = prepared.data.summary, prepared.hyperparameters
    data = memory.statistics(Documents.open(data_dir / TRAINING).lengths, summary.target_tokens)
    found = memory.Costs.of(
        shape,
        prepared.method,
        hyper,
        parameters=prepared.base.parameters,
        data=data,
        device="cuda" if room else "cpu",
        unit=documents_a_unit(prepared.objective.type),
        ranks=memory.ranks_of(plan.request.spec),
    ).placed(prepared.base_weights, room)
    choice = found.choose(room) if room else memory.Choice(prepared.bins_per_micro_batch)
    needs, had = found.memory(choice), room or memory.worker_memory(plan.request.spec)
    each = found.flops(choice)
    return {
        "device": found.setup.device,
        "family": {"name": shape.family, "known": shape.known},
        "rows": choice.bins,
        "recompute": choice.recompute,
        "sharded": found.setup.shards > 1,
        "memory": {
            "weights": needs.weights,
            "state": needs.state,
            "activations": needs.activations,
            "buffers": max(needs.work, needs.head),
            "live": needs.live,
            "resident": needs.resident,
            "available": had,
        },
        "fits": needs.resident <= had,
        "remedy": None if needs.resident <= had else memory.remedy(plan, model_dir, room),
        "flopsPerToken": each,
        **time_of(each * summary.tokens * hyper.epochs, on_gpu=bool(room)),
    }


def time_of(flops: float, *, on_gpu: bool) -> dict[str, Any]:
    """What is known of the seconds that so many operations take."""
    rate = None if on_gpu else EFFICIENCY * cpu_rate()
    return {
        "flops": flops,
        "flopsPerSecond": rate,
        "rateSource": UNKNOWN if rate is None else f"{EFFICIENCY:.0%} of a matrix product measured on this CPU",
        "seconds": None if rate is None else flops / rate,
    }


def gpu_room(spec: FineTuneJobSpec | None) -> int | None:
    """Bytes of this machine's GPU; None where a job, or this machine, trains on CPUs. `spec`: None for the defaults."""
    if spec is not None and memory.device_of(spec) == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def cpu_rate() -> float:
    """Floating-point operations a second of fp32 matrix products on all processors of this process: the median of half
    a second's."""
    import torch

    left, right = torch.randn(2, _SIDE, _SIDE).unbind()
    out = left @ right
    spent: list[float] = []
    while sum(spent) < _SECONDS:
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        spent.append(time.perf_counter() - began)
    return 2 * _SIDE**3 / sorted(spent)[len(spent) // 2]
