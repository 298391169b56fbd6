"""TLS between clients and gateways: the gateways' certificate, and whom clients trust."""

import logging
import os
from pathlib import Path

import grpc

from cluster.config import GatewaySection
from cluster.errors import InvalidConfig

logger = logging.getLogger(__name__)

SCHEME = "grpcs://"
TRUSTED_FILE = "TRIVIUM_TLS_CA"
"""Environment variable: a PEM file of the authorities that a client trusts, instead of the system's."""
SHOWN_NAME = "TRIVIUM_TLS_NAME"
"""Environment variable: the name that certificates must show, where it is not that in the address."""
PEM_BYTES_MAX = 1 << 20


def server_credentials(section: GatewaySection) -> grpc.ServerCredentials | None:
    """What gateways show, or None where they speak no TLS; raises InvalidConfig."""
    if section.tls_certificate_file is None or section.tls_key_file is None:
        return None
    certificate = Certificate(section.tls_certificate_file, section.tls_key_file)
    return grpc.dynamic_ssl_server_credentials(certificate.read(), certificate.renewed)


class Certificate:
    """A gateway's certificate and its key; whoever renews them replaces the files."""

    def __init__(self, chain: Path, key: Path):
        self._chain, self._key = chain, key
        self._stamps: tuple = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What the files hold now; raises InvalidConfig."""
        self._stamps = self._stamps_now()  # first: what changes while files are read is read again
        chain = read_pem(self._chain, "gateway.tls_certificate_file", b"CERTIFICATE")
        key = read_pem(self._key, "gateway.tls_key_file", b"PRIVATE KEY")
        return grpc.ssl_server_certificate_configuration([(key, chain)])

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What changed files hold, or None to go on with what there is; gRPC asks before each handshake."""
        if self._stamps_now() == self._stamps:
            return None
        try:
            return self.read()
        except InvalidConfig as error:
            logger.warning("the certificate before is still shown: %s", error)
            return None

    def _stamps_now(self) -> tuple:
        return tuple(map(stamp, (self._chain, self._key)))


def stamp(path: Path) -> tuple[int, int] | None:
    """What is another for another file in its place; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def open_channel(address: str, options: list[tuple[str, object]]) -> grpc.aio.Channel:
    """A channel to host:port, or by TLS to grpcs://host:port; raises InvalidConfig."""
    if not address.startswith(SCHEME):
        return grpc.aio.insecure_channel(address, options=options)
    trusted = os.environ.get(TRUSTED_FILE)
    roots = read_pem(Path(trusted), TRUSTED_FILE, b"CERTIFICATE") if trusted else None
    credentials = grpc.ssl_channel_credentials(root_certificates=roots)
    if name := os.environ.get(SHOWN_NAME):
        options = [*options, ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address.removeprefix(SCHEME), credentials, options=options)


def read_pem(path: Path, field: str, kind: bytes) -> bytes:
    """A PEM file that holds something of a kind; `field` names the setting; raises InvalidConfig."""
    try:
        with path.open("rb") as file:
            pem = file.read(PEM_BYTES_MAX)
    except OSError as error:
        raise unusable(f"{path} cannot be read: {error.strerror or error}", field, kind) from None
    if b"-----BEGIN " not in pem or kind + b"-----" not in pem:
        raise unusable(f"{path} holds no {kind.decode().lower()}", field, kind)
    return pem


def unusable(message: str, field: str, kind: bytes) -> InvalidConfig:
    """The error about a file of TLS."""
    return InvalidConfig(
        reason="NO_PEM_FILE",
        message=message,
        field=field,
        limit=f"PEM with {kind.decode()}",
        remedy="Name a file in PEM that holds it.",
    )
