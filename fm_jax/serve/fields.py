"""The fields of a request's JSON object, taken one by one, each of its kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fm_jax import jsonfiles
from fm_jax.serve.refused import Refused, must, shown, unknown_field


def read(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body."""
    try:
        text = body.decode()
        found = jsonfiles.parse(text, is_kept=False, parse_constant=_no_constant)
    except ValueError as error:
        said = str(error).splitlines()[0][:200]
        raise Refused(f"the body must be JSON in UTF-8; got {said}.") from error
    if not isinstance(found, dict):
        raise Refused(f"the body must be a JSON object; got {shown(found)}.")
    return found


class Fields:
    """The fields of a JSON object, taken one by one; `close` refuses what is left."""

    def __init__(self, fields: dict[str, Any]):
        self._left = {name: v for name, v in fields.items() if v is not None}
        self._taken: list[str] = []

    def take(self, name: str, default: Any, kind: type | tuple, demand: str) -> Any:
        """Return a field of a kind, the default where it is not given."""
        self._taken.append(name)
        value = self._left.pop(name, default)
        is_other = isinstance(value, bool) and kind is not bool  # a bool is an int too
        if value is not default and (is_other or not isinstance(value, kind)):
            raise must(name, demand, value)
        return value

    def required(self, name: str) -> Any:
        """Return a field of any kind that must be given."""
        self._taken.append(name)
        if name not in self._left:
            raise Refused(f"{name} must be given; got none.", param=name)
        return self._left.pop(name)

    def flag(self, name: str) -> bool:
        """Return a field that is true or false, false where it is not given."""
        return self.take(name, False, bool, "be true or false")

    def whole(
        self, name: str, default: int | None, low: int, high: int | None
    ) -> int | None:
        """Return a whole number from `low` to `high`."""
        demand = f"be a whole number from {low}"
        demand = f"{demand} to {high}" if high is not None else f"{demand} up"
        value = self.take(name, default, int, demand)
        is_high = high is not None and value is not None and value > high
        if value is not default and (value < low or is_high):
            raise must(name, demand, value)
        return value

    def number(
        self, name: str, default: float, demand: str, good: Callable[[float], bool]
    ) -> float:
        """Return a number that is good."""
        demand = f"be a number {demand}"
        value = self.take(name, default, (int, float), demand)
        if not good(value):
            raise must(name, demand, value)
        return float(value)

    def close(self, refused: Mapping[str, tuple], ignored: Sequence[str] = ()) -> None:
        """Refuse what is left, unless it is ignored or has a value that does nothing.

        `refused` are the fields that would change the text, with those values.
        """
        for name, value in self._left.items():
            if name in ignored:
                continue
            if name not in refused:
                raise unknown_field(name, [*self._taken, *refused, *ignored])
            if value not in refused[name]:
                harmless = " or ".join(shown(v) for v in refused[name])
                raise must(
                    name,
                    f"be left out{f' or {harmless}' if harmless else ''}",
                    value,
                    "It is not served here.",
                )


def _no_constant(name: str):
    raise ValueError(f"{name}, which JSON does not have")
