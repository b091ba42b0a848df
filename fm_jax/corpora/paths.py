"""What a path tells of a file: where it lies, what it holds, what packs it."""

from pathlib import PurePosixPath

PROSE = ".txt .text .md .markdown .rst .adoc .org .tex .bib .html .htm .xhtml .csv .tsv"
CODE = (
    ".py .pyi .pyx .js .mjs .cjs .jsx .ts .tsx .vue .svelte .css .scss .less .c .h .cc "
    ".cpp .cxx .hh .hpp .hxx .cu .cuh .java .kt .kts .scala .groovy .go .rs .swift .m "
    ".mm .cs .fs .vb .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .el "
    ".lisp .scm .rkt .sh .bash .zsh .fish .ps1 .bat .sql .proto .graphql .toml .yaml "
    ".yml .ini .cfg .cmake .mk .gradle .tf .nix .dart .zig .nim .v .sv .vhd .vhdl .f "
    ".f90 .f95 .for .pas .asm .s .tcl .vim .lean .thy .agda"
)
TEXT = frozenset([*PROSE.split(), *CODE.split()])  # a document each
LINES = frozenset([".jsonl", ".ndjson"])  # a document a line
COLUMNS = frozenset([".parquet"])  # a document a row
RECORDS = frozenset([".array_record", ".arrayrecord"])  # a document a record
KNOWN = (
    "text (.txt, .md, .py and the like), .jsonl, each also .gz or .zst, .parquet or "
    ".array_record"
)
PACKINGS = (".gz", ".zst")


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def is_known(path: str) -> bool:
    """Return whether a file's suffix is known."""
    return suffix_of(path) in TEXT | LINES | COLUMNS | RECORDS


def shown(path: str) -> str:
    """Return a path as one line that any file can hold; what is odd is escaped."""
    if path.isprintable():
        return path
    odd = {c: c.encode("unicode_escape").decode() for c in path if not c.isprintable()}
    return path.translate(str.maketrans(odd))


def suffix_of(path: str) -> str:
    """Return the suffix that says what a file holds, in small letters.

    That of a packing is left off where what holds text may be packed.
    """
    suffixes = _suffixes(path)
    if packing_of(path) and {*suffixes[-2:-1]} & (TEXT | LINES):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def packing_of(path: str) -> str:
    """Return the suffix of what packs a file, or ""."""
    last = _suffixes(path)[-1:]
    return last[0] if last and last[0] in PACKINGS else ""


def _suffixes(path: str) -> list[str]:
    if is_remote(path) and path.startswith("http"):
        path, *_ = path.split("?")
    return PurePosixPath(path.lower()).suffixes
