"""Thousands of seeds, each an order of events: the parts of a client against a service that does what it likes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from virtual import Hang, SeededLoop
from world import LIMIT_S, Tally, judged, tally

from xiling_async.api.calls import Calls
from xiling_async.api.results import Create, CreateResult
from xiling_async.api.retry_rules import RetryAction
from xiling_async.models.record import Refusal


def test_every_seed_keeps_the_promises(deep: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """2,000 orders of events (100,000 with --deep): paid once, never re-sent in doubt, nothing forgotten, no hang."""
    count = 100_000 if deep else 2_000
    began = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        total = sum(processes.map(tally, [range(low, low + 250) for low in range(0, count, 250)]), Tally())
    seconds = time.perf_counter() - began
    with capsys.disabled():
        callers = ", ".join(f"{number} {name}" for name, number in total.ends.most_common())
        print(f"\n{total.seeds} seeds, {total.seeds / seconds:.0f} a second: {total.paid} paid submits; {callers}")
    assert total.found == []
    assert total.seeds == count
    assert set(total.ends) >= {"tuple", "SubmitUncertain", "WaitTimeout", "ResultExpired", "ClientClosed", "Rejected"}


def test_a_seed_is_always_the_same() -> None:
    """What a seed does can be seen again: the same POSTs, the same ends."""
    for seed in range(100):
        first, second = judged(seed), judged(seed)
        assert [(sale.job, sale.met, sale.task_ids) for sale in first.service.sales] == [
            (sale.job, sale.met, sale.task_ids) for sale in second.service.sales
        ]
        assert [type(user.got) for user in first.users] == [type(user.got) for user in second.users]


class Resender(Calls):
    """The negative control: a POST of unknown fate is taken for one that never left, as most clients do."""

    async def create(self, create: Create) -> CreateResult:
        result = await super().create(create)
        if result.action is not RetryAction.UNCERTAIN:
            return result
        refusal = Refusal(error="NotSent", message="The connection was lost.")
        return CreateResult(refusal=refusal, action=RetryAction.AGAIN, is_sent=False)


def test_the_invariants_catch_a_client_that_sends_again() -> None:
    """With calls that are sent again after a cut connection the same seeds show jobs that were paid twice."""
    found = tally(range(300), Resender).found
    assert sum("was paid more than once" in violation for violation in found) > 20
    assert sum("sent again after an ambiguous POST" in violation for violation in found) > 20


async def _wait_for_nobody() -> None:
    await asyncio.get_running_loop().create_future()


def test_a_hang_is_found() -> None:
    """A waiter that can never be woken is not taken for one that waits long."""
    loop = SeededLoop(random.Random(0), limit_s=LIMIT_S)
    with pytest.raises(Hang, match="nothing is left to happen"):
        loop.play(_wait_for_nobody())
