"""What a PromQL expression speaks of, found by patterns and no parser: enough for our own files."""

import re
from collections.abc import Iterator

QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
SELECTOR = re.compile(r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
RANGE = re.compile(r"\[[^\[\]]*\]")
MATCHER = re.compile(r'([A-Za-z_]\w*)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
NAME = re.compile(r"(?<![\w:$.])[A-Za-z_:][\w:]*(?!\s*\()(?![\w:])")
WORDS = {
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
}


def metric_names(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    bare = expression
    for pattern in (SELECTOR, QUOTED, GROUPING, RANGE):
        bare = pattern.sub(" ", bare)
    return {name for name in NAME.findall(bare) if name not in WORDS}


def label_names(expression: str) -> set[str]:
    """Labels that it matches or groups by."""
    grouped = (name.strip() for group in GROUPING.findall(expression) for name in group.split(","))
    return {name for name, _, _ in matchers(expression)} | {name for name in grouped if name}


def matchers(expression: str) -> Iterator[tuple[str, str, str]]:
    """(label, operator, value) of each matcher."""
    for selector in SELECTOR.findall(expression):
        yield from MATCHER.findall(selector)
