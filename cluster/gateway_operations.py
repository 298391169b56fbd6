"""The operators' service: how pools and requests stand, and how many actors a pool shall have."""

import time
from typing import Any

import grpc

from cluster.coordinator_call import ask
from cluster.errors import InvalidRequest
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.route import Route
from cluster.router import Router
from cluster.scaling import Decision, Hold, PoolsReport, PoolState, Pressure

BY_CHARACTERS_MAX = 64
REQUESTS_COUNT = 20
REQUESTS_COUNT_MAX = 1000
SOMEBODY = "the operators' API"


class OperationsService(trivium_pb2_grpc.OperationsServicer):
    """trivium.v1.Operations over the coordinator's handle and this gateway's router."""

    def __init__(self, coordinator: Any, router: Router):
        self._coordinator = coordinator
        self._router = router

    async def GetPools(
        self, request: trivium_pb2.GetPoolsRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetPoolsResponse:
        """How many actors each pool has, and why."""
        return to_pools(await ask(self._coordinator.pools))

    async def ScalePool(
        self, request: trivium_pb2.ScalePoolRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetPoolsResponse:
        """Set a pool's count."""
        count = request.count if request.HasField("count") else None
        by = checked_by(request.by) or SOMEBODY
        return to_pools(await ask(self._coordinator.set_pool, request.kind, count, by))

    async def ReleasePool(
        self, request: trivium_pb2.ReleasePoolRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetPoolsResponse:
        """Let the load decide again."""
        return to_pools(await ask(self._coordinator.release_pool, request.kind))

    async def GetRequests(
        self, request: trivium_pb2.GetRequestsRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetRequestsResponse:
        """Which requests have been under way longest."""
        count = min(request.requests_max or REQUESTS_COUNT, REQUESTS_COUNT_MAX)
        routes, now_s = self._router.routes, time.monotonic()
        oldest = sorted(routes.values(), key=lambda route: route.admitted_s)[:count]
        return trivium_pb2.GetRequestsResponse(
            requests=[to_request(route, now_s) for route in oldest], requests_count=len(routes)
        )


def checked_by(by: str) -> str:
    """Who asks; raises InvalidRequest for what cannot be shown."""
    if len(by) > BY_CHARACTERS_MAX or not by.isprintable():
        raise InvalidRequest(
            reason="INVALID_NAME",
            message="this is no name to be shown",
            field="by",
            limit=f"{BY_CHARACTERS_MAX} printable characters",
            remedy="Shorten it.",
        )
    return by


def to_pools(report: PoolsReport) -> trivium_pb2.GetPoolsResponse:
    """A report as it goes over the wire; times become ages."""
    return trivium_pb2.GetPoolsResponse(
        pools=[to_pool(pool, report.now_s) for pool in report.pools],
        decisions=[to_decision(decision, report.now_s) for decision in report.decisions],
        is_autoscaled=report.is_enabled,
    )


def to_pool(pool: PoolState, now_s: float) -> trivium_pb2.Pool:
    """One pool."""
    return trivium_pb2.Pool(
        kind=pool.kind,
        target_count=pool.target_count,
        ready_count=pool.ready_count,
        starting_count=pool.starting_count,
        draining_count=pool.draining_count,
        lent_count=pool.lent_count,
        borrowed_count=pool.borrowed_count,
        count_min=pool.count_min,
        count_max=pool.count_max,
        hold=to_hold(pool.hold, now_s) if pool.hold is not None else None,
        pressures=map(to_pressure, pool.pressures),
        reason=pool.last_reason,
        outlook=pool.outlook,
    )


def to_hold(hold: Hold, now_s: float) -> trivium_pb2.PoolHold:
    """A hold."""
    return trivium_pb2.PoolHold(count=hold.count, by=hold.by, age_s=now_s - hold.since_s)


def to_pressure(pressure: Pressure) -> trivium_pb2.PoolPressure:
    """A cause."""
    return trivium_pb2.PoolPressure(
        cause=pressure.cause, level=pressure.level, words=pressure.words, limit_words=pressure.limit_words
    )


def to_decision(decision: Decision, now_s: float) -> trivium_pb2.ScaleDecision:
    """A decision."""
    return trivium_pb2.ScaleDecision(
        age_s=now_s - decision.when_s,
        kind=decision.kind,
        from_count=decision.from_count,
        to_count=decision.to_count,
        reason=decision.reason,
    )


def to_request(route: Route, now_s: float) -> trivium_pb2.RequestUnderWay:
    """A request."""
    return trivium_pb2.RequestUnderWay(
        request_id=route.request.request_id,
        phase=route.phase.value,
        age_s=now_s - route.admitted_s,
        prompt_tokens_count=len(route.request.token_ids),
        output_tokens_count=len(route.outputs),
        attempts_count=route.attempts_count,
        prefill=route.prefill,
        decode=route.decode,
    )
