"""What actors write to their logs: lines for people, or JSON objects for machines."""

import json
import logging
import sys
import time

FLOORS = ("cluster", "prefill", "decode", "experts", "kernels")


class PeopleFormatter(logging.Formatter):
    """Time, level, actor, and what happened."""

    def __init__(self, actor: str):
        super().__init__(f"%(asctime)s %(levelname)-7s {actor}: %(message)s", "%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; an exception's trace is a field of it."""

    def __init__(self, actor: str):
        super().__init__()
        self._actor = actor

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "actor": self._actor,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def begin_logs(actor: str, json_logs: bool) -> None:
    """Write what this process has to say to stderr, which Ray keeps as the actor's log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(actor) if json_logs else PeopleFormatter(actor))
    for floor in FLOORS:
        logger = logging.getLogger(floor)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
