"""Text from tokens: whole characters, stop strings, and their ends."""

from pathlib import Path

import pytest

from cluster.text_stream import TextStream
from cluster.tokenizer import Tokenizer

TEXT = "The place where three roads meet: naïve café, 三条路, 🙂!"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer of the example."""
    return Tokenizer.from_folder(Path("examples/trivium-small"))


def streamed(stream: TextStream, token_ids: list[int]) -> tuple[str, str | None, int]:
    """Text up to a stop string or the end, what stopped it, and how many tokens that took."""
    text = ""
    for count, token_id in enumerate(token_ids, 1):
        delta = stream.add(token_id)
        text += delta.text
        if delta.matched is not None:
            return text, delta.matched, count
    delta = stream.flush()
    return text + delta.text, delta.matched, len(token_ids)


def test_every_character_comes_once(tokenizer):
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    text, matched, _ = streamed(TextStream(tokenizer, [1, 2, 3]), token_ids)
    assert text == tokenizer.decode(token_ids)
    assert matched is None


def test_text_ends_before_the_stop_string(tokenizer):
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    text, matched, count = streamed(TextStream(tokenizer, [], ("nowhere", "ee r", "meet")), token_ids)
    assert tokenizer.decode(token_ids).startswith(text + "ee r")
    assert matched == "ee r"
    assert count < len(token_ids)


def test_what_might_have_become_a_stop_string_is_given_at_the_end(tokenizer):
    token_ids = tokenizer.encode("roads meet", add_special_tokens=False)
    text, matched, _ = streamed(TextStream(tokenizer, [], ("meeting",)), token_ids)
    assert text == tokenizer.decode(token_ids)
    assert matched is None


def test_no_stop_string_matches_before_the_least_tokens(tokenizer):
    token_ids = tokenizer.encode("meet meet meet meet", add_special_tokens=False)
    first = streamed(TextStream(tokenizer, [], ("meet",)), token_ids)
    later = streamed(TextStream(tokenizer, [], ("meet",), tokens_min=first[2]), token_ids)
    assert first[1] == later[1] == "meet"
    assert later[2] > first[2]
    assert "meet" in later[0]


def test_without_a_tokenizer_there_is_no_text():
    assert streamed(TextStream(None, [1], ("a",)), [5, 6, 7]) == ("", None, 3)
