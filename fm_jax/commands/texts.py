"""fm generate: prompts read, texts written as they come or as JSON lines."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from fm_jax import jsonfiles
from fm_jax.errors import UserError, reason

PACE = 0.1  # seconds between the pieces of a text that is printed as it comes
MARK = "---"  # between texts


def run(flags: Any, argv: list[str]) -> None:
    """Write the texts that the flags of `fm generate` ask for.

    Raises UserError on flags that are out of range, prompts that cannot be read and
    texts that the model has no room for.
    """
    texts = read_prompts(flags.prompt, flags.prompts)
    _check(flags)
    template = _template(Path(flags.run)) if flags.chat else None
    from fm_jax.generation import batch
    from fm_jax.generation.request import Request
    from fm_jax.train import restore

    for name, value in rules(flags).items():  # what is wrong, before weights are read
        Request((0,), 1, **{name: value})
    mesh = {axis: flags.values[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")}
    held = restore.load(Path(flags.run), flags.step, mesh=mesh)
    requests = [
        Request(
            prompt,
            flags.num_tokens,
            sample=sample,
            num_logprobs=flags.logprobs if flags.logprobs >= 0 else None,
            end_ids=held.end_ids,
            **rules(flags),
        )
        for prompt in _prompts(held, texts, template, flags)
        for sample in range(flags.num_samples)
    ]
    texts = [text for text in texts for _ in range(flags.num_samples)]
    shown = [""] * len(texts) if template else texts  # of a chat only the answer
    is_live = streams(argv, sys.stdout.isatty(), len(texts)) and not flags.json
    printer = Printer(shown, sys.stdout)
    found = batch.generate(
        held.model,
        held.params,
        requests,
        decode=held.tokenizer.decode,
        stops=flags.stop,
        tell=printer.tell if is_live else None,
        pace=PACE if is_live else None,
        layout=held.layout,
        int8=flags.int8,
    )
    if flags.json:
        decode = held.tokenizer.decode
        for prompt, written in zip(texts, found, strict=True):
            print(json.dumps(as_json(prompt, written, decode)))
        return
    if is_live:
        printer.finish()
        return
    for index, (prompt, written) in enumerate(zip(shown, found, strict=True)):
        print(*([MARK] if index else []), prompt + written.text, sep="\n")


def _template(run: Path) -> Any:
    """Return a run's chat template. Raises UserError where it has none."""
    from fm_jax.serve import chat

    found = chat.find(run)
    if found is None:
        raise UserError(
            f"--chat needs a run with a chat template; got {run}, which has none. Tune "
            "one: --config.data.examples=chat."
        )
    return found


def _prompts(held: Any, texts: list[str], template: Any, flags: Any) -> list[tuple]:
    """Return the ids of prompts: texts, or what users say in chats."""
    if template is None:
        return held.prompts(texts)
    from fm_jax.serve import chat
    from fm_jax.tokenizers import special

    encode = special.special_encoder(held.tokenizer)
    begin = chat.begin_ids(Path(flags.run), held.begin_ids)
    system = [{"role": "system", "content": flags.system}] if flags.system else []
    chats = [[*system, {"role": "user", "content": text}] for text in texts]
    return [chat.ids(template.render(said), encode, begin) for said in chats]


def read_prompts(given: list[str], file: str) -> list[str]:
    """Return the prompts of flags and of a file, one empty prompt where none is given.

    A .jsonl file has an object with `prompt` on each line, others a prompt. Raises
    UserError on a file that is not there or is something else.
    """
    if not file:
        return list(given) or [""]
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts must be a file of UTF-8 text; got {file!r} ({reason(error)})."
        ) from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts must be a file with prompts; got {file!r}, empty.")
    if not file.endswith(".jsonl"):
        return [*given, *(line for _, line in numbered)]
    return [*given, *(_prompt_of(line, f"{file}:{n}") for n, line in numbered)]


def _prompt_of(line: str, where: str) -> str:
    try:
        found = jsonfiles.parse(line)
    except ValueError as error:
        raise UserError(f"{where} must be JSON; got {line[:40]!r}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(
            f"{where} must be an object with a text `prompt`; got {line[:40]!r}."
        )
    return found["prompt"]


def _check(flags: Any) -> None:
    if flags.num_tokens < 1 or flags.num_samples < 1:
        raise UserError(
            "--num_tokens and --num_samples must be >= 1; got "
            f"{flags.num_tokens} and {flags.num_samples}."
        )
    if flags.system and not flags.chat:
        raise UserError("--system needs --chat, which it is said in.")
    if flags.logprobs < -1:
        raise UserError(f"--logprobs must be >= 0, or -1: none; got {flags.logprobs}.")
    if flags.logprobs >= 0 and not flags.json:
        raise UserError("--logprobs needs --json, which they are printed in.")


def rules(flags: Any) -> dict[str, float]:
    """Return the rules of sampling that the flags have, by their names."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: flags.values[name] for name in names}


def streams(argv: list[str], is_terminal: bool, num_texts: int) -> bool:
    """Return whether text is to be printed as it comes.

    By default on a terminal, of a single text; `--stream` and `--nostream` decide.
    """
    said = [
        a for a in argv if a.lstrip("-").partition("=")[0] in ("stream", "nostream")
    ]
    if not said:
        return is_terminal and num_texts == 1
    name, _, value = said[-1].lstrip("-").partition("=")
    return name == "stream" and value.lower() not in ("false", "0", "no", "f", "n")


def as_json(prompt: str, written: Any, decode: Callable) -> dict[str, Any]:
    """Return a text as its line of JSON says it; log-probabilities in nats."""
    logprobs = None
    if written.logprobs:
        logprobs = [
            {
                "id": token,
                "token": decode([token]),
                "logprob": one.chosen,
                "top": [
                    {"id": i, "token": decode([i]), "logprob": value}
                    for i, value in one.top
                ],
            }
            for token, one in zip(written.ids, written.logprobs, strict=True)
        ]
    return {
        "prompt": prompt,
        "text": written.text,
        "tokens": list(written.ids),
        "logprobs": logprobs,
        "finish_reason": written.finish_reason,
    }


class Printer:
    """Prints texts in their order, the first that is not done as it comes."""

    def __init__(self, prompts: list[str], out: TextIO):
        self._prompts, self._out = prompts, out
        self._held = [""] * len(prompts)
        self._current = -1

    def tell(self, index: int, text: str) -> None:
        """Take a piece of a text."""
        self._held[index] += text
        if self._current < 0:
            self._begin()
        self._flush()

    def finish(self) -> None:
        """Print the rest, when all texts are done."""
        while self._current + 1 < len(self._prompts):
            self._begin()
            self._flush()
        print(file=self._out, flush=True)

    def _begin(self) -> None:
        if self._current >= 0:
            print(f"\n{MARK}", file=self._out)
        self._current += 1
        print(self._prompts[self._current], end="", file=self._out)

    def _flush(self) -> None:
        print(self._held[self._current], end="", flush=True, file=self._out)
        self._held[self._current] = ""
