"""A gateway's question to the coordinator: an answer, or an error that a client can be told."""

import asyncio
from typing import Any

from cluster.errors import InvalidRequest, NodeUnavailable, TriviumError
from experts.errors import ExpertsMoving

ANSWER_S = 10.0


async def ask(method: Any, *arguments: Any) -> Any:
    """What the coordinator answers; its refusals come back as values and are raised here, typed."""
    try:
        answer = await asyncio.wait_for(method.remote(*arguments), ANSWER_S)
    except TimeoutError as error:
        raise NodeUnavailable(
            reason="NO_COORDINATOR",
            message="the coordinator does not answer",
            remedy="Try again in a few seconds.",
            retry_after_s=5.0,
        ) from error
    if isinstance(answer, TriviumError):
        raise answer
    if isinstance(answer, ExpertsMoving):
        raise NodeUnavailable(
            reason="EXPERTS_MOVING",
            message=str(answer),
            remedy="Try again in a few seconds.",
            retry_after_s=5.0,
        )
    if isinstance(answer, ValueError):
        raise InvalidRequest(
            reason="HOMES_DO_NOT_FIT",
            message=str(answer),
            field="layers",
            remedy="Plan anew: `trivium experts plan --output FILE`.",
        )
    return answer
