"""Between text and token ids: a Hugging Face tokenizer, its chat template, and text from a growing output."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import InvalidModel, InvalidRequest
from cluster.validation import ChatMessage

FILE_BYTES_MAX = 256 * 2**20
REPLACEMENT = "\ufffd"  # What decoders write for bytes that are not, or not yet, a character.

# Four bytes make the longest character, so tokens that stay unreadable for longer than this are not one.
UNREADABLE_TOKENS_MAX = 16
CHARACTER_BYTES_MAX = 4


class Tokenizer:
    """The tokenizer of one model folder; safe to use from several threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: dict[str, Any], template: Template | None
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()  # tokenizer.json may ask for both; a server must do neither.
        self._backend.no_padding()
        self._special_tokens = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token")}
        self._template = template
        self._special_ids = {
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja if any; or InvalidModel."""
        folder = Path(folder)
        settings = _read_settings(folder / "tokenizer_config.json")
        return cls(_read_backend(folder / "tokenizer.json"), settings, _read_template(folder, settings))

    @property
    def has_chat_template(self) -> bool:
        """Whether render_chat works."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids; special tokens spelled out in the text become themselves."""
        # The library's call for a single text keeps Python's lock, so that no other thread has a turn.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn token ids into text, without special tokens; unreadable bytes become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def has_text(self, token_id: int) -> bool:
        """Whether decode writes anything for a token: not if it is special or unknown to it."""
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    def render_chat(self, messages: Iterable[ChatMessage], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model was taught it; InvalidRequest if no template does.

        The template writes its own special tokens: encode the result with add_special_tokens=False.
        """
        if self._template is None:
            raise _no_chat_template()
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise _chat_refused(error) from error


def _token_text(entry: Any) -> str:
    """Read a special token as tokenizer_config.json has it: text, an object with content, or null."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    if text is None:
        raise _unreadable(path, "the file is missing", "Take tokenizer.json from the model's own folder.")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises plain Exception.
        raise _unreadable(path, str(error), "Take tokenizer.json from the model's own folder.") from error


def _read_settings(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise _unreadable(path, str(error), "It must be JSON.") from error
    if not isinstance(settings, dict):
        raise _unreadable(path, "it holds no object", "It must be a JSON object.")
    return settings


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    size_bytes = path.stat().st_size
    if size_bytes > FILE_BYTES_MAX:
        raise _unreadable(path, f"it has {size_bytes} bytes", f"At most {FILE_BYTES_MAX} bytes are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, str(error), "It must be UTF-8.") from error


def _read_template(folder: Path, settings: dict[str, Any]) -> Template | None:
    source = _read_text(folder / "chat_template.jinja") or _template_in_settings(
        settings.get("chat_template")
    )
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise _unreadable(folder, str(error), "Correct the chat template.") from error


def _template_in_settings(entry: Any) -> str | None:
    """Read chat_template: a text, or a list of named ones of which `default` is meant."""
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON as the templates expect it; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _unreadable(path: Path, why: str, remedy: str) -> InvalidModel:
    return InvalidModel(
        reason="UNREADABLE_TOKENIZER",
        message=f"cannot use {path.name}: {why}",
        field=str(path),
        limit=f"the formats of the tokenizers library {tokenizers.__version__}",
        remedy=remedy,
    )


def _no_chat_template() -> InvalidRequest:
    return InvalidRequest(
        reason="NO_CHAT_TEMPLATE",
        message="the served model has no chat template",
        field="messages",
        limit="text or token_ids",
        remedy="Write the conversation as one text, or add chat_template.jinja to the model's folder.",
    )


def _chat_refused(error: Exception) -> InvalidRequest:
    return InvalidRequest(
        reason="CHAT_REFUSED",
        message=f"the chat template of the model refuses these messages: {error}",
        field="messages",
        limit="the roles and their order that the template knows",
        remedy="Change roles or their order.",
    )


class IncrementalDetokenizer:
    """Text of an output that grows, each piece sent once and only when no later token can change it.

    It decodes a short window: the last tokens that read cleanly, for context, and those after them. The
    window moves on when its text ends in a whole character, so a token's work is the same in a long output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = [token for token in prompt_tail if tokenizer.has_text(token)]
        self._context_count = len(self._window)
        self._sent_count = len(_without_last_unreadable(tokenizer.decode(self._window)))

    def add(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens and return the text that is now certain."""
        return "".join(self._add(token) for token in token_ids if self._tokenizer.has_text(token))

    def flush(self) -> str:
        """Return what was held back, once no token follows."""
        rest = self._tokenizer.decode(self._window)[self._sent_count :]
        self._sent_count += len(rest)
        return rest

    def _add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        unreadable = text.endswith(REPLACEMENT)
        lost = unreadable and len(self._window) - self._context_count > UNREADABLE_TOKENS_MAX
        certain = _without_last_unreadable(text) if lost else text.rstrip(REPLACEMENT)
        piece = certain[self._sent_count :]
        self._sent_count = max(self._sent_count, len(certain))
        if lost:
            self._move_window(CHARACTER_BYTES_MAX)
        elif not unreadable:
            self._move_window(len(self._window) - self._context_count)
        return piece

    def _move_window(self, kept_count: int) -> None:
        """Keep the last tokens as context; all their text counts as sent but an unfinished last character."""
        self._window = self._window[-kept_count:]
        self._context_count = len(self._window)
        self._sent_count = len(_without_last_unreadable(self._tokenizer.decode(self._window)))


def _without_last_unreadable(text: str) -> str:
    """Drop one U+FFFD from the end: the only character that more bytes can still change."""
    return text.removesuffix(REPLACEMENT)


class StopStrings:
    """Finds the stop string that is complete first in a growing text, wherever the text is cut into pieces.

    Of several that end at the same character the longest counts. Each stop string is followed by the
    Knuth-Morris-Pratt method, so a character costs a constant amount of work.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._borders = [_borders(one) for one in stop]
        self._matched_counts = [0] * len(stop)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> tuple[str, str | None]:
        """Take the next text; return what is surely before any stop string, and the one found, if any.

        After a stop string is found, no more text comes out.
        """
        if self.matched is not None:
            return "", self.matched
        text = self._held + text
        for position in range(len(self._held), len(text)):
            self._advance(text[position])
            if self.matched is not None:
                self._held = ""
                return text[: position + 1 - len(self.matched)], self.matched
        certain_count = len(text) - max(self._matched_counts, default=0)
        self._held = text[certain_count:]
        return text[:certain_count], None

    def flush(self) -> str:
        """Return what was held back, once no text follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> None:
        for index, (stop, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
            count = self._matched_counts[index]
            while count and stop[count] != character:
                count = borders[count - 1]
            self._matched_counts[index] = count + (stop[count] == character)
        complete = [
            stop for stop, count in zip(self._stop, self._matched_counts, strict=True) if count == len(stop)
        ]
        self.matched = max(complete, key=len, default=None)


def _borders(pattern: str) -> list[int]:
    """For each prefix of a pattern: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    count = 0
    for position in range(1, len(pattern)):
        while count and pattern[position] != pattern[count]:
            count = borders[count - 1]
        count += pattern[position] == pattern[count]
        borders[position] = count
    return borders
