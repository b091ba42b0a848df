"""Commands about text and tokens: what a run is fed, made and looked at beforehand."""

from fm_jax.commands.command import Command


def build(flags, raw, argv) -> None:
    """Prepare the tokenizer and the token stores of a config."""
    from fm_jax import config as configs
    from fm_jax.prepare import command

    command.build(configs.check(raw), flags)


def show(flags, raw, argv) -> None:
    """Print what one training step trains on."""
    from fm_jax import config as configs
    from fm_jax.prepare import command

    command.show(configs.check(raw), flags)


def verify(flags, raw, argv) -> int:
    """Check token stores against their checksums."""
    from fm_jax.prepare import command

    return command.verify(flags)


def overlap(flags, raw, argv) -> None:
    """Count the n-grams that two token stores share."""
    from fm_jax.prepare import command

    command.overlap(flags)


def tokenizer(flags, raw, argv) -> None:
    """Train a tokenizer on the train text of a config."""
    from fm_jax import config as configs
    from fm_jax.prepare import command

    command.tokenizer(configs.check(raw), flags)


def pack(flags, raw, argv) -> None:
    """Make the text of a config a TFDS dataset of ArrayRecord files."""
    from fm_jax import config as configs
    from fm_jax.prepare import command

    command.pack(configs.check(raw), flags)


def toy(flags, raw, argv) -> None:
    """Write small data that the project makes itself."""
    from fm_jax.prepare import command

    command.toy(flags)


COMMANDS = {
    "data build": Command(
        build,
        "tokenise the text of a config into token stores",
        "fm data build --config=configs/data/text.py --out=stores/mine",
        {
            "out": ("", "a folder for the stores train and eval; default: the cache"),
            "json": (False, "print what was built as JSON"),
        },
        takes_config=True,
    ),
    "data show": Command(
        show,
        "print just what a training step trains on, and where it came from",
        "fm data show --config=configs/quickstart.py --step=10 --rows=0:2",
        {
            "step": (0, "which step, from 0"),
            "rows": ("", "of its batch, as 3 or 0:2; default: all"),
            "colour": ("auto", "auto (on a terminal) | always | never"),
        },
        takes_config=True,
    ),
    "data verify": Command(
        verify,
        "check token stores against their checksums, byte by byte",
        "fm data verify stores/mine",
        {},
        positional="STORE...   stores, or folders with the stores train and eval",
    ),
    "data overlap": Command(
        overlap,
        "count the n-grams of held-out text that stand in training text too",
        "fm data overlap stores/mine --n=13",
        {
            "n": (13, "ids in an n-gram"),
            "json": (False, "print JSON"),
        },
        positional="TRAIN_STORE HELD_OUT_STORE   or the folder of both",
    ),
    "data tokenizer": Command(
        tokenizer,
        "train a tokenizer on the train text of a config",
        "fm data tokenizer --config=configs/data/text.py --kind=unigram "
        "--out=tokenizer.json",
        {
            "out": (None, "the tokenizer.json to write"),
            "kind": ("bpe", "bpe (of bytes) or unigram"),
            "vocab_size": (0, "ids; default: data.vocab_size"),
            "special_token": ((), "a token that no text encodes to; may be repeated"),
            "digits": ("triples", "digits in a token: triples, single or keep"),
            "whitespace": ("runs", "runs of spaces: runs (a token) or single"),
        },
        takes_config=True,
    ),
    "data pack": Command(
        pack,
        "make the text of a config a TFDS dataset, read without TensorFlow",
        "fm data pack --config=configs/data/text.py --out=datasets --name=my_text",
        {
            "out": (None, "the data_dir of TFDS to put it in"),
            "name": (None, "of the dataset, as my_text"),
        },
        takes_config=True,
    ),
    "data toy": Command(
        toy,
        "write small data made by rules: the same files on every machine",
        "fm data toy --kind=chat --out=toys/chat",
        {
            "kind": (None, "chat | completion | preference | styles | text"),
            "out": (None, "a folder for its .jsonl files"),
            "seed": (0, "another gives other data; of styles, another world"),
            "size": (0, "training examples; 0: as many as the kind has by itself"),
            "draw": (0, "of styles: another gives other documents of that world"),
            "spurious": (
                -1.0,
                "of styles: how often a mark tells the label in training",
            ),
        },
    ),
}
