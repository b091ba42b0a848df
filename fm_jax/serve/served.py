"""The model that is served: its name, its context, and how text becomes its ids."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from functools import partial

from fm_jax.errors import UserError
from fm_jax.generation.request import SEEDS, Request
from fm_jax.serve import chat, refused
from fm_jax.serve.refused import Refused
from fm_jax.serve.requests import Asked
from fm_jax.tokenizers.protocol import Tokenizer
from fm_jax.tokenizers.template import Template

COMPLETION_TOKENS = 16  # new tokens of a completion that does not say how many


@dataclasses.dataclass(frozen=True)
class Served:
    """A model under a name.

    `capacity` tokens fit into its context, new ones included. `begin_ids` stand before
    the text of a completion, `chat_begin_ids` before that of a chat, whose special
    tokens `encode_special` knows. Text ends before any of `end_ids`.
    """

    name: str
    created: int
    capacity: int
    vocab_size: int
    tokenizer: Tokenizer
    encode_special: Callable[..., list[int]]
    template: Template | None
    begin_ids: tuple[int, ...]
    chat_begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    def requests(self, asked: Asked) -> list[Request]:
        """Return what the engine is asked for, `num_choices` for each prompt in turn.

        Raises Refused for another model, and for prompts that do not fit.
        """
        self.check_name(asked.model)
        prompts = [self._chat(asked)] if asked.is_chat else self._prompts(asked.prompts)
        name = "messages" if asked.is_chat else "prompt"
        how = asked.sampling
        seed = secrets.randbelow(SEEDS) if how.seed is None else how.seed % SEEDS
        return [
            Request(
                prompt=prompt,
                num_tokens=self._num_tokens(asked, len(prompt), name),
                temperature=how.temperature,
                top_k=min(how.top_k, self.vocab_size),
                top_p=how.top_p,
                min_p=how.min_p,
                repetition_penalty=how.repetition_penalty,
                seed=seed,
                sample=sample,
                num_logprobs=how.num_logprobs,
                end_ids=self.end_ids,
            )
            for prompt in prompts
            for sample in range(asked.num_choices)
        ]

    def echoes(self, asked: Asked) -> list[str]:
        """Return what stands before each choice: its prompt, where that is echoed."""
        if not asked.echo:
            return [""] * len(asked.prompts or [""]) * asked.num_choices
        texts = [p if isinstance(p, str) else self.decode(p) for p in asked.prompts]
        return [text for text in texts for _ in range(asked.num_choices)]

    def check_name(self, name: str) -> None:
        """Raise Refused unless the name is this model's."""
        if name != self.name:
            raise Refused(
                f"model must be {self.name!r}, which is served here; got "
                f"{refused.shown(name)}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids)

    def token(self, id: int) -> tuple[str, bytes]:
        """Return one id as text and as bytes; an id that is no text, by its number."""
        raw = self.tokenizer.decode_bytes([id])
        if not raw:
            return f"token_id:{id}", b""
        return raw.decode(errors="replace"), raw

    def _chat(self, asked: Asked) -> tuple[int, ...]:
        if self.template is None:
            raise Refused(
                f"{self.name} must have a chat template to chat; it has none. Use "
                "/v1/completions, or serve with --chat_template=FILE.",
                param="messages",
                code="no_chat_template",
            )
        text = chat.render(self.template, asked.messages, asked.values)
        encode = partial(
            chat.ids, encode_special=self.encode_special, begin=self.chat_begin_ids
        )
        return self._encoded(encode, text, "messages")

    def _prompts(self, prompts: Sequence[str | tuple[int, ...]]) -> list[tuple]:
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = self._encoded(partial(_plain, self.tokenizer), prompt, "prompt")
                found.append((*self.begin_ids, *ids))
                continue
            if max(prompt) >= self.vocab_size:
                raise refused.must(
                    "prompt", f"have ids below {self.vocab_size}", max(prompt)
                )
            found.append(prompt)
        return found

    def _encoded(self, encode: Callable, text: str, name: str) -> Sequence[int]:
        try:
            return encode(text)
        except UserError as error:
            raise Refused(str(error), param=name) from error

    def _num_tokens(self, asked: Asked, num_prompt: int, name: str) -> int:
        """Return how many new tokens there may be; raises Refused where none may."""
        room, wanted = self.capacity - num_prompt, asked.sampling.num_tokens
        if num_prompt and room >= (wanted or 1):
            return wanted or (room if asked.is_chat else min(COMPLETION_TOKENS, room))
        if not num_prompt:
            raise refused.must(name, "have at least one token", "none")
        wanted = "" if wanted is None else f" and max_tokens {wanted}"
        raise Refused(
            f"{name} and new tokens must fit into the context of {self.capacity} "
            f"tokens; got {num_prompt} of {name}{wanted}. Shorten them.",
            param=name,
            code="context_length_exceeded",
        )


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text], num_threads=1)[0].tolist()
