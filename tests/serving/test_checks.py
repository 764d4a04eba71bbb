"""The agent's judgement, without processes."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tuneward_api.conditions import Reason
from tuneward_api.files import Proof, ProofText, WantedAdapter, WantedAdapters
from tuneward_serving.agent.adapter_check import Limits, Refused, base_shapes, check_structure
from tuneward_serving.agent.engine_client import EngineClient
from tuneward_serving.agent.loop import Agent, read_wanted
from tuneward_serving.agent.proof import Measured, judge
from tuneward_serving.agent.weights import Tensor, WeightsError, is_finite, is_zero, read_header

A, B = "base_model.model.m.q.lora_A.weight", "base_model.model.m.q.lora_B.weight"
Arrays = dict[str, np.ndarray]
LENGTH = "base_model.model.m.q.lora_magnitude_vector"
LIMITS = Limits(max_adapters=4, max_rank=8)
SHAPES = {"m.q.weight": (6, 4), "norm.weight": (4,)}


def write_tensors(path: Path, arrays: Arrays, dtype: str | None = None) -> Path:
    header, data = {}, b""
    for name, array in arrays.items():
        kind = dtype or {"float32": "F32", "float16": "F16", "uint16": "BF16"}[str(array.dtype)]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_adapter(folder: Path, arrays: Arrays | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    fits = {A: np.ones((2, 4), np.float32), B: np.ones((6, 2), np.float32)}
    write_tensors(folder / "adapter_model.safetensors", fits if arrays is None else arrays)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
    return folder


def shaped(down: tuple[int, ...], up: tuple[int, ...]) -> Arrays:
    return {A: np.ones(down, np.float32), B: np.ones(up, np.float32)}


def lengths(size: int, name: str = LENGTH) -> Arrays:
    return {name: np.ones(size, np.float32)}


def test_an_adapter_that_fits_passes(tmp_path: Path) -> None:
    check_structure(write_adapter(tmp_path), SHAPES, LIMITS)
    without_update = {A: np.ones((2, 4), np.float32), B: np.zeros((6, 2), np.float32)}
    check_structure(write_adapter(tmp_path, without_update | lengths(6), use_dora=True), SHAPES, LIMITS)


@pytest.mark.parametrize(
    ("arrays", "config", "reason", "sentence"),
    [
        (shaped((2, 5), (6, 2)), {}, Reason.STRUCTURE_MISMATCH, "do not fit the base's [6, 4]"),
        (shaped((2, 4), (6, 3)), {}, Reason.STRUCTURE_MISMATCH, "lora_A [2, 4] and lora_B [6, 3]"),
        ({A: np.ones((2, 4), np.float32)}, {}, Reason.STRUCTURE_MISMATCH, "m.q has lora_A only"),
        ({}, {}, Reason.STRUCTURE_MISMATCH, "holds no tensor"),
        ({"lm_head.weight": np.ones(3, np.float32)}, {}, Reason.STRUCTURE_MISMATCH, "is neither lora_A nor lora_B"),
        (
            {key.replace("m.q", "m.x"): value for key, value in shaped((2, 4), (6, 2)).items()},
            {},
            Reason.STRUCTURE_MISMATCH,
            "the base model has no module m.x",
        ),
        (None, {"r": 9}, Reason.RANK_TOO_LARGE, "rank 9 exceeds the server's maxRank 8"),
        (None, {"rank_pattern": {"q": 16}}, Reason.RANK_TOO_LARGE, "rank 16 exceeds"),
        (shaped((9, 4), (6, 9)), {}, Reason.RANK_TOO_LARGE, "rank 9 exceeds"),
        (None, {"r": "2"}, Reason.STRUCTURE_MISMATCH, "r is '2', must be a positive integer"),
        (None, {"peft_type": "IA3"}, Reason.STRUCTURE_MISMATCH, "describes no LoRA adapter"),
        (shaped((2, 4), (6, 2)), {"use_dora": True}, Reason.STRUCTURE_MISMATCH, "m.q has no lora_magnitude_vector"),
        (shaped((2, 4), (6, 2)) | lengths(6), {}, Reason.STRUCTURE_MISMATCH, "has a lora_magnitude_vector, but"),
        (
            shaped((2, 4), (6, 2)) | lengths(4),
            {"use_dora": True},
            Reason.STRUCTURE_MISMATCH,
            "lora_magnitude_vector [4] does",
        ),
        (
            shaped((2, 4), (6, 2)) | lengths(6) | lengths(6, LENGTH.replace("m.q", "m.x")),
            {"use_dora": True},
            Reason.STRUCTURE_MISMATCH,
            "m.x has lora_magnitude_vector only",
        ),
        ({A: np.full((2, 4), np.inf, np.float32), B: np.ones((6, 2), np.float32)}, {}, Reason.NOT_FINITE, "lora_A"),
        ({A: np.ones((2, 4), np.float32), B: np.zeros((6, 2), np.float32)}, {}, Reason.NO_EFFECT, "every lora_B is zero"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: Arrays | None, config: dict[str, object], reason: Reason, sentence: str
) -> None:
    with pytest.raises(Refused) as refused:
        check_structure(write_adapter(tmp_path, arrays, **config), SHAPES, LIMITS)
    assert refused.value.reason == reason
    assert sentence in refused.value.message


@pytest.mark.parametrize(
    "loaded", ["model.language_model.layers.0.q", "language_model.model.layers.0.q", "model.layers.0.q"]
)
@pytest.mark.parametrize(
    "stored", ["model.language_model.layers.0.q", "language_model.model.layers.0.q", "model.layers.0.q"]
)
def test_a_decoder_is_the_same_under_each_of_its_names(tmp_path: Path, loaded: str, stored: str) -> None:
    """Files of a model that also sees name its decoder otherwise than the loaded model does; what sees is another part."""
    sees = "vision_tower.transformer.layers.0.q"
    base = {f"{stored}.weight": np.ones((6, 4), np.float32), f"{sees}.weight": np.ones((3, 3), np.float32)}
    shapes = base_shapes(read_header(write_tensors(tmp_path / "base.safetensors", base)))
    arrays = {key.replace("m.q", loaded): value for key, value in shaped((2, 4), (6, 2)).items()}
    check_structure(write_adapter(tmp_path / "adapter", arrays), shapes, LIMITS)
    arrays = {key.replace("m.q", f"model.{sees}"): value for key, value in shaped((2, 4), (6, 2)).items()}
    with pytest.raises(Refused, match="do not fit"):
        check_structure(write_adapter(tmp_path / "adapter", arrays), shapes, LIMITS)


def test_a_pickle_beside_the_weights_is_refused(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(Refused, match=r"adapter_model\.bin is not safetensors"):
        check_structure(tmp_path, SHAPES, LIMITS)


@pytest.mark.parametrize("content", [b"", b"\x05", struct.pack("<Q", 2**40), struct.pack("<Q", 2) + b"[]", b"PK" * 20])
def test_a_file_that_is_no_safetensors_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(WeightsError, match=r"x is not a safetensors file"):
        read_header(tmp_path / "x")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x", {"a": np.ones(4, np.float32)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is cut short"):
        read_header(path)


def bfloat16(*numbers: float) -> np.ndarray:
    return (np.array(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("array", "finite", "zero"),
    [
        (np.array([1, math.nan], np.float32), False, False),
        (np.array([1, math.inf], np.float16), False, False),
        (np.array([1, 2], np.float16), True, False),
        (np.array([0.0, -0.0], np.float32), True, True),
        (bfloat16(1, math.nan), False, False),
        (bfloat16(1, -math.inf), False, False),
        (bfloat16(3e38, 1e-38), True, False),
        (bfloat16(0.0, -0.0), True, True),
    ],
)
def test_numbers_of_every_width_are_looked_at(tmp_path: Path, array: np.ndarray, finite: bool, zero: bool) -> None:
    tensor: Tensor = read_header(write_tensors(tmp_path / "x", {"a": array}))["a"]
    assert (is_finite(tensor), is_zero(tensor)) == (finite, zero)


def proof(base: float, tuned: float) -> Proof:
    return Proof(texts=[ProofText(ids=[1, 2], base=[base], tuned=[tuned])], dtype="float32", tolerance=0.01)


@pytest.mark.parametrize(
    ("engine_base", "engine_tuned", "reason"),
    [
        (-2.0, -1.0, None),
        (-2.009, -1.009, None),
        (-2.0, -2.0, Reason.NO_EFFECT),
        (-2.0, -1.995, Reason.NO_EFFECT),
        (-2.0, -1.5, Reason.PROOF_FAILED),
        (-2.1, -1.0, Reason.PROOF_FAILED),
        (-2.0, math.nan, Reason.PROOF_FAILED),
        (math.nan, -1.0, Reason.PROOF_FAILED),
        (-2.0, -math.inf, Reason.PROOF_FAILED),
    ],
)
def test_the_proof_compares_base_and_tuned(engine_base: float, engine_tuned: float, reason: Reason | None) -> None:
    measured = [Measured([engine_base], [engine_tuned])]
    if reason is None:
        judge(proof(-2.0, -1.0), measured)
    else:
        with pytest.raises(Refused) as refused:
            judge(proof(-2.0, -1.0), measured)
        assert refused.value.reason == reason


@pytest.mark.parametrize(("dtype", "proved"), [("", False), ("float32", False), ("bfloat16", True)])
def test_an_engine_in_another_type_is_allowed_what_that_type_needs(dtype: str, proved: bool) -> None:
    measured = [Measured([-2.1], [-1.1])]
    if proved:
        judge(proof(-2.0, -1.0), measured, dtype=dtype)
    else:
        with pytest.raises(Refused, match=r"differ from the trainer's by 0\.1, allowed are 0\.01"):
            judge(proof(-2.0, -1.0), measured, dtype=dtype)


def test_an_adapter_that_changes_less_than_the_tolerance_is_still_an_adapter() -> None:
    judge(proof(-2.0, -1.995), [Measured([-2.0], [-1.995])])


def test_a_proof_without_texts_proves_nothing() -> None:
    with pytest.raises(Refused, match=r"proof.json holds no text"):
        judge(Proof(texts=[], dtype="float32", tolerance=1.0), [])


def test_a_wanted_list_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    last = WantedAdapters(adapters=[WantedAdapter(name="a", model="a", path="p", digest="d", rank=1)])
    file = tmp_path / "adapters.json"
    assert read_wanted(file, last) == WantedAdapters()
    file.write_text('{"adapters": [')
    assert read_wanted(file, last) == last
    file.write_text(json.dumps(last.to_json()))
    assert read_wanted(file, WantedAdapters()) == last


class LoadsNoDora(BaseHTTPRequestHandler):
    """Answers as vLLM does when `adapter_config.json` says use_dora (its tests/entrypoints hold the sentence)."""

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "base"}]})

    def do_POST(self) -> None:
        message = "Call to add_lora method failed: vLLM does not yet support DoRA."
        self._answer(400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})

    def _answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def loads_no_dora() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoadsNoDora)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(timeout=60)


def test_an_engine_that_loads_no_dora_is_told_with_the_command_that_helps(
    loads_no_dora: str, adapters: Path, base_model: Path, dora: WantedAdapter, tmp_path: Path
) -> None:
    wanted = tmp_path / "adapters.json"
    wanted.write_text(json.dumps(WantedAdapters(adapters=[dora]).to_json()))

    async def looked() -> Agent:
        engine = EngineClient(loads_no_dora, timeout=60)
        agent = Agent(engine=engine, adapters=adapters, wanted_file=wanted, model=base_model, limits=LIMITS)
        await agent.look()
        await engine.close()
        return agent

    (found,) = asyncio.run(looked()).report().adapters
    assert (found.ready, found.reason) == (False, Reason.LOAD_FAILED)
    assert found.message == (
        "the engine loads no DoRA; to serve it as a base model of its own: "
        f"tuneward merge {adapters / dora.path} DIR --model {base_model} "
        "(the engine says: Call to add_lora method failed: vLLM does not yet support DoRA.)"
    )
