"""Keys of a config that do not go together, refused with the way out.

Imports no jax.
"""

from fm_jax import demands
from fm_jax.corpora import chains
from fm_jax.errors import UserError
from fm_jax.sections import Config
from fm_jax.tokenizers import plain


def check(config: Config) -> None:
    """Refuse values that are wrong beside each other."""
    _divides(config, "train.batch_size", "train.accumulation")
    if config.train.loss_chunk:
        _divides(config, "data.max_length", "train.loss_chunk")
    if config.model.positions == "learned":
        length = config.data.max_length
        demands.must(
            config,
            "model.max_length",
            config.model.max_length >= length,
            f">= data.max_length={length} for learned positions",
        )
    _check_data(config)
    _check_examples(config)
    _check_finetune(config)
    _check_synthetic(config)
    warmup, decay = config.schedule.warmup_fraction, config.schedule.decay_fraction
    if config.schedule.name == "wsd" and warmup + decay > 1:
        raise UserError(
            "schedule.warmup_fraction + schedule.decay_fraction must be at most 1 "
            f"under wsd; got {warmup} + {decay}."
        )
    optimizer = config.optimizer
    if optimizer.nu_dtype == "bfloat16" and optimizer.beta2 > 1 - 2**-6:
        raise UserError(
            "optimizer.nu_dtype must be float32 when optimizer.beta2 is above "
            f"{1 - 2**-6}; got bfloat16 and {optimizer.beta2}. Smaller changes of a "
            "second moment would be rounded away."
        )
    every = config.eval.every
    if config.checkpoint.keep_best and (not every or config.checkpoint.every % every):
        raise UserError(
            "checkpoint.every must be a multiple of eval.every when "
            "checkpoint.keep_best is set; got "
            f"{config.checkpoint.every} and {every}."
        )


def _check_data(config: Config) -> None:
    """Refuse keys of the data section that do not go together."""
    data = config.data
    is_store = data.source == "store"
    is_file = data.tokenizer not in ("bytes", "bpe", "store", "symbols")
    if data.end_token:
        wanted = "a tokenizer's file when data.end_token is set"
        demands.must(config, "data.tokenizer", is_file, wanted)
    own = data.tokenizer == "store"
    wanted = "store when data.source is store, which has its own"
    demands.must(config, "data.tokenizer", own or not is_store, wanted)
    wanted = "bytes, bpe or a tokenizer's file unless data.source is store"
    demands.must(config, "data.tokenizer", is_store or not own, wanted)
    if data.packing != "split":
        wanted = f"True when data.packing is {data.packing}"
        demands.must(config, "data.mask_documents", data.mask_documents, wanted)
    for key in ("weights", "weights_at"):
        wanted = "() unless data.source is store: it is stores that are mixed"
        demands.must(config, f"data.{key}", is_store or not getattr(data, key), wanted)
    for weights in (data.weights, *(weights for _, weights in data.weights_at)):
        if weights and len(weights) != len(data.paths):
            raise UserError(
                "config.data.weights and weights_at must have a weight for each of "
                f"data.paths; got {weights} for {len(data.paths)} paths."
            )


def _check_examples(config: Config) -> None:
    """Refuse what does not go with examples, or only with them."""
    data = config.data
    is_class = data.examples == "classify"
    wanted = "() unless data.examples is classify"
    demands.must(config, "data.label_words", is_class or not data.label_words, wanted)
    wanted = "with {text} in it, where the text stands"
    demands.must(config, "data.prompt", "{text}" in data.prompt, wanted)
    if data.examples == "text":
        demands.must(
            config, "data.fields", not data.fields, "() when data.examples is text"
        )
        return
    wanted = f"text, tfds or hf when data.examples is {data.examples}"
    demands.must(config, "data.source", data.source in ("text", "tfds", "hf"), wanted)
    wanted = f"best_fit or single when data.examples is {data.examples}: no cut"
    demands.must(config, "data.packing", data.packing != "split", wanted)


def _check_finetune(config: Config) -> None:
    """Refuse ways to fine-tune that lack what they are of."""
    method, data = config.finetune.method, config.data
    has_head = data.examples == "classify" and not data.label_words
    if method in ("probe", "lp_ft") and not has_head:
        raise UserError(
            f"config.data.examples must be classify, without label_words, when "
            f"finetune.method is {method}: a probe is of a head; got "
            f"{data.examples!r}. Choose another method."
        )
    last = config.finetune.last_layers
    wanted = f"at most model.num_layers={config.model.num_layers}"
    demands.must(
        config, "finetune.last_layers", last <= config.model.num_layers, wanted
    )
    needs = {
        "init.model is True": config.init.model,
        f"finetune.method is {method}": method != "full",
        f"finetune.last_layers is {last}": last > 0,
        "finetune.rules freeze": any(not rate for _, rate in config.finetune.rules),
        "data.examples is preference": data.examples == "preference"
        and config.finetune.preference != "orpo",
    }
    asking = [name for name, asks in needs.items() if asks]
    if asking and not config.init.from_:
        raise UserError(
            f"config.init.from must be given when {asking[0]}; got ''. Name a run or a "
            "Hugging Face folder to begin with: --config.init.from=RUN."
        )
    if any(rate < 0 for _, rate in config.finetune.rules):
        wanted = "of rates that are at least 0"
        demands.must(config, "finetune.rules", False, wanted)
    if config.init.optimizer and (method != "full" or last or config.finetune.rules):
        wanted = "False when only a part of the model trains"
        demands.must(config, "init.optimizer", False, wanted)


def _check_synthetic(config: Config) -> None:
    """Refuse what does not go with a source of symbols, or symbols with another."""
    is_symbols = config.data.tokenizer == "symbols"
    if config.data.source != "synthetic":
        wanted = "bytes, bpe or a tokenizer's file unless data.source is synthetic"
        demands.must(config, "data.tokenizer", not is_symbols, wanted)
        return
    demands.must(
        config, "data.tokenizer", is_symbols, "symbols when data.source is synthetic"
    )
    synthetic = config.synthetic
    entries = chains.num_entries(
        synthetic.kind,
        synthetic.num_symbols,
        synthetic.num_states,
        synthetic.num_components,
    )
    if entries > chains.MAX_ENTRIES:
        raise UserError(
            "the tables of the synthetic section must have at most "
            f"{chains.MAX_ENTRIES:,} probabilities; got {entries:,}. Lower "
            "synthetic.num_symbols, num_states or num_components."
        )
    # Letting the prompt's other characters go would show a sample of another prompt.
    tokenizer = plain.SymbolTokenizer(synthetic.num_symbols)
    stranger = tokenizer.stranger(config.sample.prompt)
    if config.sample.num_tokens and stranger:
        raise UserError(
            f"sample.prompt must be of {tokenizer.shown}, which the synthetic source "
            f"writes; got {config.sample.prompt!r} with {stranger!r}. Set "
            "--config.sample.prompt='' or --config.sample.num_tokens=0."
        )


def _divides(config: Config, whole: str, part: str) -> None:
    sizes = demands.value(config, whole), demands.value(config, part)
    if sizes[0] % sizes[1]:
        raise UserError(
            f"{whole} must divide by {part}; got {sizes[0]} and {sizes[1]}."
        )
