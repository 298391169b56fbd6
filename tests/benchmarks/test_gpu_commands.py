"""The commands that docs/gpu.md gives for a machine with a GPU hold all its tests, and need what it says."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = {"cluster", "prefill", "decode", "experts", "kernels", "tests", "benchmarks"}
PLAIN = {"torch", "triton", "numba", "numpy", "cupy", "msgpack", "safetensors", "typer", "rich"}
TESTS = {"pytest", "hypothesis", "transformers"}
WHEELS = {"pydantic"}  # and what it needs itself: of all that a node needs, GPU images of others lack it


def documented(start: str) -> list[list[str]]:
    """The words of each command in docs/gpu.md that begins so."""
    text = (ROOT / "docs/gpu.md").read_text().replace("\\\n", " ")
    commands = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith(start)]
    assert commands, start
    return commands


def files_of(words: list[str]) -> list[Path]:
    """Test files that a command names, or that are in a folder that it names."""
    places = [ROOT / word for word in words if word.startswith("tests/")]
    return [file for place in places for file in ([place] if place.is_file() else place.glob("test_*.py"))]


def has_gpu_tests(file: Path) -> bool:
    """Whether a test there is marked for GPUs, or runs on the device that `tests/conftest.py` finds."""
    tree = ast.parse(file.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    if any(function.name == "device" for function in functions):  # a fixture of its own
        return False
    for test in (function for function in functions if function.name.startswith("test_")):
        decorators = [ast.unparse(decorator) for decorator in test.decorator_list]
        asks = "device" in {argument.arg for argument in test.args.args}
        if "pytest.mark.gpu" in decorators or (asks and not re.search("['\"]device['\"]", str(decorators))):
            return True
    return False


def imported(files: Iterable[Path]) -> set[str]:
    """Packages of others that files import, and whatever of ours they import in turn, conftests too."""
    waiting = list(files)
    waiting += [above / "conftest.py" for file in waiting for above in file.parents]
    seen: set[Path] = set()
    foreign: set[str] = set()
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        for name in names_in(file):
            top, *_ = name.split(".")
            if top in OWN:
                place = ROOT.joinpath(*name.split("."))
                waiting += [above / "__init__.py" for above in (place, *place.parents)]
                waiting.append(place.with_suffix(".py"))
            elif top not in sys.stdlib_module_names:
                foreign.add(top)
    return foreign


def names_in(file: Path) -> set[str]:
    """Modules that a file imports, and what it imports from them, which may be modules."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{one.name}" for one in node.names}
    return names


def test_every_test_for_a_gpu_is_in_a_documented_command():
    asked = {file for words in documented("python -m pytest -m gpu") for file in files_of(words)}
    there = {file for file in (ROOT / "tests").rglob("test_*.py") if has_gpu_tests(file)}
    assert there and there <= asked, sorted(str(file.relative_to(ROOT)) for file in there - asked)


def test_a_warning_of_a_gpu_fails_no_documented_test():
    for words in documented("python -m pytest -m gpu"):
        assert words[words.index("-W") + 1] == "default" and "--continue-on-collection-errors" in words


def test_the_first_documented_tests_import_nothing_that_must_be_brought():
    first, *others = documented("python -m pytest -m gpu")
    assert imported(files_of(first)) <= PLAIN | TESTS
    for words in others:
        assert imported(files_of(words)) <= PLAIN | TESTS | WHEELS


def test_benchmarks_import_no_more_than_they_say():
    assert documented("python -m benchmarks.kernels") and documented("python -m benchmarks.truncated_v3")
    assert imported([ROOT / "benchmarks/kernels.py"]) <= PLAIN
    assert imported([ROOT / "benchmarks/truncated_v3.py"]) <= PLAIN | WHEELS
