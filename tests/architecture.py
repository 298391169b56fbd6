"""The law of the house as functions of one file's path and source: each returns its breaches as sentences."""

import ast
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

FLOORS = ("cluster", "prefill", "decode", "experts", "kernels")

GRPC_DOOR = ("cluster/gateway*.py", "cluster/client.py", "cluster/tls.py", "cluster/proto/*")
METRICS_DOOR = ("cluster/metrics.py",)
NOWHERE = ()
DOORS = {
    "ray": ("cluster/pools.py", "cluster/ray_window.py"),
    "grpc": GRPC_DOOR,
    "grpc_health": GRPC_DOOR,
    "grpc_reflection": GRPC_DOOR,
    "grpc_status": GRPC_DOOR,
    "grpc_tools": ("cluster/proto/*",),
    "google": GRPC_DOOR,  # protobuf and google.rpc
    "prometheus_client": METRICS_DOOR,
    "tokenizers": ("cluster/tokenizer.py",),
    "jinja2": ("cluster/tokenizer.py",),
    "yaml": ("cluster/config_file.py",),
    "triton": ("kernels/ops/*",),
    "numba": ("kernels/ops/machine_code.py",),
    "cupy": ("kernels/transport/nccl.py",),
    "matplotlib": ("cluster/bench/picture.py",),
    "safetensors": ("kernels/model/checkpoint.py",),
    "aiohttp": ("cluster/http_server.py", "cluster/pools_page.py", "cluster/ray_dashboard.py"),
    "opentelemetry": ("cluster/tracing.py",),
    "socket": ("kernels/transport/*",),
    "transformers": NOWHERE,
    "pickle": NOWHERE,
    "cloudpickle": NOWHERE,
    "dill": NOWHERE,
    "marshal": NOWHERE,
    "shelve": NOWHERE,
}

BANNED_NAMES = {
    "torch.load": "it unpickles",
    "torch.save": "it pickles",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.full_load_all": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.unsafe_load_all": "use yaml.safe_load",
    "importlib.import_module": "imports stand at the top of a file",
    "__import__": "imports stand at the top of a file",
    "eval": "no code from outside",
    "exec": "no code from outside",
    "builtins.eval": "no code from outside",
    "builtins.exec": "no code from outside",
}

BANNED_FILE_WORDS = {"utils", "util", "helpers", "helper", "manager", "common"}
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[str, str], list[str]]


def product_files(root: Path) -> list[Path]:
    """Every Python file of the five floors that people wrote, sorted."""
    files = (file for floor in FLOORS for file in (root / floor).rglob("*.py"))
    return sorted(file for file in files if not fnmatch(file.name, "*_pb2*.py"))


def breaches(root: Path, rule: Rule) -> list[str]:
    """What a rule finds in the whole tree, each breach after its file's path."""
    return [
        f"{path}:{breach}"
        for path in (file.relative_to(root).as_posix() for file in product_files(root))
        for breach in rule(path, (root / path).read_text())
    ]


def foreign_library_outside_its_door(path: str, source: str) -> list[str]:
    """One door for each foreign library, and none for those that carry code in data."""
    return [
        f"{line}: imports {module}, which belongs in {' or '.join(DOORS[module]) or 'no file'}"
        for line, module in _imported_top_modules(ast.parse(source))
        if module in DOORS and not any(fnmatch(path, door) for door in DOORS[module])
    ]


def banned_name(path: str, source: str) -> list[str]:
    """Names that load code, under whatever alias they are imported."""
    return [
        f"{line}: uses {name}: {BANNED_NAMES[name]}"
        for line, name in _dotted_names(ast.parse(source))
        if name in BANNED_NAMES
    ]


def assert_statement(path: str, source: str) -> list[str]:
    """Python drops assertions under -O, so none may guard product code."""
    nodes = ast.walk(ast.parse(source))
    return [f"{node.lineno}: asserts; raise an error" for node in nodes if isinstance(node, ast.Assert)]


def hidden_import(path: str, source: str) -> list[str]:
    """Imports inside functions or for type checkers alone hide a circle."""
    tree = ast.parse(source)
    hiding = [node for node in ast.walk(tree) if isinstance(node, Function) or _is_type_checking(node)]
    lines = {
        inner.lineno
        for node in hiding
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }
    return [f"{line}: hides an import" for line in sorted(lines)]


def vague_file_name(path: str, source: str) -> list[str]:
    """A file or folder is named after what it holds."""
    words = {word for part in PurePosixPath(path).with_suffix("").parts for word in part.split("_")}
    return [f"1: '{word}' says nothing of what is inside" for word in sorted(words & BANNED_FILE_WORDS)]


def long_file(path: str, source: str) -> list[str]:
    """A file fits in a head."""
    line_count = len(source.splitlines())
    return [f"{line_count}: more than {FILE_LINES_MAX} lines"] if line_count > FILE_LINES_MAX else []


def long_function(path: str, source: str) -> list[str]:
    """A function fits on a screen."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    lengths = {node: node.end_lineno - node.lineno + 1 for node in functions}
    return [
        f"{node.lineno}: {node.name} has {length} lines, more than {FUNCTION_LINES_MAX}"
        for node, length in lengths.items()
        if length > FUNCTION_LINES_MAX
    ]


def folder_without_init(root: Path) -> list[str]:
    """Folders that would be packages by accident, invisible to packaging and to import contracts."""
    folders = {file.parent for file in product_files(root)}
    missing = sorted(folder for folder in folders if not (folder / "__init__.py").exists())
    return [f"{folder.relative_to(root)}: no __init__.py" for folder in missing]


def real_tree(root: Path) -> dict[str, set[str]]:
    """Names of the files without .py by folder, leaving out __init__ and generated code."""
    tree: dict[str, set[str]] = {}
    for file in product_files(root):
        if file.stem != "__init__":
            tree.setdefault(file.parent.relative_to(root).as_posix() + "/", set()).add(file.stem)
    return tree


def drawn_tree(readme: str) -> dict[str, set[str]]:
    """Names by folder as a README draws them, in its one fenced block called `text tree`."""
    blocks = re.findall(r"^```text tree\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    if len(blocks) != 1:
        raise ValueError(f"the README has {len(blocks)} blocks called 'text tree'; it needs exactly one")
    lines = (line.split() for line in blocks[0].splitlines())
    return {words[0]: set(words[1:]) for words in lines if words}


def tree_differences(root: Path, readme: str) -> list[str]:
    """Where the drawn tree lies: folders of the floors file by file, any other folder by its being there."""
    real, drawn = real_tree(root), drawn_tree(readme)
    floors = {folder: names for folder, names in drawn.items() if folder.split("/")[0] in FLOORS}
    wrong = [f"{folder} is drawn but does not exist" for folder in drawn if not (root / folder).is_dir()]
    for folder in sorted(real.keys() | floors.keys()):
        there, shown = real.get(folder, set()), floors.get(folder, set())
        wrong += [f"{folder}{name} exists but is not drawn" for name in sorted(there - shown)]
        wrong += [
            f"{folder}{name} is drawn but does not exist"
            for name in sorted(shown - there)
            if not ("." in name and (root / folder / name).is_file())
        ]
    return wrong


def _imported_top_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and first name of each module imported, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]


def _dotted_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of each name used, imported aliases resolved: with `import torch as t`, t.load."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            yield node.lineno, ".".join(filter(None, (aliases.get(first, first), rest)))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
