"""Send a workload in an open loop: each request when it is due, however late the cluster is with others."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from cluster.bench.record import COMPLETED, RequestRecord, Run
from cluster.bench.workload import ModelLimits, Workload, as_requested
from cluster.client import Admitted, Client, Delta, Finished
from cluster.errors import TriviumError
from cluster.validation import RequestedGeneration, RequestedSampling

INTERRUPTED = ("Cancelled", "INTERRUPTED")
NO_FINISH = ("NodeUnavailable", "NO_FINISH")
UNEXPECTED = "UNEXPECTED"
WARM_UP_COUNT = 32
OTHER_SEED = 1 << 62  # seeds end at 2**63, so that the other one is a seed too
FIRST = RequestedGeneration(
    token_ids=(1, 2, 3), sampling=RequestedSampling(temperature=0.0, tokens_max=4, ignore_eos=True)
)


@dataclass
class Live:
    """Counts of a run while it runs."""

    planned_count: int
    sent_count: int = 0
    completed_count: int = 0
    failed_count: int = 0
    tokens_count: int = 0

    @property
    def in_flight_count(self) -> int:
        """Sent and not ended."""
        return self.sent_count - self.completed_count - self.failed_count


async def prepare(client: Client, timeout_s: float) -> ModelLimits:
    """Ask which model is served and send one short request that is not counted; raises TriviumError."""
    model = await client.get_model()
    async for _ in client.generate(FIRST, timeout_s):
        pass
    return ModelLimits(model.vocab_size, model.context_tokens_max)


async def warm_up(
    workload: Workload, clients: Sequence[Client], model: ModelLimits, timeout_s: float
) -> None:
    """Send some requests at once that are as long as those planned, but of other tokens, and count none."""
    step = max(1, len(workload.requests) // WARM_UP_COUNT)
    requests = (replace(planned, at_s=0.0) for planned in workload.requests[::step][:WARM_UP_COUNT])
    other = replace(workload, requests=tuple(requests), seed=workload.seed ^ OTHER_SEED)
    await Runner(other, clients, model, timeout_s, Live(len(other.requests))).run()


async def run_workload(
    workload: Workload, clients: Sequence[Client], model: ModelLimits, timeout_s: float, live: Live
) -> Run:
    """Send every request and wait for all; a cancellation cancels them and still gives what happened."""
    runner = Runner(workload, clients, model, timeout_s, live)
    try:
        await runner.run()
    except asyncio.CancelledError:
        asyncio.current_task().uncancel()
        return runner.result(was_interrupted=True)
    return runner.result(was_interrupted=False)


class Runner:
    """One run."""

    def __init__(
        self,
        workload: Workload,
        clients: Sequence[Client],
        model: ModelLimits,
        timeout_s: float,
        live: Live,
    ):
        self._workload = workload
        self._clients = clients
        self._model = model
        self._timeout_s = timeout_s
        self._live = live
        self._records: list[RequestRecord] = []
        self._start_s = perf_counter()

    async def run(self) -> None:
        """Send all, each in a task of its own, and return when the last has ended."""
        self._start_s = perf_counter()
        async with asyncio.TaskGroup() as sending:
            for index, planned in enumerate(self._workload.requests):
                request = as_requested(self._workload, index, self._model.vocab_size)
                await asyncio.sleep(max(0.0, planned.at_s - self._now_s()))
                sending.create_task(self._send(index, request))

    def result(self, was_interrupted: bool) -> Run:
        """What has happened."""
        return Run(self._workload, tuple(self._records), self._now_s(), was_interrupted)

    async def _send(self, index: int, request: RequestedGeneration) -> None:
        client = self._clients[index % len(self._clients)]
        record = RequestRecord(self._workload.requests[index], sent_at_s=self._now_s())
        self._records.append(record)
        self._live.sent_count += 1
        try:
            async for event in client.generate(request, self._timeout_s):
                self._note(record, event)
            if not record.finish_reason:
                record.error_kind, record.error_reason = NO_FINISH
        except TriviumError as error:
            record.error_kind, record.error_reason = type(error).__name__, error.reason
        except asyncio.CancelledError:
            record.error_kind, record.error_reason = INTERRUPTED
            raise
        except Exception as error:  # of this request alone: the run must tell of the others
            record.error_kind, record.error_reason = type(error).__name__, UNEXPECTED
        finally:
            if record.ended_at_s is None:
                record.ended_at_s = self._now_s()
            is_done = record.outcome == COMPLETED
            self._live.completed_count += is_done
            self._live.failed_count += not is_done

    def _note(self, record: RequestRecord, event: Admitted | Delta | Finished) -> None:
        now_s = self._now_s()
        match event:
            case Admitted():
                record.admitted_at_s = now_s
            case Delta(token_ids=token_ids) if token_ids:
                record.token_times_s.append(now_s)
                record.token_counts.append(len(token_ids))
                self._live.tokens_count += len(token_ids)
            case Finished(finish_reason, usage, timing):
                record.ended_at_s = now_s
                record.finish_reason, record.usage, record.timing = finish_reason or "other", usage, timing

    def _now_s(self) -> float:
        return perf_counter() - self._start_s
