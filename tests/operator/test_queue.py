"""The queue's promises: one pass at a time for a key, none forgotten, urgent first, failures apart."""

from __future__ import annotations

import asyncio
import time

import pytest

from tuneward_operator import queue as queues
from tuneward_operator.queue import Key, KeyedQueue

A, B, C = (Key("FineTuneJob", "team", name) for name in "abc")


async def test_many_events_for_a_waiting_key_are_one_pass() -> None:
    queue = KeyedQueue()
    for _ in range(5):
        queue.add(A)
    assert await queue.get() == A
    assert len(queue) == 0


async def test_a_key_added_during_its_pass_gets_another_after_it_and_not_beside_it() -> None:
    queue = KeyedQueue()
    queue.add(A)
    assert await queue.get() == A
    queue.add(A)
    second = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert not second.done()
    queue.done(A)
    assert await second == A


async def test_urgent_keys_come_first_even_when_they_waited_in_the_slow_line() -> None:
    queue = KeyedQueue()
    for key in (A, B):
        queue.add(key)
    queue.add(C, urgent=True)
    queue.add(B, urgent=True)
    order = []
    for _ in range(3):
        order.append(await queue.get())
        queue.done(order[-1])
    assert order == [C, B, A]


async def test_the_earliest_of_several_delays_counts() -> None:
    queue = KeyedQueue()
    queue.add_after(A, 999)
    queue.add_after(A, 0)
    queue.add_after(A, 999)
    assert await queue.get() == A


async def test_all_waiting_workers_are_served() -> None:
    queue = KeyedQueue()
    workers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    for key in (A, B, C):
        queue.add(key)
    assert sorted(await asyncio.gather(*workers)) == [A, B, C]


async def test_failures_in_a_row_double_the_wait_of_that_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "FIRST_BACKOFF", 1.0)
    queue = KeyedQueue()
    assert [queue.failed(A) for _ in range(3)] == [1.0, 2.0, 4.0]
    assert queue.failed(B) == 1.0
    queue.succeeded(A)
    assert queue.failed(A) == 1.0
    assert queue.failed(C, at_least=30) == 30


async def test_a_stuck_queue_is_noticed_and_an_idle_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    queue = KeyedQueue()
    clock[0] += 1000
    assert queue.stuck_for() == 0
    queue.add(A)
    queue.add(B)
    clock[0] += 70
    assert queue.stuck_for() == 70
    await queue.get()
    clock[0] += 5
    assert queue.longest_pass() == 5
    queue.done(A)
    assert queue.stuck_for() == 0
