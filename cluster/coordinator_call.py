"""A gateway's question to the coordinator: an answer, or an error that a client can be told."""

import asyncio
import logging
from typing import Any

from cluster.errors import InvalidRequest, NodeUnavailable, TriviumError
from experts.errors import ExpertsMoving

logger = logging.getLogger(__name__)

ANSWER_S = 10.0


async def ask(method: Any, *arguments: Any) -> Any:
    """What the coordinator answers; its refusals come back as values and are raised here, typed."""
    try:
        answer = await asyncio.wait_for(method.remote(*arguments), ANSWER_S)
    except asyncio.CancelledError as error:
        if asyncio.current_task().cancelling():
            raise
        raise no_answer(error) from error  # the call to the coordinator was cancelled, not this task
    except Exception as error:
        raise no_answer(error) from error
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


def no_answer(error: BaseException) -> NodeUnavailable:
    """What a client is told when the coordinator is gone or broken; the log says which."""
    logger.warning("no answer from the coordinator: %s: %s", type(error).__name__, error)
    return NodeUnavailable(
        reason="NO_COORDINATOR",
        message="the coordinator does not answer",
        remedy="Try again in a few seconds.",
        retry_after_s=5.0,
    )
