import json

import pytest

from fm_jax.transfer import page
from fm_jax.transfer.study import Found


def _found(method, seed, valid, ood, *, rate=0.1, drift=None):
    return Found(
        method=method,
        rate=rate,
        seed=seed,
        accuracy={"valid": valid, "ood": ood},
        loss={"valid": 0.5, "ood": 0.75},
        drift=drift or {},
    )


@pytest.fixture
def chosen():
    """Return three seeds: probe is below full on valid and far above it on ood."""
    return {
        "probe": {
            seed: _found("probe", seed, 0.7, 0.5 + seed / 10, rate=None)
            for seed in range(3)
        },
        "full": {
            seed: _found(
                "full", seed, valid, 0.3 + seed / 10, rate=rate, drift={"ood": 0.25}
            )
            for seed, valid, rate in ((0, 0.7, 0.1), (1, 0.8, 0.3), (2, 0.9, 0.2))
        },
    }


def _summary(chosen, against="full"):
    names, rates = ("valid", "ood"), (0.1, 0.2, 0.3)
    return page.summary(chosen, names=names, rates=rates, against=against)


def test_differences_are_paired_by_seed(chosen):
    found = _summary(chosen)["differences"]["probe"]
    # 0.2 for every seed, though each method alone varies by 0.1.
    assert found["ood"]["mean"] == pytest.approx(0.2)
    assert found["ood"]["half_width"] == pytest.approx(0.0, abs=1e-12)
    # 0, -0.1, -0.2: t of 2 degrees times 0.1 / sqrt(3).
    assert found["valid"]["mean"] == pytest.approx(-0.1)
    assert found["valid"]["half_width"] == pytest.approx(0.24841, rel=1e-4)


def test_the_summary_is_json(chosen):
    again = json.loads(json.dumps(_summary(chosen)))
    full = again["methods"]["full"]
    assert full["rates"] == {"0": 0.1, "1": 0.3, "2": 0.2}
    assert full["drift"]["ood"] == {"mean": 0.25, "half_width": 0.0, "count": 3}
    assert full["drift"]["valid"] == {"mean": None, "half_width": None, "count": 0}


def test_the_page_shows_what_is_sure_and_what_is_not(chosen):
    made = page.lines(_summary(chosen), title="Transfer", about=["- base: b"])
    assert made[:3] == ["# Transfer", "", "- base: b"]
    assert made[4:8] == [
        "| method | accuracy valid, % | accuracy ood, % |      drift ood |"
        "           rates chosen |",
        "| ------ | ----------------: | --------------: | -------------: |"
        " ---------------------: |",
        "| probe  |       70.0 +- 0.0 |    60.0 +- 24.8 |              - |"
        "                      - |",
        "| full   |      80.0 +- 24.8 |    40.0 +- 24.8 | 0.250 +- 0.000 |"
        " 0.1 x1, 0.2 x1, 0.3 x1 |",
    ]
    assert made[9:12] == [
        "| difference   | valid, points |  ood, points |",
        "| ------------ | ------------: | -----------: |",
        "| probe - full | -10.0 +- 24.8 | +20.0 +- 0.0 |",
    ]
    assert "- valid: probe cannot be told from full (3 pairs)" in made
    assert "- ood: probe is above full (3 pairs)" in made
    assert any("95 % t interval over 3 seeds" in line for line in made)
    assert any("valid chose each seed's rate" in line for line in made)


def test_rates_at_an_end_of_the_sweep_are_told(chosen):
    made = page.lines(_summary(chosen), title="Transfer", about=[])
    assert made[-1] == (
        "full: 2 of 3 rates are at an end of the sweep: a wider one may do better."
    )


def test_one_seed_makes_no_claim(chosen):
    one = {method: {1: runs[1]} for method, runs in chosen.items()}
    made = page.lines(_summary(one), title="Transfer", about=[])
    assert "- ood: probe cannot be compared with full (1 pair)" in made


def test_seeds_that_one_method_lacks_are_no_pair(chosen):
    del chosen["full"][2]
    found = _summary(chosen)
    assert found["differences"]["probe"]["ood"]["count"] == 2
    made = page.lines(found, title="Transfer", about=[])
    assert any("over 2 to 3 seeds" in line for line in made)


def test_without_the_method_to_compare_with_there_is_only_the_table(chosen):
    del chosen["full"]
    made = page.lines(_summary(chosen), title="Transfer", about=[])
    assert not any("difference" in line for line in made)
