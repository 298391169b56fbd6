"""What can go wrong with a request or with the setup, each saying what to do about it.

TriviumError
├── InvalidRequest     the request itself is wrong                   change it, do not retry
├── Unauthenticated    no token, or not the right one                send the token
├── Overloaded         the cluster has no room now                   retry after `retry_after_s`
├── NodeUnavailable    no node can serve this, or one was lost       retry
├── DeadlinePassed     the client's deadline came first              ask for less, or wait longer
├── Cancelled          the client gave up
├── Internal           our fault; `error_id` finds it in the log     tell the operator the id
├── InvalidConfig      the YAML is wrong                             correct it
└── InvalidModel       the model's folder is incomplete or wrong     correct it
"""


class TriviumError(Exception):
    """Base of all: a `reason` for programs (UPPER_SNAKE_CASE), a message for people, and what to do."""

    grpc_status = "INTERNAL"

    def __init__(
        self,
        reason: str,
        message: str,
        field: str | None = None,
        limit: str | None = None,
        remedy: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, message, field, limit, remedy, retry_after_s)
        self.reason = reason
        self.message = message
        self.field = field
        self.limit = limit
        self.remedy = remedy
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        field = f"{self.field}: " if self.field else ""
        limit = f" (limit: {self.limit})" if self.limit else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{field}{self.message}{limit}.{remedy}"


class InvalidRequest(TriviumError):
    """The request breaks a rule; sent again unchanged it fails again."""

    grpc_status = "INVALID_ARGUMENT"


class Unauthenticated(TriviumError):
    """The call carries no valid bearer token."""

    grpc_status = "UNAUTHENTICATED"


class Overloaded(TriviumError):
    """The request was shed unread; it may be sent again after `retry_after_s`."""

    grpc_status = "RESOURCE_EXHAUSTED"


class NodeUnavailable(TriviumError):
    """A node that the request needs is lost or not there yet."""

    grpc_status = "UNAVAILABLE"


class DeadlinePassed(TriviumError):
    """The deadline that the client set came before the last token."""

    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(TriviumError):
    """The client cancelled, or went away."""

    grpc_status = "CANCELLED"


class Internal(TriviumError):
    """A fault of ours, told apart only by the id under which the log has all of it."""

    def __init__(self, error_id: str) -> None:
        super().__init__(
            reason="INTERNAL",
            message=f"something broke in the server, error id {error_id}",
            remedy="Tell the operator the error id; the server's log has the details under it.",
        )
        self.args = (error_id,)
        self.error_id = error_id


class InvalidConfig(TriviumError):
    """The configuration file cannot be used."""

    grpc_status = "FAILED_PRECONDITION"


class InvalidModel(TriviumError):
    """The model's folder cannot be used."""

    grpc_status = "FAILED_PRECONDITION"
