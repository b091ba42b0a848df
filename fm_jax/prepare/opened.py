"""The data of a config: its tokenizer, and the rows of both splits."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fm_jax.config import Config
from fm_jax.corpora import sources
from fm_jax.corpora.chains import Chain
from fm_jax.data import build, mixtures, store
from fm_jax.data.batches import TrainBatches
from fm_jax.data.example_rows import ExampleRows
from fm_jax.data.example_store import ExampleStore
from fm_jax.data.mixtures import Mixture
from fm_jax.data.store import TokenStore
from fm_jax.data.windows import Windows
from fm_jax.errors import UserError
from fm_jax.prepare import ready, tuned, vocabulary
from fm_jax.tokenizers.protocol import Tokenizer

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Split:
    """The stores of one split, each as rows; most splits have one.

    Those of documents are token stores, cut into rows.
    """

    names: tuple[str, ...]
    windows: tuple[Windows | ExampleRows, ...]

    def __len__(self) -> int:
        return sum(map(len, self.windows))

    @property
    def stores(self) -> tuple[TokenStore | ExampleStore, ...]:
        """The stores, one a component."""
        return tuple(w.store for w in self.windows)

    @property
    def name(self) -> str:
        """What tells this text, tokenised as it is, from any other."""
        return "+".join(s.header["name"] for s in self.stores)

    @property
    def num_targets(self) -> int:
        """Tokens that a pass over all rows trains on."""
        return sum(w.num_targets for w in self.windows)

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return sum(s.num_bytes for s in self.stores)

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What gzip -9 makes of the text, or of its beginning where it is long."""
        of = sum(s.header["gzip_of"] for s in self.stores)
        return 8 * sum(s.header["gzip_bytes"] for s in self.stores) / of if of else None


@dataclasses.dataclass(frozen=True)
class Data:
    """The tokenizer, the rows of both splits, and what wrote them where known.

    `weights` are those of the components of `train` in tokens, `weights_at` the steps
    at which they change.

    Of examples to tune on: their `kind`; `labels`, which targets are indices of, and
    `label_ids`, the ids of their words where they have any; `num_segments`, the most of
    any row; `begin_ids`, which stand before a prompt that is no chat; `chat_template`,
    the text of the template of chats, "" where there are none; `end_ids`, which end
    what the model says. Several held-out files are components of `eval` by their names,
    the first of which is the one to choose by.
    """

    tokenizer: Tokenizer
    train: Split
    eval: Split
    weights: tuple[float, ...] = (1.0,)
    weights_at: tuple[tuple[int, tuple[float, ...]], ...] = ()
    chain: Chain | None = None
    kind: str = "text"
    labels: tuple[str, ...] = ()
    label_ids: tuple[int, ...] = ()
    num_segments: int = 0
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    chat_template: str = ""

    def mixture(self, batch_size: int) -> Mixture:
        """Return which component each row of training is of."""
        return mixtures.plan(
            self.weights,
            self.weights_at,
            batch_size=batch_size,
            mean_targets=[w.mean_targets for w in self.train.windows],
        )

    def tokens_by_store(self, num_steps: int, batch_size: int) -> np.ndarray:
        """Return the tokens of each store in the first steps, float64 `[K]`.

        As many as its rows have on average: exact at the end of an epoch.
        """
        means = [w.mean_targets for w in self.train.windows]
        return self.mixture(batch_size).taken(num_steps * batch_size) * np.array(means)

    def tokens_seen(self, num_steps: int, batch_size: int) -> dict[str, float]:
        """Return `train/tokens_seen/<name>` where several stores are mixed."""
        if len(self.train.names) == 1:
            return {}
        tokens = self.tokens_by_store(num_steps, batch_size)
        return {
            f"train/tokens_seen/{name}": float(count)
            for name, count in zip(self.train.names, tokens, strict=True)
        }

    def unique_tokens(self, tokens: float, num_steps: int, batch_size: int) -> float:
        """Return how many different tokens were among `tokens`, those of the steps.

        Of several stores those of the steps alone count, not what came before them.
        """
        if len(self.train.names) == 1:
            return min(tokens, self.train.num_targets)
        seen = self.tokens_by_store(num_steps, batch_size)
        sizes = [w.num_targets for w in self.train.windows]
        return float(np.minimum(seen, sizes).sum())

    @functools.cached_property
    def eval_bayes(self) -> np.ndarray | None:
        """Summed nats of each held-out window under what wrote it, float64; or None."""
        if self.chain is None:
            return None
        (windows,) = self.eval.windows
        every = np.arange(len(windows))
        sums = []
        for some in np.array_split(every, -(-every.size * windows.length // 2**20)):
            rows = windows.rows(some)
            names = ("tokens", "targets", "loss_weights")
            sums.append(self.chain.bayes_nll(*(rows[n] for n in names)).sum(1))
        return np.concatenate(sums)


def open_data(config: Config, say: Say, *, may_build: bool = True) -> Data:
    """Return the data of a config, building what the cache does not have.

    Raises UserError on data that cannot be trained on, see corpora and data; also on
    what is not in the cache, unless it may be built.
    """
    if config.data.examples != "text":
        return _examples(config, say, may_build=may_build)
    if config.data.source == "store":
        return _ready(config, say)
    source = source_of(config)
    tokenizer = vocabulary.of(config, source, say, may_build=may_build)
    stores = build_stores(config, source, tokenizer, say, may_build=may_build)
    splits = {name: Split(("all",), (_cut(config, s, tokenizer),))
              for name, s in stores.items()}  # fmt: skip
    chain = source.chain if config.data.source == "synthetic" else None
    return Data(tokenizer, **splits, chain=chain)


def source_of(config: Config) -> sources.Source:
    """Return where the text of a config comes from.

    Raises UserError when nothing is there, the source is ready stores, or its rows are
    examples, which are no text.
    """
    data = config.data
    if data.examples != "text":
        raise UserError(
            f"data.examples must be text for what reads text alone; got {data.examples}"
            ". fm train makes examples itself, and fm data show shows them."
        )
    return sources.make(
        source=data.source,
        paths=data.paths,
        eval_paths=data.eval_paths,
        eval_fraction=data.eval_fraction,
        name=data.name,
        tfds_dir=data.tfds_dir,
        split=data.split,
        eval_split=data.eval_split,
        text_field=data.text_field,
        synthetic=dataclasses.asdict(config.synthetic),
        cache=Path(data.cache_dir).expanduser(),
    )


def build_stores(
    config: Config,
    source: sources.Source,
    tokenizer: Tokenizer,
    say: Say,
    *,
    may_build: bool = True,
    out: Path | None = None,
) -> dict[str, TokenStore]:
    """Return the stores of both splits, from the cache or built; `out` is a folder.

    Held-out text comes first where it lies apart, so that training text can do without
    what stands in it too.
    """
    data = config.data
    found: dict[str, TokenStore] = {}
    for split in ("eval", "train"):
        found[split] = build.find_or_build(
            source,
            split,
            tokenizer,
            cache=Path(data.cache_dir).expanduser(),
            on_bad_text=data.on_bad_text,
            max_document_bytes=data.max_document_bytes,
            deduplicate=data.deduplicate,
            num_workers=data.num_workers,
            without=found.get("eval") if source.is_held_out_apart else None,
            say=say,
            may_build=may_build,
            out=out / split if out else None,
        )
    return found


def train_plan(
    data: Data, config: Config, *, num_steps: int, rows: np.ndarray
) -> TrainBatches:
    """Return the batches of a run, of which `rows` are read here."""
    size = config.train.batch_size
    return TrainBatches(
        data.train.windows, data.mixture(size), size, config.train.seed, num_steps, rows
    )


def _cut(config: Config, found: TokenStore, tokenizer: Tokenizer) -> Windows:
    """Return a store's rows; raises UserError where a shard was damaged."""
    found.require_unchanged()
    return Windows(
        found,
        tokenizer,
        config.data.max_length,
        config.data.mask_documents,
        config.data.packing,
        Path(config.data.cache_dir).expanduser() / "plans",
    )


def _examples(config: Config, say: Say, *, may_build: bool) -> Data:
    """Return the data of examples to tune on."""
    found = tuned.open_examples(config, say, may_build=may_build)
    rows = (found.train, *found.eval.values())
    return Data(
        found.tokenizer,
        Split(("all",), (found.train,)),
        Split(tuple(found.eval), tuple(found.eval.values())),
        kind=config.data.examples,
        labels=found.labels,
        label_ids=found.label_ids,
        num_segments=max(r.num_segments for r in rows),
        begin_ids=found.begin_ids,
        end_ids=found.end_ids,
        chat_template=found.chat_template,
    )


def _ready(config: Config, say: Say) -> Data:
    """Return the data of token stores that are there already."""
    tokenizer, folders = ready.find(config.data.paths, config.data.eval_paths)
    splits = {}
    for name in sources.SPLITS:
        names, paths = zip(*folders[name], strict=True)
        stores = (store.open_store(path, tokenizer) for path in paths)
        splits[name] = Split(names, tuple(_cut(config, s, tokenizer) for s in stores))
    if shared := ready.shared_documents(splits["train"].stores, splits["eval"].stores):
        say(f"WARNING: {shared:,} documents are held out and trained on too")
    sizes = tuple(float(w.num_targets) for w in splits["train"].windows)
    return Data(
        tokenizer,
        **splits,
        weights=config.data.weights or sizes,
        weights_at=config.data.weights_at,
    )


def repeats(data: Data, num_steps: int, batch_size: int) -> Iterator[str]:
    """Yield a line for each component: its share, and its epochs in so many steps."""
    seen = data.tokens_by_store(num_steps, batch_size)
    for name, windows, tokens in zip(
        data.train.names, data.train.windows, seen, strict=True
    ):
        epochs = tokens / windows.num_targets
        share = tokens / max(seen.sum(), 1)
        line = (
            f"mixture {name}: {share:.1%} of tokens, {epochs:.2f} epochs of "
            f"{windows.num_targets:,}"
        )
        yield f"WARNING: {line}; it repeats" if epochs > 1 else line
