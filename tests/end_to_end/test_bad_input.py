"""Bad input gets a typed error that names field, limit and remedy, and the cluster goes on."""

import asyncio
import json
import math
import os
import socket
import subprocess
import sys

import grpc
import pytest

from cluster.client import Client, raise_typed
from cluster.errors import InvalidRequest, TriviumError
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.validation import ChatMessage, RequestedGeneration, RequestedSampling
from tests.checkpoints import random_prompt, reference_tokens
from tests.end_to_end.stage import GREEDY_64, all_tokens, tokens_of

NAME = "groups"
PROMPT = tuple(random_prompt(NAME, 65))
HUNDRED_MB = 100 * 10**6


@pytest.fixture
def address(stage, checkpoint):
    """A cluster that must still answer rightly when the test is over."""
    address = stage.cluster(checkpoint(NAME))
    yield address
    ours = all_tokens(address, [RequestedGeneration(token_ids=PROMPT, sampling=GREEDY_64)])[0]
    assert ours == list(reference_tokens(checkpoint(NAME), list(PROMPT), 64))


def refused(address: str, request: RequestedGeneration) -> TriviumError:
    """The error that a request is refused with."""

    async def send() -> None:
        async with Client(address) as client:
            await tokens_of(client, request)

    with pytest.raises(TriviumError) as caught:
        asyncio.run(send())
    return caught.value


def with_sampling(**values) -> RequestedGeneration:
    """A good prompt with some sampling parameters."""
    return RequestedGeneration(token_ids=PROMPT, sampling=RequestedSampling(**values))


BAD_REQUESTS = {
    "no prompt": (RequestedGeneration(), "prompt"),
    "empty prompt": (RequestedGeneration(token_ids=()), "token_ids"),
    "too long": (RequestedGeneration(token_ids=(1,) * 5000), "prompt"),
    "token id out of range": (RequestedGeneration(token_ids=(1, 512)), "token_ids"),
    "text without a tokenizer": (RequestedGeneration(text="hello"), "text"),
    "chat without a tokenizer": (RequestedGeneration(messages=(ChatMessage("user", "hi"),)), "messages"),
    "NaN temperature": (with_sampling(temperature=math.nan), "temperature"),
    "infinite temperature": (with_sampling(temperature=math.inf), "temperature"),
    "negative top_k": (with_sampling(top_k=-1), "top_k"),
    "top_p of zero": (with_sampling(top_p=0.0), "top_p"),
    "min_p above one": (with_sampling(min_p=1.5), "min_p"),
    "no tokens wanted": (with_sampling(tokens_max=0), "max_tokens"),
    "more tokens than fit": (with_sampling(tokens_max=100_000), "max_tokens"),
    "min above max": (with_sampling(tokens_max=4, tokens_min=5), "min_tokens"),
    "stop token out of range": (with_sampling(stop_token_ids=(512,)), "stop_token_ids"),
    "too many logprobs": (with_sampling(logprobs_count=1000), "logprobs"),
    "penalty out of range": (with_sampling(presence_penalty=3.0), "presence_penalty"),
}


def test_bad_requests_are_named(address):
    for case, (request, field) in BAD_REQUESTS.items():
        error = refused(address, request)
        assert isinstance(error, InvalidRequest), f"{case}: {error!r}"
        assert field in (error.field or ""), f"{case}: {error.field}"
        assert error.limit, case
        assert error.remedy, case


def test_a_message_of_100_mb(address):
    async def send() -> None:
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = trivium_pb2_grpc.InferenceStub(channel)
            try:
                async for _ in stub.Generate(trivium_pb2.GenerateRequest(text="x" * HUNDRED_MB)):
                    pass
            except grpc.aio.AioRpcError as error:
                raise_typed(error, address)

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(send())
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.limit
    assert caught.value.remedy


def open_socket(address: str) -> socket.socket:
    """A raw connection to an address of ours."""
    if address.startswith("unix://"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.removeprefix("unix://"))
        return sock
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return socket.create_connection((host, int(port)))


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"TRV1" + b"\xff" * 12, b"\x00" * 4096, os.urandom(65536)]
)
def test_garbage_on_every_port(address, stage, garbage):
    for member in stage.view.members:
        with open_socket(member.address) as sock:
            try:
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
            except OSError:
                pass  # the peer may hang up at the first byte


def trivium(*arguments: str) -> subprocess.CompletedProcess:
    """A command line run to its end."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "1000"}
    )


def test_a_bad_model_is_refused_before_anything_starts(tmp_path, checkpoint):
    whole = checkpoint(NAME)
    cases = {}
    for case in ("truncated", "sparse", "garbled", "shape"):
        folder = tmp_path / case
        folder.mkdir()
        for file in whole.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        cases[case] = folder
    weights = sorted(cases["truncated"].glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    for case, change in (("sparse", {"index_topk": 2048}), ("shape", {"hidden_size": 192})):
        path = cases[case] / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (cases["garbled"] / "config.json").write_text("{")
    for case, folder in cases.items():
        done = trivium("serve", "--model", str(folder))
        assert done.returncode == 1, case
        assert "error model.folder" in done.stderr + done.stdout, f"{case}: {done.stderr}"
        assert "Traceback" not in done.stderr, case


def test_an_unknown_key_in_the_yaml(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("model:\n  folder: .\ndecode:\n  reqests_max: 3\n")
    done = trivium("config", "check", str(path))
    assert done.returncode == 1
    assert "Did you mean" in done.stderr
    assert "requests_max" in done.stderr
