import json

import pytest

from fm_jax import configfile
from fm_jax.errors import DivergedError, UserError
from fm_jax.runs import Run
from fm_jax.transfer import study

NAMES = ("valid", "ood")
# Accuracy on valid and ood, and loss on valid, by method and rate. Out of
# distribution the other rate would be better.
NUMBERS = {
    ("probe", None): (0.7, 0.6, 0.9),
    ("full", 0.1): (0.8, 0.9, 0.5),
    ("full", 0.2): (0.9, 0.2, 0.4),
    ("lora", 0.1): (0.8, 0.1, 0.5),
    ("lora", 0.2): (0.8, 0.3, 0.6),
}


def _raw():
    raw = configfile.load_base()
    raw["train"]["steps"] = 3
    raw["data"] |= {"paths": ("a.jsonl",), "eval_paths": ("valid.jsonl", "ood.jsonl")}
    return raw


def _plan(folder, **given):
    defaults = {
        "methods": ("probe", "full", "lora"),
        "rates": (0.1, 0.2),
        "seeds": (0, 1),
    }
    return study.plan(_raw(), folder, **defaults | given)


class _Trainer:
    """Write what a run leaves behind; count the calls."""

    def __init__(self, diverges=()):
        self.calls, self.diverges = [], diverges

    def __call__(self, raw, folder):
        method, seed = raw["finetune"]["method"], raw["train"]["seed"]
        rate = None if method == "probe" else raw["optimizer"]["learning_rate"]
        self.calls.append((method, rate, seed))
        run = Run(folder)
        run.begin()
        run.write_config(
            {
                "config": raw,
                "changed_from_base": {},
                "resolved": {"model": {}},
                "data": {},
                "history": [],
            }
        )
        if (method, rate, seed) in self.diverges:
            error = DivergedError("the loss", float("nan"), 2)
            run.write("FAILED", f"{type(error).__name__}: {error}\n")
            raise error
        valid, ood, loss = NUMBERS[method, rate]
        run.append({"step": 1, "final/accuracy/valid": 0.0, "eval/drift/ood": 0.0})
        run.append(
            {
                "step": 3,
                "final/accuracy": 0.5,
                "final/accuracy/valid": valid + seed / 100,
                "final/accuracy/ood": ood + seed / 100,
                "final/loss/valid": loss,
                "final/loss/ood": 1.0,
                "final/drift/valid": 0.25,
            }
        )
        run.write("DONE", "0\n" if method == "probe" else "3\n")


def _run(planned, train=None, said=None):
    return study.run(
        planned,
        names=NAMES,
        train=train or _Trainer(),
        say=(said if said is not None else []).append,
    )


def test_methods_with_a_rate_have_all_of_them_and_the_probe_has_none(tmp_path):
    planned = _plan(tmp_path)
    assert [(p.method, p.rate) for p in planned if p.seed == 0] == list(NUMBERS)
    assert len({p.folder for p in planned}) == len(planned) == 10
    one = planned[-1]
    assert one.raw["finetune"]["method"] == "lora"
    assert one.raw["optimizer"]["learning_rate"] == 0.2
    assert one.raw["train"]["seed"] == 1
    assert one.folder == tmp_path / "lora" / "rate_0.2" / "seed_1"
    assert one.name == "lora, rate 0.2, seed 1"


def test_a_seed_gives_all_methods_its_own_draw_of_the_data(tmp_path):
    planned = _plan(tmp_path, data_of=lambda seed: {"paths": (f"{seed}.jsonl",)})
    for one in planned:
        assert one.raw["data"]["paths"] == (f"{one.seed}.jsonl",)
        assert one.raw["data"]["eval_paths"] == ("valid.jsonl", "ood.jsonl")


def test_what_is_done_is_not_done_again(tmp_path):
    first, said = _Trainer(), []
    found = _run(_plan(tmp_path, seeds=(0,)), first)
    assert len(first.calls) == 5
    second = _Trainer()
    both = _run(_plan(tmp_path), second, said)
    assert second.calls == [(method, rate, 1) for method, rate in NUMBERS]
    assert both[:5] == found
    assert said[0] == "5 of 10 runs were done before"
    assert said[1].startswith("[1/5] probe, seed 1: valid 71.0%, ood 61.0%; 0.")


def test_what_was_killed_is_made_and_what_it_read_is_the_last(tmp_path):
    planned = _plan(tmp_path, seeds=(0,))
    _run(planned)
    (planned[2].folder / "DONE").unlink()
    again = _Trainer()
    found = _run(planned, again)
    assert again.calls == [("full", 0.2, 0)]
    assert found[2].accuracy == {"valid": 0.9, "ood": 0.2}
    assert found[2].loss == {"valid": 0.4, "ood": 1.0}
    assert found[2].drift == {"valid": 0.25, "ood": 0.0}


def test_a_run_that_diverged_is_left_out_and_not_tried_again(tmp_path):
    planned, said = _plan(tmp_path, seeds=(0,)), []
    first = _Trainer(diverges={("full", 0.2, 0)})
    found = _run(planned, first, said)
    assert [(f.method, f.rate) for f in found] == [
        key for key in NUMBERS if key != ("full", 0.2)
    ]
    assert "full, rate 0.2, seed 0: diverged (the loss must stay finite" in said[2]
    again = _Trainer()
    assert _run(planned, again) == found
    assert again.calls == []


def test_the_rate_is_chosen_by_the_first_file_alone(tmp_path):
    chosen = study.choose(_run(_plan(tmp_path)), "valid")
    assert list(chosen) == ["probe", "full", "lora"]
    assert {seed: run.rate for seed, run in chosen["full"].items()} == {0: 0.2, 1: 0.2}
    assert chosen["full"][1].accuracy["ood"] == pytest.approx(0.21)
    # Equal accuracies: the lower loss.
    assert chosen["lora"][0].rate == 0.1
    assert chosen["probe"][0].rate is None
    other = study.choose(_run(_plan(tmp_path)), "ood")
    assert other["full"][0].rate == 0.1
    assert other["lora"][0].rate == 0.2


def test_the_only_held_out_file_has_no_name_in_metrics(tmp_path):
    (planned,) = _plan(tmp_path, methods=("probe",), seeds=(0,))
    run = Run(planned.folder)
    run.begin()
    row = {"step": 3, "final/accuracy": 0.5, "final/loss": 0.7, "final/drift": 0.0}
    run.append(row)
    found = study.read(planned, ("valid",))
    assert (found.accuracy, found.loss) == ({"valid": 0.5}, {"valid": 0.7})
    assert found.drift == {"valid": 0.0}
    with pytest.raises(UserError, match="must have final/accuracy/valid; got none in"):
        study.read(planned, NAMES)


def test_a_folder_with_another_study_is_refused(tmp_path):
    planned = _plan(tmp_path, seeds=(0,))
    _run(planned)
    for section, key, value in (
        ("train", "steps", 4),
        ("init", "from", "runs/other"),
        ("lora", "rank", 3),
    ):
        others = _plan(tmp_path, seeds=(0,))
        for one in others:
            one.raw[section][key] = value
        said = f"--out must hold the runs of this study alone.*{section}.{key}: "
        with pytest.raises(UserError, match=said):
            _run(others)
    assert json.loads((planned[0].folder / "config.json").read_text())["config"]
