"""Laws: loss as a function of parameters and tokens, in the units people publish."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from fm_jax import errors
from fm_jax.errors import UserError
from fm_jax.scaling import lawfile, starts

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Law:
    """A formula with named parameters, some of which may be held at a number.

    `theta` is always `[..., P]` in the order of `names`, the parameters not held.
    """

    name: str
    parameters: tuple[str, ...]
    formula: Callable  # (a value for each parameter, *columns) -> loss; broadcasts
    begin: Callable  # (law, columns, loss) -> starts [S] by parameter
    columns: tuple[str, ...] = ("params", "tokens")
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Which parameters are E, A, B, alpha, beta, where the law has that form.
    places: tuple[str, ...] | None = None
    growth: Callable | None = None  # values of all parameters -> the exponents a, b
    held: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are fitted, in the order of theta."""
        return tuple(name for name in self.parameters if name not in self.held)

    def loss(self, theta: np.ndarray, columns: Columns) -> np.ndarray:
        """Return the losses `[..., n]`, in nats a token, of n points under theta."""
        values = [value[..., None] for value in self.values(theta).values()]
        return self.formula(values, *(columns[name] for name in self.columns))

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Return all parameters by name, each `[...]`, those that are held too."""
        theta = np.asarray(theta)
        if theta.shape[-1] != len(self.names):
            raise ValueError(
                f"theta of {self.name} must end in {len(self.names)} values "
                f"({', '.join(self.names)}); got shape {theta.shape}"
            )
        found = {n: np.full(theta.shape[:-1], value) for n, value in self.held.items()}
        found |= {name: theta[..., i] for i, name in enumerate(self.names)}
        return {name: found[name] for name in self.parameters}

    def power(self, theta: np.ndarray) -> tuple[np.ndarray, ...] | None:
        """Return E, A, B, alpha, beta `[...]`, None where the law has another form."""
        if self.places is None:
            return None
        values = self.values(theta)
        return tuple(values[name] for name in self.places)

    def exponents(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a, b of N* ~ C^a and D* ~ C^b, None where they have no closed form."""
        if self.places is not None:
            *_, alpha, beta = self.power(theta)
            return beta / (alpha + beta), alpha / (alpha + beta)
        return None if self.growth is None else self.growth(self.values(theta))

    def scale(self, name: str) -> str:
        """Return how a parameter is fitted, one of lawfile.SCALES."""
        return self.scales.get(name, "log")

    def starts(self, columns: Columns, loss: np.ndarray) -> np.ndarray:
        """Return values `[S, P]` of theta that a fit to n points may begin from."""
        found = self.begin(self, columns, loss)
        return np.stack([found[name] for name in self.names], axis=1)


def fixed(law: Law, **held: float) -> Law:
    """Return the law with parameters held at numbers: `fixed(kaplan, E=0)`.

    Raises UserError for an unknown parameter, for a number that it cannot be, and where
    none is left to fit.
    """
    for name, value in held.items():
        if name not in law.parameters:
            raise errors.unknown(f"held parameter of {law.name}", name, law.parameters)
        demand, least, most = {
            "log": ("more than 0", np.nextafter(0, 1), np.inf),
            "linear": ("0 or more", 0.0, np.inf),
            "signed": ("a number between -20 and 20", -20.0, 20.0),
        }[law.scale(name)]
        if not np.isfinite(value) or not least <= value <= most:
            raise UserError(
                f"{name} of {law.name} must be held at {demand}; got {value}. "
                "Hold it at another number, or fit it."
            )
    held = {name: float(value) for name, value in (dict(law.held) | held).items()}
    if len(held) == len(law.parameters):
        raise UserError(
            f"a law must have a parameter to fit; got {law.name} with all of "
            f"{', '.join(held)} held. Hold fewer."
        )
    inside = ",".join(f"{name}={value!r}" for name, value in sorted(held.items()))
    base = law.name[: law.name.rindex("(")] if law.held else law.name
    name = f"{base}({inside})" if held else base
    return dataclasses.replace(law, name=name, held=held)


def find(name: str) -> Law:
    """Return the law of a name or of a Python file, with some parameters held or none.

    `chinchilla`, `kaplan(E=0)`, `my_law.py`, `my_law.py(gamma=1,delta=2)`; the name of
    every law finds it again. lawfile.py says what a file defines. Raises UserError for
    an unknown name and for whatever is wrong with a file.
    """
    base, inside = re.fullmatch(r"(.*?)(?:\(([^()]*)\))?", name, re.DOTALL).groups()
    held = {}
    for part in filter(None, (inside or "").split(",")):
        key, _, value = part.partition("=")
        try:
            held[key.strip()] = float(value)
        except ValueError as error:
            raise UserError(
                f"a held parameter must be NAME=NUMBER; got {part!r} in {name!r}. "
                "Write, for example, kaplan(E=0)."
            ) from error
    if base.endswith(".py"):
        law = _of(lawfile.read(pathlib.Path(base)))
    elif base in LAWS:
        law = LAWS[base]
    else:
        listed = errors.unknown("law", base, LAWS)
        raise UserError(f"{listed}, or the path of a file that ends in .py")
    return fixed(law, **held) if held else law


def _of(file: lawfile.LawFile) -> Law:
    """Return the law that a user's file defines."""

    def begin(law, columns, loss):
        if file.start is None:
            return starts.random({name: law.scale(name) for name in file.names}, loss)
        return dict(zip(file.names, file.start.T, strict=True))

    return Law(str(file.path), file.names, file.loss, begin, file.columns, file.scales)


def _chinchilla(theta, params, tokens):
    E, A, B, alpha, beta = theta
    return E + A / params**alpha + B / tokens**beta


def _tied(theta, params, tokens):
    E, A, B, alpha = theta
    return E + A / params**alpha + B / tokens**alpha


def _kaplan(theta, params, tokens):
    E, N_c, D_c, alpha_N, alpha_D = theta
    inner = (N_c / params) ** (alpha_N / alpha_D) + D_c / tokens
    return E + inner**alpha_D


def _data_constrained(theta, params, tokens, unique_tokens):
    E, A, B, alpha, beta, R_D, R_N = theta
    unique = np.minimum(unique_tokens, tokens)
    # The parameters that suit the unique tokens: those beyond them count less.
    balance = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    useful = np.minimum(params, (unique * balance) ** (beta / alpha) * balance)
    tokens = unique * (1 - R_D * np.expm1(-(tokens / unique - 1) / R_D))
    params = useful * (1 - R_N * np.expm1(-(params / useful - 1) / R_N))
    return E + A / params**alpha + B / tokens**beta


def _begin_power(law, columns, loss):
    return starts.power(law.places, law.held, columns, loss)


def _begin_kaplan(law, columns, loss):
    floors = np.atleast_1d(law.held.get("E", starts.FLOORS * loss.min()))
    return starts.kaplan(columns, loss, floors)


def _begin_data_constrained(law, columns, loss):
    return starts.data_constrained(law.held, columns, loss)


def _kaplan_growth(values):
    both = values["alpha_N"] + values["alpha_D"]
    return values["alpha_D"] / both, values["alpha_N"] / both


_SIGNED = {"E": "linear", "alpha": "signed", "beta": "signed"}

LAWS = {
    law.name: law
    for law in (
        # arXiv:2203.15556: L = E + A/N^alpha + B/D^beta.
        Law("chinchilla", ("E", "A", "B", "alpha", "beta"), _chinchilla, _begin_power,
            scales=_SIGNED, places=("E", "A", "B", "alpha", "beta")),
        # arXiv:2403.08540: L = E + (a M^eta + b M^-eta) C^-eta with M = D/N, C = 6 N D,
        # which is the law above with alpha = beta = 2 eta, A = a/6^eta, B = b/6^eta;
        # it is fitted and shown in these, so that its columns mean the same.
        Law("tied", ("E", "A", "B", "alpha"), _tied, _begin_power,
            scales=_SIGNED, places=("E", "A", "B", "alpha", "alpha")),
        # arXiv:2001.08361, equation 1.5, which has no E: fixed(kaplan, E=0). With E it
        # is one law, and whether E is nil becomes a question for the data.
        Law("kaplan", ("E", "N_c", "D_c", "alpha_N", "alpha_D"), _kaplan, _begin_kaplan,
            scales={"E": "linear"}, growth=_kaplan_growth),
        # arXiv:2305.16264, equation 6: what is repeated is worth ever less.
        Law("data_constrained", ("E", "A", "B", "alpha", "beta", "R_D", "R_N"),
            _data_constrained, _begin_data_constrained,
            columns=("params", "tokens", "unique_tokens"), scales={"E": "linear"}),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """A law's parameters as a paper gives them."""

    law: str
    values: Mapping[str, float]
    source: str

    @property
    def theta(self) -> np.ndarray:
        """The values `[P]` in the order of the law's names."""
        return np.array([self.values[name] for name in LAWS[self.law].names])


PUBLISHED = {
    # To the digits of the paper's TeX source; rounded as printed (406.4, 410.7, 1.69,
    # 0.34, 0.28) they move the optimum by half.
    "hoffmann": Published(
        "chinchilla",
        {"E": np.exp(0.5267228), "A": np.exp(6.0073404), "B": np.exp(6.0179186),
         "alpha": 0.33917084, "beta": 0.2849083},
        "arXiv:2203.15556, approach 3",
    ),
    "epoch": Published(
        "chinchilla",
        {"E": 1.81686, "A": 482.01, "B": 2085.43, "alpha": 0.34781, "beta": 0.36585},
        "arXiv:2404.10102, a refit to points read off a figure of arXiv:2203.15556",
    ),
    "kaplan": Published(
        "kaplan",
        {"E": 0.0, "N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
        "arXiv:2001.08361, table 2; N without embeddings",
    ),
    "muennighoff": Published(
        "data_constrained",
        {"E": np.exp(0.6254804), "A": np.exp(6.255414), "B": np.exp(7.3049974),
         "alpha": 0.3526596, "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743},
        "arXiv:2305.16264",
    ),
}  # fmt: skip
