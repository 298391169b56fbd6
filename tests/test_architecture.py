"""The law of the house: it holds in the tree, and a breach planted on purpose is reported."""

import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import importlinter.configuration
import pytest
from importlinter.application.use_cases import create_report, read_user_options
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.independence import IndependenceContract
from importlinter.contracts.layers import LayersContract
from importlinter.domain.contract import registry

from tests.architecture import (
    DOORS,
    FLOORS,
    assert_statement,
    banned_name,
    breaches,
    folder_without_init,
    foreign_library_outside_its_door,
    hidden_import,
    long_file,
    long_function,
    tree_differences,
    vague_file_name,
)

ROOT = Path(__file__).parent.parent

RULES_OF_A_FILE = (
    foreign_library_outside_its_door,
    banned_name,
    assert_statement,
    hidden_import,
    vague_file_name,
    long_file,
    long_function,
)

STAIR = "Each floor imports floors below it, never above"
INSIDE_KERNELS = "Inside kernels the model knows the operations, never the reverse"
TRANSPORT_AND_MODEL = "The transport and the model do not know each other"
TRANSPORT_AND_OPERATIONS = "The transport and the operations do not know each other"
INBOX_ONLY = "Of decode, prefill knows the messages alone"
PLAIN_FACES = "Messages and configs bring neither torch nor sockets"
NO_TORCH = "Gateways and the coordinator stay small: they compute nothing, and load no torch"
CONTRACTS = {
    STAIR,
    INSIDE_KERNELS,
    TRANSPORT_AND_MODEL,
    TRANSPORT_AND_OPERATIONS,
    INBOX_ONLY,
    PLAIN_FACES,
    NO_TORCH,
}

PLANTED_CONTRACT_BREACHES = [
    (STAIR, "kernels/ops/breach.py", "import experts"),
    (STAIR, "experts/breach.py", "from decode import messages"),
    (STAIR, "decode/breach.py", "import prefill.messages"),
    (STAIR, "prefill/breach.py", "from cluster.errors import TriviumError"),
    (INSIDE_KERNELS, "kernels/ops/breach.py", "from kernels.model.config import ModelConfig"),
    (TRANSPORT_AND_MODEL, "kernels/transport/breach.py", "import kernels.model.config"),
    (TRANSPORT_AND_MODEL, "kernels/model/breach.py", "from kernels.transport import frame"),
    (TRANSPORT_AND_OPERATIONS, "kernels/transport/breach.py", "from kernels.ops import sample"),
    (TRANSPORT_AND_OPERATIONS, "kernels/ops/breach.py", "from kernels.transport.frame import Frame"),
    (INBOX_ONLY, "prefill/breach.py", "from decode.config import DecodeConfig"),
    (INBOX_ONLY, "prefill/breach.py", "import decode.node"),
    *((PLAIN_FACES, f"{floor}/messages.py", "import torch") for floor in ("prefill", "decode", "experts")),
    *((PLAIN_FACES, f"{floor}/config.py", "import socket") for floor in ("prefill", "decode", "experts")),
    (PLAIN_FACES, "experts/messages.py", "from kernels.ops.sample import sample"),
    (NO_TORCH, "cluster/gateway.py", "from kernels.transport.connect import connect"),
    (NO_TORCH, "cluster/coordinator.py", "import experts.weights"),
]

PLANTED_BREACHES = [
    *(
        (foreign_library_outside_its_door, "decode/step.py", f"from {library} import anything")
        for library in DOORS
    ),
    (foreign_library_outside_its_door, "cluster/cli.py", "import ray.serve as serve"),
    (foreign_library_outside_its_door, "cluster/router.py", "def f():\n    import grpc.aio"),
    (banned_name, "decode/step.py", "import torch\ntorch.load(path)"),
    (banned_name, "decode/step.py", "import torch as t\nrun(t.load)"),
    (banned_name, "decode/step.py", "from torch import load as fetch"),
    (banned_name, "cluster/config.py", "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
    (banned_name, "cluster/config.py", "from yaml import unsafe_load"),
    (banned_name, "decode/step.py", "eval(text)"),
    (banned_name, "decode/step.py", "exec(text)"),
    (banned_name, "decode/step.py", "import importlib\nimportlib.import_module(name)"),
    (banned_name, "decode/step.py", "__import__('pickle')"),
    (assert_statement, "decode/step.py", "def f(x):\n    assert x > 0"),
    (hidden_import, "decode/step.py", "def f():\n    import json"),
    (hidden_import, "decode/step.py", "class A:\n  async def f(self):\n    from a import b"),
    (hidden_import, "decode/step.py", "if TYPE_CHECKING:\n    import json"),
    (hidden_import, "decode/step.py", "if typing.TYPE_CHECKING:\n    import json"),
    (vague_file_name, "decode/utils.py", ""),
    (vague_file_name, "decode/page_manager.py", ""),
    (vague_file_name, "decode/helpers/pages.py", ""),
    (vague_file_name, "cluster/common.py", ""),
    (long_file, "decode/step.py", "x = 1\n" * 401),
    (long_function, "decode/step.py", "def f():\n" + "    x = 1\n" * 70),
]

INNOCENT = [
    (foreign_library_outside_its_door, "cluster/pools.py", "from ray import serve"),
    (foreign_library_outside_its_door, "cluster/gateway_status.py", "import grpc"),
    (banned_name, "decode/step.py", "model.eval()\nself.checkpoint.load(name)\njson.load(file)"),
    (banned_name, "cluster/config.py", "import yaml\nyaml.safe_load(text)"),
    (hidden_import, "kernels/transport/nccl.py", "try:\n  import cupy\nexcept ImportError:\n  pass"),
    (long_file, "decode/step.py", "x = 1\n" * 400),
    (long_function, "decode/step.py", "def f():\n" + "    x = 1\n" * 69),
]


importlinter.configuration.configure()
registry.register(LayersContract, "layers")
registry.register(IndependenceContract, "independence")
registry.register(ForbiddenContract, "forbidden")


def broken_contracts(tree: Path, patch: pytest.MonkeyPatch) -> set[str]:
    """Names of the import contracts that the packages in a folder break."""
    with patch.context() as during:
        for floor in FLOORS:  # an imported package would be found where it was imported from
            during.delitem(sys.modules, floor, raising=False)
        during.syspath_prepend(tree)
        options = read_user_options(str(ROOT / "pyproject.toml"))
        report = create_report(options, cache_dir=None)
    if report.invalid_contract_options:
        raise ValueError(f"contracts that cannot be checked: {report.invalid_contract_options}")
    checks = dict(report.get_contracts_and_checks())
    if {contract.name for contract in checks} != CONTRACTS:
        raise ValueError(f"contracts in pyproject.toml: {sorted(contract.name for contract in checks)}")
    return {contract.name for contract, check in checks.items() if not check.kept}


def planted_tree(folder: Path, path: str, line: str) -> Path:
    """A copy of the five floors with one more line in one file."""
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / floor, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / path).open("a") as file:
        file.write(f"\n{line}\n")
    return folder


def test_import_contracts_hold(monkeypatch):
    assert broken_contracts(ROOT, monkeypatch) == set()


@pytest.mark.parametrize(("contract", "path", "line"), PLANTED_CONTRACT_BREACHES)
def test_a_planted_import_breaks_its_contract(contract, path, line, tmp_path, monkeypatch):
    assert contract in broken_contracts(planted_tree(tmp_path, path, line), monkeypatch)


@pytest.mark.parametrize("rule", RULES_OF_A_FILE, ids=lambda rule: rule.__name__)
def test_a_rule_holds_everywhere(rule):
    assert breaches(ROOT, rule) == []


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED_BREACHES)
def test_a_planted_breach_is_reported(rule, path, source, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    [breach] = breaches(tmp_path, rule)
    assert breach.startswith(f"{path}:")


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT)
def test_the_innocent_are_left_alone(rule, path, source):
    assert rule(path, source) == []


def test_every_rule_was_broken_once():
    assert {rule for rule, _, _ in PLANTED_BREACHES} == set(RULES_OF_A_FILE)
    assert {contract for contract, _, _ in PLANTED_CONTRACT_BREACHES} == CONTRACTS


def test_all_five_floors_are_there():
    assert [floor for floor in FLOORS if not (ROOT / floor / "__init__.py").exists()] == []


def test_every_folder_is_a_package(tmp_path):
    assert folder_without_init(ROOT) == []
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode/step.py").touch()
    assert folder_without_init(tmp_path) == ["decode: no __init__.py"]


def test_the_tree_in_the_readme_is_true():
    assert tree_differences(ROOT, (ROOT / "README.md").read_text()) == []


def test_a_readme_that_lies_about_the_tree_is_caught(tmp_path):
    (tmp_path / "decode").mkdir()
    (tmp_path / "examples").mkdir()
    for name in ("__init__.py", "step.py", "inbox.py", "request_pb2.py"):
        (tmp_path / "decode" / name).touch()

    def differences(*lines: str) -> list[str]:
        return tree_differences(tmp_path, "\n".join(("Text", "```text tree", *lines, "```", "")))

    assert differences("decode/   inbox step", "examples/") == []
    assert differences("decode/ inbox step node") == ["decode/node is drawn but does not exist"]
    assert differences("decode/ inbox") == ["decode/step exists but is not drawn"]
    undrawn = ["decode/inbox exists but is not drawn", "decode/step exists but is not drawn"]
    assert differences("examples/") == undrawn
    assert differences("decode/ inbox step", "helm/") == ["helm/ is drawn but does not exist"]
    with pytest.raises(ValueError, match="0 blocks"):
        tree_differences(tmp_path, "```text\ndecode/ inbox step\n```\n")


def test_no_other_distribution_owns_the_name_kernels():
    try:
        distribution("kernels")
    except PackageNotFoundError:
        return
    pytest.fail(
        "the distribution 'kernels' (Hugging Face's) is installed beside Trivium, whose folder of that name"
        " hides it: transformers may fail to import. Remove it: pip uninstall kernels"
    )
