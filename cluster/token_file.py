"""The bearer token in a file, for gateways that ask for it and clients that send it."""

from pathlib import Path

from cluster.errors import InvalidConfig


def read_token(path: Path | None, field: str) -> str | None:
    """The token, or None without a path; `field` names the setting; raises InvalidConfig."""
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise unusable(f"{path} cannot be read: {why}", field) from None
    if not token or not token.isascii() or not token.isprintable():
        raise unusable(f"{path} holds no token", field)
    return token


def unusable(message: str, field: str) -> InvalidConfig:
    """The error about a token file."""
    return InvalidConfig(
        reason="NO_TOKEN_FILE",
        message=message,
        field=field,
        limit="one line of printable ASCII",
        remedy="Name a file that holds the token.",
    )
