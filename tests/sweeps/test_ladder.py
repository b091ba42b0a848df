import math
import pathlib

import pytest

from fm_jax import configfile
from fm_jax.errors import UserError
from fm_jax.models import counts
from fm_jax.sweeps import ladder

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"


@pytest.fixture(scope="module")
def base():
    raw = configfile.load(str(CONFIGS / "base.py")).to_dict()
    raw["model"] |= {"vocab_size": 320, "max_length": 64, "embed_dim": 96}
    raw["data"]["max_length"] = 64
    raw["train"] |= {"batch_size": 24, "accumulation": 3}
    return raw


@pytest.fixture
def size():
    return {
        "rule": "width",
        "aspect": 24.0,
        "num_layers": 0,
        "head_dim": 8,
        "group": 1,
        "mlp_ratio": 4.0,
        "round_to": 8,
        "count": "total",
        "limits": (0, 0),
    }


@pytest.fixture
def budget():
    return {
        "batch": "fixed",
        "batch_multiple": 1,
        "micro_rows": 0,
        "learning_rate": "fixed",
        "warmup": "fraction",
        "anchor_params": 1e6,
        "anchor_tokens": 1e8,
        "min_steps": 20,
    }


def test_the_width_rule_gives_depth_by_the_aspect_and_whole_heads(size, base):
    found = ladder.model_of(72, size, base["model"])
    assert found == {
        "num_layers": 3,
        "embed_dim": 72,
        "num_heads": 9,
        "num_kv_heads": 9,
        "head_dim": 8,
        "mlp_dim": 288,
    }


def test_the_layers_rule_rounds_the_width_up_to_whole_heads(size, base):
    found = ladder.model_of(5, size | {"rule": "layers", "head_dim": 16}, base["model"])
    assert (found["num_layers"], found["embed_dim"]) == (5, 128)  # 5 * 24 = 120
    found = ladder.model_of(4, size | {"rule": "layers"}, base["model"])
    assert found["embed_dim"] == 96  # whole already


def test_a_given_depth_stands_at_every_width(size, base):
    fixed = size | {"num_layers": 2}
    assert {
        ladder.model_of(d, fixed, base["model"])["num_layers"] for d in (8, 200, 800)
    } == {2}


@pytest.mark.parametrize(
    ("heads", "group", "kv_heads"), [(6, 4, 2), (5, 4, 5), (8, 4, 2)]
)
def test_heads_share_as_many_as_divide_them(size, base, heads, group, kv_heads):
    found = ladder.model_of(8 * heads, size | {"group": group}, base["model"])
    assert found["num_kv_heads"] == kv_heads


@pytest.mark.parametrize("ratio", [8 / 3, 4.0])
def test_mlp_widths_are_multiples_near_the_ratio(size, base, ratio):
    for width in (8, 40, 104):
        found = ladder.model_of(
            width, size | {"mlp_ratio": ratio, "round_to": 16}, base["model"]
        )["mlp_dim"]
        assert found % 16 == 0
        assert found == 16 or abs(found - ratio * width) <= 8


@pytest.mark.parametrize("count", ["total", "non_embedding", "matmul"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rule", ["width", "layers"])
def test_no_dial_is_nearer_than_the_nearest(size, base, count, group, rule):
    size |= {"rule": rule, "group": group}
    step = 8 if rule == "width" else 1
    every = {
        step * n: ladder.count_of(step * n, count, size, base["model"])
        for n in range(1, 60)
    }
    for target in (3e3, 5.5e4, 2.1e5, 3.3e6):
        distance = {d: abs(math.log(c / target)) for d, c in every.items()}
        found = ladder.nearest(target, count, size, base["model"])
        assert distance[found] == pytest.approx(min(distance.values()), abs=1e-12)


def test_counts_are_those_of_the_decoder_that_is_built(size, base):
    model = ladder.model_of(48, size, base["model"])
    config = ladder.config_of(model, base["model"])
    assert ladder.count_of(48, "matmul", size, base["model"]) == (
        counts.params(config).matmul
    )
    # By hand: two layers of 48, MLP of 192 with a gate, embedding and head of 320.
    products = 2 * (4 * 48 * 48 + 3 * 48 * 192)
    assert counts.params(config).total == products + 5 * 48 + 2 * 320 * 48


def test_flops_are_six_times_the_count_or_those_of_every_product(size, base):
    config = ladder.config_of(ladder.model_of(48, size, base["model"]), base["model"])
    found = ladder.flops_per_token(config, "6n", "non_embedding", 64)
    assert found == 6 * counts.params(config).non_embedding
    found = ladder.flops_per_token(config, "exact", "non_embedding", 64)
    attention = 3 * 2 * 2 * 2 * 48 * 65 / 2  # 2 layers, causal mean of 65 / 2 keys
    assert found == 6 * counts.params(config).matmul + attention


def test_absolute_laws_are_the_published_ones():
    # StepLaw's abstract (2503.04715) and DeepSeek's section 3 (2401.02954), with
    # logarithms worked out apart from the code.
    assert ladder.steplaw_rate(1e9, 1e11) == pytest.approx(
        math.exp(math.log(1.79) - 0.713 * math.log(1e9) + 0.307 * math.log(1e11))
    )
    assert ladder.steplaw_batch(1e11) == pytest.approx(10 ** (11 * 0.571) * 0.58)
    assert ladder.deepseek_rate(1e17) == pytest.approx(10 ** (-17 / 8) * 0.3118)
    assert ladder.deepseek_batch(1e17) == pytest.approx(10 ** (17 * 0.3271) * 0.2920)


def test_deepseek_rates_of_its_own_models_come_out():
    # DeepSeek LLM 7B and 67B on 2T tokens: 4.2e-4 at 2304 rows of 4096, 3.2e-4 at 4608
    # (2401.02954, table 2); the law gives values near those that were used.
    assert ladder.deepseek_rate(6 * 7e9 * 2e12) == pytest.approx(4.2e-4, rel=0.15)
    assert ladder.deepseek_rate(6 * 67e9 * 2e12) == pytest.approx(3.2e-4, rel=0.15)
    assert ladder.deepseek_batch(6 * 7e9 * 2e12) == pytest.approx(2304 * 4096, rel=0.15)
    assert ladder.deepseek_batch(6 * 67e9 * 2e12) == pytest.approx(
        4608 * 4096, rel=0.15
    )


def test_anchored_rules_pass_through_their_anchor_with_their_exponent():
    assert ladder.porian_batch(512, 1e6, 1e6) == 512
    assert ladder.porian_batch(512, 8e6, 1e6) == pytest.approx(512 * 4)
    assert ladder.porian_rate(1e-2, 8e6, 1e6) == pytest.approx(5e-3)
    assert ladder.power_lines_batch(512, 1e11, 1e10) == pytest.approx(512 * 10**0.383)
    assert ladder.width_rate(1e-2, 256, 64) == pytest.approx(2.5e-3)


def test_rows_are_a_multiple_of_what_is_asked_and_of_micro_batches(base, budget):
    budget |= {"batch": "porian", "batch_multiple": 2}
    rows = ladder.batch_rows(2.5e6, 1e8, 1e15, budget, base)
    assert rows % 6 == 0
    assert abs(rows - 24 * 2.5 ** (2 / 3)) <= 3
    assert ladder.batch_rows(1.0, 1e8, 1e15, budget, base) == 6  # never none


def test_micro_batches_are_the_fewest_that_are_small_enough(base, budget):
    assert ladder.accumulation(24, budget, base) == 3
    assert ladder.accumulation(24, budget | {"micro_rows": 7}, base) == 4
    assert ladder.accumulation(24, budget | {"micro_rows": 24}, base) == 1


@pytest.mark.parametrize("rule", ladder.RATES)
def test_each_rate_rule_is_the_function_of_its_name(size, base, budget, rule):
    model = ladder.model_of(48, size, base["model"])
    body = counts.params(ladder.config_of(model, base["model"])).non_embedding
    asked = {
        "fixed": 1e-3,
        "porian": ladder.porian_rate(1e-3, 3e5, 1e6),
        "steplaw": ladder.steplaw_rate(body, 5e7),
        "deepseek": ladder.deepseek_rate(1e14),
        "width": 1e-3 * 96 / 48,
    }
    budget["learning_rate"] = rule
    found = ladder.peak_rate(3e5, 5e7, 1e14, model, budget, base)
    assert found == pytest.approx(asked[rule], rel=1e-3)


@pytest.mark.parametrize("rule", ladder.BATCHES)
def test_each_batch_rule_is_the_function_of_its_name(base, budget, rule):
    asked = {
        "fixed": 24,
        "porian": ladder.porian_batch(24, 3e6, 1e6),
        "steplaw": ladder.steplaw_batch(5e7) / 64,
        "deepseek": ladder.deepseek_batch(1e14) / 64,
        "power_lines": ladder.power_lines_batch(24, 5e7, 1e8),
    }
    budget["batch"] = rule
    found = ladder.batch_rows(3e6, 5e7, 1e14, budget, base)
    assert abs(found - asked[rule]) <= 1.5


def test_porian_warms_up_on_as_many_tokens_as_parameters_at_most(base, budget):
    base = base | {"schedule": base["schedule"] | {"warmup_fraction": 0.25}}
    budget["warmup"] = "porian"
    assert ladder.warmup_steps(5e4, 1000, 512, budget, base) == round(5e4 / 512)
    assert ladder.warmup_steps(5e7, 1000, 512, budget, base) == 250
    budget["warmup"] = "fraction"
    assert ladder.warmup_steps(5e4, 1000, 512, budget, base) == 250


def test_training_has_whole_steps_and_no_other_duration(size, base, budget):
    model = ladder.model_of(48, size, base["model"])
    found = ladder.training_of(1e5, 1e7, 1e13, model, budget, base)
    assert found["train.steps"] == round(1e7 / (24 * 64))
    assert found["train.tokens"] == found["train.epochs"] == 0
    assert found["train.tokens_per_param"] == 0
    fraction = found["schedule.warmup_fraction"]
    assert round(fraction * found["train.steps"]) == fraction * found["train.steps"]


def test_a_width_that_is_not_whole_heads_is_refused(size, base):
    with pytest.raises(UserError, match=r"must divide by size.head_dim; got 20 and 8"):
        ladder.model_of(20, size, base["model"])


def test_nothing_is_counted_without_a_vocabulary(size, base):
    with pytest.raises(UserError, match=r"model.vocab_size must be given .* got 0"):
        ladder.count_of(16, "total", size, base["model"] | {"vocab_size": 0})
