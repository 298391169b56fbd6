"""What a gateway answers to operators, with something of everything, and names that mean ill."""

from cluster.proto import trivium_pb2

EVIL = "[red]evil[/red]\x1b[31m\x07"
"""Would change the screen if it were taken for more than text."""
HARMLESS = "[red]evil[/red][31m"


def pools(name: str = "somebody", autoscaled: bool = True) -> trivium_pb2.GetPoolsResponse:
    """Four pools, of which one is held; `name` stands wherever texts of others do."""
    made = trivium_pb2.GetPoolsResponse(is_autoscaled=autoscaled)
    for kind in ("gateway", "prefill", "decode", "experts"):
        made.pools.add(
            kind=kind, target_count=3, ready_count=2, count_min=1, count_max=8, outlook=f"as {name}"
        )
    decode = made.pools[2]
    decode.starting_count, decode.draining_count, decode.lent_count, decode.borrowed_count = 1, 2, 3, 4
    decode.hold.count, decode.hold.by, decode.hold.age_s = 3, f"scale, {name}", 5.0
    decode.pressures.add(cause="pages", level=0.9, words="72 % of pages", limit_words="80 %")
    decode.pressures.add(cause="inter-token latency", level=1.5, words="150 ms", limit_words="100 ms")
    for number in range(9):
        made.decisions.add(
            age_s=10.0 * number, kind="decode", from_count=number, to_count=number + 1, reason=f"of {name}"
        )
    return made


def cluster(name: str = "node") -> trivium_pb2.GetClusterResponse:
    """A prefill and a decode node, and a gateway."""
    made = trivium_pb2.GetClusterResponse(placement_epoch=3)
    for kind in ("prefill", "decode"):
        made.nodes.add(
            name=f"{kind}-{name}"[:40],
            state=trivium_pb2.STATE_DRAINING,
            requests_running_count=4096,
            requests_waiting_count=1024,
            pages_total_count=1000,
            pages_free_count=100,
            pages_cached_count=150,
            pages_leased_count=750,
            tokens_per_s=12345.6,
        )
    made.nodes.add(name="gateway-a1b2c3", state=trivium_pb2.STATE_READY)
    return made


def requests(name: str = "0123456789abcdef") -> trivium_pb2.GetRequestsResponse:
    """Two requests of a thousand."""
    made = trivium_pb2.GetRequestsResponse(requests_count=1000)
    for phase in ("waiting", "prefilling"):
        made.requests.add(
            request_id=name,
            phase=phase,
            age_s=4000.0,
            prompt_tokens_count=131072,
            output_tokens_count=65536,
            attempts_count=1,
            prefill=f"prefill-{name[:6]}",
            decode=f"decode-{name[:6]}",
        )
    return made
