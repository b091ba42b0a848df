"""Adapters that peft made come in, ours go out: the same logits, the same bits."""

import copy
import json
import math

import jax
import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.finetune import lora
from fm_jax.hf import adapters, families, lowrank, parity, samples, theirs
from fm_jax.hf.adapters import Adapter
from fm_jax.hf.fields import ARITHMETIC
from fm_jax.hf.leaves import shapes
from fm_jax.hf.lowrank import Update
from fm_jax.models import zoo
from fm_jax.models.config import ModelConfig
from tests.hf import made

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

RANK, ALPHA = 3, 5.0
FUSED = ("gpt2", "phi3", "gpt-neox", "bloom")
NAMES = ["llama2", *FUSED] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ("gpt-j", "olmo2", "mixtral")
]


class Base:
    """A tiny model of transformers', its parameters in ours, and its products."""

    def __init__(self, name, folder):
        sample = samples.SAMPLES[name]
        self.model, self.fed = theirs.make(sample), theirs.fed(sample)
        self.model.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        self.family, said = families.read(fields)
        self.config = ModelConfig(**said, **ARITHMETIC)
        self.params = parity.read(self.family, self.config, made.load(folder))
        self.known = lowrank.modules(self.family, self.config)
        self.shapes = shapes(self.config)
        self.paths = sorted({path for m in self.known.values() for path in m.paths})

    def updates(self, paths=(), first=0, seed=0):
        """Return random updates of kernels, of all where none are named."""
        rng, found = np.random.default_rng(seed), {}
        for path in paths or self.paths:
            num_layers, *dims = self.shapes[path]
            at, count = lora.num_in(path), num_layers - first
            a = 0.1 * rng.standard_normal((count, *dims[:at], RANK), np.float32)
            b = 0.1 * rng.standard_normal((count, RANK, *dims[at:]), np.float32)
            found[path] = Update(a, b, first)
        return found

    def written(self, folder, updates, root=False):
        """Write updates as an adapter's folder; return the folder."""
        folder.mkdir()
        lows = lowrank.theirs(updates, self.known, alpha=ALPHA, root=root)
        is_turned = next(iter(self.known.values())).is_turned
        adapter = Adapter(lows, RANK, ALPHA, root, 0.0, is_turned, "base")
        adapters.write(folder, adapter, list(self.known))
        return folder

    def read(self, folder):
        """Return an adapter's folder, and its updates of our kernels."""
        adapter = adapters.read(folder)
        return adapter, lowrank.ours(
            adapter.lows, self.known, self.shapes, rank=adapter.rank
        )

    def merged(self, updates, scale):
        """Return params with W + scale a b, in float64, for each layer's W."""
        params = copy.deepcopy(self.params)
        for path, update in updates.items():
            *above, last = path.split("/")
            leaf = params
            for key in above:
                leaf = leaf[key]
            for i, (a, b) in enumerate(zip(update.a, update.b, strict=True)):
                added = scale * np.tensordot(a.astype(float), b.astype(float), 1)
                leaf[last][update.first + i] += added.astype(np.float32)
        return params

    def ours(self, params):
        """Return our logits where tokens count, [tokens, V]."""
        fed, model = self.fed, zoo.build(self.config)
        with jax.default_matmul_precision("highest"):
            rows = (fed.tokens_BT, fed.positions_BT, fed.segments_BT)
            x_BTD, _ = model.hidden(params, *rows)
            return np.asarray(model.logits(params, x_BTD))[fed.segments_BT > 0]

    def theirs(self, model):
        """Return the logits of a model of torch's where tokens count."""
        fed = self.fed
        rows = (fed.tokens_BT, fed.positions_BT, fed.segments_BT)
        return theirs.logits(model, *rows)[fed.segments_BT > 0]

    def adapted(self, folder):
        """Return the model of transformers' with an adapter that peft reads."""
        model = copy.deepcopy(self.model)
        return peft.PeftModel.from_pretrained(model, folder).eval()

    def check_same(self, params, model, folder):
        """Assert equal logits, others than the base's, and equal weights once merged.

        Logits differ by rounding alone, as far as those of the base do.
        """
        ours, wanted = self.ours(params), self.theirs(model.get_base_model())
        apart, size = np.abs(ours - wanted).max(), np.abs(wanted).max()
        assert np.abs(self.theirs(self.model) - wanted).max() > 0.05 * size
        model.merge_and_unload().save_pretrained(folder)
        merged = made.load(folder)
        written = parity.write(self.family, self.config, params)
        assert merged.keys() == written.keys()
        worst = max(np.abs(merged[name] - written[name]).max() for name in merged)
        print(f"\nlogits {apart:.2e} of {size:.2f}, weights {worst:.1e}")
        assert worst < 1e-6
        assert apart < parity.TOLERANCE * size


def trained(base, **given):
    """Return a model with an adapter that peft makes, with random numbers in it."""
    import torch

    keys = {"r": RANK, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(
        copy.deepcopy(base.model), peft.LoraConfig(**keys | given)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(0.15 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return `bases(name)`, each made once."""
    kept = {}

    def make(name):
        if name not in kept:
            kept[name] = Base(name, tmp_path_factory.mktemp(name))
        return kept[name]

    return make


@pytest.mark.parametrize("root", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", NAMES)
def test_our_updates_have_the_same_logits_in_peft_and_come_back(
    bases, tmp_path, name, root
):
    base = bases(name)
    updates = base.updates()
    folder = base.written(tmp_path / "adapter", updates, root)
    scale = ALPHA / (math.sqrt(RANK) if root else RANK)
    base.check_same(base.merged(updates, scale), base.adapted(folder), tmp_path / "m")
    _, back = base.read(folder)
    assert back.keys() == updates.keys()
    for path, update in updates.items():
        np.testing.assert_array_equal(back[path].a, update.a)
        np.testing.assert_array_equal(back[path].b, update.b)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama2", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("gpt-neox", ["query_key_value"]),
        ("gpt-j", "all-linear"),
    ],
)
@pytest.mark.parametrize("root", [False, True], ids=["lora", "rslora"])
def test_adapters_of_peft_come_in_with_their_logits_and_go_out_as_they_came(
    bases, tmp_path, name, targets, root
):
    base = bases(name)
    model = trained(base, target_modules=targets, use_rslora=root)
    folder = tmp_path / "given"
    model.save_pretrained(folder)
    adapter, updates = base.read(folder)
    scale = adapter.scale(adapter.alpha, adapter.rank)
    base.check_same(base.merged(updates, scale), model, tmp_path / "m")
    lows = lowrank.theirs(updates, base.known, alpha=adapter.alpha, root=root)
    again = Adapter(lows, RANK, adapter.alpha, root, 0.0, adapter.is_turned, "")
    (tmp_path / "again").mkdir()
    adapters.write(tmp_path / "again", again, list(base.known))
    for file in (adapters.WEIGHTS, adapters.CONFIG):
        before, after = (tmp_path / at / file for at in ("given", "again"))
        if file == adapters.CONFIG:
            before, after = (json.loads(x.read_text()) for x in (before, after))
            same = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
                    "fan_in_fan_out", "bias", "task_type", "peft_type")  # fmt: skip
            assert {k: before[k] for k in same} == {k: after[k] for k in same}
        else:
            before, after = (made.load_file(x) for x in (before, after))
            assert before.keys() == after.keys()
            for key, tensor in before.items():
                assert tensor.tobytes() == after[key].tobytes(), key


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt-neox"])
def test_a_kernel_without_an_update_stays_as_it_is_within_a_fused_module(
    bases, tmp_path, name
):
    base = bases(name)
    at = "blocks/attention"
    updates = base.updates([f"{at}/query/kernel", f"{at}/value/kernel"])
    folder = base.written(tmp_path / "adapter", updates)
    base.check_same(
        base.merged(updates, ALPHA / RANK), base.adapted(folder), tmp_path / "m"
    )
    assert base.read(folder)[1].keys() == updates.keys()
    assert len(json.loads((folder / adapters.CONFIG).read_text())["rank_pattern"]) == 1


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_updates_of_upper_layers_alone_are_named_one_by_one(bases, tmp_path, name):
    base = bases(name)
    updates = base.updates(first=2)
    folder = base.written(tmp_path / "adapter", updates)
    base.check_same(
        base.merged(updates, ALPHA / RANK), base.adapted(folder), tmp_path / "m"
    )
    targets = json.loads((folder / adapters.CONFIG).read_text())["target_modules"]
    assert all(".2." in target for target in targets)
    for path, update in base.read(folder)[1].items():
        assert update.first == 2
        np.testing.assert_array_equal(update.a, updates[path].a)
        np.testing.assert_array_equal(update.b, updates[path].b)


def test_a_layer_in_between_without_an_update_is_refused_by_name(bases, tmp_path):
    base = bases("llama2")
    folder = base.written(tmp_path / "adapter", base.updates())
    tensors = made.load(folder)
    kept = {n: x for n, x in tensors.items() if ".1.mlp.up_proj" not in n}
    made.save(folder / adapters.WEIGHTS, kept)
    said = r"from its first on; got no update of 'model\.layers\.1\.mlp\.up_proj'"
    with pytest.raises(UserError, match=said):
        base.read(folder)


def test_one_projection_of_two_with_the_same_last_name_is_told_from_the_other(
    bases, tmp_path
):
    base = bases("gpt2")
    updates = base.updates(["blocks/mlp/down/kernel"])
    folder = base.written(tmp_path / "adapter", updates)
    base.check_same(
        base.merged(updates, ALPHA / RANK), base.adapted(folder), tmp_path / "m"
    )
    targets = json.loads((folder / adapters.CONFIG).read_text())["target_modules"]
    assert targets == ["mlp.c_proj"]


def test_patterns_of_names_say_rank_and_alpha_of_a_module(bases, tmp_path):
    base = bases("llama2")
    model = trained(
        base, target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": RANK + 1}, alpha_pattern={r"1\.self_attn.v_proj": 9},
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    found = adapters.read(tmp_path)
    at = "model.layers.{}.self_attn.{}_proj"
    assert {len(found.lows[at.format(i, "q")].a_RI) for i in range(3)} == {RANK + 1}
    assert [found.lows[at.format(i, "v")].alpha for i in range(3)] == [7, 9, 7]
    with pytest.raises(UserError, match=r"have one rank, 3.*got 4 for 'model.*q_proj'"):
        lowrank.ours(found.lows, base.known, base.shapes, rank=found.rank)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA; got 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM; got 'SEQ_CLS'"),
        ({"bias": "all"}, "bias must be none; got 'all'"),
        ({"use_dora": True}, "must not have use_dora; got True. DoRA also scales"),
        ({"modules_to_save": ["lm_head"]}, "must not have modules_to_save"),
        ({"target_parameters": ["experts.w"]}, "must not have target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must leave the base's"),
        ({"new_trick": 3}, "a key of adapter_config.json .*got 'new_trick'"),
        ({"r": 0}, "r must be a whole number >= 1; got 0"),
        ({"r": 4}, r"must have the rank of adapter_config.json, 4; got A \[3, 28\]"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number >= 0; got 'x'"),
        ({"alpha_pattern": 3}, "alpha_pattern must be an object; got 3"),
        ({"rank_pattern": {"(": 3}}, r"patterns must be regular expressions; got '\('"),
    ],
)
def test_what_is_more_than_a_plain_adapter_is_refused_by_name(
    bases, tmp_path, change, said
):
    folder = bases("llama2").written(tmp_path / "adapter", bases("llama2").updates())
    made.edited(folder, lambda config: config.update(change), adapters.CONFIG)
    with pytest.raises(UserError, match=said) as error:
        adapters.read(folder)
    assert "\n" not in str(error.value)


def test_keys_that_are_not_known_mean_nothing_where_they_are_empty(bases, tmp_path):
    folder = bases("llama2").written(tmp_path / "adapter", bases("llama2").updates())
    new = {"new_trick": None, "another": {}}
    made.edited(folder, lambda config: config.update(new), adapters.CONFIG)
    assert adapters.read(folder).rank == RANK


AT = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop(f"{AT}.lora_B.weight"), "must have both A and B; got A alone"),
        (lambda x: x.update({f"{AT}.lora_magnitude_vector": np.ones(3, "f4")}),
         "A and B of products alone; got .*magnitude_vector"),
        (lambda x: x.clear(), "must have a module; got none"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_updates_are_refused_by_name(bases, tmp_path, change, said):
    folder = bases("llama2").written(tmp_path / "adapter", bases("llama2").updates())
    tensors = made.load(folder)
    change(tensors)
    made.save(folder / adapters.WEIGHTS, tensors)
    with pytest.raises(UserError, match=said):
        adapters.read(folder)


def test_a_folder_of_pickles_is_refused(bases, tmp_path):
    folder = bases("llama2").written(tmp_path / "adapter", bases("llama2").updates())
    (folder / adapters.WEIGHTS).rename(folder / adapters.PICKLE)
    with pytest.raises(
        UserError, match=r"got only adapter_model\.bin, which runs code"
    ):
        adapters.read(folder)
    (folder / adapters.PICKLE).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors; got none in"):
        adapters.read(folder)
