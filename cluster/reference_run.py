"""The process behind `trivium reference`: one request, one process, no Ray."""

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from cluster.config import check_config
from cluster.device import check_numbers, device_of
from cluster.errors import TriviumError
from cluster.events import RoutedRequest
from cluster.model_folder import open_checkpoint
from cluster.place import context_tokens_max
from cluster.reference import Generation, Reference, RequestRefused
from cluster.requests import error_values, from_json
from cluster.show import printable
from cluster.text_stream import TextStream
from cluster.tokenizer import Tokenizer
from cluster.validation import RequestLimits, ValidRequest, validate

console = Console(stderr=True)


def main(
    config_json: str, request_json: str, json_output: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Load the model, answer, and print."""
    try:
        print_answer(config_json, request_json, json_output)
    except RequestRefused as error:
        tell(TriviumError("REQUEST_REFUSED", str(error)), json_output)
    except TriviumError as error:
        tell(error, json_output)
    except KeyboardInterrupt:
        sys.exit(130)


def tell(error: TriviumError, json_output: bool) -> NoReturn:
    """Tell an error to people and, where they asked for JSON, to programs; ends with status 1."""
    if json_output:
        print(json.dumps(error_values(error)))
    console.print(f"[red]error[/] {escape(str(error))}", highlight=False)
    sys.exit(1)


def print_answer(config_json: str, request_json: str, json_output: bool) -> None:
    """Answer one request; raises TriviumError, RequestRefused."""
    config = check_config(json.loads(config_json), "command line", Path.cwd())
    folder = config.model.folder
    checkpoint = open_checkpoint(folder)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    limits = RequestLimits(
        checkpoint.config.vocab_size,
        context_tokens_max(checkpoint.config, config),
        config.gateway.tokens_max_default,
    )
    check_numbers(checkpoint.config, config, device_of(config))
    valid = validate(from_json(request_json), limits, 0, tokenizer)
    torch.set_num_threads(config.threads_per_actor)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("loading the model", total=None)
        reference = Reference(
            checkpoint,
            getattr(torch, config.model.compute_dtype),
            latents_bytes=config.decode.latents_bytes,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            packs_latents=config.model.latents == "fp8",
            device=device_of(config),
            keeps_fp8=device_of(config) != "cpu",
        )
    request = RoutedRequest("reference", valid.token_ids, valid.sampling)
    text = TextStream(tokenizer, valid.token_ids, valid.stop_strings, valid.sampling.tokens_min)
    show(reference.generate([request])[0], text, valid, json_output)
    reference.close()


def show(generation: Generation, text: TextStream, valid: ValidRequest, json_output: bool) -> None:
    """Print an answer up to the first stop string."""
    token_ids, words = [], ""
    reason = generation.finish_reason
    for token_id in generation.token_ids:
        token_ids.append(token_id)
        delta = text.add(token_id)
        words += delta.text
        if delta.matched is not None:
            reason = "stop_string"
            break
    else:
        delta = text.flush()
        words += delta.text
        reason = reason if delta.matched is None else "stop_string"
    if json_output:
        values = {"text": words, "token_ids": token_ids, "finish_reason": reason, "seed": valid.sampling.seed}
        print(json.dumps(values))
    else:
        print(printable(words) or " ".join(map(str, token_ids)))


if __name__ == "__main__":
    typer.run(main)
