"""What is committed beside trivium.proto is what protoc makes of it."""

import ast
import re

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor

from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.proto.generate import PROTO, REPOSITORY, generate, run_protoc


def test_the_committed_descriptor_is_that_of_the_proto_file(tmp_path):
    run_protoc(f"--descriptor_set_out={tmp_path / 'set'}")
    fresh = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    for message in fresh.message_type:
        for field in message.field:
            field.ClearField("json_name")  # Derived; what Python embeds leaves it out.
    committed = descriptor_pb2.FileDescriptorProto()
    trivium_pb2.DESCRIPTOR.CopyToProto(committed)
    assert fresh == committed, "run: python -m cluster.proto.generate"
    assert fresh.SerializeToString(deterministic=True) == committed.SerializeToString(deterministic=True)


def test_the_committed_stubs_are_those_of_the_proto_file(tmp_path):
    generate(tmp_path)
    fresh, committed = (tmp_path / PROTO).parent, (REPOSITORY / PROTO).parent
    types = [ast.dump(ast.parse((folder / "trivium_pb2.pyi").read_text())) for folder in (fresh, committed)]
    assert types[0] == types[1]
    calls = [
        re.findall(r"'/trivium[^']+'", (folder / "trivium_pb2_grpc.py").read_text())
        for folder in (fresh, committed)
    ]
    assert calls[0] == calls[1] != []


def test_the_service_is_the_one_promised():
    service = trivium_pb2.DESCRIPTOR.services_by_name["Inference"]
    assert service.full_name == "trivium.v1.Inference"
    assert [method.name for method in service.methods] == ["Generate", "GetModel", "GetCluster"]
    assert hasattr(trivium_pb2_grpc, "InferenceServicer")


def test_no_message_says_where_a_node_is():
    words = {"address", "host", "port", "ip", "path"}
    for message in trivium_pb2.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert not words & set(field.name.split("_")), f"{message.name}.{field.name}"


def test_every_sampling_number_can_be_absent():
    for field in trivium_pb2.SamplingParameters.DESCRIPTOR.fields:
        is_number = field.cpp_type not in (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_BOOL)
        assert field.has_presence or field.is_repeated or not is_number, field.name
