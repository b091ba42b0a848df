"""The text of a prediction's config: what its page tells, and which file gives way."""

import ast

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.scaling import laws, predict
from fm_jax.sweeps import labpage, recipe

LAW = laws.LAWS["chinchilla"]
THETA = np.array([1.817218, 477.826, 2143.417, 0.3473105, 0.3671724])
SPREAD = 1 + 0.01 * np.random.default_rng(0).standard_normal((200, 5))


def _fit(**more):
    ends = {"params": [1e6, 1e8], "tokens": [1e7, 1e9], "flops_6nd": [1e14, 1e17]}
    inputs = {"count": "total", "path": "runs.csv", "sha256": "ab" * 32, "rows": 37}
    third = dict(zip(LAW.names, map(float, THETA), strict=True))
    third["residual_sd"] = 0.01
    fit = {"inputs": inputs, "range": ends, "approach3": third, "warnings": []}
    return fit | more


def _written(tmp_path, fit):
    draws = {"approach3": THETA * SPREAD}
    found = predict.predict(fit, draws, LAW, flops=3e17)
    made = recipe.recipe(found, fit=fit, draws=draws, law=LAW)
    path = tmp_path / labpage.file_name(found)
    return found, made, path, labpage.write(made, path, found=found, fit=fit)


def test_the_page_tells_where_the_run_is_from_and_what_to_expect(tmp_path):
    fit = _fit(warnings=["few decades", "approach 2: few sizes"])
    fit["inputs"]["path"] = 'a\\"""b.csv'  # ends no docstring
    _, made, path, text = _written(tmp_path, fit)
    module = ast.parse(path.read_text())
    page = " ".join(ast.get_docstring(module).split())
    for said in (
        "train the compute-optimal run of 3e+17 FLOPs",
        "fit of a/'''b.csv (sha256 abababababababab), law chinchilla, 37 runs",
        "from 1e+14 to 1e+17 FLOPs",
        f"fm train --config={path}",
        f"{made.params:,} total parameters, {made.tokens:,} tokens",
        f"{made.flops_exact:.4g} by every product",
        f"held-out loss {made.loss['value']:.4f} nats per token",
        f"{made.loss['interval'][0]:.4f} to {made.loss['interval'][1]:.4f} in 95 %",
        f"noise included, {made.loss['of_a_run'][0]:.4f} to ",
        "few decades",
        "3 times beyond the largest",
    ):
        assert said in page, said
    assert "approach 2" not in page
    assert all(
        len(line) <= 88 for line in path.read_text().splitlines() if "/" not in line
    )
    shown = "\n".join(text)
    assert f"fm train --config={path}" in shown
    assert f"{made.loss['value']:.4f}" in shown


def test_a_name_says_what_was_asked():
    assert labpage.file_name({"asked": {"flops": 5.76e23}}) == "flops_5p76e23.py"
    asked = {"params": 7e9, "tokens_per_param": 0.5}
    assert labpage.file_name({"asked": asked}) == "params_7e09_tokens_per_param_0p5.py"


def test_only_the_same_file_may_be_there(tmp_path):
    fit = _fit()
    found, made, path, text = _written(tmp_path, fit)
    before = path.stat().st_mtime_ns
    assert labpage.write(made, path, found=found, fit=fit) == text
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a \.py file; got .*x\.txt"):
        labpage.write(made, tmp_path / "x.txt", found=found, fit=fit)
    with pytest.raises(UserError, match="must be written where one can"):
        labpage.write(made, path / "x.py", found=found, fit=fit)
    path.write_text(path.read_text() + "# mine")
    with pytest.raises(UserError, match=r"must be written to a new file; got .*else"):
        labpage.write(made, path, found=found, fit=fit)


def test_a_stale_prediction_gives_way_but_no_file_of_the_user_s(tmp_path):
    old = _fit()
    old["inputs"]["rows"] = 36
    *_, path, _ = _written(tmp_path, old)
    stale, fit = path.read_text(), _fit()
    path.unlink()
    found, made, path, text = _written(tmp_path, fit)
    fresh = path.read_text()
    assert fresh != stale
    path.write_text(stale)
    with pytest.raises(UserError, match="must be written to a new file"):
        labpage.write(made, path, found=found, fit=fit)
    given = {"found": found, "fit": fit, "replace": True}
    assert labpage.write(made, path, **given) == text
    assert path.read_text() == fresh
    mine = stale.replace("config.train.steps = ", "config.train.steps = 2 * ")
    for kept in (mine, stale + "# mine", "x = 1\n", "", "\udcff"):
        path.write_bytes(kept.encode(errors="surrogateescape"))
        with pytest.raises(
            UserError, match=r"must be written to a new file; got .*else"
        ):
            labpage.write(made, path, **given)
        assert path.read_bytes() == kept.encode(errors="surrogateescape")
    assert mine != stale
