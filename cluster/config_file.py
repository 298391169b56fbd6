"""A configuration file as plain values: YAML within limits, each key once."""

from pathlib import Path
from typing import Any

import yaml

from cluster.errors import InvalidConfig

FILE_BYTES_MAX = 64 * 2**10


def read_yaml(path: Path) -> Any:
    """What a small file of plain YAML holds, read as nothing but values; raises InvalidConfig."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        why = error.strerror or str(error)
        raise _unreadable(path, why, "a file that can be read", "Check the path.") from None
    if len(content) > FILE_BYTES_MAX:
        raise _unreadable(path, "it is too large", f"{FILE_BYTES_MAX} bytes", "Is it the right file?")
    try:
        _refuse_twins(yaml.compose(content, Loader=yaml.SafeLoader), path)
        return yaml.safe_load(content)
    except RecursionError:
        raise _unreadable(
            path, "it is nested too deeply", "sections of plain values", "Flatten it."
        ) from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        why = " ".join(str(error).split()).replace(' in "<byte string>"', "")
        raise _unreadable(path, why, "plain YAML", "Correct that place.") from None


def _refuse_twins(root: yaml.Node | None, path: Path) -> None:
    """Refuse a key given twice in one mapping: YAML itself would take the last and say nothing."""
    waiting, seen_ids = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen_ids or not isinstance(node, yaml.CollectionNode):
            continue
        seen_ids.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
            continue
        waiting.extend(value for _, value in node.value)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twins = sorted(key for key in set(keys) if keys.count(key) > 1)
        if twins:
            line = node.start_mark.line + 1
            why = f"the key {twins[0]!r} stands twice in the mapping that begins in line {line}"
            raise _unreadable(path, why, "each key once", "Take one of them out.")


def _unreadable(path: Path, why: str, limit: str, remedy: str) -> InvalidConfig:
    return InvalidConfig("UNREADABLE_CONFIG", why, field=str(path), limit=limit, remedy=remedy)
