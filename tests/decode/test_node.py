"""A decode node from reservation to last token, and whoever fails or goes away at whatever moment."""

import random
import threading
from dataclasses import replace

import pytest
import torch

from decode.messages import (
    DOWN,
    LENGTH,
    STOP,
    AskReport,
    CancelRequest,
    ExtendLeases,
    NodeReport,
    PageReservation,
    ReservationRefused,
    SamplingParameters,
    TokenChunks,
)
from experts.errors import ExpertsUnavailable
from experts.local import LocalExperts
from kernels.model.latent_cache import slots_of
from kernels.model.step_watch import StepsFail
from kernels.transport.errors import ChannelClosed
from prefill.messages import HandedOver
from tests.checkpoints import random_prompt
from tests.fixtures import CHECKPOINT, GREEDY, Stage

MOMENTS = range(0, 60, 2)


def prompt(tokens_count: int) -> list[int]:
    return random_prompt(CHECKPOINT, tokens_count)


def generate(stage: Stage, token_ids: list[int], sampling=GREEDY, name: str = "alone") -> list[int]:
    """Run one request to its end; its tokens."""
    stage.gateway.ask(name, token_ids, sampling)
    stage.settle()
    stage.gateway.assert_in_order(name)
    return stage.gateway.tokens(name)


@pytest.fixture(scope="module")
def expected(transformer):
    """Greedy tokens after prompts of 200 and 70 tokens, each alone."""
    stage = Stage(transformer)
    tokens = {count: generate(stage, prompt(count), GREEDY, str(count)) for count in (200, 70)}
    stage.close()
    return tokens


def test_a_request_runs_to_its_end_and_leaves_nothing_behind(stage):
    tokens = generate(stage, prompt(100))
    assert len(tokens) == GREEDY.tokens_max
    assert stage.gateway.chunks("alone")[-1].finish_reason == LENGTH
    assert [type(message) for message in stage.gateway.said][:1] == [PageReservation]
    assert len(stage.gateway.heard(HandedOver)) == 1
    assert len(stage.gateway.heard(TokenChunks)) == GREEDY.tokens_max - 1
    stage.assert_all_free()


def test_requests_that_join_and_leave_change_nobodys_tokens(stage):
    """One asks alone; then 12 others of other lengths and samplings come and go around it."""
    sampling = SamplingParameters(temperature=0.9, seed=5, tokens_max=12, ignore_eos=True)
    alone = generate(stage, prompt(130), sampling)
    for number in range(6):
        stage.gateway.ask(f"early-{number}", prompt(20 + 9 * number), replace(GREEDY, tokens_max=3 + number))
    stage.until(lambda: stage.decode.batcher.requests_running_count > 0)
    stage.gateway.ask("again", prompt(130), sampling)
    stage.until(lambda: len(stage.gateway.tokens("again")) > 2)
    for number in range(6):
        late = replace(sampling, seed=number, tokens_max=2 + number, frequency_penalty=0.5)
        stage.gateway.ask(f"late-{number}", prompt(10 + number), late)
    stage.settle()
    assert stage.gateway.tokens("again") == alone
    assert stage.gateway.failures() == []
    stage.assert_all_free()


def test_a_step_sends_one_message_to_each_gateway(stage):
    other = stage.open_gateway()
    for number in range(3):
        stage.gateway.ask(f"r{number}", prompt(30 + number))
        other.ask(f"o{number}", prompt(40 + number))
    stage.until(lambda: stage.decode.batcher.requests_running_count == 6)
    stage.settle()
    assert stage.decode.steps_count >= len(stage.gateway.heard(TokenChunks))
    assert {c.request_id for m in stage.gateway.heard(TokenChunks) for c in m.chunks} == {"r0", "r1", "r2"}
    assert {c.request_id for m in other.heard(TokenChunks) for c in m.chunks} == {"o0", "o1", "o2"}


def test_no_more_run_at_once_than_allowed(make_stage):
    stage = make_stage(requests_max=2)
    for number in range(5):
        stage.gateway.ask(f"r{number}", prompt(20))
    stage.until(lambda: stage.decode.batcher.requests_waiting_count == 3)
    report = stage.decode.report()
    assert (report.requests_running_count, report.requests_waiting_count) == (2, 3)
    stage.settle()
    assert len({tuple(stage.gateway.tokens(f"r{number}")) for number in range(5)}) == 1
    stage.assert_all_free()


SAMPLED = {
    "seeded": SamplingParameters(temperature=1.0, seed=3, tokens_max=9, ignore_eos=True),
    "penalised": SamplingParameters(
        temperature=0.8,
        seed=2**63,
        tokens_max=9,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.6,
        ignore_eos=True,
    ),
    "filtered": SamplingParameters(temperature=1.5, seed=1, top_k=20, top_p=0.9, min_p=0.01, tokens_max=9),
}


@pytest.mark.parametrize("sampling", SAMPLED.values(), ids=SAMPLED)
def test_any_attempt_goes_on_where_the_one_before_ended(stage, sampling):
    """So prefill and decode reckon positions, penalties and limits alike."""
    whole = generate(stage, prompt(100), sampling)
    reason = stage.gateway.chunks("alone")[-1].finish_reason
    for cut in range(1, len(whole)):
        name = f"cut-{cut}"
        stage.gateway.ask(name, prompt(100) + whole[:cut], sampling, 2, prompt_tokens_count=100)
        stage.settle()
        stage.gateway.assert_in_order(name)
        assert stage.gateway.tokens(name) == whole[cut:], f"after {cut} tokens"
        assert stage.gateway.chunks(name)[0].index == cut
        assert stage.gateway.chunks(name)[-1].finish_reason == reason
        stage.gateway.cancel(name, 2)
        stage.settle()
    stage.assert_all_free()


def test_penalties_keep_tokens_from_coming_again(stage):
    free = generate(stage, [7] * 64, replace(GREEDY, tokens_max=40), "free")
    assert len(set(free)) < len(free), "nothing is repeated anyway: the test shows nothing"
    present = generate(stage, [7] * 64, replace(GREEDY, tokens_max=40, presence_penalty=100.0), "present")
    assert len(set(present)) == 40
    frequent = generate(stage, [7] * 64, replace(GREEDY, tokens_max=40, frequency_penalty=100.0), "frequent")
    assert frequent == present
    repeated = generate(stage, [7] * 64, replace(GREEDY, tokens_max=40, repetition_penalty=1e9), "repeated")
    assert len(set(repeated)) == 40


def test_repetition_penalty_heeds_the_prompt_too(stage, expected):
    first = expected[70][0]
    token_ids = prompt(70)
    punished = replace(GREEDY, repetition_penalty=1e9)
    tokens = generate(stage, [*token_ids[:-2], first, token_ids[-1]], punished)
    assert not set(tokens) & {*token_ids[:-2], first, token_ids[-1]}


def test_a_stop_token_ends_a_request(stage, expected):
    stop = expected[200][3]
    at = expected[200].index(stop)
    tokens = generate(stage, prompt(200), replace(GREEDY, stop_token_ids=(400, stop)))
    assert tokens == expected[200][: at + 1]
    assert stage.gateway.chunks("alone")[-1].finish_reason == STOP
    stage.assert_all_free()


def test_nothing_ends_a_request_below_its_minimum(stage, expected):
    stops = tuple(expected[200])
    tokens = generate(stage, prompt(200), replace(GREEDY, stop_token_ids=stops, tokens_min=4))
    assert len(tokens) >= 5 and not set(tokens[:4]) & set(stops)


def test_the_end_of_text_ends_a_request_unless_ignored(stage, expected):
    eos = expected[200][2]
    assert eos not in expected[200][:2]
    for node in (stage.prefill, stage.decode):
        node._model = replace(node._model, eos_token_ids=(eos,))
    assert generate(stage, prompt(200), replace(GREEDY, ignore_eos=False)) == expected[200][:3]
    assert generate(stage, prompt(200), GREEDY, "ignoring") == expected[200]


def test_logprobs_are_those_of_the_model(stage, transformer):
    sampling = replace(GREEDY, logprobs_count=3)
    tokens = generate(stage, prompt(90), sampling)
    logprobs = [logprob for chunk in stage.gateway.chunks("alone") for logprob in chunk.logprobs]
    assert len(logprobs) == len(tokens)
    for index, (token, found) in enumerate(zip(tokens, logprobs, strict=True)):
        assert [found.chosen] == [value for ranked, value in found.top[:1] if ranked == token]
        assert len(found.top) == 3
        assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
        name = f"check-{index}"
        generate(stage, prompt(90) + tokens[:index], replace(sampling, tokens_max=1), name)
        again = stage.gateway.chunks(name)[0].logprobs[0]
        assert again.chosen == pytest.approx(found.chosen, abs=1e-3)
        assert dict(again.top) == pytest.approx(dict(found.top), abs=1e-3)


def test_no_logprobs_unless_asked(stage):
    generate(stage, prompt(90))
    assert all(chunk.logprobs == () for chunk in stage.gateway.chunks("alone"))


# failures


def running(stage: Stage, *names: str) -> None:
    """Ask for requests of 200 and 70 tokens, and wait until they are in decode's batch."""
    for name in names:
        stage.gateway.ask(name, prompt(200 if name == names[0] else 70))
    stage.until(lambda: stage.decode.batcher.requests_running_count == len(names))


def test_latents_that_are_no_numbers_fail_their_request_alone(stage, expected):
    running(stage, "good", "bad", "fine")
    bad = next(r for r in stage.decode.batcher.everyone() if r.asked.request_id == "bad")
    stage.decode.cache.latents[1, slots_of(bad.pages, 3, 4)] = float("nan")
    stage.settle()
    assert stage.gateway.failures() == [("bad", "no_next_token", False)]
    assert stage.gateway.tokens("good") == expected[200]
    assert stage.gateway.tokens("fine") == expected[70]
    assert stage.decode.report().failures == {"no_next_token": 1}
    stage.assert_all_free()


def test_a_request_whose_tokens_are_all_banned_fails_alone(stage, expected):
    everything = tuple(range(stage.decode.decode_step.transformer.config.vocab_size))
    running(stage, "good", "bad")
    bad = next(r for r in stage.decode.batcher.everyone() if r.asked.request_id == "bad")
    bad.asked = replace(bad.asked, sampling=replace(GREEDY, stop_token_ids=everything, tokens_min=6))
    stage.settle()
    assert stage.gateway.failures() == [("bad", "no_next_token", False)]
    assert stage.gateway.tokens("good") == expected[200]
    stage.assert_all_free()


def test_experts_that_do_not_answer_fail_the_batch_and_not_the_node(stage, expected, monkeypatch):
    running(stage, "a", "b")
    with monkeypatch.context() as broken:
        broken.setattr(LocalExperts, "dispatch", no_experts)
        stage.decode.step()
    stage.settle()
    assert sorted(stage.gateway.failures()) == [
        ("a", "experts_unavailable", True),
        ("b", "experts_unavailable", True),
    ]
    stage.assert_all_free()
    assert generate(stage, prompt(200)) == expected[200]


def no_experts(*_):
    raise ExpertsUnavailable("no answer from the experts in 1 s")


def test_an_error_that_nobody_foresaw_fails_the_batch_and_not_the_node(stage, expected, monkeypatch):
    running(stage, "a", "b")
    with monkeypatch.context() as broken:
        broken.setattr(stage.decode.decode_step, "run", lambda batch: 1 / 0)
        for _ in range(3):
            stage.decode._turn()
    stage.settle()
    assert sorted(stage.gateway.failures()) == [("a", "internal", True), ("b", "internal", True)]
    stage.assert_all_free()
    assert generate(stage, prompt(200)) == expected[200]


def test_a_poisonous_request_fails_alone(stage, expected, monkeypatch):
    running(stage, "a", "b", "bad")
    run = stage.decode.decode_step.run

    def choke(batch):
        assert all(request.asked.request_id != "bad" for request in batch)
        return run(batch)

    monkeypatch.setattr(stage.decode.decode_step, "run", choke)
    stage.settle()
    assert stage.gateway.failures() == [("bad", "internal", True)]
    assert (stage.gateway.tokens("a"), stage.gateway.tokens("b")) == (expected[200], expected[70])
    stage.assert_all_free()


def test_a_node_that_fails_whatever_comes_leaves_so_that_all_see_it(stage, monkeypatch):
    monkeypatch.setattr(stage.decode.decode_step, "run", lambda batch: 1 / 0)
    stage.decode.start()
    for number in range(7):
        assert stage.decode.is_alive
        stage.gateway.ask(f"r{number}", prompt(20))
        until_failed(stage, number + 1)
        stage.now_s += 2.0
    stage.decode._thread.join(5)
    assert not stage.decode.is_alive
    stage.gateway.endpoint.poll(0)
    with pytest.raises(ChannelClosed):
        DOWN.send(stage.gateway.decode, AskReport())


def complete(stage: Stage, monkeypatch, *names: str, sampling=GREEDY) -> None:
    """Ask for requests, and wait until all that their first steps need is here."""
    with monkeypatch.context() as paused:
        paused.setattr(stage.decode, "step", lambda: 0)
        for name in names:
            stage.gateway.ask(name, prompt(70), sampling)
        stage.settle()


@pytest.mark.parametrize("names", ["ab", "a"])
def test_a_node_without_numbers_leaves_and_blames_no_requests_that_step_together(stage, monkeypatch, names):
    run = stage.decode.decode_step.run
    monkeypatch.setattr(stage.decode.decode_step, "run", lambda batch: run(batch) * float("nan"))
    for number in range(5):
        complete(stage, monkeypatch, *(f"{name}{number}" for name in names))
        stage.decode._turn()
        stage.now_s += 2.5
    complete(stage, monkeypatch, *names)
    with pytest.raises(StepsFail):  # which makes its thread close the node
        stage.decode._turn()
    stage.settle()
    told, left = stage.gateway.failures(), [(name, "internal", True) for name in names]
    blamed = ("internal", True) if len(names) > 1 else ("no_next_token", False)
    assert {failure[1:] for failure in told[: -len(names)]} == {blamed}
    assert told[-len(names) :] == left and len(told) == 6 * len(names)


def test_a_node_whose_every_common_step_fails_leaves_though_requests_alone_do_not(stage, monkeypatch):
    run = stage.decode.decode_step.run

    def alone(batch):
        if len(batch) > 1:
            raise ZeroDivisionError
        stage.now_s += 1.5
        batch[0].lease_end_s = stage.now_s + 10.0
        return run(batch)

    monkeypatch.setattr(stage.decode.decode_step, "run", alone)
    complete(stage, monkeypatch, "a", "b", sampling=replace(GREEDY, tokens_max=30))
    with pytest.raises(StepsFail):
        for _ in range(50):
            stage.decode._turn()
    stage.settle()
    assert sorted(stage.gateway.failures()) == [("a", "internal", True), ("b", "internal", True)]


def until_failed(stage: Stage, count: int) -> None:
    """Turn all but the decode node, which has its own threads, until so many requests have failed."""
    stage.gone.append(stage.decode)
    stage.until(lambda: len(stage.gateway.failures()) == count)
    stage.gone.remove(stage.decode)


def test_a_step_without_end_shows_while_the_node_still_answers(stage, monkeypatch):
    generate(stage, prompt(70))
    blocked, freed = threading.Event(), threading.Event()

    def hang(batch):
        blocked.set()
        assert freed.wait(10)
        raise ZeroDivisionError

    running(stage, "a")
    monkeypatch.setattr(stage.decode.decode_step, "run", hang)
    stage.decode.start()
    assert blocked.wait(10)
    assert stage.decode.is_alive
    stage.now_s += stage.decode.config.step_s_max + 1
    assert not stage.decode.is_alive
    assert stage.decode.report().requests_running_count == 1
    with pytest.raises(StepsFail, match="the process has to end"):
        stage.decode.close()
    with pytest.raises(ChannelClosed):
        DOWN.send(stage.gateway.decode, AskReport())
    freed.set()
    stage.decode._thread.join(10)


def test_a_node_that_cannot_keep_its_books_leaves_so_that_all_see_it(stage, monkeypatch):
    running(stage, "a")
    monkeypatch.setattr(stage.decode.decode_step, "run", lambda batch: 1 / 0)
    stage.decode.cache.pool._owners.clear()
    stage.decode._run()
    stage.gone.append(stage.decode)
    stage.settle()
    with pytest.raises(ChannelClosed):
        DOWN.send(stage.gateway.decode, AskReport())
    assert not stage.decode.is_alive


def test_damaged_latents_fail_their_request_at_once(stage, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("prefill.outbox.checksum", lambda parts: 0)
        stage.gateway.ask("a", prompt(70))
        stage.settle()
    assert ("a", "latents_damaged", True) in stage.gateway.failures()
    assert stage.gateway.heard(TokenChunks) == []
    stage.gateway.cancel("a")
    stage.settle()
    assert stage.decode.report().refused_frames_count > 0
    stage.assert_all_free()


@pytest.mark.parametrize("lost", [0, 2])
def test_lost_latents_fail_their_request_instead_of_letting_it_wait(stage, monkeypatch, lost):
    sent = []
    original = stage.prefill.outbox._send

    def send(parcel):
        sent.append(parcel)
        if len(sent) != lost + 1:
            original(parcel)

    monkeypatch.setattr(stage.prefill.outbox, "_send", send)
    stage.gateway.ask("a", prompt(200))
    stage.settle()
    assert stage.gateway.failures() == [("a", "latents_missing", True)]
    stage.gateway.cancel("a")
    stage.settle()
    stage.assert_all_free()


def test_no_room_is_refused_and_room_comes_back(make_stage):
    stage = make_stage(decode_pages=5)
    stage.gateway.ask("a", prompt(200))
    stage.gateway.ask("b", prompt(200))
    stage.settle()
    refused = stage.gateway.heard(ReservationRefused)
    assert [(r.request_id, r.pages_available_count) for r in refused] == [("b", 1)]
    generate(stage, prompt(200), GREEDY, "c")
    stage.assert_all_free()


# ends at any moment


def begin_two(make_stage, moment: int) -> Stage:
    """Two requests, the second later, after so many single moves; 'a' is in the middle of something."""
    stage = make_stage(step_tokens_max=64)
    stage.gateway.ask("a", prompt(200))
    moves = 0
    while moves < moment:
        for move in stage.moves():
            move()
            moves += 1
            if moves == 7:
                stage.gateway.ask("b", prompt(70))
            if moves == moment:
                break
    if moment < 7:
        stage.gateway.ask("b", prompt(70))
    return stage


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancel_at_any_moment_frees_everything_and_harms_nobody(make_stage, expected, moment):
    stage = begin_two(make_stage, moment)
    stage.gateway.cancel("a")
    stage.settle()
    assert stage.gateway.tokens("a") == expected[200][: len(stage.gateway.tokens("a"))]
    assert stage.gateway.tokens("b") == expected[70]
    assert stage.gateway.failures() == []
    stage.assert_all_free()


@pytest.mark.parametrize("end", ["cancel", "gateway goes"])
def test_a_running_request_that_nobody_wants_leaves_before_the_next_step(stage, end):
    other = stage.open_gateway()
    stage.gateway.ask("a", prompt(70), replace(GREEDY, tokens_max=900))
    other.ask("b", prompt(70), replace(GREEDY, tokens_max=30))
    stage.until(lambda: stage.decode.batcher.requests_running_count == 2)
    if end == "cancel":
        stage.gateway.cancel("a")
    else:
        stage.end(stage.gateway)
    while stage.decode.endpoint.poll(0):
        pass
    assert stage.decode.step() == 1
    assert [request.asked.request_id for request in stage.decode.batcher.everyone()] == ["b"]
    stage.settle()
    stage.assert_all_free()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_gateway_that_goes_at_any_moment_leaves_nothing_behind(make_stage, expected, moment):
    stage = begin_two(make_stage, moment)
    other = stage.open_gateway()
    other.ask("c", prompt(70))
    stage.end(stage.gateway)
    stage.settle()
    assert other.tokens("c") == expected[70]
    stage.assert_all_free()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_prefill_node_that_goes_at_any_moment_leaves_nobody_waiting(make_stage, expected, moment):
    """A request is done, or told to have failed, or prefill, whose loss its gateway sees, never began it."""
    stage = begin_two(make_stage, moment)
    stage.end(stage.prefill)
    stage.settle()
    told = {request_id for request_id, reason, retryable in stage.gateway.failures() if retryable}
    untouched = {request.asked.request_id for request in stage.decode.inbox._waiting.values()}
    for name, tokens in (("a", expected[200]), ("b", expected[70])):
        done = stage.gateway.tokens(name) == tokens
        assert done + (name in told) + (name in untouched) == 1
        assert done or name in untouched or ("prefill_lost", name) in failed_by(stage)
    assert all(request.prefill is None for request in stage.decode.inbox._waiting.values())
    for name in untouched:
        DOWN.send(stage.gateway.decode, CancelRequest(name, 1))
    stage.settle()
    stage.assert_all_free()


def failed_by(stage: Stage) -> set[tuple[str, str]]:
    return {(reason, request_id) for request_id, reason, _ in stage.gateway.failures()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_decode_node_that_goes_at_any_moment_is_not_waited_for(make_stage, expected, moment):
    stage = begin_two(make_stage, moment)
    stage.end(stage.decode)
    stage.settle()
    assert {reason for _, reason, _ in stage.gateway.failures()} <= {"decode_unreachable"}
    assert len(stage.gateway.failures()) == len({name for name, _, _ in stage.gateway.failures()})
    stage.assert_all_free()


# leases


def test_a_reservation_that_nobody_extends_ends(stage):
    stage.gateway.forwards = False
    for name in ("kept", "forgotten"):
        stage.gateway.ask(name, prompt(70))
    stage.settle()
    stage.now_s += 9.0
    DOWN.send(stage.gateway.decode, ExtendLeases(("kept",)))
    stage.settle()
    stage.now_s += 2.0
    DOWN.send(stage.gateway.decode, ExtendLeases(()))
    stage.settle()
    assert stage.gateway.failures() == [("forgotten", "lease_ended", True)]
    assert list(stage.decode.inbox._waiting) == ["kept"]


def test_a_running_request_that_nobody_extends_ends(stage):
    running(stage, "kept", "forgotten")
    stage.now_s += 9.0
    DOWN.send(stage.gateway.decode, ExtendLeases(("kept",)))
    stage.decode.endpoint.poll(0)
    stage.decode._turn()
    stage.now_s += 2.0
    stage.decode._turn()
    assert [request.asked.request_id for request in stage.decode.batcher.everyone()] == ["kept"]
    stage.settle()
    assert stage.gateway.failures() == [("forgotten", "lease_ended", True)]
    stage.assert_all_free()


# threads


def test_threads_of_their_own_change_nothing(make_stage, expected):
    """Requests come and are cancelled while both nodes run; the rest is right, and every page comes back."""
    stage = make_stage(step_tokens_max=64, decode_pages=64)
    gateway = stage.gateway
    for node in (stage.prefill, stage.decode):
        node.start()
    kept = [f"kept-{number}" for number in range(8)]
    for number, name in enumerate(kept):
        gateway.ask(name, prompt(200 if number % 2 else 70))
        gateway.ask(f"gone-{number}", prompt(200))
        for _ in range(random.randrange(6)):
            gateway.endpoint.poll(0.01)
        gateway.cancel(f"gone-{number}")
    wait_until(gateway, lambda: all(gateway.chunks(n) and gateway.chunks(n)[-1].finish_reason for n in kept))
    for number, name in enumerate(kept):
        assert gateway.tokens(name) == expected[200 if number % 2 else 70]
    assert gateway.failures() == []
    wait_until(gateway, lambda: is_free(gateway))
    assert stage.prefill.is_alive and stage.decode.is_alive
    stage.assert_all_free()


def wait_until(gateway, condition) -> None:
    for _ in range(2000):
        if condition():
            return
        gateway.endpoint.poll(0.02)
    raise AssertionError("the condition never came true")


def is_free(gateway) -> bool:
    """Ask both nodes, and look at what they said last."""
    for channel in (gateway.prefill, gateway.decode):
        DOWN.send(channel, AskReport())
    reports = gateway.heard(NodeReport)
    latest = {report.kind: report for report in reports}
    return len(latest) == 2 and all(
        report.pages_leased_count + report.requests_running_count + report.requests_waiting_count == 0
        for report in latest.values()
    )


def test_a_report_counts_every_request_and_page(stage):
    running(stage, "a", "b")
    report = stage.decode.report()
    assert (report.kind, report.address) == ("decode", stage.decode.endpoint.address)
    assert report.requests_running_count == 2
    assert report.pages_leased_count == 4 + 2
    assert report.pages_free_count + report.pages_leased_count == report.pages_total_count
    stage.settle()
    report = stage.decode.report()
    assert report.tokens_count == 2 * (GREEDY.tokens_max - 1)
    assert report.steps_count >= GREEDY.tokens_max - 1
    assert report.busy_s > 0


def test_what_a_peer_must_not_say_costs_it_its_channel_alone(stage, expected):
    other = stage.open_gateway()
    other.decode.send("Latents", {"request_id": 5}, [memoryview(b"x" * 100)])
    stage.gateway.ask("a", prompt(200))
    stage.settle()
    assert stage.gateway.tokens("a") == expected[200]
    assert stage.decode.endpoint.counts.refused_peers_count == 1
    assert torch.isfinite(stage.decode.cache.latents).any()


def test_peers_are_counted_that_are_refused_where_latents_arrive(make_stage):
    stage = make_stage(latents_address="memory://latents-alone")
    stranger = stage.gateway.endpoint.connect(stage.decode.endpoints[-1].address)
    before_count = stage.decode.report().refused_frames_count
    stranger.send("Latents", {"request_id": 5}, [memoryview(b"x" * 100)])
    stage.settle()
    assert stage.decode.report().refused_frames_count == before_count + 1
