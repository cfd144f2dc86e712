"""A simulation of the service: the generation API on a real socket, with faults on request.

It is written from the public facts about the service and imports nothing of the client, so tests can rely on it.

    async with Simulator() as sim:
        sim.script(faults.drop_after_accept())
        ...  # the next create is charged, and its answer is lost
        assert sim.ledger.paid_submits == 1
"""

from xiling_async.simulator import faults
from xiling_async.simulator.ledger import CallbackRecord, GetRecord, Ledger, MediaRecord, PostRecord, UploadRecord
from xiling_async.simulator.service import Simulator

__all__ = [
    "CallbackRecord",
    "GetRecord",
    "Ledger",
    "MediaRecord",
    "PostRecord",
    "Simulator",
    "UploadRecord",
    "faults",
]
