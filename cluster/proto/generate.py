"""Writes the Python side of trivium.proto again: `python -m cluster.proto.generate`."""

from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

REPOSITORY = Path(__file__).resolve().parents[2]
PROTO = "cluster/proto/trivium.proto"


def run_protoc(*outputs: str) -> None:
    """Run protoc over trivium.proto with options such as `--python_out=folder`; SystemExit if it fails."""
    well_known_protos = files("grpc_tools").joinpath("_proto")
    arguments = ["protoc", f"-I{REPOSITORY}", f"-I{well_known_protos}", *outputs, PROTO]
    if protoc.main(arguments) != 0:
        raise SystemExit(f"protoc refused {PROTO}; its reason stands above.")


def generate(folder: Path) -> None:
    """Write `cluster/proto/trivium_pb2.py`, its `.pyi` and `trivium_pb2_grpc.py` below a folder."""
    run_protoc(*(f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")))


if __name__ == "__main__":
    generate(REPOSITORY)
