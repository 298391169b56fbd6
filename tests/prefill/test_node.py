"""A prefill node from prompt to first token, and whoever fails or goes away meanwhile."""

import threading
from dataclasses import replace

import pytest
import torch

from decode.messages import DOWN as DECODE_DOWN
from decode.messages import (
    LENGTH,
    STOP,
    CancelRequest,
    LatentsReceived,
    PageReservation,
    RequestFailed,
    TokenChunks,
)
from decode.messages import UP as DECODE_UP
from experts.errors import ExpertsUnavailable
from experts.local import LocalExperts
from kernels.model.latent_cache import slots_of
from kernels.model.step_watch import StepsFail
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelClosed
from prefill.messages import DOWN, FirstTokenChunk, HandedOver, PrefillPrompt
from prefill.node import PrefillNode
from tests.checkpoints import random_prompt
from tests.fixtures import CHECKPOINT, GREEDY, SECRET, Stage

ONE = replace(GREEDY, tokens_max=1)


def prompt(tokens_count: int) -> list[int]:
    return random_prompt(CHECKPOINT, tokens_count)


def first_tokens(stage: Stage) -> dict[str, FirstTokenChunk]:
    return {first.chunk.request_id: first for first in stage.gateway.heard(FirstTokenChunk)}


def computed(stage: Stage, name: str, token_ids: list[int], sampling=GREEDY) -> FirstTokenChunk:
    """Run one request to its end; what prefill said of it."""
    stage.gateway.ask(name, token_ids, sampling)
    stage.settle()
    return first_tokens(stage)[name]


def prefilling(stage: Stage, *names: str, tokens_count: int = 200) -> None:
    """Ask for requests, and wait until prefill has begun them all but finished none."""
    for name in names:
        stage.gateway.ask(name, prompt(tokens_count))
    batcher = stage.prefill.batcher
    stage.until(lambda: batcher.requests_running_count == len(names))
    assert not set(first_tokens(stage)) & set(names)


def in_transfer(stage: Stage, name: str, tokens_count: int = 200) -> None:
    """Ask for a request, and stop when prefill has sent everything and decode has not answered."""
    stage.gateway.ask(name, prompt(tokens_count))
    for _ in range(500):
        for move in stage.moves():
            move()
            if stage.prefill._in_transfer:
                return
    raise AssertionError("nothing was in transfer")


def test_the_first_token_comes_at_once_and_is_the_first(stage):
    first = computed(stage, "a", prompt(100))
    assert (first.chunk.index, len(first.chunk.token_ids), first.chunk.finish_reason) == (0, 1, None)
    assert first.cached_tokens_count == 0
    said = [type(message) for message in stage.gateway.said]
    assert said[:2] == [PageReservation, FirstTokenChunk]
    assert said.index(FirstTokenChunk) < said.index(TokenChunks)
    stage.assert_all_free()


def test_phases_are_reckoned_by_the_nodes_clock(make_stage):
    stage = make_stage(step_tokens_max=64)
    stage.gateway.forwards = False
    stage.gateway.ask("a", prompt(100))
    stage.settle()
    stage.gateway.forward(stage.gateway.heard(PageReservation)[0])
    stage.until(lambda: stage.prefill.endpoint.poll(0) > 0)
    for pause_s in (2.0, 0.5):
        stage.now_s += pause_s
        assert stage.prefill.step() == 1
    stage.now_s += 0.25
    stage.settle()
    first = first_tokens(stage)["a"]
    assert first.prefill_s == 0.5
    assert [handed.transfer_s for handed in stage.gateway.heard(HandedOver)] == [0.25]
    assert stage.prefill.report().transfer_s == 0.25


def test_a_known_prefix_is_not_computed_again_and_gives_the_same(stage):
    fresh = computed(stage, "a", prompt(200))
    whole = stage.gateway.tokens("a")
    before = stage.prefill.tokens_count
    again = computed(stage, "b", prompt(200))
    assert (fresh.cached_tokens_count, again.cached_tokens_count) == (0, 192)
    assert stage.prefill.tokens_count - before == 8
    assert stage.gateway.tokens("b") == whole
    longer = computed(stage, "c", prompt(200)[:130] + prompt(60))
    assert longer.cached_tokens_count == 128
    stage.assert_all_free()


def test_a_known_prefix_waits_for_its_decode_node_without_holding_up_others(stage, monkeypatch):
    computed(stage, "before", prompt(200))
    frames = []
    address = f"memory://{stage.name}-slow"
    slow = Endpoint(address, SECRET, "slow", lambda _, frame: frames.append(DECODE_DOWN.read_frame(frame)))
    outbox, takes = stage.prefill.outbox, stage.prefill.outbox._takes
    monkeypatch.setattr("prefill.outbox.QUEUED_BYTES_MAX", 1)

    def full(line, parcel):
        return parcel.request.asked.request_id != "a" and takes(line, parcel)

    with monkeypatch.context() as blocked:
        blocked.setattr(outbox, "_takes", full)
        DOWN.send(stage.gateway.prefill, PrefillPrompt("a", 1, tuple(prompt(200)), 200, GREEDY, address))
        computed(stage, "b", prompt(200)[::-1])
        assert len(stage.gateway.tokens("b")) == GREEDY.tokens_max
        assert list(first_tokens(stage)) == ["before", "b"]
        (waiting,) = outbox._waiting()
        assert [(parcel.layer, parcel.end) for parcel in waiting.parcels] == [(0, 192)]
    outbox.send_all()
    stage.settle()
    for _ in range(20):
        slow.poll(0)
    layers = range(stage.prefill.cache.layers_count)
    spans = [(layer, begin, end) for begin, end in ((0, 192), (192, 200)) for layer in layers]
    assert [(frame.layer, frame.begin, frame.end) for frame in frames[:-1]] == spans
    assert frames[-1].token_id == first_tokens(stage)["a"].chunk.token_ids[0]
    slow.close()


def test_a_request_that_ends_with_its_first_token_is_not_handed_over(stage):
    first = computed(stage, "a", prompt(70), ONE)
    assert first.chunk.finish_reason == LENGTH
    assert stage.prefill.outbox.sent_bytes == 0
    assert stage.gateway.heard(HandedOver) == []
    assert stage.prefill.report().requests_running_count == 0
    assert len(stage.decode.inbox) == 1, "its reservation ends with the gateway's word"
    stage.gateway.cancel("a")
    stage.settle()
    stage.assert_all_free()


def test_a_later_attempt_that_lacks_one_token_sends_no_latents_either(stage):
    computed(stage, "a", prompt(200))
    whole = stage.gateway.tokens("a")
    sent_bytes = stage.prefill.outbox.sent_bytes
    stage.gateway.ask("b", prompt(200) + whole[:-1], generation=2, prompt_tokens_count=200)
    stage.settle()
    assert (stage.gateway.tokens("b"), stage.prefill.outbox.sent_bytes) == (whole[-1:], sent_bytes)


def test_latents_that_wait_are_not_sent_once_the_first_token_has_ended_a_prompt(stage, monkeypatch):
    token_id = computed(stage, "a", prompt(100)).chunk.token_ids[0]
    sent_bytes = stage.prefill.outbox.sent_bytes
    with monkeypatch.context() as blocked:
        blocked.setattr(stage.prefill.outbox, "_takes", lambda line, parcel: False)
        ended = computed(stage, "b", prompt(100), replace(GREEDY, stop_token_ids=(token_id,)))
    stage.prefill.outbox.send_all()
    assert (ended.chunk.finish_reason, stage.prefill.outbox.sent_bytes) == (STOP, sent_bytes)


def test_prompts_wait_for_pages_by_priority(make_stage):
    stage = make_stage(prefill_pages=4, step_tokens_max=64)
    prefilling(stage, "first", tokens_count=250)
    for name, priority in (("second", 0), ("urgent", 5)):
        stage.gateway.ask(name, prompt(180 + priority), priority=priority)
    stage.until(lambda: stage.prefill.report().requests_waiting_count == 2)
    assert stage.prefill.batcher.requests_running_count == 1
    stage.settle()
    assert list(first_tokens(stage)) == ["first", "urgent", "second"]
    stage.assert_all_free()


BAD_PROMPTS = {
    "no token": [],
    "a token beyond the vocabulary": [5, 512],
    "a negative token": [5, -1],
    "more than all pages hold": [5] * (24 * 64 + 1),
}


def ask_badly(stage, bad, address):
    stage.gateway.ask("good", prompt(200))
    DOWN.send(stage.gateway.prefill, PrefillPrompt("bad", 1, tuple(bad), len(bad), GREEDY, address))
    stage.settle()
    assert len(stage.gateway.tokens("good")) == GREEDY.tokens_max
    stage.assert_all_free()


@pytest.mark.parametrize("bad", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_prompt_that_can_never_be_computed_is_refused_and_spoils_nobodys_step(stage, bad):
    ask_badly(stage, bad, stage.decode.endpoint.address)
    assert stage.gateway.failures() == [("bad", "invalid_prompt", False)]


def test_a_wrong_address_is_not_the_prompts_fault_nor_told_to_its_client(stage):
    ask_badly(stage, [5] * 200, "carrier-pigeon://roof")
    assert stage.gateway.failures() == [("bad", "decode_unreachable", True)]
    [failed] = stage.gateway.heard(RequestFailed)
    assert "roof" not in failed.message


def test_latents_that_are_no_numbers_fail_their_prompt_alone_and_are_not_shared(make_stage):
    stage = make_stage(step_tokens_max=128)
    expected = computed(stage, "before", prompt(150), ONE).chunk.token_ids
    stage.gateway.cancel("before")
    prefilling(stage, "bad", "good", tokens_count=199)
    bad = next(r for r in stage.prefill.batcher.everyone() if r.asked.request_id == "bad")
    stage.prefill.cache.latents[1, slots_of(bad.pages, 3, 4)] = float("nan")
    stage.settle()
    assert stage.gateway.failures() == [("bad", "no_next_token", False)]
    assert len(stage.gateway.tokens("good")) == GREEDY.tokens_max
    named = list(stage.prefill.cache.pool._hash_of)
    for page in named:
        assert torch.isfinite(stage.prefill.cache.latents[:, page * 64 : page * 64 + 64]).all()
    stage.gateway.cancel("bad")
    assert computed(stage, "after", prompt(150), ONE).chunk.token_ids == expected
    again = computed(stage, "same", prompt(199))
    assert stage.gateway.tokens("same") == stage.gateway.tokens("good")
    assert again.cached_tokens_count == 192
    stage.gateway.cancel("after")
    stage.settle()
    stage.assert_all_free()


def test_a_prompt_whose_first_token_cannot_be_chosen_fails_alone(stage):
    everything = tuple(range(512))
    stage.gateway.ask("bad", prompt(90), replace(GREEDY, stop_token_ids=everything, tokens_min=2))
    stage.gateway.ask("good", prompt(90))
    stage.settle()
    assert stage.gateway.failures() == [("bad", "no_next_token", False)]
    assert len(stage.gateway.tokens("good")) == GREEDY.tokens_max


def test_experts_that_do_not_answer_fail_the_step_and_not_the_node(make_stage, monkeypatch):
    stage = make_stage(step_tokens_max=128)
    prefilling(stage, "a", "b")

    def no_experts(*_):
        raise ExpertsUnavailable("no answer from the experts in 1 s")

    with monkeypatch.context() as broken:
        broken.setattr(LocalExperts, "dispatch", no_experts)
        assert stage.prefill.step() == 2
    stage.settle()
    assert sorted(stage.gateway.failures()) == [
        ("a", "experts_unavailable", True),
        ("b", "experts_unavailable", True),
    ]
    assert stage.prefill.report().pages_cached_count == 0, "half a prompt was remembered"
    for name in "ab":
        stage.gateway.cancel(name)
    computed(stage, "c", prompt(200))
    stage.assert_all_free()


def test_an_error_that_nobody_foresaw_fails_prompts_and_not_the_node(make_stage, monkeypatch):
    stage = make_stage(step_tokens_max=128)
    prefilling(stage, "a", "b")
    with monkeypatch.context() as broken:
        broken.setattr("prefill.node.sample_each", lambda logits, rows: 1 / 0)
        while stage.prefill.batcher.everyone():
            stage.prefill._turn()
    stage.settle()
    assert {failure[1:] for failure in stage.gateway.failures()} == {("internal", True)}
    for name in "ab":
        stage.gateway.cancel(name)
    computed(stage, "c", prompt(200))
    stage.assert_all_free()


def poisoned(stage: Stage, monkeypatch, name: str = "poison", after_layers: int = 0) -> list[list[str]]:
    """Fail each step in which a prompt is, once so many layers have been computed; who was in each step."""
    steps, run = [], stage.prefill.prefill_step.run

    def poisonous(chunks, on_latents):
        steps.append([chunk.request.asked.request_id for chunk in chunks])
        if name not in steps[-1]:
            return run(chunks, on_latents)
        run(chunks, lambda chunk, layer, latents: layer < after_layers and on_latents(chunk, layer, latents))
        raise ZeroDivisionError

    monkeypatch.setattr(stage.prefill.prefill_step, "run", poisonous)
    return steps


@pytest.mark.parametrize("after_layers", [0, 2])
def test_a_poisonous_prompt_fails_alone(make_stage, monkeypatch, after_layers):
    stage = make_stage(prefill_pages=64, decode_pages=64)
    expected = computed(stage, "alone", prompt(150)[::-1], ONE).chunk.token_ids
    steps = poisoned(stage, monkeypatch, after_layers=after_layers)
    names = [f"good-{number}" for number in range(10)]
    for name in [*names[:5], "poison", *names[5:]]:
        stage.gateway.ask(name, prompt(150)[::-1])
    stage.settle()
    assert stage.gateway.failures() == [("poison", "internal", True)]
    assert any(len(step) > 1 and "poison" in step for step in steps), "it never had company"
    assert all(first_tokens(stage)[name].chunk.token_ids == expected for name in names)
    assert all(len(stage.gateway.tokens(name)) == GREEDY.tokens_max for name in names)
    for name in ("alone", "poison"):
        stage.gateway.cancel(name)
    stage.settle()
    stage.assert_all_free()


def test_a_poisonous_prompt_that_comes_again_and_again_does_not_make_the_node_leave(stage, monkeypatch):
    poisoned(stage, monkeypatch)
    for generation in range(1, 9):
        stage.now_s += 3.0
        stage.gateway.ask("poison", prompt(100), generation=generation)
        stage.until(lambda count=generation: len(stage.gateway.failures()) == count)
        stage.gateway.cancel("poison", generation)


def test_a_node_that_fails_whatever_comes_leaves_so_that_all_see_it(stage, monkeypatch):
    monkeypatch.setattr(stage.prefill.prefill_step, "run", lambda *_: 1 / 0)
    for number in range(5):
        stage.gateway.ask(f"r{number}", prompt(20))
        stage.until(lambda count=number + 1: len(stage.gateway.failures()) == count)
        stage.now_s += 2.5
    stage.gateway.ask("one more", prompt(20))
    while not stage.prefill._arrived:
        for poll in stage.moves()[:-2]:
            poll()
    stage.prefill._run()
    stage.gone.append(stage.prefill)
    stage.settle()
    assert len(stage.gateway.failures()) == 6
    with pytest.raises(ChannelClosed):
        DOWN.send(stage.gateway.prefill, CancelRequest("r0", 1))


def arrive(stage: Stage, monkeypatch, *names: str, sampling=GREEDY, tokens_count: int = 20) -> None:
    """Ask for requests, and wait until prefill has all their prompts, and has begun none."""
    with monkeypatch.context() as paused:
        paused.setattr(stage.prefill, "step", lambda: 0)
        for name in names:
            stage.gateway.ask(name, prompt(tokens_count), sampling)
        stage.settle()


@pytest.mark.parametrize("names", ["ab", "a"])
def test_a_node_without_numbers_leaves_and_blames_no_prompts_that_step_together(stage, monkeypatch, names):
    run = stage.prefill.prefill_step.run
    monkeypatch.setattr(stage.prefill.prefill_step, "run", lambda *asked: run(*asked) * float("nan"))
    for number in range(5):
        arrive(stage, monkeypatch, *(f"{name}{number}" for name in names))
        stage.prefill._turn()
        stage.now_s += 2.5
    arrive(stage, monkeypatch, *names)
    with pytest.raises(StepsFail):  # which makes its thread close the node
        stage.prefill._turn()
    stage.settle()
    told, left = stage.gateway.failures(), [(name, "internal", True) for name in names]
    blamed = ("internal", True) if len(names) > 1 else ("no_next_token", False)
    assert {failure[1:] for failure in told[: -len(names)]} == {blamed}
    assert told[-len(names) :] == left and len(told) == 6 * len(names)


def test_chunks_of_which_none_is_a_prompts_last_do_not_clear_a_node(make_stage, monkeypatch):
    stage = make_stage(step_tokens_max=64)
    stage.prefill._watch.failed("before")
    arrive(stage, monkeypatch, "a", tokens_count=150)
    assert stage.prefill.step() == 1
    assert stage.prefill._watch._failed == {"before"}, "nobody has seen a number yet"
    stage.settle()
    assert stage.prefill._watch._failed == set()


def test_a_node_whose_every_common_step_fails_leaves_though_prompts_alone_do_not(stage, monkeypatch):
    run = stage.prefill.prefill_step.run

    def alone(chunks, on_latents):
        if len(chunks) > 1:
            raise ZeroDivisionError
        stage.now_s += 1.0
        return run(chunks, on_latents)

    monkeypatch.setattr(stage.prefill.prefill_step, "run", alone)
    with pytest.raises(StepsFail):
        for number in range(20):
            arrive(stage, monkeypatch, f"a{number}", f"b{number}", sampling=ONE)
            while stage.prefill.batcher.everyone() or stage.prefill._arrived:
                stage.prefill._turn()
    stage.settle()
    assert {failure[1:] for failure in stage.gateway.failures()} == {("internal", True)}


def test_a_step_without_end_shows_while_the_node_still_answers(stage, monkeypatch):
    computed(stage, "warm", prompt(20))
    monkeypatch.setattr(PrefillNode, "_run", lambda self: self._stopped.wait(10), raising=False)
    stage.prefill._stopped = threading.Event()
    stage.prefill.start()
    with stage.prefill._watch.step():
        assert stage.prefill.is_alive
        stage.now_s += stage.prefill.config.step_s_max + 1
        assert not stage.prefill.is_alive
        with pytest.raises(StepsFail, match="the process has to end"):
            stage.prefill.close()
    stage.prefill._stopped.set()


def test_a_node_that_cannot_keep_its_books_leaves_so_that_all_see_it(make_stage, monkeypatch):
    stage = make_stage(step_tokens_max=128)
    prefilling(stage, "a")
    monkeypatch.setattr(stage.prefill.prefill_step, "run", lambda *_: 1 / 0)
    stage.prefill.cache.pool._owners.clear()
    stage.prefill._run()
    stage.gone.append(stage.prefill)
    stage.settle()
    with pytest.raises(ChannelClosed):
        DOWN.send(stage.gateway.prefill, CancelRequest("a", 1))
    assert not stage.prefill.is_alive


def test_a_decode_node_that_nobody_can_reach_is_told_once(make_stage):
    stage = make_stage(step_tokens_max=64)
    fields = (tuple(prompt(200)), 200, GREEDY, "memory://nobody-here")
    DOWN.send(stage.gateway.prefill, PrefillPrompt("a", 1, *fields))
    stage.settle()
    assert stage.gateway.failures() == [("a", "decode_unreachable", True)]
    assert stage.prefill.report().failures == {"decode_unreachable": 1}
    assert stage.prefill.tokens_count <= 128, "a prompt that nobody waits for was computed to its end"
    stage.assert_all_free()


def test_a_decode_node_that_closes_during_the_transfer_is_told(stage):
    in_transfer(stage, "a")
    stage.end(stage.decode)
    stage.settle()
    assert stage.gateway.failures() == [("a", "decode_unreachable", True)]
    stage.assert_all_free()


def test_a_request_in_transfer_counts_as_under_way_until_decode_has_it(stage):
    in_transfer(stage, "a")
    assert stage.prefill.report().requests_running_count == 1
    stage.settle()
    assert stage.prefill.report().requests_running_count == 0


def test_a_request_in_transfer_can_be_cancelled(stage):
    in_transfer(stage, "a")
    stage.gateway.cancel("a")
    stage.settle()
    assert stage.gateway.heard(HandedOver) == []
    stage.assert_all_free()


def test_a_gateway_that_goes_takes_its_transfers_along(stage):
    in_transfer(stage, "a")
    stage.end(stage.gateway)
    stage.settle()
    stage.assert_all_free()


def test_a_word_of_receipt_that_fits_nothing_is_not_heeded(stage):
    in_transfer(stage, "a")
    DECODE_UP.send(stage.gateway.prefill, LatentsReceived("a", 2))
    DECODE_UP.send(stage.gateway.prefill, LatentsReceived("b", 1))
    stage.settle()
    assert len(stage.gateway.heard(HandedOver)) == 1


def test_cancel_of_an_older_attempt_spares_the_newer(make_stage):
    stage = make_stage(step_tokens_max=64)
    stage.gateway.ask("a", prompt(200), generation=2)
    stage.until(lambda: stage.prefill.batcher.requests_running_count == 1)
    DOWN.send(stage.gateway.prefill, CancelRequest("a", 1))
    stage.settle()
    assert len(stage.gateway.tokens("a")) == GREEDY.tokens_max


def test_a_report_counts_every_prompt_token_and_page(make_stage):
    stage = make_stage(step_tokens_max=64)
    prefilling(stage, "a", "b")
    report = stage.prefill.report()
    assert (report.kind, report.address) == ("prefill", stage.prefill.endpoint.address)
    assert report.requests_running_count == 2
    assert report.tokens_waiting_count + report.tokens_count == 400
    assert report.pages_leased_count == 8
    stage.settle()
    report = stage.prefill.report()
    assert (report.tokens_waiting_count, report.tokens_count) == (0, 400)
    assert report.pages_free_count + report.pages_cached_count == report.pages_total_count
    assert report.busy_s > 0
