"""Finding what others have made, if it is installed or lies in a folder that was named; nothing is required.

A folder may hold unpacked packages, single files of theirs (Python's path then begins with it), and libraries
named `_…_C…so`, which register their operations with torch when they are loaded.
"""

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

MODULES = {
    "FlashMLA": ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface", "flash_mla_interface"),
    "DeepGEMM": ("deep_gemm", "vllm.third_party.deep_gemm"),
    "FlashInfer": ("flashinfer",),
    "FlashAttention 3": ("flash_attn_interface", "vllm.vllm_flash_attn"),
    "vLLM Triton": ("vllm.v1.attention.ops.triton_decode_attention", "triton_decode_attention"),
    "SGLang Triton": ("sglang.srt.layers.attention.triton_ops.decode_attention", "decode_attention"),
    "vLLM gate": ("vllm._moe_C",),
    "SGLang gate": ("sgl_kernel",),
}
REASON_LENGTH = 120


def load_folder(folder: Path) -> list[str]:
    """Make a folder's modules and libraries available; what could not be loaded, with why."""
    sys.path.insert(0, str(folder.resolve()))
    failures = []
    for library in sorted(folder.rglob("_*_C*.so")):
        try:
            torch.ops.load_library(str(library.resolve()))
        except Exception as error:  # whatever its authors or the loader raise
            failures.append(f"{library.name}: {reason(error)}")
    return failures


@cache
def module_of(peer: str) -> ModuleType | None:
    """A peer's module, or None if none of its names can be imported."""
    for name in MODULES[peer]:
        try:
            return importlib.import_module(name)
        except Exception:  # a package may raise anything where it finds no driver or another torch
            continue
    return None


def operations_of(library: str, operation: str) -> object | None:
    """An operation that a loaded library has registered with torch, or None."""
    namespace = getattr(torch.ops, library)
    return getattr(namespace, operation, None)


def found_peers() -> dict[str, str]:
    """Peers that are there, with their versions."""
    there = {"torch": torch.__version__}
    for peer in MODULES:
        module = module_of(peer)
        if module is not None:
            there[peer] = str(getattr(module, "__version__", "no version"))
    for library, operation in (("_flashmla_C", "dense_decode_fwd"), ("_vllm_fa3_C", "fwd")):
        if operations_of(library, operation) is not None:
            there[library] = "a library"
    return there


def reason(error: BaseException) -> str:
    """An error in one short line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + "…"
