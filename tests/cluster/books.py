"""Whether a router's counts are those of its requests: checked after each event of a story."""

from collections import Counter

from cluster.router import Phase, Router


def check_books(router: Router) -> None:
    """Raise AssertionError if a count of a node, or the queue, is not what the routes say."""
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for route in router.routes.values():
        if route.phase is Phase.WAITING:
            continue
        requests[route.decode] += 1
        if route.phase is not Phase.DECODING:
            requests[route.prefill] += 1
            tokens[route.prefill] += route.tokens_sent_count
        assert {route.decode} <= set(router.nodes), f"{route.request.request_id} is on a node that is lost"
        assert not route.needs_prefill or route.prefill in router.nodes
    for name, node in router.nodes.items():
        assert node.requests_count == requests[name], f"requests of {name}"
        assert node.tokens_sent_count == tokens[name], f"tokens sent to {name}"
    waiting = sum(route.phase is Phase.WAITING for route in router.routes.values())
    assert router.requests_waiting_count == waiting, "requests waiting"
    kept = router._kept
    assert all(router.routes[request_id].phase is Phase.WAITING for request_id in kept), "kept for nobody"
    assert len(set(kept.values())) == len(kept), "a node is kept for two"
