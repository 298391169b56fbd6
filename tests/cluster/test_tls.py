"""TLS at the gateway's door, with a certificate made for the test."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.client import Client
from cluster.config import GatewaySection, check_config
from cluster.errors import InvalidConfig, NodeUnavailable
from cluster.gateway import Tokens, bind, make_server
from cluster.gateway_operations import OperationsService
from cluster.proto import trivium_pb2_grpc
from cluster.router import Router
from cluster.tls import SHOWN_NAME, TRUSTED_FILE, server_credentials


def make_certificate(folder: Path, name: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """A certificate for a name that has signed itself, and its key."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    asked = ("-x509", *curve, "-nodes", "-days", "2", "-subj", "/CN=gateway")
    named = ("-addext", f"subjectAltName={name}", "-keyout", str(key), "-out", str(certificate))
    subprocess.run(["openssl", "req", *asked, *named], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that all tests share."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def section(certificate: tuple[Path, Path]) -> GatewaySection:
    return GatewaySection(tls_certificate_file=certificate[0], tls_key_file=certificate[1])


@asynccontextmanager
async def gateway(certificate: tuple[Path, Path]) -> AsyncIterator[str]:
    """Host and port of a gateway behind TLS that knows of no request."""
    server = make_server(1 << 20, Tokens())
    trivium_pb2_grpc.add_OperationsServicer_to_server(OperationsService(None, Router(10.0)), server)
    port = bind(server, "127.0.0.1", 0, server_credentials(section(certificate)))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def told_at(address: str) -> int:
    """How many requests a new client is told of."""
    async with Client(address) as client:
        return (await client.get_requests(timeout_s=5.0)).requests_count


async def requests_at(certificate: tuple[Path, Path], scheme: str) -> int:
    """How many requests a gateway behind TLS tells a client of."""
    async with gateway(certificate) as address:
        return await told_at(scheme + address)


def test_a_client_that_trusts_the_authority_is_served(certificate, monkeypatch):
    monkeypatch.setenv(TRUSTED_FILE, str(certificate[0]))
    assert asyncio.run(requests_at(certificate, "grpcs://")) == 0


def test_a_client_may_await_another_name_than_that_in_the_address(tmp_path, monkeypatch):
    """As through a port that is forwarded to this host."""
    files = make_certificate(tmp_path, "DNS:gateway.example")
    monkeypatch.setenv(TRUSTED_FILE, str(files[0]))
    with pytest.raises(NodeUnavailable, match="Hostname Verification"):
        asyncio.run(requests_at(files, "grpcs://"))
    monkeypatch.setenv(SHOWN_NAME, "gateway.example")
    assert asyncio.run(requests_at(files, "grpcs://")) == 0


@pytest.mark.parametrize("scheme", ["grpcs://", ""])
def test_one_that_does_not_or_speaks_no_tls_is_not(certificate, monkeypatch, scheme):
    monkeypatch.delenv(TRUSTED_FILE, raising=False)
    with pytest.raises(NodeUnavailable):
        asyncio.run(requests_at(certificate, scheme))


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path, monkeypatch):
    files = make_certificate(tmp_path)

    def trust(name: str) -> None:
        (tmp_path / name).write_bytes(files[0].read_bytes())
        monkeypatch.setenv(TRUSTED_FILE, str(tmp_path / name))

    async def run() -> None:
        trust("old")
        async with gateway(files) as address:
            assert await told_at(f"grpcs://{address}") == 0
            files[1].unlink()
            assert await told_at(f"grpcs://{address}") == 0, "half a renewal ends nothing"
            make_certificate(tmp_path)
            with pytest.raises(NodeUnavailable):
                await told_at(f"grpcs://{address}")
            trust("new")
            assert await told_at(f"grpcs://{address}") == 0

    asyncio.run(run())


def test_files_that_are_none_are_told(certificate, tmp_path):
    nothing = tmp_path / "nothing.pem"
    with pytest.raises(InvalidConfig, match=r"gateway\.tls_certificate_file"):
        server_credentials(section((nothing, certificate[1])))
    with pytest.raises(InvalidConfig, match="private key"):
        server_credentials(section((certificate[0], certificate[0])))


def test_certificate_and_key_go_together(tmp_path):
    values = {"model": {"folder": "x"}, "gateway": {"tls_key_file": "key.pem"}}
    with pytest.raises(InvalidConfig, match="go together"):
        check_config(values, "test", tmp_path)
