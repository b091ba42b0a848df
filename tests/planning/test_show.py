"""Tests of plans as text, from records made by hand."""

import copy

from fm_jax.planning import show

FITS = {
    "machine": "v5e:4x4*2",
    "devices": 32,
    "mesh": {"data": 2, "fsdp": 16},
    "params": {"total": 1_200_000, "non_embedding": 900_000},
    "vocab_size": 50_304,
    "steps": 2_000,
    "batch_size": 64,
    "length": 512,
    "micro_batches": 4,
    "remat": "names",
    "attention": {"compiled": "splash", "there": "splash"},
    "tokens": 65_536_000,
    "epochs": 1.5,
    "flops_per_step": {"6n": 2.4e11, "exact": 2e11, "compiled": 2.5e11},
    "memory": {
        "params": 300_000,
        "optimizer": 600_000,
        "average": 310_000,
        "batch": 12_300,
        "gradients": 300_000,
        "activations": 7_000_000,
        "host": 4_400_000,
        "needed": 8_522_300,
        "capacity": 16_900_000,
        "fits": True,
        "is_cpu_estimate": False,
    },
    "collectives": [
        {"kind": "all-reduce", "axes": ["data"], "count": 1, "bytes": 300_000,
         "wire_bytes": 600_000.0, "crosses_slices": True},
        {"kind": "all-gather", "axes": ["fsdp"], "count": 2_400, "bytes": 1_200,
         "wire_bytes": 1_100.0, "crosses_slices": False},
    ],
    "checkpoint": {"bytes": 18_000_000, "host_bytes": 5_000_000},
    "at_mfu": {"step_seconds": 0.25, "tokens_per_second": 131_072.0,
               "hours": 0.139, "mfu": 0.4},
    "roofline": {"step_seconds": 0.1, "tokens_per_second": 327_680.0,
                 "hours": 55.56, "mfu": 0.55, "compute_seconds": 0.1,
                 "memory_seconds": 0.05, "network_seconds": 0.0123},
    "compile_seconds": 12.34,
}  # fmt: skip


def _changed(**sections):
    found = copy.deepcopy(FITS)
    for name, values in sections.items():
        found[name] = found[name] | values if isinstance(values, dict) else values
    return found


def test_a_plan_that_fits_is_told_whole():
    assert show.lines(FITS) == [
        "machine   v5e:4x4*2: 32 devices, mesh data=2 * fsdp=16",
        "model     1,200,000 parameters (900,000 without embedding and head), 50,304 "
        "ids",
        "steps     2,000 of 64 x 512 tokens = 6.55e+07 tokens (1.50 epochs, 54.61 per "
        "parameter)",
        "batch     4 micro-batches, remat names",
        "attention splash",
        "FLOPs     a step: 2.4e+11 by 6N, 2e+11 exactly, 2.5e+11 as compiled (1.25 of "
        "exactly)",
        "memory    of a device",
        "  parameters                      300 kB",
        "  optimizer                       600 kB",
        "  average of weights              310 kB",
        "  batch                          12.3 kB",
        "  gradients                       300 kB",
        "  activations and the rest          7 MB",
        "  a device in all                8.52 MB of 16.9 MB",
        "  offloaded to the host           4.4 MB",
        "network   what a device says in a step",
        "  all-reduce          data                       1 times      300 kB  between "
        "slices",
        "  all-gather          fsdp                   2,400 times      1.2 kB",
        "roofline  100 ms a step, MFU 55%: 327,680 tokens/s, 55.6 h in all; alone: "
        "compute 100 ms, memory 50 ms, network 12.3 ms",
        "at --mfu  250 ms a step, MFU 40%: 131,072 tokens/s, 8.3 min in all",
        "saves     checkpoints of 18 MB, through 5 MB of memory on each host",
        "compiled  in 12.3 s",
    ]


def test_a_plan_says_what_attention_is_where_the_machine_is_another():
    found = _changed(attention={"compiled": "chunks", "there": "cudnn"})
    said = "attention cudnn on the GPU, chunks in what was compiled here"
    assert said in show.lines(found)


def test_a_plan_that_does_not_fit_says_by_how_much():
    found = _changed(memory={"needed": 20_000_000, "fits": False})
    said = "DOES NOT FIT: needs 20 MB of 16.9 MB on each device, 3.1 MB too much"
    assert said in show.lines(found)
    assert not any("DOES NOT FIT" in line for line in show.lines(FITS))


def test_a_plan_that_was_refused_says_what_is_known_without_it():
    found = _changed(memory={"needed": 20_000_000, "fits": False},
                     flops_per_step={"compiled": None})  # fmt: skip
    del found["collectives"], found["roofline"]
    for part in ("gradients", "activations", "host"):
        del found["memory"][part]
    text = show.lines(found)
    assert "FLOPs     a step: 2.4e+11 by 6N, 2e+11 exactly" in text
    place = text.index("memory    of a device")
    assert [line.split() for line in text[place + 1 : place + 5]] == [
        ["params", "300", "kB"],
        ["optimizer", "600", "kB"],
        ["average", "310", "kB"],
        ["batch", "12.3", "kB"],
    ]
    assert text[place + 5].startswith("DOES NOT FIT: needs 20 MB of")
    assert not any(line.startswith(("network", "roofline")) for line in text)


def test_without_a_chip_there_are_no_times_and_no_limit():
    found = _changed(memory={"capacity": None})
    del found["at_mfu"], found["roofline"]
    text = show.lines(found)
    assert "  a device in all                8.52 MB" in text
    assert not any(line.startswith(("roofline", "at --mfu")) for line in text)


def test_what_is_not_known_or_not_there_is_said():
    found = _changed(mesh={}, epochs=None, memory={"average": 0, "host": 0},
                     roofline={"memory_seconds": None})  # fmt: skip
    found |= {"mesh": {}, "collectives": []}
    text = "\n".join(show.lines(found))
    assert "mesh 1 device\n" in text
    assert "(corpus not prepared yet, 54.61 per parameter)" in text
    assert "memory unknown, network" in text
    assert "network   what a device says in a step\n  none\n" in text
    assert "average" not in text
    assert "offloaded" not in text


def test_a_simulated_chip_has_its_memory_only_estimated():
    (line,) = [
        line
        for line in show.lines(_changed(memory={"is_cpu_estimate": True}))
        if line.startswith("memory ")
    ]
    assert "(an estimate: XLA's compiler for CPUs" in line


def test_the_whole_run_is_told_in_hours_minutes_or_seconds():
    def shown(hours):
        (line,) = [
            line
            for line in show.lines(_changed(at_mfu={"hours": hours}))
            if line.startswith("at --mfu")
        ]
        return line.split(", ")[-1]

    assert shown(1234.56) == "1,234.6 h in all"
    assert shown(0.5) == "30.0 min in all"
    assert shown(0.005) == "18 s in all"


def test_the_overrides_of_a_plan_that_fits_can_be_typed():
    found = {"instead": {"overrides": {"model.remat": "full", "mesh.fsdp": 16}}}
    said = "This fits: --config.model.remat=full --config.mesh.fsdp=16"
    assert show.instead(found) == said


def test_a_table_is_aligned_with_its_numbers_to_the_right():
    rows = [("name", "shape", "bytes"), ("a/long/name", "3", "1,024"), ("b", "", "7")]
    assert show.table(rows) == [
        "name         shape  bytes",
        "a/long/name  3      1,024",
        "b                       7",
    ]
