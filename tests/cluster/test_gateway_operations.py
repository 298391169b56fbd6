"""The operators' service over real gRPC, a real autoscaler behind it, and the tokens that it asks for."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from cluster import coordinator_call, gateway_operations
from cluster.autoscaler import Autoscaler
from cluster.client import Client, as_values
from cluster.coordinator_call import ask
from cluster.errors import InvalidRequest, NodeUnavailable, TriviumError, Unauthenticated
from cluster.events import RoutedRequest
from cluster.gateway import OPERATORS_SERVICES, SERVICE, Tokens, bind, make_server
from cluster.gateway_operations import OperationsService
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.route import Phase, Route
from cluster.scaling import AutoscalerConfig, PoolLimits, PoolReading, PoolsReport
from decode.messages import SamplingParameters
from experts.errors import ExpertsMoving

LIMITS = (PoolLimits("prefill", 1, 1, 8), PoolLimits("decode", 2, 1, 8))


class Answering:
    """One method of the coordinator as Ray hands it out."""

    def __init__(self, method):
        self._method = method

    async def remote(self, *arguments):
        """Answer, refusals as values, as the coordinator does."""
        try:
            return self._method(*arguments)
        except TriviumError as error:
            return error


class Coordinator:
    """An autoscaler, and a Serve that obeys at once."""

    def __init__(self) -> None:
        self.autoscaler = Autoscaler(AutoscalerConfig(LIMITS))
        pages = {"pages_total_count": 100, "pages_leased_count": 90}
        readings = [PoolReading("prefill", 1.0, 1, 1), PoolReading("decode", 1.0, 2, 2, **pages)]
        self.autoscaler.decide(readings, 1.0)
        self.pools = Answering(self._report)
        self.set_pool = Answering(self._set)
        self.release_pool = Answering(self._release)

    def _report(self) -> PoolsReport:
        return self.autoscaler.report(11.0)

    def _set(self, kind: str, count: int | None, by: str) -> PoolsReport:
        if count == 13:
            raise NodeUnavailable("RAY_DASHBOARD_SILENT", "the server did not do it", remedy="Start it.")
        self.autoscaler.hold(kind, count, by, 9.0)
        return self._report()

    def _release(self, kind: str) -> PoolsReport:
        self.autoscaler.release(kind, 10.0)
        return self._report()


def route(name: str, age_s: float, **values: object) -> Route:
    """A request under way."""
    request = RoutedRequest(name, (1, 2, 3), SamplingParameters())
    return Route(request, time.monotonic() - age_s, 0, [], **values)


@asynccontextmanager
async def served(tokens: Tokens | None = None, routes: tuple[Route, ...] = ()) -> AsyncIterator[str]:
    """A gateway's server with the operators' service alone."""
    server = make_server(1 << 20, tokens or Tokens())
    router = SimpleNamespace(routes={one.request.request_id: one for one in routes})
    trivium_pb2_grpc.add_OperationsServicer_to_server(OperationsService(Coordinator(), router), server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def test_pools_come_with_their_pressures_reasons_and_decisions():
    async def run() -> None:
        async with served() as address, Client(address) as client:
            answer = await client.get_pools()
            assert answer.is_autoscaled and [pool.kind for pool in answer.pools] == ["prefill", "decode"]
            prefill, decode = answer.pools
            assert (decode.target_count, decode.ready_count, decode.count_min, decode.count_max) == (
                3,
                2,
                1,
                8,
            )
            assert not prefill.HasField("hold") and not decode.HasField("hold")
            [pages] = decode.pressures
            assert pages.cause == "pages" and pages.level == pytest.approx(0.9 / 0.8)
            assert "90 %" in pages.words and pages.limit_words == "80 %"
            [decision] = answer.decisions
            assert (decision.kind, decision.from_count, decision.to_count) == ("decode", 2, 3)
            assert decision.age_s == 10.0 and decision.reason == decode.reason
            assert decode.outlook == "nothing was heard of it of late, so its count stays"

    asyncio.run(run())


def test_a_count_is_set_and_released():
    async def run() -> None:
        async with served() as address, Client(address) as client:
            decode = (await client.scale_pool("decode", 5, "ada")).pools[1]
            assert (decode.hold.count, decode.hold.by, decode.hold.age_s) == (5, "ada", 2.0)
            prefill = (await client.scale_pool("prefill", None)).pools[0]
            assert (prefill.hold.count, prefill.hold.by) == (1, gateway_operations.SOMEBODY)
            assert not (await client.release_pool("decode")).pools[1].HasField("hold")
            assert as_values(await client.get_pools())["pools"][0]["hold"]["count"] == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "count", "by", "reason"),
    [
        ("nowhere", 2, "", "UNKNOWN_POOL"),
        ("", None, "", "UNKNOWN_POOL"),
        ("decode", 0, "", "COUNT_OUT_OF_BOUNDS"),
        ("decode", 2**32 - 1, "", "COUNT_OUT_OF_BOUNDS"),
        ("decode", 2, "x" * 65, "INVALID_NAME"),
        ("decode", 2, "two\nlines", "INVALID_NAME"),
        ("decode", 2, "\x1b[31m", "INVALID_NAME"),
        ("decode", 2, "\u202e", "INVALID_NAME"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    kind: str, count: int | None, by: str, reason: str
):
    async def run() -> None:
        async with served() as address, Client(address) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.scale_pool(kind, count, by)
            error = caught.value
            assert error.reason == reason and error.field and error.limit and error.remedy
            assert not any(pool.HasField("hold") for pool in (await client.get_pools()).pools)

    asyncio.run(run())


def test_a_name_of_64_characters_is_shown_whole():
    async def run() -> None:
        async with served() as address, Client(address) as client:
            answer = await client.scale_pool("decode", 2, "ä" * 64)
            assert answer.pools[1].hold.by == "ä" * 64
            with pytest.raises(InvalidRequest, match="there is no pool"):
                await client.release_pool("nowhere")

    asyncio.run(run())


def test_a_ray_that_does_not_obey_is_told():
    async def run() -> None:
        async with served() as address, Client(address) as client:
            with pytest.raises(NodeUnavailable) as caught:
                await client.scale_pool("decode", 13)
            assert caught.value.reason == "RAY_DASHBOARD_SILENT" and caught.value.remedy == "Start it."

    asyncio.run(run())


def test_the_oldest_requests_come_first():
    nodes = {"prefill": "p-1", "decode": "d-1"}
    routes = (
        route("young", 1.0),
        route("old", 9.0, phase=Phase.DECODING, attempts_count=2, outputs=[7, 8], **nodes),
        route("middle", 5.0),
    )

    async def run() -> None:
        async with served(routes=routes) as address, Client(address) as client:
            answer = await client.get_requests()
            assert [one.request_id for one in answer.requests] == ["old", "middle", "young"]
            old = answer.requests[0]
            assert 9.0 <= old.age_s < 20 and old.phase == "decoding" and old.attempts_count == 2
            assert (old.prompt_tokens_count, old.output_tokens_count) == (3, 2)
            assert (old.prefill, old.decode) == ("p-1", "d-1")
            few = await client.get_requests(2)
            assert [one.request_id for one in few.requests] == ["old", "middle"] and few.requests_count == 3

    asyncio.run(run())


def test_requests_are_told_within_bounds(monkeypatch):
    monkeypatch.setattr(gateway_operations, "REQUESTS_COUNT_MAX", 25)
    routes = tuple(route(f"r{number}", number) for number in range(40))

    async def run() -> None:
        async with served(routes=routes) as address, Client(address) as client:
            counts = [len((await client.get_requests(asked)).requests) for asked in (0, 3, 25, 2**32 - 1)]
            assert counts == [20, 3, 25, 25]

    asyncio.run(run())


# tokens


@pytest.mark.parametrize("token", [None, "", "of clients", "of operatorsx", "OF OPERATORS"])
def test_operators_need_their_own_token(token: str | None):
    async def run() -> None:
        async with served(Tokens("of clients", "of operators")) as address:
            async with Client(address, token) as client:
                for call in (
                    client.get_pools(),
                    client.scale_pool("decode", 5),
                    client.release_pool("decode"),
                    client.get_requests(),
                ):
                    with pytest.raises(Unauthenticated) as caught:
                        await call
                    assert "of operators" not in str(caught.value)
            async with Client(address, "of operators") as client:
                assert not (await client.get_pools()).pools[1].HasField("hold"), "nothing was done"

    asyncio.run(run())


def test_without_a_token_of_their_own_operators_send_that_of_clients():
    async def run() -> None:
        async with served(Tokens("of clients")) as address:
            async with Client(address, "of clients") as client:
                assert (await client.get_pools()).pools
            async with Client(address) as client:
                with pytest.raises(Unauthenticated):
                    await client.get_pools()

    asyncio.run(run())


def test_which_tokens_open_which_service():
    both = Tokens("c", "o")
    assert both.accepted(SERVICE) == ("c", "o"), "operators are clients too"
    assert [both.accepted(service) for service in OPERATORS_SERVICES] == [("o",), ("o",)]
    assert {service.rpartition(".")[2] for service in OPERATORS_SERVICES} == {"Experts", "Operations"}
    assert Tokens("c").accepted(OPERATORS_SERVICES[0]) == Tokens("c").accepted(SERVICE) == ("c",)
    assert Tokens("c", page="p").accepted(OPERATORS_SERVICES[0]) == ("p",), "clients are no operators"
    assert Tokens("c", page="p").accepted(SERVICE) == ("c", "p"), "operators are clients too"
    assert Tokens(page="p").accepted(OPERATORS_SERVICES[0]) == (), "where nobody has a token all is open"
    own = Tokens(None, "o")
    assert own.accepted(SERVICE) == () and own.accepted(OPERATORS_SERVICES[0]) == ("o",)
    assert Tokens().accepted(SERVICE) == Tokens().accepted(OPERATORS_SERVICES[1]) == ()
    assert "secret" not in repr(Tokens("secret", "secret"))


# the coordinator's answers


class Method:
    """Answers with what it is given, or not at all."""

    def __init__(self, answer: object = None, delay_s: float = 0.0):
        self._answer, self._delay_s = answer, delay_s

    async def remote(self, *arguments: object) -> object:
        """As Ray does."""
        await asyncio.sleep(self._delay_s)
        return (self._answer, *arguments) if self._answer is None else self._answer


def test_answers_are_handed_on_and_refusals_raised():
    assert asyncio.run(ask(Method(), 1, "a")) == (None, 1, "a")
    refused = InvalidRequest("A_REASON", "no")
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(ask(Method(refused)))
    assert caught.value is refused
    with pytest.raises(NodeUnavailable, match="on their way") as moving:
        asyncio.run(ask(Method(ExpertsMoving("experts are on their way"))))
    assert moving.value.reason == "EXPERTS_MOVING" and moving.value.retry_after_s
    with pytest.raises(InvalidRequest, match="too few homes"):
        asyncio.run(ask(Method(ValueError("too few homes"))))


def test_a_coordinator_that_is_silent_is_told(monkeypatch):
    monkeypatch.setattr(coordinator_call, "ANSWER_S", 0.02)
    with pytest.raises(NodeUnavailable) as caught:
        asyncio.run(ask(Method(delay_s=5.0)))
    assert caught.value.reason == "NO_COORDINATOR" and caught.value.retry_after_s == 5.0


@pytest.mark.parametrize("error", [RuntimeError("the actor died"), asyncio.CancelledError()])
def test_a_coordinator_that_dies_is_told(error, caplog):
    class Dead:
        async def remote(self) -> None:
            raise error

    with pytest.raises(NodeUnavailable) as caught:
        asyncio.run(ask(Dead()))
    assert caught.value.reason == "NO_COORDINATOR" and caught.value.retry_after_s == 5.0
    assert "died" not in str(caught.value) and type(error).__name__ in caplog.text


def test_a_call_that_its_client_cancels_asks_the_coordinator_no_more():
    async def run() -> None:
        asking = asyncio.create_task(ask(Method(delay_s=5.0)))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())


def test_messages_have_no_field_that_is_never_told():
    """Every field of a pool is set somewhere in these tests' full answer."""
    fields = {field.name for field in trivium_pb2.Pool.DESCRIPTOR.fields}
    autoscaler = Coordinator().autoscaler
    autoscaler.hold("decode", 5, "ada", 9.0)
    told = gateway_operations.to_pools(autoscaler.report(11.0)).pools[1]
    missing = fields - {field.name for field, _ in told.ListFields()}
    assert missing <= {"starting_count", "draining_count", "lent_count", "borrowed_count"}
