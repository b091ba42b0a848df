"""Tests of the door: what base.py declares, what is refused, what follows."""

import copy
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import typing

import pytest

from fm_jax import config as configs
from fm_jax import configfile, demands, meshes, optimizers, sections
from fm_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
SECTIONS = {
    f.name: f.type for f in dataclasses.fields(configs.Config) if f.name != "raw"
}


@functools.cache
def _base():
    return configfile.load_base()


def _raw(**changes):
    """Return base's dict for a run of 7 steps, with `section__key=value` changed."""
    raw = copy.deepcopy(_base())
    raw["train"]["steps"] = 7
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return raw


def _mistake(raw):
    with pytest.raises(UserError) as error:
        configs.check(raw)
    return str(error.value)


# ---- base.py


def test_base_has_exactly_the_keys_of_the_dataclasses():
    assert set(configfile.flat(_base())) == {
        f"{section}.{field.name.rstrip('_')}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    }


def test_base_has_fewer_than_150_keys():
    assert len(configfile.flat(_base())) < 150


def test_the_defaults_of_base_have_the_types_of_the_dataclasses():
    config = configs.check(_raw())
    for section, kind in SECTIONS.items():
        for name, expected in typing.get_type_hints(kind).items():
            value = getattr(getattr(config, section), name)
            assert isinstance(value, typing.get_origin(expected) or expected), name


def test_the_dataclasses_have_no_defaults():
    for kind in SECTIONS.values():
        for field in dataclasses.fields(kind):
            assert field.default is dataclasses.MISSING
            assert field.default_factory is dataclasses.MISSING


# Keys whose name says all that a comment would.
PLAIN = {
    "model.num_layers",
    "model.embed_dim",
    "model.num_heads",
    "model.norm_epsilon",
    "model.rope_theta",
    "model.embed_init_std",
    "data.eval_fraction",
    "optimizer.name",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.epsilon",
    "train.steps",
    "train.tokens",
    "train.epochs",
    "train.seed",
    "eval.batch_size",
    "sample.num_samples",
    "sample.temperature",
    "sample.top_p",
}


def test_every_key_of_base_has_a_comment_unless_its_name_says_all():
    lines = (FOLDER / "base.py").read_text().splitlines()
    said = {}
    for above, line in itertools.pairwise(lines):
        written = re.sub(r'\["(\w+)"\]', r".\1", line)  # as `from` must be
        found = re.match(r"\s+(?:config\.)?(\w+\.\w+) = (.*)", written)
        if found and "ConfigDict" not in found[2]:
            said[found[1]] = "  # " in line or above.strip().startswith("# ")
    assert said.keys() == configfile.flat(_base()).keys()
    assert {key for key, has_comment in said.items() if not has_comment} <= PLAIN


# ---- the files beside it


def _documented():
    """Return every config file, and each variant that its first line names."""
    found = []
    for file in sorted(FOLDER.glob("[!_]*.py")):
        if file.stem == "base":
            continue
        first = file.read_text().partition("\n\n")[0]
        listed = re.search(r"variant is an? \w+: ([\w. -]+?)\.?\n?$", first.strip('"'))
        names = listed[1].split() if listed else []
        found += [
            f"{file.name}{variant}" for variant in ("", *[f":{n}" for n in names])
        ]
    return found


@pytest.mark.parametrize("name", _documented())
def test_a_config_file_loads_and_checks(name):
    raw = configfile.load(str(FOLDER / name)).to_dict()
    assert raw.keys() == _base().keys()
    assert configfile.flat(raw).keys() == configfile.flat(_base()).keys()
    if raw["init"]["model"]:  # of a run that its user names
        raw["init"]["from"] = "a_run"
    config = configs.check(raw)
    assert config.model.embed_dim > 0


@pytest.mark.parametrize("file", sorted(p.name for p in FOLDER.glob("[!_]*.py")))
def test_the_command_of_a_config_file_names_it_with_a_documented_variant(file):
    text = (FOLDER / file).read_text()
    named = re.findall(r"--config=configs/([\w.]+(?::[\w.-]+)?)", text)
    assert set(named) <= set(_documented())
    if file != "base.py":
        assert {name.partition(":")[0] for name in named} == {file}


def test_base_alone_lacks_a_duration():
    assert _mistake(copy.deepcopy(_base())) == (
        "exactly one of train.steps, train.tokens, train.epochs and "
        "train.tokens_per_param must be set; got none. Set the others to 0."
    )


# ---- what follows from what is given


def test_sizes_of_zero_are_derived():
    config = configs.check(
        _raw(model__embed_dim=24, model__num_heads=3, data__max_length=40)
    )
    model = config.model
    assert (model.num_kv_heads, model.head_dim, model.mlp_dim) == (3, 8, 96)
    assert (model.max_length, model.vocab_size) == (40, 0)


def test_sizes_that_are_given_stay():
    given = {
        "model__embed_dim": 20,
        "model__num_heads": 6,
        "model__num_kv_heads": 2,
        "model__head_dim": 10,
        "model__mlp_dim": 31,
        "model__max_length": 300,
    }
    model = configs.check(_raw(**given)).model
    for key, value in given.items():
        assert getattr(model, key.removeprefix("model__")) == value


def test_derived_sizes_are_in_the_config_and_not_in_what_was_given():
    config = configs.check(_raw(model__embed_dim=24, model__num_heads=3))
    assert config.model.head_dim == 8
    assert config.raw["model"]["head_dim"] == 0
    assert configs.check(config.raw) == config
    wider = config.raw["model"] | {"embed_dim": 48}
    assert configs.check(config.raw | {"model": wider}).model.head_dim == 16


def test_checking_leaves_the_callers_dict_alone():
    raw = _raw()
    before = copy.deepcopy(raw)
    configs.check(raw)
    assert raw == before


def test_a_whole_number_may_stand_for_a_fraction_and_a_list_for_a_tuple():
    config = configs.check(
        _raw(
            optimizer__weight_decay=0,
            data__paths=["a", "b"],
            optimizer__decay_rules=[["bias", False], [".*", True]],
            mesh__rules=[["embed", ["fsdp", "expert"]], ["vocab", []]],
        )
    )
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.data.paths == ("a", "b")
    assert config.optimizer.decay_rules == (("bias", False), (".*", True))
    assert config.mesh.rules == (("embed", ("fsdp", "expert")), ("vocab", ()))


# ---- refusals


def test_an_unknown_section_is_refused_with_the_nearest():
    text = _mistake(_raw() | {"optimiser": {}})
    assert text.startswith(
        "config section must be one of the known names; got 'optimiser'. "
        "Did you mean 'optimizer'? Known: optimizer, "
    )


def test_a_value_in_the_place_of_a_section_is_refused():
    assert _mistake(_raw() | {"train": 5}) == "config.train must be a section; got 5."


def test_an_unknown_key_is_refused_with_the_nearest():
    assert _mistake(_raw(log__evry=3)) == (
        "config.log key must be one of the known names; got 'evry'. "
        "Did you mean 'every'? Known: every"
    )


@pytest.mark.parametrize("key", sorted(configfile.flat(_base())))
def test_a_missing_key_is_refused(key):
    raw = _raw()
    section, name = key.split(".")
    # These are derived where they are not given.
    derived = ("num_kv_heads", "head_dim", "mlp_dim", "max_length")
    del raw[section][name]
    if section == "model" and name in derived:
        configs.check(raw)
        return
    assert _mistake(raw) == (
        f"config.{key} must be given; got no value. Start from configs/base.py."
    )


def test_a_missing_section_is_refused():
    raw = _raw()
    del raw["log"]
    assert _mistake(raw) == (
        "config.log.every must be given; got no value. Start from configs/base.py."
    )


@pytest.mark.parametrize(
    "key, value, demand",
    [
        ("model__num_layers", 2.0, "int"),
        ("model__num_layers", True, "int"),
        ("model__num_heads", "4", "int"),
        ("model__embed_dim", "256", "int"),
        ("model__qk_norm", 1, "bool"),
        ("model__norm", None, "str"),
        ("optimizer__learning_rate", "1e-3", "float"),
        ("optimizer__learning_rate", True, "float"),
        ("optimizer__learning_rate", False, "float"),
        ("optimizer__learning_rate", math.nan, "finite"),
        ("optimizer__learning_rate", math.inf, "finite"),
        ("data__paths", "a.txt", "tuple[str, ...]"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value, demand):
    assert _mistake(_raw(**{key: value})) == (
        f"config.{key.replace('__', '.')} must be {demand}; got {value!r}."
    )


def test_a_tuple_with_a_value_of_another_type_is_refused_whole():
    assert _mistake(_raw(data__paths=("a", 3))) == (
        "config.data.paths must be tuple[str, ...]; got ('a', 3)."
    )
    assert _mistake(_raw(data__weights_at=(300, (1, 2)))) == (
        "config.data.weights_at must be "
        "tuple[tuple[int, tuple[float, ...]], ...]; got (300, (1, 2))."
    )
    assert _mistake(_raw(optimizer__decay_rules=(("bias",),))) == (
        "config.optimizer.decay_rules must be tuple[tuple[str, bool], ...]; got "
        "(('bias',),)."
    )


@pytest.mark.parametrize("key", demands.NOT_EMPTY)
def test_text_that_must_be_given_is_not_empty(key):
    assert _mistake(_raw(**{key.replace(".", "__"): ""})) == (
        f"config.{key} must be given; got ''."
    )


@pytest.mark.parametrize(
    "given, shown",
    [
        ({"steps": 7, "tokens": 100.0}, "train.steps=7, train.tokens=100.0"),
        ({"epochs": 2, "tokens_per_param": 20}, None),
        ({"steps": 0}, "none"),
        (
            {"steps": 1, "tokens": 2.0, "epochs": 3.0, "tokens_per_param": 4.0},
            "train.steps=1, train.tokens=2.0, train.epochs=3.0, "
            "train.tokens_per_param=4.0",
        ),
    ],
)
def test_exactly_one_duration_must_be_set(given, shown):
    raw = _raw(train__steps=0)
    raw["train"] |= given
    if shown is None:
        shown = "train.epochs=2.0, train.tokens_per_param=20.0"
    assert _mistake(raw) == (
        "exactly one of train.steps, train.tokens, train.epochs and "
        f"train.tokens_per_param must be set; got {shown}. Set the others to 0."
    )


AT_LEAST_ONE = [
    "train.batch_size",
    "train.accumulation",
    "data.max_length",
    "eval.batch_size",
    "checkpoint.keep",
    "log.every",
    "mesh.dcn_data",
    "mesh.dcn_fsdp",
    "sample.num_samples",
    "synthetic.num_states",
    "synthetic.num_components",
    "synthetic.num_tokens",
    "synthetic.num_eval_tokens",
]
AT_LEAST_ZERO = [
    "eval.every",
    "eval.max_batches",
    "checkpoint.every",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "train.loss_chunk",
    "train.z_loss",
    "optimizer.clip_norm",
    "optimizer.weight_decay",
    "sample.num_tokens",
    "sample.temperature",
    "sample.top_k",
    "train.seed",
    "synthetic.zipf",
    "synthetic.seed",
]
RANGES = [
    *[(key, 0, ">= 1") for key in AT_LEAST_ONE],
    *[(key, -1, ">= 0") for key in AT_LEAST_ZERO],
    ("train.steps", -7, "> 0"),
    ("schedule.warmup_fraction", 1.5, "between 0 and 1"),
    ("schedule.decay_fraction", -0.5, "between 0 and 1"),
    ("schedule.final_fraction", 2.0, "between 0 and 1"),
    ("optimizer.beta1", 1.0, "at least 0 and below 1"),
    ("optimizer.beta2", -0.5, "at least 0 and below 1"),
    ("train.ema_decay", 1.0, "at least 0 and below 1"),
    ("optimizer.learning_rate", 0.0, "> 0"),
    ("optimizer.epsilon", 0.0, "> 0"),
    ("synthetic.concentration", 0.0, "> 0"),
    ("synthetic.num_symbols", 1, "from 2 to 50000"),
    ("synthetic.num_symbols", 50_001, "from 2 to 50000"),
    ("synthetic.mean_length", 0.5, "from 1 to 100000"),
    ("sample.top_p", 0.0, "above 0 and at most 1"),
    ("sample.top_p", 1.5, "above 0 and at most 1"),
]


@pytest.mark.parametrize("key, value, demand", RANGES)
def test_a_value_out_of_range_is_refused(key, value, demand):
    raw = _raw(**{key.replace(".", "__"): value})
    shown = float(value) if isinstance(_value(key), float) else value
    assert _mistake(raw) == f"config.{key} must be {demand}; got {shown!r}."


def _value(key):
    return configfile.flat(_base())[key]


@pytest.mark.parametrize("key", [k for k in AT_LEAST_ZERO if k != "checkpoint.every"])
def test_zero_is_allowed_where_it_means_none(key):
    configs.check(_raw(**{key.replace(".", "__"): 0}))


def test_heads_that_do_not_divide_the_width_are_refused():
    assert _mistake(_raw(model__embed_dim=20, model__num_heads=3)) == (
        "model.embed_dim must divide by model.num_heads; got 20 and 3. "
        "Change one, or set --config.model.head_dim."
    )


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    assert _mistake(_raw(train__batch_size=10, train__accumulation=4)) == (
        "train.batch_size must divide by train.accumulation; got 10 and 4."
    )


def test_chunks_that_do_not_divide_a_row_are_refused():
    assert _mistake(_raw(train__loss_chunk=7, data__max_length=20)) == (
        "data.max_length must divide by train.loss_chunk; got 20 and 7."
    )


def test_learned_positions_must_reach_over_a_row():
    given = {"model__max_length": 9, "data__max_length": 10}
    assert _mistake(_raw(model__positions="learned", **given)) == (
        "config.model.max_length must be >= data.max_length=10 for learned positions; "
        "got 9."
    )
    assert configs.check(_raw(model__positions="rope", **given)).model.max_length == 9


@pytest.mark.parametrize("save, evaluate", [(100, 0), (100, 40)])
def test_the_best_can_only_be_kept_where_every_save_is_evaluated(save, evaluate):
    given = {"checkpoint__every": save, "eval__every": evaluate}
    assert _mistake(_raw(checkpoint__keep_best=1, **given)) == (
        "checkpoint.every must be a multiple of eval.every when checkpoint.keep_best "
        f"is set; got {save} and {evaluate}."
    )
    configs.check(_raw(checkpoint__keep_best=0, **given))
    configs.check(_raw(checkpoint__keep_best=1, checkpoint__every=80, eval__every=40))


# Of a source of symbols, whose prompt is of them too.
SYMBOLS = {
    "data__source": "synthetic",
    "data__tokenizer": "symbols",
    "sample__prompt": "def",
}


def test_symbols_go_with_the_synthetic_source_and_only_with_it():
    configs.check(_raw(**SYMBOLS))
    assert _mistake(_raw(**SYMBOLS | {"data__tokenizer": "bytes"})) == (
        "config.data.tokenizer must be symbols when data.source is synthetic; got "
        "'bytes'."
    )
    assert _mistake(_raw(**SYMBOLS | {"data__source": "stdlib"})) == (
        "config.data.tokenizer must be bytes, bpe or a tokenizer's file unless "
        "data.source is synthetic; got 'symbols'."
    )


def test_ready_stores_go_with_their_own_tokenizer_and_nothing_else_does():
    configs.check(_raw(data__source="store", data__tokenizer="store"))
    assert _mistake(_raw(data__source="store", data__tokenizer="bpe")) == (
        "config.data.tokenizer must be store when data.source is store, which has its "
        "own; got 'bpe'."
    )
    assert _mistake(_raw(data__source="stdlib", data__tokenizer="store")) == (
        "config.data.tokenizer must be bytes, bpe or a tokenizer's file unless "
        "data.source is store; got 'store'."
    )


STORES = {
    "data__source": "store",
    "data__tokenizer": "store",
    "data__paths": ("a", "b"),
}


def test_weights_are_of_ready_stores_and_one_for_each():
    configs.check(_raw(**STORES, data__weights=(1, 2.5)))
    configs.check(_raw(**STORES, data__weights_at=((7, (1, 2.0)), (9, (0.5, 0.5)))))
    for key, value, shown in (
        ("weights", (1.0,), (1.0,)),
        ("weights_at", ((7, (1.0, 2.0)), (9, (3.0, 4.0, 5.0))), (3.0, 4.0, 5.0)),
    ):
        assert _mistake(_raw(**STORES, **{f"data__{key}": value})) == (
            "config.data.weights and weights_at must have a weight for each of "
            f"data.paths; got {shown} for 2 paths."
        )
        assert _mistake(_raw(**{f"data__{key}": value})) == (
            f"config.data.{key} must be () unless data.source is store: it is stores "
            f"that are mixed; got {value!r}."
        )


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_whole_documents_are_kept_apart(packing):
    configs.check(_raw(data__packing=packing))
    assert _mistake(_raw(data__packing=packing, data__mask_documents=False)) == (
        f"config.data.mask_documents must be True when data.packing is {packing}; got "
        "False."
    )


def test_an_end_token_is_of_a_tokenizers_file():
    configs.check(_raw(data__end_token="</s>", data__tokenizer="mine.json"))
    assert _mistake(_raw(data__end_token="</s>", data__tokenizer="bpe")) == (
        "config.data.tokenizer must be a tokenizer's file when data.end_token is set; "
        "got 'bpe'."
    )


def test_a_prompt_of_other_characters_is_refused_unless_there_is_no_sample():
    assert _mistake(_raw(**SYMBOLS | {"sample__prompt": "def "})) == (
        "sample.prompt must be of the 256 symbols from '!' to 'Ń', which the synthetic "
        "source writes; got 'def ' with ' '. Set --config.sample.prompt='' or "
        "--config.sample.num_tokens=0."
    )
    configs.check(_raw(**SYMBOLS | {"sample__prompt": ""}))
    configs.check(_raw(**SYMBOLS, sample__num_tokens=0, synthetic__num_symbols=2))


@pytest.mark.parametrize(
    "given, entries",
    [
        ({"num_symbols": 8193}, "67,125,249"),
        ({"num_symbols": 5000, "num_components": 3}, "75,000,000"),
        ({"kind": "hmm", "num_symbols": 9000, "num_states": 5000}, "70,000,000"),
    ],
)
def test_tables_that_are_too_large_are_refused(given, entries):
    given = {f"synthetic__{key}": value for key, value in given.items()}
    assert _mistake(_raw(**SYMBOLS, **given)) == (
        "the tables of the synthetic section must have at most 67,108,864 "
        f"probabilities; got {entries}. Lower synthetic.num_symbols, num_states or "
        "num_components."
    )
    configs.check(_raw(**given))  # which no other source reads


def test_an_impossible_model_is_refused_at_the_door():
    assert _mistake(_raw(model__norm="batchnorm")).startswith(
        "model.norm must be one of the known names; got 'batchnorm'. "
    )


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.check(_raw()).train.steps = 8


# ---- durations


@pytest.mark.parametrize(
    "duration, steps",
    [
        ({"steps": 9}, 9),
        ({"tokens": 2000.0}, 20),
        ({"tokens": 2001.0}, 21),  # at least as many tokens as were asked for
        ({"tokens": 1.0}, 1),
        ({"epochs": 1.0}, 8),  # 750 targets
        ({"epochs": 2.5}, 19),
        ({"epochs": 0.001}, 1),
        ({"tokens_per_param": 20.0}, 66),  # of 330 params
    ],
)
def test_a_duration_stands_for_these_steps(duration, steps):
    raw = _raw(train__steps=0)
    raw["train"] |= duration
    found = configs.resolve_steps(
        configs.check(raw).train, tokens_per_step=100, corpus_tokens=750, num_params=330
    )
    assert found == steps


@pytest.mark.parametrize("key", demands.CHOICES)
def test_unknown_choices_are_refused_with_the_known_ones(key):
    text = _mistake(_raw(**{key.replace(".", "__"): "zzz"}))
    assert text.startswith(f"config.{key} must be one of the known names; got 'zzz'")
    assert text.endswith("Known: " + ", ".join(sorted(demands.CHOICES[key])))


def test_the_door_knows_the_names_that_the_mesh_knows():
    assert set(demands.CHOICES["mesh.preset"]) == meshes.PRESETS.keys()
    axes = {field.name for field in dataclasses.fields(sections.MeshConfig)}
    assert axes >= set(meshes.AXES)


def test_the_door_knows_the_names_that_the_optimizer_knows():
    assert demands.CHOICES["schedule.name"] == optimizers.SCHEDULES
    assert demands.CHOICES["optimizer.name"] == optimizers.OPTIMIZERS
