"""The whole cluster in one thread: one seed decides who takes a turn, who is cancelled, and who dies when.

Routers, nodes, inboxes, outboxes and frames are those of a cluster; only time is made up.
"""

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.events import NodeDrained, RequestAdmitted, RequestCancelled, RoutedRequest
from decode.config import DecodeConfig
from decode.node import DecodeNode
from kernels.model.transformer import Transformer
from kernels.transport import endpoint
from prefill.config import PrefillConfig
from prefill.node import PrefillNode
from tests.simulation.parts import LEASE_S, SECRET, Client, Gateway, Node

TURN_S = 0.01
TURNS_MAX = 10_000
SPELL_TURNS = 100  # for which some parts sleep, so that they are late with everything
QUIET_ROUNDS_COUNT = 5
STORY_LINES_MAX = 400
FAULTS = ("kill prefill", "kill decode", "kill gateway", "cut", "drain decode")


@dataclass(frozen=True)
class Budget:
    """How much each node holds and takes at once: little, so that requests wait and are refused."""

    latents_bytes: int
    step_tokens_max: int = 64
    requests_max: int = 4


class Simulation:
    """Two gateways, two prefill and two decode nodes, and what happens to them."""

    def __init__(self, seed: int, transformer: Transformer, budget: Budget):
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.turns_count = 0
        self.story: list[str] = [f"seed {seed}"]
        self.clients: list[Client] = []
        self.gateways: dict[str, Gateway] = {}
        self.nodes: dict[str, Node] = {}
        self._transformer = transformer
        self._budget = budget
        self._prefix = f"simulation-{seed}"
        self._names = {kind: itertools.count(1) for kind in "gpd"}
        self._plan: list[tuple[int, str, str]] = []
        self._asleep: set[str] = set()
        for kind in "ggppdd":
            self._start(f"{kind}{next(self._names[kind])}")

    def run(
        self,
        requests: Sequence[RoutedRequest],
        faults_count: int,
        cancels_count: int,
        faults: Sequence[str] = FAULTS,
    ) -> list[Client]:
        """Send requests at moments of the seed's choosing, do harm, and go on until all have ended."""
        self._make_plan(requests, cancels_count, self.random.choices(faults, k=faults_count))
        by_id = {request.request_id: request for request in requests}
        while self._plan or not all(client.has_ended for client in self.clients):
            if self.turns_count >= TURNS_MAX:
                open_ids = [client.request.request_id for client in self.clients if not client.has_ended]
                raise AssertionError(f"{open_ids} did not end in {TURNS_MAX} turns")
            self._turn()
            while self._plan and self._plan[0][0] <= self.turns_count:
                _, deed, whom = self._plan.pop(0)
                self._act(deed, by_id.get(whom), whom)
        self._settle()
        return self.clients

    def check_books(self) -> None:
        """Raise AssertionError unless every part of the cluster is empty and its ledger balances."""
        for name, gateway in self.gateways.items():
            assert not gateway.router.routes, f"{name} still routes {list(gateway.router.routes)}"
        for name, node in self.nodes.items():
            node.cache.pool.check()
            report = node.report()
            assert report.pages_leased_count == 0, f"{name} has {report.pages_leased_count} pages leased"
            assert report.requests_running_count == report.requests_waiting_count == 0, f"{name} has requests"

    def told(self) -> str:
        """The end of the story, for whoever must find out what went wrong."""
        lines = self.story if len(self.story) <= STORY_LINES_MAX else ["…", *self.story[-STORY_LINES_MAX:]]
        return "\n".join([self.story[0], *lines])

    def close(self) -> None:
        """Close what is still open."""
        for part in (*self.gateways.values(), *self.nodes.values()):
            part.close()

    # what happens

    def _make_plan(
        self, requests: Sequence[RoutedRequest], cancels_count: int, faults: Sequence[str]
    ) -> None:
        plan = [(self.random.randrange(200), "admit", request.request_id) for request in requests]
        arrival_of = {request_id: turn for turn, _, request_id in plan}
        for request in self.random.sample(list(requests), cancels_count):
            turn = arrival_of[request.request_id] + self.random.randrange(400)
            plan.append((turn, "cancel", request.request_id))
        plan += [(self.random.randrange(500), fault, "") for fault in faults]
        self._plan = sorted(plan)

    def _put(self, turn: int, deed: str, whom: str) -> None:
        bisect.insort(self._plan, (turn, deed, whom))

    def _turn(self) -> None:
        self.turns_count += 1
        self.now_s += TURN_S
        if self.turns_count % SPELL_TURNS == 0:
            self._asleep = {name for name in (*self.gateways, *self.nodes) if self.random.random() < 0.3}
        awake = [name for name in (*self.gateways, *self.nodes) if name not in self._asleep]
        name = self.random.choice(awake or [""])
        endpoint.FRAMES_PER_TURN = self.random.choice((1, 2, 16)) if name in self.nodes else 1
        if name in self.gateways:
            gateway = self.gateways[name]
            if self.random.random() < 0.3:
                gateway.tick(self.nodes, asks_reports=self.random.random() < 0.3)
            else:
                gateway.poll()
        elif name in self.nodes:
            self._let_work(self.nodes[name])

    def _let_work(self, node: Node) -> None:
        if self.random.random() < 0.5:
            node.endpoint.poll(0)
            return
        if isinstance(node, DecodeNode):
            node._sweep_running()  # as its own thread does before each step
        node.step()

    def _act(self, deed: str, request: RoutedRequest | None, whom: str) -> None:
        match deed:
            case "admit" if not self.gateways:
                self._put(self.turns_count + 1, deed, whom)
            case "admit":
                gateway = self.random.choice(list(self.gateways.values()))
                self.clients.append(Client(request))
                gateway.clients[whom] = self.clients[-1]
                gateway.tell(RequestAdmitted(request))
            case "cancel":
                self._cancel(whom)
            case "start":
                self._start(whom)
            case "cut":
                self._cut()
            case "drain decode":
                self._drain()
            case _:
                self._kill(deed)

    def _cancel(self, request_id: str) -> None:
        for gateway in self.gateways.values():
            client = gateway.clients.get(request_id)
            if client is not None and not client.has_ended:
                client.cancelled = True
                gateway.tell(RequestCancelled(request_id))

    def _kill(self, deed: str) -> None:
        """Close a part at once; another one starts later, a node perhaps under the same name."""
        kind = deed.removeprefix("kill ")[0]
        parts = self.gateways if kind == "g" else self.nodes
        names = [name for name in parts if name[0] == kind]
        if not names:
            return
        name = self.random.choice(names)
        self._note(f"{name} dies")
        part = parts.pop(name)
        if self.random.random() < 0.5:  # as a host does that takes with it what it has sent
            for other in (*self.gateways.values(), *self.nodes.values()):
                close_channels(other, {name, part.endpoint.address})
        part.close()
        if isinstance(part, Gateway):
            part.lose_clients()
        comes_back = kind != "g" and self.random.random() < 0.5
        successor = name if comes_back else f"{kind}{next(self._names[kind])}"
        self._put(self.turns_count + self.random.randrange(150), "start", successor)

    def _cut(self) -> None:
        """Break the channels on which latents come to a node that awaits some, with both ends alive."""
        awaiting = [name for name, node in self.nodes.items() if name[0] == "d" and len(node.inbox)]
        if awaiting:
            name = self.random.choice(awaiting)
            self._note(f"{name} loses its prefill nodes")
            close_channels(self.nodes[name], {name for name in self.nodes if name[0] == "p"})

    def _drain(self) -> None:
        """Let a decode node have no new requests; another takes its place."""
        name = self.random.choice([name for name in self.nodes if name[0] == "d"] or [""])
        for gateway in self.gateways.values():
            gateway.tell(NodeDrained(name))
        self._start(f"d{next(self._names['d'])}")

    def _start(self, name: str) -> None:
        self._note(f"{name} starts")
        address = f"memory://{self._prefix}-{name}"
        budget = self._budget
        match name[0]:
            case "g":
                self.gateways[name] = Gateway(name, address, self._clock, self._note)
            case "p":
                config = PrefillConfig(
                    name, address, SECRET, budget.latents_bytes, budget.step_tokens_max, budget.requests_max
                )
                self.nodes[name] = PrefillNode(config, self._transformer, self._clock)
            case _:
                config = DecodeConfig(
                    name, address, SECRET, budget.latents_bytes, budget.requests_max, lease_s=LEASE_S
                )
                self.nodes[name] = DecodeNode(config, self._transformer, self._clock)

    def _settle(self) -> None:
        """Let everybody take turns until nothing moves any more."""
        quiet_count = 0
        while quiet_count < QUIET_ROUNDS_COUNT:
            self.now_s += TURN_S
            moved = sum(gateway.poll() for gateway in self.gateways.values())
            moved += sum(node.endpoint.poll(0) + node.step() for node in self.nodes.values())
            quiet_count = 0 if moved else quiet_count + 1

    def _clock(self) -> float:
        return self.now_s

    def _note(self, line: str) -> None:
        self.story.append(f"{self.now_s:8.2f} {line}")


def close_channels(part: Gateway | Node, peers: set[str]) -> None:
    """Break a part's channels to some peers; what lies unread in them is lost."""
    for channel in part.endpoint._channels:
        if channel.peer in peers:
            channel.close()
