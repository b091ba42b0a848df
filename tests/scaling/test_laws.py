"""Tests of the laws against published values, identities and what people mistype."""

import dataclasses

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import laws

POINTS = {
    "params": np.array([1.1e8, 7e8, 2.3e9]),
    "tokens": np.array([3e10, 8e9, 2e11]),
    "unique_tokens": np.array([3e10, 9e9, 1e10]),
}


def test_the_data_constrained_law_gives_its_repositorys_numbers():
    law, found = laws.LAWS["data_constrained"], laws.PUBLISHED["muennighoff"]
    points = {
        "params": np.array([6.34e9, 8.67e9]),
        "tokens": np.array([242e9, 178e9]),
        "unique_tokens": np.array([25e9, 25e9]),
    }
    expected = [2.2256440889984477, 2.2269634075087867]
    np.testing.assert_allclose(law.loss(found.theta, points), expected, rtol=1e-12)


def test_data_without_repetition_obey_the_plain_law():
    found = laws.PUBLISHED["muennighoff"]
    plain = laws.LAWS["chinchilla"]
    theta = np.array([found.values[name] for name in plain.names])
    points = {
        "params": np.array([1e7, 1e8]),
        "tokens": np.array([1e11, 1e12]),
        "unique_tokens": np.array([1e11, 9e12]),
    }
    law = laws.LAWS["data_constrained"]
    np.testing.assert_allclose(
        law.loss(found.theta, points), plain.loss(theta, points), rtol=1e-13
    )


def test_rounding_hoffmanns_values_moves_the_optimum_as_is_known():
    # Tokens a parameter at the compute of Chinchilla: 58.9, and 92.6 once rounded.
    for values, expected in (
        (laws.PUBLISHED["hoffmann"].values, 58.9),
        ({"A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}, 92.6),
    ):
        A, B, alpha, beta = (values[name] for name in ("A", "B", "alpha", "beta"))
        balance = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        params = balance * (5.76e23 / 6) ** (beta / (alpha + beta))
        assert 5.76e23 / (6 * params**2) == pytest.approx(expected, abs=0.05)


def test_the_tied_law_is_gadres():
    E, a, b, eta = 1.8, 200.0, 240.0, 0.17
    params, tokens = POINTS["params"], POINTS["tokens"]
    over, flops = tokens / params, 6 * params * tokens
    gadre = E + (a * over**eta + b * over**-eta) * flops**-eta
    theta = np.array([E, a / 6**eta, b / 6**eta, 2 * eta])
    np.testing.assert_allclose(laws.LAWS["tied"].loss(theta, POINTS), gadre, rtol=1e-13)


def test_kaplans_law_is_its_own_one_dimensional_laws_at_the_ends():
    law, found = laws.fixed(laws.LAWS["kaplan"], E=0), laws.PUBLISHED["kaplan"]
    theta = np.array([found.values[name] for name in law.names])
    ends = {"params": np.array([1e9, 1e60]), "tokens": np.array([1e60, 1e10])}
    expected = [(6.4e13 / 1e9) ** 0.076, (1.8e13 / 1e10) ** 0.103]
    np.testing.assert_allclose(law.loss(theta, ends), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["chinchilla", "tied", "kaplan"])
def test_exponents_are_those_of_the_best_loss_at_each_compute(name):
    law = laws.LAWS[name]
    theta = {
        "chinchilla": laws.PUBLISHED["hoffmann"].theta,
        "tied": np.array([1.7, 300.0, 900.0, 0.33]),
        "kaplan": laws.PUBLISHED["kaplan"].theta,
    }[name]
    grid, best = np.geomspace(1e5, 1e13, 200_001), []
    for flops in (1e19, 1e22):
        loss = law.loss(theta, {"params": grid, "tokens": flops / 6 / grid})
        best.append(np.log(grid[np.argmin(loss)]))
    a, b = law.exponents(theta)
    assert (best[1] - best[0]) / np.log(1e3) == pytest.approx(a, abs=3e-4)
    assert a + b == pytest.approx(1)


def test_a_law_without_a_power_frontier_says_so():
    law = laws.LAWS["data_constrained"]
    theta = laws.PUBLISHED["muennighoff"].theta
    assert law.exponents(theta) is None
    assert law.power(theta) is None


@pytest.mark.parametrize("published", laws.PUBLISHED.values(), ids=laws.PUBLISHED)
def test_batches_of_theta_broadcast(published):
    law = laws.LAWS[published.law]
    theta = published.theta * np.linspace(0.9, 1.1, 6).reshape(2, 3, 1)
    found = law.loss(theta, POINTS)
    assert found.shape == (2, 3, 3)
    np.testing.assert_allclose(found[1, 2], law.loss(theta[1, 2], POINTS), rtol=1e-13)


def test_a_held_parameter_leaves_theta_and_keeps_its_value():
    law = laws.LAWS["chinchilla"]
    theta = laws.PUBLISHED["epoch"].theta
    held = laws.fixed(laws.fixed(law, A=482.01), E=1.81686)
    assert held.names == ("B", "alpha", "beta")
    np.testing.assert_allclose(
        held.loss(theta[2:], POINTS), law.loss(theta, POINTS), rtol=1e-14
    )
    assert held.exponents(theta[2:]) == law.exponents(theta)
    np.testing.assert_array_equal(held.power(theta[2:]), theta)


def test_the_name_of_every_law_finds_it_again(tmp_path):
    file = tmp_path / "mine (2).py"
    file.write_text(FILE)
    held = [laws.fixed(laws.LAWS["kaplan"], E=0), laws.fixed(laws.find(str(file)), q=1)]
    for law in [*laws.LAWS.values(), *held, laws.fixed(held[1], E=0.1 + 0.2)]:
        again = laws.find(law.name)
        assert again.name == law.name
        assert again.names == law.names
        assert again.held == law.held


def test_theta_of_another_law_is_refused():
    with pytest.raises(ValueError, match=r"tied must end in 4 .* got shape \(2, 5\)"):
        laws.LAWS["tied"].loss(np.ones((2, 5)), POINTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chinchila", r"law must be .* got 'chinchila'. Did you mean 'chinchilla'"),
        ("chinchila", "or the path of a file that ends in .py"),
        ("kaplan(E)", r"held parameter must be NAME=NUMBER; got 'E' in 'kaplan\(E\)'"),
        ("tied(beta=1)", "held parameter of tied must be .* got 'beta'"),
        ("kaplan(N_c=0)", "N_c of kaplan must be held at more than 0; got 0.0"),
        ("kaplan(E=-1)", "E of kaplan must be held at 0 or more; got -1.0"),
        (
            "tied(alpha=inf)",
            "alpha of tied must be held at a number between -20 and 20",
        ),
        (
            "tied(E=1,A=1,B=1,alpha=1)",
            "must have a parameter to fit; got tied with all",
        ),
    ],
)
def test_a_mistyped_law_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as caught:
        laws.find(name)
    assert "\n" not in str(caught.value)


FILE = """
import numpy as np
NAMES = ("E", "A", "q")
SCALES = {"E": "linear", "q": "signed"}
COLUMNS = ("params",)
START = (1.5, 100.0, 0.3)

def loss(theta, params):
    E, A, q = theta
    return E + A * np.exp(-q * np.log(params))
"""


def test_a_users_law_reads_as_it_is_written(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    law = laws.find(str(file))
    assert (law.names, law.columns) == (("E", "A", "q"), ("params",))
    assert [law.scale(name) for name in law.names] == ["linear", "log", "signed"]
    theta = np.array([[1.0, 50.0, 0.25], [2.0, 60.0, 0.5]])
    expected = theta[:, :1] + theta[:, 1:2] / POINTS["params"] ** theta[:, 2:]
    np.testing.assert_allclose(law.loss(theta, POINTS), expected, rtol=1e-12)
    np.testing.assert_array_equal(law.starts(POINTS, np.ones(3)), [[1.5, 100.0, 0.3]])
    assert law.exponents(theta) is None
    assert dataclasses.asdict(laws.fixed(law, q=1.0))["held"] == {"q": 1.0}
