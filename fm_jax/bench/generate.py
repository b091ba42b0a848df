"""How fast texts are written: the prompt and new tokens, beside transformers."""

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fm_jax import machine
from fm_jax.bench import ratios
from fm_jax.config import Config
from fm_jax.errors import UserError
from fm_jax.generation.engine import Engine
from fm_jax.generation.request import Request
from fm_jax.hf import families, parity
from fm_jax.models import zoo
from fm_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Task:
    """Greedy text for a batch of equal prompts' lengths, as both sides write it."""

    batch: int
    prompt_length: int
    num_tokens: int

    def prompts(self, vocab: int) -> np.ndarray:
        """Return ids [B, T], always the same ones."""
        rng = np.random.default_rng(self.batch)
        return rng.integers(0, vocab, (self.batch, self.prompt_length))


def run(
    config: ModelConfig,
    *,
    batches: tuple[int, ...] = (1, 8),
    prompt_length: int = 32,
    num_tokens: int = 224,
    rounds: int = 7,
    int8: bool = False,
    vs: str = "transformers",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return tokens/s of new ids by batch size, ours and transformers', in float32.

    The two write in turns, `rounds` times, from the same weights: those of a Llama of
    the config's sizes where the config's own model is none. Times are whole, of prompt
    and new tokens; `prefill_seconds` is ours until each text has its first token.
    vs: "transformers", or "" for ours alone. Ratios are those of each round's times,
    the median and its quartiles.
    """
    config, name = comparable(config, prompt_length + num_tokens)
    model = zoo.build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    found = {"model": name, "prompt_tokens": prompt_length, "new_tokens": num_tokens}
    theirs = None
    if vs:
        try:
            theirs, found[vs] = load_theirs(config, params), _version()
        except ImportError as error:
            found[vs] = f"no {error.name}: pip install fm_jax[parity]"
    for batch in batches:
        say(f"batch {batch}: {rounds} rounds")
        task = Task(batch, prompt_length, num_tokens)
        sides = {"": ours(model, params, task, int8=False)}
        if int8:
            sides["int8_"] = ours(model, params, task, int8=True)
        found |= race(task, sides, theirs, rounds, config.vocab_size)
    return found


def sized(config: Config) -> ModelConfig:
    """Return a config's model, of the vocabulary that its tokenizer is to have."""
    model = config.model
    size = model.vocab_size or -(-config.data.vocab_size // 64) * 64
    return dataclasses.replace(model, vocab_size=size)


def comparable(config: ModelConfig, length: int) -> tuple[ModelConfig, str]:
    """Return a model that transformers has too, and what to call it."""
    config = dataclasses.replace(config, max_length=max(config.max_length, length))
    sizes = (
        f"{config.num_layers} layers, {config.embed_dim} dims, "
        f"{config.vocab_size} ids, float32"
    )
    config = dataclasses.replace(config, dtype="float32", residual_dtype="float32")
    try:
        return config, f"the config's own ({families.fitting(config).name}): {sizes}"
    except UserError:
        llama = dataclasses.replace(config, expert_capacity=0.0, **llama_of(config))
        return llama, f"a Llama of the config's sizes: {sizes}"


def llama_of(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a Llama of a model's sizes, with about as many weights.

    Its MLP has three matrices; of a model whose MLP has two, it is a third narrower.
    """
    mlp_dim = config.mlp_dim if config.is_gated else -(-2 * config.mlp_dim // 3)
    theirs = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": mlp_dim,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": config.tied_embeddings,
    }
    return families.read(theirs)[1]


def ours(model: Any, params: dict, task: Task, *, int8: bool) -> Callable:
    """Return a function that writes the task's texts: ids, seconds, prefill seconds."""
    capacity = task.prompt_length + task.num_tokens
    engine = Engine(model, params, num_slots=task.batch, capacity=capacity, int8=int8)

    def write(prompts_BT):
        began, prefill = time.perf_counter(), 0.0
        texts = {
            engine.add(Request(tuple(row), task.num_tokens)): []
            for row in prompts_BT.tolist()
        }
        while not engine.is_idle:
            for progress in engine.step():
                texts[progress.id] += progress.ids
            if not prefill and all(texts.values()):
                prefill = time.perf_counter() - began
        return list(texts.values()), time.perf_counter() - began, prefill

    return write


def load_theirs(config: ModelConfig, params: dict) -> Callable:
    """Return a function that writes a task's texts with transformers and its cache."""
    import torch
    import transformers

    torch.set_num_threads(machine.num_cores())
    family = families.fitting(config)
    fields = families.write(family, config, "float32")
    kind = transformers.AutoConfig.for_model(**fields)
    net = transformers.AutoModelForCausalLM.from_config(kind).eval()
    tensors = parity.write(family, config, jax.tree.map(np.asarray, params))
    weights = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    missing = net.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys

    def write(prompts_BT, num_tokens):
        ids = torch.from_numpy(prompts_BT)
        began = time.perf_counter()
        with torch.inference_mode():
            out = net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist(), time.perf_counter() - began

    return write


def race(
    task: Task,
    sides: dict[str, Callable],
    theirs: Callable | None,
    rounds: int,
    vocab: int,
) -> dict[str, Any]:
    """Return what was measured of a task, after a round to compile and warm up."""
    prompts_BT = task.prompts(vocab)
    texts = {name: write(prompts_BT)[0] for name, write in sides.items()}
    if theirs:
        other, _ = theirs(prompts_BT, task.num_tokens)
    times = {name: [] for name in sides}
    prefills, their_times = [], []
    for _ in range(rounds):
        gc.collect()
        for name, write in sides.items():
            _, seconds, prefill = write(prompts_BT)
            times[name].append(seconds)
            if not name:
                prefills.append(prefill)
        if theirs:
            their_times.append(theirs(prompts_BT, task.num_tokens)[1])
    count, after = task.batch * task.num_tokens, f"batch_{task.batch}"
    found = {f"prefill_seconds_{after}": statistics.median(prefills)}
    for name, seconds in times.items():
        found[f"{name}tokens_per_second_{after}"] = count / statistics.median(seconds)
        if theirs:
            pair = ratios.paired(their_times, seconds)
            found[f"{name}ratio_{after}"] = pair["median"]
            found[f"{name}ratio_low_{after}"] = pair["low"]
            found[f"{name}ratio_high_{after}"] = pair["high"]
    if theirs:
        rate = count / statistics.median(their_times)
        found[f"transformers_tokens_per_second_{after}"] = rate
        found[f"same_text_{after}"] = texts[""] == other
    found[f"load_{after}"] = os.getloadavg()[0]
    return found


def _version() -> str:
    import transformers

    return transformers.__version__
