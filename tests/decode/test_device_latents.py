"""Latents from one GPU's memory to another's pages, over a link that stands in for NCCL: the same tokens."""

import time
from collections.abc import Callable

import pytest
import torch

from kernels.model.pages import pages_for
from kernels.transport import device_wire
from kernels.transport.connect import LINKS
from kernels.transport.transfers import Transfers
from tests.checkpoints import random_prompt
from tests.fixtures import CHECKPOINT, GREEDY, Stage
from tests.kernels.transport.stand_in_link import Behaviour, StandInLink

LENGTHS = (130, 70, 3)
WAIT_S = 20.0


class CountingLink(StandInLink):
    """Keeps every link, so that a test can ask what went over it."""

    links: list["CountingLink"] = []  # noqa: RUF012  emptied for each test

    def __init__(self):
        super().__init__()
        self.links.append(self)


@pytest.fixture(autouse=True)
def links(monkeypatch) -> list[CountingLink]:
    """What joins GPUs in this test."""
    monkeypatch.setitem(LINKS, "nccl", CountingLink)
    monkeypatch.setattr(StandInLink, "joints", {})
    monkeypatch.setattr(CountingLink, "links", [])
    return CountingLink.links


def run_until(stage: Stage, condition: Callable[[], bool]) -> None:
    """Turn until a condition holds."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "the condition never came true"
        stage.turn()
        time.sleep(0.001)  # for the threads that move transfers


def generate(stage: Stage) -> list[list[int]]:
    """Tokens of prompts that run together."""
    names = [str(length) for length in LENGTHS]
    for length, name in zip(LENGTHS, names, strict=True):
        stage.gateway.ask(name, random_prompt(CHECKPOINT, length))
    run_until(stage, lambda: all(len(stage.gateway.tokens(name)) == GREEDY.tokens_max for name in names))
    return [stage.gateway.tokens(name) for name in names]


@pytest.mark.parametrize("packs_latents", [False, True], ids=["numbers", "FP8"])
def test_tokens_are_those_of_latents_that_go_by_the_host(transformer, links, packs_latents):
    plain = Stage(transformer, packs_latents)
    expected = generate(plain)
    plain.close()
    assert not links
    stage = Stage(transformer, packs_latents, latents_address="nccl://127.0.0.1:0")
    assert generate(stage) == expected
    stage.settle()
    stage.assert_all_free()
    row_bytes = transformer.latent_layout(packs_latents).row_bytes
    sent_bytes = sum(LENGTHS) * transformer.config.layers_count * row_bytes
    assert sum(link.moved_bytes for link in links) >= sent_bytes == stage.prefill.report().latents_bytes
    stage.close()


def test_a_link_that_breaks_is_replaced_and_pages_come_back(transformer, links):
    stage = Stage(transformer, latents_address="nccl://127.0.0.1:0")
    stage.gateway.ask("first", random_prompt(CHECKPOINT, 40))
    run_until(stage, lambda: len(stage.gateway.tokens("first")) == GREEDY.tokens_max)
    both = [link for link in links if link.opened]
    for link in both:
        link.behaviour.broken = True
    run_until(stage, lambda: all(link.aborted.is_set() for link in both))
    stage.gateway.ask("second", random_prompt(CHECKPOINT, 50))
    run_until(stage, lambda: len(stage.gateway.tokens("second")) == GREEDY.tokens_max)
    assert len([link for link in links if link.opened]) == 2 * len(both) == 4
    stage.settle()
    stage.assert_all_free()
    stage.close()


def test_what_says_that_it_needs_no_checksum_must_come_from_a_gpu(transformer, monkeypatch):
    stage = Stage(transformer)
    monkeypatch.setattr("prefill.outbox.checksum", lambda parts: None)
    stage.gateway.ask("odd", random_prompt(CHECKPOINT, 5))
    stage.settle()
    assert stage.decode.inbox.refused_count and len(stage.gateway.tokens("odd")) == 1
    assert torch.equal(stage.decode.cache.latents.view(torch.uint8).amin(), torch.tensor(255).byte())
    stage.close()


def test_pages_under_a_link_that_cannot_be_aborted_are_never_given_away(transformer, monkeypatch, caplog):
    for name, value in (("TRANSFER_TIMEOUT_S", 0.05), ("WATCH_S", 0.01), ("QUIET_WAIT_S", 0.05)):
        monkeypatch.setattr(device_wire, name, value)
    monkeypatch.setattr(Transfers, "_kept", [])
    stuck = Behaviour(hangs=True, aborting_fails=True)
    monkeypatch.setitem(LINKS, "nccl", lambda: StandInLink(stuck))
    stage = Stage(transformer, latents_address="nccl://127.0.0.1:0")
    stage.gateway.ask("stuck", random_prompt(CHECKPOINT, 130))
    run_until(stage, lambda: "pages of stuck stay leased" in caplog.text)
    assert not len(stage.decode.inbox)
    stage.settle()
    stage.decode.cache.pool.check()
    assert stage.decode.report().pages_leased_count == pages_for(130 + GREEDY.tokens_max)
    stage.close()
