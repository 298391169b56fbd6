"""What an actor sees and tells through Ray; a file of its own, for the coordinator is to load no torch."""

from collections.abc import Iterable

from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.services import get_webui_url_from_internal_kv
from ray.util.metrics import Gauge

from cluster.ray_dashboard import DashboardAccess


class RayWindow:
    """Through which an actor that does not know Ray sees and tells it things; made before Ray sends it."""

    def __init__(self, application: str) -> None:
        self.application = application
        self._gauges: dict[str, Gauge] = {}

    def publish(self, samples: Iterable[tuple[str, dict[str, str], float]]) -> None:
        """Give Ray's exporter the newest (name, labels, value), all as gauges called `ray_…`."""
        for name, labels, value in samples:
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag_keys=tuple(labels))
            self._gauges[name].set(value, labels)

    def dashboard(self) -> DashboardAccess | None:
        """Where the server is and what it wants to see, or None where there is none."""
        address = get_webui_url_from_internal_kv()
        return DashboardAccess(f"http://{address}", auth_headers()) if address else None


def auth_headers() -> dict[str, str]:
    """Headers by which Ray's servers know this cluster's own processes."""
    return dict(get_auth_headers_if_auth_enabled({}))
