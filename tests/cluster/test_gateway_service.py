"""The three calls over real gRPC, with real nodes in threads: streams, stops, cancels, refusals, shedding."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health, health_pb2

from cluster import links
from cluster.client import Admitted, Client, Delta, Finished, as_values
from cluster.errors import (
    Cancelled,
    DeadlinePassed,
    InvalidRequest,
    NodeUnavailable,
    Overloaded,
    Unauthenticated,
)
from cluster.events import DeliverTokens, FailRequest, FinishRequest, Phases, RequestCancelled
from cluster.gateway import SERVICE
from cluster.gateway_report import GatewayReport
from cluster.gateway_service import STATES, VALIDATED_INLINE_BYTES
from cluster.gateway_service import Delta as ServiceDelta
from cluster.proto import trivium_pb2
from cluster.text_stream import TextStream
from cluster.tokenizer import Tokenizer
from cluster.validation import RequestedGeneration, RequestedSampling
from cluster.view import DRAINING, STARTING, Member, View
from decode.messages import UP
from experts.messages import Placement, ShardReport
from kernels.transport.endpoint import Endpoint
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from tests.cluster.served import FOLDER, SECRET, load_transformer, running_nodes, served, until, view_of

GREEDY = RequestedSampling(temperature=0.0, tokens_max=12, ignore_eos=True)
ENDLESS = RequestedSampling(temperature=0.0, tokens_max=400, ignore_eos=True)
TEXT = RequestedGeneration(text="The place where", sampling=GREEDY)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """A prefill and a decode node of the example."""
    with running_nodes(load_transformer(), tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


async def events_of(client: Client, request: RequestedGeneration, timeout_s: float = 60.0) -> list:
    """Every event of one request."""
    return [event async for event in client.generate(request, timeout_s)]


def text_of(events: list) -> str:
    """All text of a stream."""
    return "".join(event.text for event in events if isinstance(event, Delta))


def tokens_of(events: list) -> list[int]:
    """All tokens of a stream."""
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def pages_leased_count(nodes: dict) -> int:
    """Pages that somebody holds."""
    return sum(node.report().pages_leased_count for node in nodes.values())


def test_a_stream_from_admission_to_its_end(nodes):
    async def run() -> None:
        async with served(view_of(nodes)) as gateway, Client(gateway.address) as client:
            events = await events_of(client, TEXT)
            assert isinstance(events[0], Admitted)
            finished = events[-1]
            assert isinstance(finished, Finished)
            assert finished.finish_reason == "length"
            assert finished.usage.output_tokens_count == len(tokens_of(events)) == 12
            assert finished.usage.prompt_tokens_count == events[0].prompt_tokens_count
            assert text_of(events) == Tokenizer.from_folder(FOLDER).decode(tokens_of(events)) != ""
            await gateway.is_idle()

    asyncio.run(run())


def test_a_stop_string_ends_it_wherever_it_comes_to_stand(nodes):
    async def run() -> None:
        async with served(view_of(nodes)) as gateway, Client(gateway.address) as client:
            whole = text_of(await events_of(client, TEXT))
            for stop in (whole[0], whole[4:8], whole[-1:], whole[-3:]):
                sampling = RequestedSampling(
                    temperature=0.0, tokens_max=12, ignore_eos=True, stop_strings=(stop,)
                )
                request = RequestedGeneration(text=TEXT.text, sampling=sampling)
                events = await events_of(client, request)
                assert events[-1].finish_reason == "stop_string", stop
                assert text_of(events) == whole[: whole.index(stop)]
                assert events[-1].usage.output_tokens_count == len(tokens_of(events))
            await gateway.is_idle()
            await until(lambda: pages_leased_count(nodes) == 0)

    asyncio.run(run())


def test_a_stop_string_in_the_last_token_takes_the_end_that_came_with_it():
    tokenizer = Tokenizer.from_folder(FOLDER)
    token_ids = tokenizer.encode(" roads meet", add_special_tokens=False)
    finish = FinishRequest("r", "length", 0, Phases(0, 0, 0, 0, 0))
    outputs = [DeliverTokens("r", tuple(token_ids), ()), DeliverTokens("r", (1,), ()), finish]
    delta = ServiceDelta()
    assert delta.take(outputs, TextStream(tokenizer, [], ("meet",)), tokenizer) is finish
    assert delta.matched == "meet"
    assert delta.text == " roads " or delta.text == "roads "
    assert len(delta.token_ids) <= len(token_ids), "nothing after the stop string"


def test_a_node_that_falls_silent_for_long_loses_its_requests_to_another(nodes, monkeypatch, tmp_path):
    monkeypatch.setattr(links, "LOST_ASKS_COUNT", 2)
    monkeypatch.setattr(links, "SILENT_ASKS_COUNT", 1)
    most_count = 2 * nodes["d"].report().pages_total_count
    address = f"unix://{tmp_path}/mute"

    def answer_once(channel: StreamChannel, frame: Frame) -> None:
        UP.send(channel, replace(nodes["d"].report(), name="mute", pages_free_count=most_count))
        mute._on_frame = lambda *_: None

    mute = Endpoint(address, SECRET, "mute", answer_once)
    mute.start()

    async def run() -> None:
        view = View((*view_of(nodes).members, Member("mute", "decode", address)))
        async with served(view) as gateway, Client(gateway.address) as client:
            router, unanswered_counts = gateway.desk.router, gateway.desk._links._unanswered_counts
            await until(lambda: all(node.is_known for node in router.nodes.values()))
            asked = asyncio.create_task(events_of(client, TEXT))
            await until(lambda: any(route.decode == "mute" for route in router.routes.values()))
            while "mute" in router.nodes:
                await until(lambda: unanswered_counts["p"] == unanswered_counts["d"] == 0)
                gateway.desk._links.ask_reports()
            assert len(tokens_of(await asked)) == 12
            assert router.retries_count == 1
            await gateway.is_idle()

    asyncio.run(run())
    mute.close()


@pytest.mark.parametrize("name", ["p", "d"])
def test_a_node_in_a_long_step_still_answers(nodes, monkeypatch, name):
    begun, ended = threading.Event(), threading.Event()

    def long_step() -> int:
        begun.set()
        while not ended.is_set():  # no sleep: it takes all of Python that it can get
            pass
        return 1

    async def run() -> None:
        async with served(view_of(nodes)) as gateway:
            monkeypatch.setattr(nodes[name], "step", long_step)
            nodes[name]._work.set()
            await asyncio.to_thread(begun.wait, 10)
            gateway.desk._links.ask_reports()
            await until(lambda: gateway.desk._links._unanswered_counts[name] == 0)
            assert begun.is_set() and not ended.is_set()
            ended.set()

    asyncio.run(run())


def test_clients_that_leave_free_everything(nodes):
    async def run() -> None:
        async with served(view_of(nodes)) as gateway, Client(gateway.address) as client:
            request = RequestedGeneration(text="The place", sampling=ENDLESS)
            for kind in (Admitted, Delta):
                stream = client.generate(request)
                async for event in stream:
                    if isinstance(event, kind):
                        break
                await stream.aclose()
            with pytest.raises(DeadlinePassed):
                await events_of(client, request, timeout_s=0.05)
            await gateway.is_idle()
            await until(lambda: pages_leased_count(nodes) == 0)

    asyncio.run(run())


def test_an_error_in_text_frees_everything_and_is_told_by_its_id(nodes, monkeypatch):
    async def run() -> None:
        async with served(view_of(nodes)) as gateway, Client(gateway.address) as client:
            monkeypatch.setattr(TextStream, "add", lambda *_: 1 / 0)
            with pytest.raises(Exception, match="error id") as caught:
                await events_of(client, TEXT)
            assert "division" not in str(caught.value)
            await gateway.is_idle()

    asyncio.run(run())


def test_a_stalled_reader_is_cut_off_and_leaves_nothing():
    class Context:
        def invocation_metadata(self) -> tuple:
            return ()

        async def write(self, _) -> None:
            await asyncio.Event().wait()

    async def run() -> None:
        async with served(View(), stall_timeout_s=0.01) as gateway:
            request = trivium_pb2.GenerateRequest(text="hello")
            with pytest.raises(Cancelled) as caught:
                await gateway.service.Generate(request, Context())
            assert caught.value.reason == "STREAM_STALLED"
            await gateway.is_idle()

    asyncio.run(run())


def test_too_many_waiting_are_shed(nodes):
    async def run() -> None:
        async with served(View(), requests_waiting_max=1) as gateway, Client(gateway.address) as client:
            waiting = asyncio.create_task(events_of(client, TEXT))
            await until(lambda: gateway.desk.requests_count == 1)
            with pytest.raises(Overloaded) as caught:
                await events_of(client, TEXT)
            assert caught.value.retry_after_s == 1.0
            assert caught.value.limit == "1"
            await gateway.desk.follow(view_of(nodes))
            assert isinstance((await waiting)[-1], Finished)
            await gateway.is_idle()

    asyncio.run(run())


def test_a_stop_string_that_came_before_a_failure_ends_the_request(nodes):
    tokenizer = Tokenizer.from_folder(FOLDER)
    token_ids = tuple(tokenizer.encode(" roads meet", add_special_tokens=False))
    sampling = RequestedSampling(stop_strings=("meet",))

    async def run() -> None:
        async with served(View()) as gateway, Client(gateway.address) as client:
            events = asyncio.create_task(
                events_of(client, RequestedGeneration(text="three", sampling=sampling))
            )
            await until(lambda: gateway.desk.router.routes)
            [request_id] = gateway.desk.router.routes
            gateway.desk._do(DeliverTokens(request_id, token_ids, ()))
            gateway.desk._do(FailRequest(request_id, "node_lost", "it went"))
            gateway.desk.router.handle(RequestCancelled(request_id), 0.0)
            assert (await events)[-1].finish_reason == "stop_string"
            await gateway.is_idle()

    asyncio.run(run())


def test_calls_that_are_still_validated_count_among_those_that_wait(nodes, monkeypatch):
    encode, ended = Tokenizer.encode, threading.Event()
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: ended.wait(20) and encode(*a, **k))
    long = replace(TEXT, text="ab " * VALIDATED_INLINE_BYTES)

    async def run() -> None:
        async with served(view_of(nodes), requests_waiting_max=2) as gateway:
            async with Client(gateway.address) as client:
                calls = [asyncio.create_task(events_of(client, long)) for _ in range(2)]
                await until(lambda: gateway.desk.requests_count == 2)
                with pytest.raises(Overloaded):
                    await events_of(client, RequestedGeneration(token_ids=(1, 2)))
                calls.pop().cancel()
                await until(lambda: gateway.desk.requests_count == 1)
                sampling = RequestedSampling(tokens_max=1)
                assert await events_of(client, RequestedGeneration(token_ids=(1, 2), sampling=sampling))
                ended.set()
                with pytest.raises(InvalidRequest, match="prompt has"):
                    await calls[0]
            await gateway.is_idle()

    asyncio.run(run())


def test_bad_requests_never_reach_the_desk(nodes):
    async def run() -> None:
        async with served(View(), has_tokenizer=False) as gateway, Client(gateway.address) as client:
            for request in (
                TEXT,
                RequestedGeneration(token_ids=(10**6,)),
                RequestedGeneration(token_ids=(1,) * 9999),
            ):
                with pytest.raises(InvalidRequest):
                    await events_of(client, request)
            for request in (
                RequestedGeneration(token_ids=(2**40,)),
                RequestedGeneration(token_ids=(1,), sampling=RequestedSampling(seed=-1)),
                RequestedGeneration(text="\udcff"),
            ):
                with pytest.raises(InvalidRequest) as caught:
                    await events_of(client, request)
                assert caught.value.reason == "UNSENDABLE"
            assert gateway.desk.requests_count == 0

    asyncio.run(run())


def test_the_token(nodes):
    async def run() -> None:
        async with served(View(), token="right") as gateway:
            for token in (None, "wrong"):
                async with Client(gateway.address, token) as client:
                    with pytest.raises(Unauthenticated):
                        await client.get_model()
                    with pytest.raises(Unauthenticated):
                        await events_of(client, TEXT)
            async with Client(gateway.address, "right") as client:
                assert (await client.get_model()).name == "small"

    asyncio.run(run())


def test_a_call_without_the_token_is_refused_before_any_message_of_it_is_read():
    async def run() -> None:
        async with (
            served(View(), token="right") as gateway,
            grpc.aio.insecure_channel(gateway.address) as channel,
        ):
            for method in ("Generate", "GetModel"):
                call = channel.stream_stream(f"/{SERVICE}/{method}")(timeout=5.0)  # that sends none
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


def test_get_model_and_get_cluster(nodes):
    shards = [
        Member(name, "experts", "unix:///s", report=ShardReport(name, "unix:///s", 3, 8, 5, 40, 0, 0, ()))
        for name in ("s1", "s2")
    ]
    report = GatewayReport(requests_running_count=2, requests_waiting_count=1)
    others = (Member("g", "gateway", "x", report=report), Member("late", "decode", "", STARTING), *shards)

    async def run() -> None:
        view = view_of(nodes)
        view = View((*view.members, *others), placement_in_force=Placement(3, 1, (), ()))
        async with served(view) as gateway, Client(gateway.address) as client:
            model = await client.get_model()
            assert model.has_tokenizer
            assert model.context_tokens_max == 512
            cluster = await client.get_cluster()
            assert cluster.placement_epoch == 3
            found = {node.name: node for node in cluster.nodes}
            assert set(found) == {"p", "d", "g", "late"}
            assert found["late"].state == trivium_pb2.STATE_STARTING
            assert found["d"].state == trivium_pb2.STATE_READY
            assert found["g"].requests_running_count == 3
            assert (
                found["d"].pages_total_count
                == found["d"].pages_free_count + found["d"].pages_cached_count
                > 0
            )
            assert [(shard.name, shard.experts_count) for shard in cluster.shards] == [("s1", 8), ("s2", 8)]
            assert as_values(cluster)["nodes"][0]["tokens_per_s"] == 0.0

    asyncio.run(run())
    assert set(STATES) >= {STARTING, DRAINING}


def test_nobody_at_the_address():
    async def run() -> None:
        async with Client("127.0.0.1:1") as client:
            with pytest.raises(NodeUnavailable) as caught:
                await client.get_model(timeout_s=5.0)
            assert caught.value.reason == "NO_SERVER"
            assert not await client.is_serving()

    asyncio.run(run())


def test_health_needs_no_token():
    async def run() -> None:
        async with served(View(), token="right") as gateway:
            async with grpc.aio.insecure_channel(gateway.address) as channel:
                check = channel.unary_unary(
                    f"/{health.SERVICE_NAME}/Check",
                    request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await check(health_pb2.HealthCheckRequest(), timeout=5.0)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "this server has no health service"

    asyncio.run(run())
