"""A trace is replayed as it was, and one that is wrong is refused with line and field."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cluster.bench import trace
from cluster.bench.settings import LoadSettings
from cluster.bench.trace import plan_trace, read_line
from cluster.bench.workload import ModelLimits, prompt_tokens
from cluster.errors import InvalidRequest

MODEL = ModelLimits(vocab_size=1000, context_tokens_max=4096)
GOOD = {"timestamp": 0, "input_length": 700, "output_length": 10, "hash_ids": [1, 2]}


@pytest.fixture
def write(tmp_path):
    """Writes lines as a trace."""

    def written(*lines: dict | str):
        path = tmp_path / "life.jsonl"
        path.write_text(
            "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        )
        return path

    return written


def test_a_trace_is_replayed(write):
    path = write(
        {"timestamp": 3000, "input_length": 1025, "output_length": 64, "hash_ids": [7, 8, 9], "priority": 3},
        GOOD | {"timestamp": 1000, "input_length": 1024, "hash_ids": [7, 8]},
        "",
        GOOD | {"timestamp": 9000},
    )
    workload = plan_trace(path, LoadSettings(scale=1 / 64, speed=2.0, seed=5), MODEL)
    first, second, third = workload.requests
    assert [request.at_s for request in workload.requests] == [0.0, 1.0, 4.0]
    assert (first.prompt_tokens_count, second.prompt_tokens_count) == (16, 16)
    assert (second.output_tokens_count, second.priority) == (1, 3)
    assert (workload.name, workload.block_tokens, workload.duration_s) == ("life", 8, 4.0)
    a, b, c = (prompt_tokens(workload, index, MODEL.vocab_size) for index in range(3))
    assert a == b
    assert a[:8] != c[:8]
    assert third.shared_blocks == (1, 2)
    assert first.seed != second.seed


def test_a_duration_ends_it_early(write):
    path = write(GOOD, GOOD | {"timestamp": 1999}, GOOD | {"timestamp": 20_000})
    workload = plan_trace(path, LoadSettings(duration_s=5.0), MODEL)
    assert (len(workload.requests), workload.duration_s) == (2, 5.0)


def test_a_trace_that_ends_before_its_duration_offered_nothing_after(write):
    path = write(GOOD, GOOD | {"timestamp": 4000})
    assert plan_trace(path, LoadSettings(duration_s=60.0), MODEL).duration_s == 4.0
    assert plan_trace(path, LoadSettings(duration_s=4.0), MODEL).duration_s == 4.0
    assert plan_trace(path, LoadSettings(duration_s=60.0, speed=100), MODEL).duration_s == 1.0
    assert plan_trace(path, LoadSettings(duration_s=0.5, speed=100), MODEL).duration_s == 0.5


def test_a_trace_of_single_tokens_is_told(write):
    path = write(GOOD, GOOD)
    [note] = plan_trace(path, LoadSettings(), MODEL).notes
    assert note.startswith("100% of outputs are a single token")
    assert plan_trace(path, LoadSettings(scale=1.0), MODEL).notes == ()


@given(
    some.lists(
        some.tuples(some.integers(0, 10**6), some.integers(1, 3000), some.integers(1, 600)),
        min_size=1,
        max_size=20,
    )
)
def test_lines_come_back_as_they_were_written(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "timestamp": at_ms,
                    "input_length": prompt,
                    "output_length": output,
                    "hash_ids": list(range(-(-prompt // 512))),
                }
            )
            for at_ms, prompt, output in lines
        )
    )
    workload = plan_trace(path, LoadSettings(scale=1.0), MODEL)
    start_ms = min(at_ms for at_ms, _, _ in lines)
    ordered = sorted(lines, key=lambda line: line[0])
    assert [(r.at_s, r.prompt_tokens_count, r.output_tokens_count) for r in workload.requests] == [
        ((at_ms - start_ms) / 1000, prompt, output) for at_ms, prompt, output in ordered
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nonsense", "line 1: is not JSON"),
        ("[1]", "line 1: "),
        ("\xff\xfe", "line 1: is not JSON"),
        ("[" * 100_000, "line 1: is not JSON"),
        ({"timestamp": 1}, "line 1, input_length: "),
        (GOOD | {"timestamp": -1}, "line 1, timestamp: "),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "line 1, timestamp: "),
        (GOOD | {"output_length": 0}, "line 1, output_length: "),
        (GOOD | {"output_length": True}, "line 1, output_length: "),
        (GOOD | {"output_length": 10**12}, "line 1, output_length: "),
        (GOOD | {"hash_ids": [1]}, "line 1, hash_ids: 1 blocks are too few for 700 tokens"),
        (GOOD | {"hash_ids": [1, "2"]}, "line 1, hash_ids.1: "),
        (GOOD | {"hash_ids": [1, 2**62]}, "line 1, hash_ids.1: "),
        (GOOD | {"priority": 101}, "line 1, priority: "),
    ],
)
def test_a_bad_line_is_named(line, told):
    raw = (line if isinstance(line, str) else json.dumps(line)).encode("latin-1")
    with pytest.raises(InvalidRequest) as refused:
        read_line(raw, 1)
    assert str(refused.value).startswith(f"--trace: {told}")
    assert refused.value.remedy


def test_the_line_that_is_bad_is_the_one_told(write):
    with pytest.raises(InvalidRequest, match="line 3, input_length"):
        plan_trace(write(GOOD, "", GOOD | {"input_length": 0}), LoadSettings(), MODEL)


def test_files_that_are_none_or_too_large(write, tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="cannot be read"):
        plan_trace(tmp_path / "missing.jsonl", LoadSettings(), MODEL)
    with pytest.raises(InvalidRequest, match="0 requests are planned"):
        plan_trace(write(), LoadSettings(), MODEL)
    path = write(GOOD, GOOD, GOOD)
    monkeypatch.setattr(trace, "REQUESTS_COUNT_MAX", 2)
    with pytest.raises(InvalidRequest, match="too many lines"):
        plan_trace(path, LoadSettings(), MODEL)
    monkeypatch.setattr(trace, "LINE_BYTES_MAX", 20)
    with pytest.raises(InvalidRequest, match="line 1: is longer than 20 bytes"):
        plan_trace(path, LoadSettings(), MODEL)
    monkeypatch.setattr(trace, "FILE_BYTES_MAX", 20)
    with pytest.raises(InvalidRequest, match="too large"):
        plan_trace(path, LoadSettings(), MODEL)
