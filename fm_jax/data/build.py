"""Token stores found or built: in parallel, and on from where the last try stopped."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from fm_jax import caches
from fm_jax.corpora.documents import Reading, Source
from fm_jax.data import headers, joined, lanes, store
from fm_jax.data.crew import Crew
from fm_jax.data.hands import Work
from fm_jax.data.lanes import Lane, Sizes
from fm_jax.data.site import Site
from fm_jax.data.store import TokenStore
from fm_jax.errors import UserError
from fm_jax.tokenizers.protocol import Tokenizer

MOST_FILES = 100  # that a header lists by name


def find_or_build(
    source: Source,
    split: str,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    on_bad_text: str,
    max_document_bytes: int,
    deduplicate: bool,
    num_workers: int = 0,
    without: TokenStore | None = None,
    say: Callable[[str], None],
    may_build: bool = True,
    out: Path | None = None,
    sizes: Sizes | None = None,
) -> TokenStore:
    """Return the store of a split's documents, from the cache or built into it.

    num_workers: processes that build it, 0 for one a core. without: a store whose
    documents are left out. out: the store's folder, where it is not to be the cache's.

    A store's name is a digest of the source's identity, the tokenizer, the options and
    the format, so a changed input is another store. Its bytes do not depend on the
    number of processes or on how often the build was stopped: finished shards are kept,
    and the next try goes on from them.

    Raises UserError on bad text or none, a full disk, another thing at `out`, and what
    is not there unless it may be built; RuntimeError where a process died.
    """
    told = {
        "format": headers.FORMAT,
        "split": split,
        "source": source.identity(split),
        "share": list(source.share(split)),
        "tokenizer": tokenizer.fingerprint,
        "options": {
            "on_bad_text": on_bad_text,
            "max_document_bytes": max_document_bytes,
            "deduplicate": deduplicate,
        },
        "without": without.header["name"] if without else "",
    }
    name = _digest(told)
    path = Path(out) if out else cache / "stores" / name
    if not _is_there(path, name, is_out=bool(out)):
        caches.require(may_build, path)
        try:
            with caches.made_by_one(path, is_cache=not out):
                if not _is_there(path, name, is_out=bool(out)):
                    making = _Making(source, tokenizer, told, without, sizes or Sizes())
                    making.make(Site(path, name), num_workers, say)
        except OSError as error:
            thing, way_out = "data.cache_dir", "set --config.data.cache_dir"
            if out:
                thing, way_out = "the folder of a token store", "name another one"
            raise UserError(
                f"{thing} must be writable and have room; got {path} "
                f"({error.strerror or error}). Free space or {way_out}."
            ) from error
    return store.open_store(path, tokenizer)


@dataclasses.dataclass(frozen=True)
class _Making:
    """What a store is made of; `told` is what its name is a digest of."""

    source: Source
    tokenizer: Tokenizer
    told: dict
    without: TokenStore | None
    sizes: Sizes

    def make(self, site: Site, num_workers: int, say: Callable[[str], None]) -> None:
        """Make the store and put it in its place; shards outlive a failure."""
        planned = lanes.plan(self.source.pieces(self.told["split"]), self.sizes)
        is_begun = site.open(self._plan(planned))
        doing = "Going on with" if is_begun else "Building"
        say(f"{doing} a token store in {site.place}")
        try:
            if not site.is_whole:
                header = self._write(site, planned, num_workers, say)
                site.finish(headers.seal(header))
                say(
                    f"  {header['num_documents']:,} documents, "
                    f"{header['num_bytes']:,} bytes, {header['num_tokens']:,} tokens"
                )
        finally:
            site.leave()
        site.put()

    def _write(self, site: Site, planned: list[Lane], num_workers: int, say) -> dict:
        """Write all that a store is but the header, which is returned."""
        tokenizer_file = site.folder / "tokenizer.json"
        caches.write_whole(tokenizer_file, self.tokenizer.to_json())
        split, options = self.told["split"], self.told["options"]
        crew = Crew(
            work=Work(
                folder=str(site.parts),
                source=self.source.spec(split),
                share=self.told["share"],
                without=str(self.without.path) if self.without else "",
                sizes=self.sizes,
                **options,
            ),
            lanes=planned,
            tokenizer=self.tokenizer,
            tokenizer_file=tokenizer_file,
            num_workers=num_workers,
            room=joined.GZIP_BYTES if split == "eval" else 0,
            say=say,
        )
        if options["deduplicate"]:
            crew.find_duplicates()
        by_lane = crew.tokenize()
        every = [record for records in by_lane for record in records]
        with_documents = [record for record in every if record["documents"]]
        if not with_documents:
            site.clear()
            what = "hold out" if split == "eval" else "train on"
            raise UserError(
                f"the corpus must have text to {what}; got no document of that split. "
                "A plain file is one document: name held-out files in data.eval_paths, "
                "or change data.eval_fraction."
            )
        made = joined.join(
            site.folder,
            site.parts,
            with_documents,
            tokenizer=self.tokenizer,
            files=lanes.files(planned),
        )
        met = Reading(
            on_bad_text=options["on_bad_text"],
            max_document_bytes=options["max_document_bytes"],
        )
        for records in by_lane:
            met.add(records[-1]["next"]["met"])
        return {
            "format": headers.FORMAT,
            "name": _digest(self.told),
            "split": split,
            **made,
            "options": options,
            "met": met.to_json(),
            "duplicates": sum(record["duplicates"] for record in every),
            "held_out_elsewhere": sum(r["held_out_elsewhere"] for r in every),
            "source": _shown(self.told["source"]),
        }

    def _plan(self, planned: list[Lane]) -> str:
        """Return a digest of how the work is cut, by which shards are made."""
        cut = [
            [[piece.name, piece.start, piece.stop] for piece in lane.pieces]
            for lane in planned
        ]
        sizes = dataclasses.asdict(self.sizes)
        return _digest({"told": self.told, "lanes": cut, "sizes": sizes})


def _is_there(path: Path, name: str, *, is_out: bool) -> bool:
    """Return whether the store is at `path`; raise UserError where another thing is."""
    demand = "the folder of a token store must be new or empty"
    if not (path / "header.json").exists():
        if is_out and path.exists() and (path.is_file() or any(path.iterdir())):
            raise UserError(f"{demand}; got {path} with other files. Name another one.")
        return False
    found = store.open_store(path).header["name"] if is_out else name
    if found != name:
        raise UserError(
            f"{demand}, or have that store; got {path} with the store {found}, where "
            f"{name} was to be. Delete it or name another one."
        )
    return True


def _shown(identity: dict) -> dict:
    """Return a source's identity as headers have it: long lists by count and digest."""
    return {
        key: {"count": len(value), "digest": _digest(value)}
        if isinstance(value, dict | list) and len(value) > MOST_FILES
        else value
        for key, value in identity.items()
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
