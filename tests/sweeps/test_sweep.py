import itertools
import pathlib
import re
import subprocess
import sys

import pytest

from fm_jax import config as configs
from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.sweeps import sweep

ROOT = pathlib.Path(__file__).parent.parent.parent
SWEEPS = ROOT / "configs" / "sweeps"
FILES = sorted(p.stem for p in SWEEPS.glob("*_*.py") if p.stem != "__init__")


def _raw(name="tiny_isoflop", **changed):
    raw = configfile.load(str(SWEEPS / f"{name}.py")).to_dict()
    for key, value in changed.items():
        *sections, last = key.split("__")
        at = raw
        for section in sections:
            at = at[section]
        at[last] = value
    return raw


@pytest.mark.parametrize("name", FILES)
def test_every_sweep_of_ours_is_accepted_and_again_as_it_is_kept(name):
    checked = sweep.check(_raw(name))
    again = sweep.check(checked.raw)
    assert again.raw == checked.raw
    assert checked.base["model"]["vocab_size"] > 0


def test_base_has_exactly_the_keys_of_the_dataclasses_each_with_a_comment():
    raw = _raw("base")
    for section, kind in sweep.SECTIONS.items():
        assert set(raw[section]) == set(kind.__annotations__)
    assert set(raw) == {"base", *sweep.SECTIONS, *sweep.PLAIN}
    lines = (SWEEPS / "base.py").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"\s+(design|size|budget|config)\.\w+ = [^=]*$", line):
            assert "#" in line or "#" in above or "ConfigDict" in line, line


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"desing": {}}, "Did you mean 'design'"),
        ({"design__kinds": 1}, "config.design key must be .* Did you mean 'kind'"),
        ({"design__kind": "isoflops"}, "config.design.kind .* Did you mean 'isoflop'"),
        ({"budget__batch": "porain"}, "config.budget.batch .* Did you mean 'porian'"),
        ({"design__points": 2.5}, "config.design.points must be int; got 2.5"),
        ({"design__points": 0}, "config.design.points must be >= 1; got 0"),
        ({"design__width": 0.5}, "config.design.width must be >= 1; got 0.5"),
        ({"design__budgets": (1e12, -1.0)}, "design.budgets must be positive numbers"),
        ({"design__decay_fraction": 1.0}, "decay_fraction must be between 0 and 1"),
        ({"size__aspect": 0.0}, "config.size.aspect must be > 0; got 0.0"),
        ({"size__limits": (8,)}, "config.size.limits must be"),
        ({"noise": "much"}, "config.noise must be float; got 'much'"),
        ({"target_flops": -1.0}, "config.target_flops must be >= 0; got -1.0"),
        ({"design": 3}, "config.design must be a section; got 3"),
        (
            {"budget__batch": "power_lines"},
            "budget.anchor_tokens must be > 0 for budget.batch=power_lines; got 0.0",
        ),
        (
            {"base__optimizer__learning_rate": 0.0},
            "^config.base.optimizer.learning_rate must be > 0; got 0.0",
        ),
        (
            {"base__model__num_heads": 3},
            "^base.model.embed_dim must divide by base.model.num_heads; got 32 and 3. "
            "Change one, or set --config.base.model.head_dim",
        ),
        (
            {"base__init__model": True, "base__init__from": "base"},
            "^config.base.init.model must be False in a sweep.* own sizes.*got True",
        ),
        (
            {"base__finetune__method": "bias", "base__init__from": "base"},
            "^config.base.finetune.method must be full in a sweep.*; got 'bias'",
        ),
        (
            {
                "base__data__examples": "chat",
                "base__data__source": "text",
                "base__data__tokenizer": "bytes",
                "base__data__packing": "best_fit",
            },
            "^config.base.data.examples must be text in a sweep.*; got 'chat'",
        ),
        ({"base__model__embd_dim": 3}, "^config.base.model key must be .*'embed_dim'"),
        (
            {"base__data__source": "text", "base__data__tokenizer": "my.json"},
            "config.base.model.vocab_size must be given for data.tokenizer='my.json'",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(changed, said):
    with pytest.raises(UserError, match=said) as caught:
        sweep.check(_raw(**changed))
    assert "\n" not in str(caught.value)


def test_a_missing_key_or_section_is_named():
    raw = _raw()
    del raw["design"]["width"]
    with pytest.raises(UserError, match=r"config.design.width must be given"):
        sweep.check(raw)
    raw = _raw()
    del raw["noise"]
    with pytest.raises(UserError, match=r"config.noise must be given"):
        sweep.check(raw)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"source": "text", "tokenizer": "bytes"}, 320),
        ({"source": "text", "tokenizer": "bpe", "vocab_size": 1000}, 1024),
        ({"source": "synthetic", "tokenizer": "symbols"}, 320),
    ],
)
def test_the_vocabulary_is_what_training_will_resolve(data, expected):
    from fm_jax.tokenizers import plain
    from fm_jax.train import compose

    raw = configfile.load(str(ROOT / "configs" / "base.py")).to_dict()
    raw["data"] |= data
    raw["train"]["steps"] = 1
    raw["sample"]["num_tokens"] = 0
    config = configs.check(raw)
    assert sweep.vocabulary(config) == expected
    known = {
        "bytes": plain.ByteTokenizer,
        "symbols": lambda: plain.SymbolTokenizer(256),
    }
    if data["tokenizer"] in known:
        found = compose.resolve(config, known[data["tokenizer"]]())
        assert found.model.vocab_size == expected


def test_the_anchor_is_the_base_own_model_unless_given():
    checked = sweep.check(_raw())
    raw = checked.base | {"train": checked.base["train"] | {"steps": 1}}
    own = counts.params(configs.check(raw).model).total
    assert checked.budget.anchor_params == own
    assert sweep.check(_raw(budget__anchor_params=5.0)).budget.anchor_params == 5.0


def test_planning_imports_no_jax():
    code = (
        "import sys\n"
        "from fm_jax.sweeps import runner, outlook\n"
        "print([m for m in ('jax', 'pandas', 'matplotlib', 'scipy', 'pyarrow') "
        "if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert found.stdout.strip() == "[]"
