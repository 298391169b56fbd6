"""What the client makes of responses and errors, and what the screen and JSON show of them."""

import asyncio
import io

import grpc
import pytest
from grpc.aio import Metadata
from rich.console import Console

from cluster import gateway_messages as wire
from cluster.client import Admitted, Client, Delta, Finished, as_message, raise_typed, read_response
from cluster.errors import DeadlinePassed, InvalidRequest, NodeUnavailable, Overloaded, TriviumError
from cluster.gateway_status import to_rpc_status
from cluster.proto import trivium_pb2_grpc
from cluster.requests import as_json, error_values, from_json, read_token_ids
from cluster.show import as_cell, collect, printable, stream_to_screen, summary
from cluster.validation import RequestedGeneration, RequestedSampling

FINISHED = Finished("length", wire.Usage(3, 1, 2), wire.Timing(0.1, 0.2, 0.0, 0.5, 0.8))


def call_error(code: grpc.StatusCode, error: TriviumError | None = None) -> grpc.aio.AioRpcError:
    """A failed call as gRPC raises it, with the details of one of our errors."""
    trailing = Metadata()
    details = "said by gRPC"
    if error is not None:
        status = to_rpc_status(error)
        details = status.message
        trailing.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, Metadata(), trailing, details)


async def stream(*events):
    """Events as a client gives them."""
    for event in events:
        yield event


def shown(*events) -> str:
    """What a stream writes to the screen."""
    console = Console(file=io.StringIO(), width=200)
    asyncio.run(stream_to_screen(stream(*events), console))
    return console.file.getvalue()


def test_errors_come_back_as_they_were():
    sent = Overloaded("TOO_MANY", "too many", "gateway.x", "4", "Wait.", retry_after_s=1.5)
    with pytest.raises(Overloaded) as caught:
        raise_typed(call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, sent), "a:1")
    assert vars(caught.value) == vars(sent)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, NodeUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlinePassed),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, TriviumError),
    ],
)
def test_errors_without_details(code, kind):
    with pytest.raises(TriviumError) as caught:
        raise_typed(call_error(code), "a:1")
    assert type(caught.value) is kind


def test_nobody_there_and_a_stream_that_breaks_are_told_apart():
    lost = call_error(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(NodeUnavailable) as caught:
        raise_typed(lost, "a:1")
    assert caught.value.reason == "NO_SERVER"
    assert "a:1" in caught.value.message and "said by gRPC" in caught.value.message
    with pytest.raises(NodeUnavailable) as caught:
        raise_typed(lost, "a:1", has_begun=True)
    assert caught.value.reason == "STREAM_BROKEN" and "again" in caught.value.remedy
    with pytest.raises(NodeUnavailable) as caught:
        sent = NodeUnavailable("NODE_LOST", "lost")
        raise_typed(call_error(grpc.StatusCode.UNAVAILABLE, sent), "a:1", has_begun=True)
    assert caught.value.reason == "NODE_LOST"


def test_a_gateway_that_goes_away_in_the_midst_of_a_stream():
    class Leaving(trivium_pb2_grpc.InferenceServicer):
        async def Generate(self, request, context):
            await context.write(wire.admitted("r", 3, 1))
            await server.stop(0)

    async def run() -> None:
        nonlocal server
        server = grpc.aio.server()
        trivium_pb2_grpc.add_InferenceServicer_to_server(Leaving(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with Client(f"127.0.0.1:{port}") as client:
            with pytest.raises(NodeUnavailable) as caught:
                async for _ in client.generate(RequestedGeneration(token_ids=(1,)), 10.0):
                    pass
            assert caught.value.reason == "STREAM_BROKEN"

    server = None
    asyncio.run(run())


def test_responses_become_values():
    admitted = read_response(wire.admitted("r", 3, 2**63))
    assert admitted == Admitted("r", 3, 2**63)
    finished = read_response(wire.finished_by_length(FINISHED.usage, FINISHED.timing))
    assert finished == FINISHED
    logprob = wire.TokenLogprob(5, "a", -0.5, (wire.TopLogprob(5, "a", -0.5),))
    assert read_response(wire.delta("a", [5], [logprob])) == Delta("a", (5,), (logprob,))


def test_what_no_message_holds_is_refused_here():
    for request in (RequestedGeneration(token_ids=(-1,)), RequestedGeneration(text="\ud800")):
        with pytest.raises(InvalidRequest):
            as_message(request)


def test_text_streams_to_the_screen():
    assert shown(Admitted("r", 1, 2), Delta("", (7,), ()), Delta("one", (8,), ()), FINISHED).startswith(
        "one\n"
    )


def test_ids_stand_for_text_that_there_is_not():
    deltas = [Delta("", (token_id,), ()) for token_id in range(20)]
    assert shown(*deltas, FINISHED).splitlines()[0].split() == [str(token_id) for token_id in range(20)]


def test_a_model_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9b1m\r\tc\n") == "a[2Jb1m\tc\n"
    assert "\x1b" not in shown(Delta("\x1b]0;title\x07", (1,), ()), FINISHED)
    assert shown(Delta("[red]x[/nothing]", (1,), ()), FINISHED).startswith("[red]x[/nothing]")
    assert as_cell("[/]\x1b") == "\\[/]"


def test_everything_at_once():
    whole = asyncio.run(
        collect(stream(Admitted("r", 1, 2), Delta("a", (1,), ()), Delta("b", (2,), ()), FINISHED))
    )
    assert whole["text"] == "ab"
    assert whole["token_ids"] == [1, 2]
    assert whole["finish_reason"] == "length"
    assert whole["seed"] == 2


def test_a_summary_of_a_single_token_divides_by_nothing():
    assert "0 tokens/s" in summary(Finished("stop", wire.Usage(1, 0, 1), wire.Timing(0, 0, 0, 0, 0)))


def test_requests_and_errors_as_text():
    request = RequestedGeneration(
        token_ids=(1, 2), sampling=RequestedSampling(temperature=float("nan"), top_k=3)
    )
    back = from_json(as_json(request))
    assert back.token_ids == (1, 2)
    assert back.sampling.top_k == 3
    assert read_token_ids(" 1, 2,3,") == (1, 2, 3)
    with pytest.raises(InvalidRequest):
        read_token_ids("1;2")
    told = error_values(InvalidRequest("REASON", "text", "field"))["error"]
    assert (told["kind"], told["reason"], told["field"], told["limit"]) == (
        "InvalidRequest",
        "REASON",
        "field",
        None,
    )
