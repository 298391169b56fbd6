"""Text in pieces is the same text, and no stop string gets through."""

import itertools
import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from cluster.errors import InvalidModel, InvalidRequest
from cluster.tokenizer import IncrementalDetokenizer, StopStrings, Tokenizer
from cluster.validation import ChatMessage

SMALL = Path(__file__).parents[2] / "examples" / "trivium-small"
TOKENIZER = Tokenizer.from_folder(SMALL)
TREE_IDS = TOKENIZER.encode("🌳", add_special_tokens=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé你🌱\ufffd\u200d "), max_size=60)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 has it: words with ▁ for spaces, and a token for each byte."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {}, None)


FALLBACK = byte_fallback_tokenizer()


def pieces(items, cuts: list[int]) -> list:
    """Cut a sequence at the given places."""
    borders = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[start:end] for start, end in itertools.pairwise(borders)]


def in_pieces(tokenizer: Tokenizer, token_ids: list[int], cuts: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.add(piece) for piece in pieces(token_ids, cuts)), detokenizer.flush()]


@given(TEXT, st.lists(st.integers(0, 200)))
def test_deltas_of_text_add_up(text, cuts):
    token_ids = TOKENIZER.encode(text)
    assert "".join(in_pieces(TOKENIZER, token_ids, cuts)) == TOKENIZER.decode(token_ids) == text


@given(st.text("ab 你🌱é", max_size=30), st.lists(st.integers(0, 200)))
def test_deltas_of_byte_tokens_add_up(text, cuts):
    token_ids = FALLBACK.encode(text.replace(" ", "▁"))
    assert "".join(in_pieces(FALLBACK, token_ids, cuts)) == FALLBACK.decode(token_ids)


@given(st.lists(st.integers(0, 1100), max_size=120), st.lists(st.integers(0, 200)))
@example(TREE_IDS[:1] * 100, list(range(100)))
@example(TREE_IDS[1:2] * 100 + TREE_IDS, list(range(110)))
def test_deltas_of_any_tokens_add_up(token_ids, cuts):
    assert "".join(in_pieces(TOKENIZER, token_ids, cuts)) == TOKENIZER.decode(token_ids)


@given(st.lists(st.sampled_from([*range(4), *TOKENIZER.encode("你🌳é\x80a"), 1050]), max_size=100))
def test_deltas_of_broken_characters_add_up(token_ids):
    assert "".join(in_pieces(TOKENIZER, token_ids, list(range(100)))) == TOKENIZER.decode(token_ids)


def test_a_character_is_never_split():
    token_ids = TOKENIZER.encode("x🌳y", add_special_tokens=False)
    assert len(token_ids) > 3
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    deltas = [detokenizer.add([token_id]) for token_id in token_ids]
    assert [delta for delta in deltas if delta] == ["x", "🌳", "y"]


def test_an_unfinished_character_comes_out_at_the_end_only():
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.add(TREE_IDS[:-1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_output_goes_on_where_the_prompt_ends():
    prompt = FALLBACK.encode("b▁a")
    detokenizer = IncrementalDetokenizer(FALLBACK, prompt)
    assert detokenizer.add(FALLBACK.encode("▁a")) == " a"
    detokenizer = IncrementalDetokenizer(TOKENIZER, TREE_IDS[:-1])
    assert detokenizer.add(TREE_IDS[-1:]) == "🌳"


@pytest.mark.parametrize("token_ids", [TOKENIZER.encode("all the words "), TREE_IDS[1:2]])
def test_the_work_for_a_token_does_not_grow(token_ids):
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    times_s = []
    for _ in range(4):
        start_s = time.process_time()
        detokenizer.add(token_ids * (2000 // len(token_ids)))
        times_s.append(time.process_time() - start_s)
    assert min(times_s[1:]) < 4 * max(times_s[0], 0.01)
    assert len(detokenizer._window) < 40


def test_special_tokens_are_read_but_not_written():
    assert TOKENIZER.encode("<|user|>hi", add_special_tokens=False)[0] == 2
    assert TOKENIZER.encode("hi")[0] == 0
    assert TOKENIZER.decode([0, *TOKENIZER.encode("hi"), 1]) == "hi"


def test_a_conversation_is_written_by_the_template():
    turns = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Yes?")]
    expected = "<|bos|>Be brief.\n\n<|user|>Hi<|assistant|>Yes?<|eos|>"
    assert TOKENIZER.render_chat(turns, add_generation_prompt=False) == expected
    assert TOKENIZER.render_chat(turns) == expected + "<|assistant|>"
    with pytest.raises(InvalidRequest, match="not robot") as caught:
        TOKENIZER.render_chat([ChatMessage("robot", "Hi")])
    assert caught.value.reason == "CHAT_REFUSED"


def folder_with(folder: Path, settings: dict | str, template: str | None = None) -> Path:
    (folder / "tokenizer.json").write_bytes((SMALL / "tokenizer.json").read_bytes())
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "tokenizer_config.json").write_text(text)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_templates_come_from_three_places(tmp_path):
    turns = [ChatMessage("user", "<é>")]
    named = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {"chat_template": named}))
    assert tokenizer.render_chat(turns) == "<é>"
    bos = {"content": "<b>", "special": True}
    folder = folder_with(
        tmp_path, {"chat_template": "old", "bos_token": bos}, "{{ bos_token }}{{ messages[0]|tojson }}"
    )
    assert Tokenizer.from_folder(folder).render_chat(turns) == '<b>{"role": "user", "content": "<é>"}'


def test_without_a_template_messages_are_refused(tmp_path):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {}))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.render_chat([ChatMessage("user", "Hi")])
    assert caught.value.reason == "NO_CHAT_TEMPLATE"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].role / 0 }}", "{{ 1 / 0 }}"],
)
def test_templates_are_kept_in_their_box(tmp_path, template):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {}, template))
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.render_chat([ChatMessage("user", "Hi")])
    assert caught.value.reason == "CHAT_REFUSED"


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(InvalidModel, match="missing"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(InvalidModel, match="tokenizer_config"):
        Tokenizer.from_folder(folder_with(tmp_path, "{"))
    with pytest.raises(InvalidModel, match="tokenizer_config"):
        Tokenizer.from_folder(folder_with(tmp_path, "[]"))
    with pytest.raises(InvalidModel, match="template"):
        Tokenizer.from_folder(folder_with(tmp_path, {"chat_template": "{% if %}"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_limit_left_in_the_file_cuts_nothing(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(SMALL / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("all the words") == TOKENIZER.encode("all the words")
    assert len(tokenizer.encode("a")) == 2


def naive_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Look at every beginning of the text, shortest first."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=4).map(tuple),
    st.lists(st.integers(0, 40)),
)
@example("aab", ("aab", "ab"), [1])
def test_stop_strings_are_found_across_borders(text, stops, cuts):
    finder = StopStrings(stops)
    released = ""
    for piece in pieces(text, cuts):
        new, matched = finder.add(piece)
        released += new
        if matched is not None:
            break
    released += finder.flush()
    assert (released, finder.matched) == naive_stop(text, stops)
    assert finder.matched is None or finder.add("more") == ("", finder.matched)


def test_only_what_may_begin_a_stop_string_is_held_back():
    finder = StopStrings(("</s>", "END"))
    assert finder.add("an <") == ("an ", None)
    assert finder.add("/b> E") == ("</b> ", None)
    assert finder.add("NDED") == ("", "END")
    assert StopStrings(()).add("all") == ("all", None)


def test_a_long_text_is_encoded_beside_other_threads():
    encoding = threading.Thread(
        target=TOKENIZER.encode, args=("The place where three roads meet. " * 12_000,)
    )
    encoding.start()
    turns_count = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns_count += 1
    assert turns_count > 10, "nobody else had a turn"
