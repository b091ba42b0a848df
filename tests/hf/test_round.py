"""From a folder of transformers' through fine-tuning back to transformers and peft."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from fm_jax import configfile
from fm_jax.checkpoints import Checkpoints
from fm_jax.finetune import weights
from fm_jax.hf import adapters, parity, samples, theirs, verify
from fm_jax.models import zoo
from fm_jax.runs import Run
from fm_jax.serve import chat
from fm_jax.train import restore

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "another", "run", "after")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a folder of short texts, and the texts."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(20, 200))) for _ in range(40)]
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder, texts


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Return a checkpoint as transformers saves it, with a tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("theirs") / "base"
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus[1], trainer)
    sample = samples.SAMPLES["llama2"]
    keys = sample.keys | {"vocab_size": 320}
    model = theirs.make(dataclasses.replace(sample, keys=keys))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = 0, 1
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fm(corpus, folder, tmp_path_factory):
    """Return `fm(*arguments)`, a finished command, and `fm(method=...)`, a run."""
    import os

    cache = tmp_path_factory.mktemp("cache")

    def done(*arguments):
        found = subprocess.run(
            [sys.executable, "-m", "fm_jax.cli", *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "64"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found

    def train(out, *more):
        done(
            "train",
            f"--config={ROOT}/configs/quickstart.py",
            f"--config.init.from={folder}",
            "--config.init.model=True",
            "--config.data.source=text",
            f"--config.data.paths=('{corpus[0]}',)",
            "--config.data.eval_fraction=0.2",
            "--config.data.max_length=16",
            f"--config.data.cache_dir={cache}",
            "--config.model.dtype=float32",
            "--config.train.steps=5",
            "--config.train.batch_size=8",
            f"--config.train.compile_cache={ROOT}/.pytest_cache/jax",
            "--config.optimizer.learning_rate=0.01",
            "--config.eval.batch_size=8",
            "--config.eval.max_batches=2",
            "--config.sample.num_tokens=0",
            f"--workdir={out}",
            *more,
        )
        return out

    return done, train


@pytest.fixture(scope="module")
def lora_run(fm, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lora"
    method = ("--config.finetune.method=lora", "--config.lora.rank=3")
    return fm[1](out, *method)


@pytest.fixture(scope="module")
def full_run(fm, tmp_path_factory):
    return fm[1](tmp_path_factory.mktemp("runs") / "full")


def ours(run):
    """Return a function of tokens [B, T] to our logits of a run's last step."""
    record = configfile.read_run(Run(run))
    step = Checkpoints(run / "checkpoints").steps()[-1]
    return verify.ours(weights.model_config(record), weights.read(run, step))


def check_same(run, model):
    """Assert that a run and a model of torch's have the same logits."""
    tokens_BT = np.random.default_rng(1).integers(0, 300, (3, 29), np.int32)
    prompts = verify.Prompts(tokens_BT, np.zeros(tokens_BT.shape, bool))
    positions_BT = np.broadcast_to(np.arange(29), tokens_BT.shape)
    wanted = theirs.logits(model, tokens_BT, positions_BT, np.ones_like(tokens_BT))
    apart, size = np.abs(ours(run)(prompts) - wanted).max(), np.abs(wanted).max()
    print(f"\n{run.name}: largest difference {apart:.2e} of logits up to {size:.2f}")
    assert apart < parity.TOLERANCE * size


def test_an_adapter_trained_here_has_the_same_logits_in_peft(
    fm, folder, lora_run, tmp_path
):
    fm[0]("export", f"--run={lora_run}", f"--out={tmp_path}/adapter")
    config = json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(folder)
    base = theirs.load(folder)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    check_same(lora_run, adapted.get_base_model())
    # And it comes in again as the same model, which writes text.
    brought = tmp_path / "brought"
    imported = configfile.read_run(Run(lora_run))["resolved"]["init"]["path"]
    fm[0]("import", f"--hf={tmp_path}/adapter", f"--base={imported}",
          f"--out={brought}")  # fmt: skip
    check_same(brought, adapted.get_base_model())
    flags = ("--prompt=the", "--num_tokens=5", "--temperature=0")
    both = [fm[0]("generate", f"--run={run}", *flags) for run in (lora_run, brought)]
    assert both[0].stdout == both[1].stdout


def test_merged_it_has_the_same_logits_in_transformers(fm, lora_run, tmp_path):
    out = tmp_path / "whole"
    fm[0]("export", f"--run={lora_run}", f"--out={out}", "--merge_lora")
    check_same(lora_run, theirs.load(out))


def test_trained_in_full_it_has_the_same_logits_in_transformers(
    fm, folder, full_run, tmp_path
):
    fm[0]("export", f"--run={full_run}", f"--out={tmp_path}/whole")
    check_same(full_run, theirs.load(tmp_path / "whole"))
    text = "the cat sat on another mat"
    ids = [
        transformers.AutoTokenizer.from_pretrained(at)(text)["input_ids"]
        for at in (folder, tmp_path / "whole")
    ]
    assert ids[0] == ids[1]


def test_a_tuned_run_keeps_the_template_and_the_ids_that_end_a_text(lora_run):
    held = restore.load(lora_run)
    assert held.end_ids == (1,)
    template = chat.find(lora_run, "")
    said = chat.render(template, [{"role": "user", "content": "hello"}], {})
    assert said == "<s>hello"
    assert zoo.build(held.config.model).abstract.keys() == held.params.keys()
