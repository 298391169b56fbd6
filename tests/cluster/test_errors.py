"""The family of errors: each member is drawn, has a status, and survives a copy."""

import copy

import pytest

from cluster import errors
from cluster.errors import Internal, InvalidRequest, Overloaded, TriviumError

FAMILY = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, TriviumError)]
STATUSES = {
    "InvalidRequest": "INVALID_ARGUMENT",
    "Unauthenticated": "UNAUTHENTICATED",
    "Overloaded": "RESOURCE_EXHAUSTED",
    "NodeUnavailable": "UNAVAILABLE",
    "DeadlinePassed": "DEADLINE_EXCEEDED",
    "Cancelled": "CANCELLED",
    "Internal": "INTERNAL",
    "InvalidConfig": "FAILED_PRECONDITION",
    "InvalidModel": "FAILED_PRECONDITION",
}


def test_each_error_has_its_status():
    assert {one.__name__: one.grpc_status for one in FAMILY if one is not TriviumError} == STATUSES


@pytest.mark.parametrize("error", FAMILY)
def test_each_error_is_drawn_in_the_docstring(error):
    assert error.__name__ in errors.__doc__


def test_the_text_names_field_limit_and_remedy():
    error = InvalidRequest("R", "5 is out of range", field="top_p", limit="0 to 1", remedy="Send less.")
    assert str(error) == "top_p: 5 is out of range (limit: 0 to 1). Send less."
    assert str(TriviumError("R", "it broke")) == "it broke."


def test_errors_survive_the_way_between_processes():
    error = copy.copy(Overloaded("FULL", "no room", limit="3 requests", retry_after_s=0.5))
    assert (type(error), error.reason, error.limit, error.retry_after_s) == (
        Overloaded,
        "FULL",
        "3 requests",
        0.5,
    )
    internal = copy.copy(Internal(error_id="abc"))
    assert internal.error_id == "abc" and "abc" in str(internal)
