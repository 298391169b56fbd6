"""Log lines for people, and for machines one JSON object each, whatever is in a message."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from cluster.logs import FLOORS, begin_logs


@pytest.fixture
def written(capsys) -> Iterator[Callable[[], str]]:
    """Tells what was written to stderr; loggers are as before at the end."""
    loggers = [logging.getLogger(floor) for floor in FLOORS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield lambda: capsys.readouterr().err
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def fail() -> None:
    """Something that goes wrong, told."""
    try:
        raise KeyError("the key\nof two lines")
    except KeyError:
        logging.getLogger("decode.node").exception("a step failed")


def test_people_get_lines(written):
    begin_logs("decode-1", json_logs=False)
    logging.getLogger("decode.node").warning("%s pages are left", 3)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING decode-1: 3 pages are left\n", written())
    fail()
    text = written()
    assert "Traceback" in text and "KeyError" in text


def test_machines_get_objects(written):
    begin_logs("decode-1", json_logs=True)
    logging.getLogger("decode.node").info("%s pages are left", 3)
    [line] = written().splitlines()
    values = json.loads(line)
    moment = datetime.fromisoformat(values.pop("time"))
    assert datetime.now(UTC) - moment < timedelta(minutes=1)
    assert values == {
        "level": "info",
        "actor": "decode-1",
        "logger": "decode.node",
        "message": "3 pages are left",
    }


def test_an_exception_is_a_field_of_one_line(written):
    begin_logs("decode-1", json_logs=True)
    fail()
    [line] = written().splitlines()
    values = json.loads(line)
    assert values["level"] == "error" and values["message"] == "a step failed"
    assert values["exception"].startswith("Traceback") and "of two lines" in values["exception"]


@pytest.mark.parametrize(
    "text", ["two\nlines", "\r\n", 'a "quote" \\', "\x1b[31m red", "\x00", "größer", "100 %"]
)
def test_whatever_a_message_holds_it_is_one_line_of_json(written, text: str):
    begin_logs("decode-1", json_logs=True)
    logging.getLogger("cluster.desk").info(text)
    line = written()
    assert line.endswith("\n") and line.count("\n") == 1 and "\x1b" not in line
    assert json.loads(line)["message"] == text


def test_every_floor_is_heard_once_however_often_it_begins(written):
    for _ in range(3):
        begin_logs("gateway-1", json_logs=False)
    for floor in FLOORS:
        logging.getLogger(f"{floor}.anything").info("from %s", floor)
        logging.getLogger(f"{floor}.anything").debug("not this")
    assert [line.split()[-1] for line in written().splitlines()] == list(FLOORS)
