"""Valid examples made wrong, in bytes and in values, and what may come of them."""

import contextlib
import copy
import json
import os
import signal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fm_jax.errors import UserError

SECONDS = 10  # in which a case must be over
DEEP = json.loads("[" * 300 + "]" * 300)
VALUES = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64 + 1, 10**300, 10**400, 0.5,
    -0.0, 1e308, float("nan"), float("inf"), "", "x", "0", "../../x", "/etc/passwd",
    "a\0b", "a\nb",
    "\ud800", "\u202ex", "é" * 300, "x" * 5000, "(a+)+$", "%s{}", [], [0], [""],
    [[]], [None, {}], {}, {"": 0}, {"a": {"b": []}}, DEEP,
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[]", b"null", b'{"a": NaN}', b"[" * 20_000, b'{"a":' * 20_000,
    b"9" * 5000, b"\xff\xfe", b"\x00" * 40, b'{"a": 1, "a": 2}', b'"\\ud800"',
    b"\xef\xbb\xbf{}", b'{"a": 1e999}', b"\r\n\r\n",
)  # fmt: skip


class Hang(BaseException):
    """A case that takes too long; no parser takes it for an error of its own."""


def cases(number):
    """Return the settings of a test with so many cases, the same ones each time.

    FM_FUZZ=20 in the environment tries 20 times as many, others each time.
    """
    times = int(os.environ.get("FM_FUZZ", "1"))
    return settings(
        max_examples=number * times,
        derandomize=times == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def of_bytes(draw, valid):
    """Draw bytes: any at all, or valid ones cut, flipped, doubled or left out of."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.one_of(st.binary(max_size=80), st.sampled_from(TEXTS)))
    raw = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(raw)))
        stop = start + draw(st.integers(0, 12))
        match draw(st.integers(0, 4)):
            case 0 if start < len(raw):
                raw[start] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del raw[start:]
            case 2:
                del raw[start:stop]
            case 3:
                raw[start:start] = raw[start:stop]
            case _:
                raw[start:stop] = draw(st.binary(max_size=8))
    return bytes(raw)


@st.composite
def of_value(draw, valid):
    """Draw a value of JSON: a valid one with parts replaced, left out or doubled."""
    made = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(made))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.integers(0, 5)):
            case 0 if holder is not made:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw(st.sampled_from(("", "x", "é\n", "a.b", "-", "__")))] = (
                    holder.pop(key)
                )
            case 2 if isinstance(holder, list) and holder is not made:
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return made[0]


def of_json(valid):
    """Return the strategy of what a file of JSON may be instead of a valid value."""
    text = json.dumps(valid).encode()
    changed = of_value(valid).map(lambda value: json.dumps(value).encode())
    return st.one_of(changed, changed, changed, of_bytes(text))


def _places(outer):
    pairs = outer.items() if isinstance(outer, dict) else enumerate(outer)
    for key, inner in list(pairs):
        yield outer, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def refused(function, *args, errors=UserError, **named):
    """Return what a call is refused with, in one line; "" where it is not.

    Any other error comes out, and so does one that takes too long.
    """
    try:
        with _within(SECONDS):
            function(*args, **named)
    except errors as error:
        said = str(error)
        assert said.strip(), "an error must say something"
        assert "\n" not in said, f"an error must be one line; got {said!r}"
        return said
    return ""


class Tally:
    """Counts what was refused and what was taken, so that neither is ever all."""

    def __init__(self):
        self.refused = self.taken = 0

    def add(self, said):
        self.refused += bool(said)
        self.taken += not said


@contextlib.contextmanager
def _within(seconds):
    def stop(number, frame):
        raise Hang(f"a case must be over in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
