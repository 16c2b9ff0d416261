"""The accelerator run at its tiny sizes: every section, the budget, failures, the report; and its PyTorch U-Net."""

import importlib.util
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import loss
from diffusion.process import coefficients
from experiments import parts
from experiments.bench.accelerator import (
    command,
    compile_ahead,
    image_grid,
    jobs,
    peers,
    prepare,
    program_text,
    record,
    report,
    sections,
)
from experiments.configs import jit, lsun, mnist
from tests.models.vit_flops import vit_flops

ROOT = Path(__file__).parent.parent


def ran(folder, section):
    """One section's tiny run in this process, after the machine's: what it wrote, and the lines of the report."""
    text = command.run(folder, [section], budget=1e5, tiny=True, start=command.here)
    results = report.collected(folder)
    assert json.loads((folder / "results.json").read_text()) == results
    assert text == (folder / "results.md").read_text() and "Tiny sizes" in text
    assert f"# Accelerator run: {jax.devices()[0].device_kind}" in text
    values = results[section]
    assert not values["errors"] and "error" not in values, values
    assert set(values["rows"]) == set(values["planned"]) and values["rows"]
    for row in values["rows"].values():
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))
        assert "timings" not in row or row["seconds"] == pytest.approx(np.median(row["timings"]))
    return results, {row.what: row for row in report.rows(results)}


def left_out(results, section):
    return {entry.partition(":")[0] for entry in results[section]["left_out"]}


def over(rows, ours, theirs):
    """The ratio of images per second as it is printed."""
    return f"{rows[ours]['images_per_second'] / rows[theirs]['images_per_second']:.2f} x"


@pytest.mark.slow
def test_the_training_step_is_set_against_the_matrix_product_and_pytorch(tmp_path):
    results, lines = ran(tmp_path, "jit_train")
    rows, name = results["jit_train"]["rows"], "batch 4, xla"
    assert rows[name]["images_per_second"] == pytest.approx(4 / rows[name]["seconds"])
    roof = results["machine"]["rows"]["matrix product"]["flops_per_second"]
    wanted = results["jit_train"]["operations_per_image"] * rows[name]["images_per_second"] / roof
    assert rows[name]["mfu"] == pytest.approx(wanted)
    assert rows[name]["bytes"] > 16 * sum(a.size for a in jax.tree.leaves(jobs.params_like(jobs.jit_b16(tiny=True))))
    assert lines[f"{name}: share of the matrix product"].aim == "at least 50 %"
    assert "attention by cuDNN" in left_out(results, "jit_train")
    if importlib.util.find_spec("torch"):
        same = rows["PyTorch is the same network"]
        assert max(same["output"], same["gradient"]) < peers.TOLERANCE
        assert lines[f"{name}: speed over compiled PyTorch"].value == over(rows, name, "PyTorch, batch 4")
    else:
        assert "PyTorch" in left_out(results, "jit_train")


@pytest.mark.slow
def test_sampling_is_set_against_pytorch(tmp_path):
    results, lines = ran(tmp_path, "jit_sample")
    rows, name = results["jit_sample"]["rows"], "batch 2, xla"
    # Two steps of Heun: three evaluations, each with and without the label.
    job = jobs.jit_b16(tiny=True)
    operations = 6 * vit_flops(job.shape[:2], job.shape[2], **job.fields)
    assert rows[name]["flops_per_second"] == pytest.approx(operations * rows[name]["images_per_second"])
    if importlib.util.find_spec("torch"):
        assert lines[f"{name}: speed over compiled PyTorch"].value == over(rows, name, "PyTorch, batch 2")


@pytest.mark.slow
def test_the_unet_is_set_against_pytorch_and_a_network_without_patches(tmp_path):
    results, lines = ran(tmp_path, "unet")
    rows = results["unet"]["rows"]
    for kind in ("training", "sampling"):
        patched, plain = (rows[f"{kind}, {name}"] for name in ("32 px, P = 4", "8 px, P = 1"))
        time_, memory = (lines[f"{kind}, 32 px, P = 4 over 8 px, P = 1: {what}"] for what in ("time", "memory"))
        assert (time_.value, time_.aim) == (f"{patched['seconds'] / plain['seconds']:.3f}", "1.0")
        assert memory.value == f"{patched['bytes'] / plain['bytes']:.3f}"
    if importlib.util.find_spec("torch"):
        same, name = rows["PyTorch is the same network"], "training, 32 px, P = 4"
        assert max(same["output"], same["gradient"]) < peers.TOLERANCE
        assert lines[f"{name}: speed over compiled PyTorch"].value == over(rows, name, f"PyTorch, {name}")


def test_patches_are_set_against_a_copy_of_the_tokens(tmp_path):
    results, lines = ran(tmp_path, "patch")
    rows = results["patch"]["rows"]
    cut, copied = rows["patchify, 10 every 6"], rows["copy of the tokens, 10 every 6"]
    assert cut["bytes"] == sections.COPIES * 4 * 2 * 3 * (28**2 + 16 * 100)
    assert cut["over_copy"] == pytest.approx(cut["bytes_per_second"] / copied["bytes_per_second"])
    assert lines["patchify, P = 4"].aim == "at least 0.8 of a copy"
    assert lines["copy"].value == f"{results['machine']['rows']['copy']['bytes_per_second'] / 1e9:.3g} GB/s"


@pytest.mark.slow
def test_the_main_job_is_measured_with_several_steps_a_dispatch(tmp_path):
    results, lines = ran(tmp_path, "digits")
    several = results["digits"]["rows"]["10 steps a dispatch"]
    assert several["seconds_for_3600_steps"] == pytest.approx(360 * several["seconds"])
    assert "3,600 steps" in lines["main job, 1 step a dispatch"].value


@pytest.mark.slow
def test_numbers_hold_on_this_machine(tmp_path):
    results, lines = ran(tmp_path, "numbers")
    rows = results["numbers"]["rows"]
    gradients = rows["gradients, bfloat16 against float32"]
    assert 0 < gradients["relative_difference"] < 0.1 and "block_0" in gradients["by_module"]
    assert rows["JiT-B/16's step twice"]["equal"]
    assert rows["samples in two batch sizes"]["max_difference_of_255"] <= 1
    assert lines["JiT-B/16's step twice, operations as they are"].met


@pytest.mark.slow
def test_the_short_training_ends_with_samples_to_look_at(tmp_path):
    results, _ = ran(tmp_path, "training")
    row = results["training"]["rows"]["JiT, tiny"]
    assert row["steps"] == 8 and len(row["loss"]) == 2 and row["images"] == "made"
    for name in row["written"]:
        assert decoded((tmp_path / name).read_bytes()).shape == (2 + 18, 2 + 9 * 18, 3)


def decoded(png):
    """A PNG of `images.png`, by its chunks."""
    width, height = struct.unpack(">II", png[16:24])
    at = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    lines = np.frombuffer(zlib.decompress(png[at + 4 : at + 4 + length]), np.uint8).reshape(height, 1 + 3 * width)
    return lines[:, 1:].reshape(height, width, 3)


def test_a_grid_of_images_is_a_png_that_others_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    image_grid.save_grid(tmp_path / "grid.png", x, 2)
    canvas = np.asarray(image.open(tmp_path / "grid.png"))
    assert canvas.shape == (2 + 2 * 6, 2 + 2 * 7, 3) and (canvas == decoded((tmp_path / "grid.png").read_bytes())).all()
    np.testing.assert_array_equal(canvas[2:6, 9:14], x[1])


def test_made_images_show_their_labels():
    x, labels = image_grid.made(40, 32)
    again, _ = image_grid.made(40, 32)
    assert x.shape == (40, 32, 32, 3) and (x == again).all() and set(labels) <= set(range(9))
    centre = x[:, 12:20, 12:20].reshape(40, -1, 3).astype(int)
    # The colour of the label is the strongest somewhere in the middle, by far.
    contrast = [(c[:, k] - np.delete(c, k, 1).max(1)).max() for c, k in zip(centre, labels % 3, strict=True)]
    assert np.median(contrast) > 80


def test_given_images_are_read_and_others_are_refused(tmp_path):
    x, y = image_grid.made(16, 16)
    np.savez(tmp_path / "given.npz", x, y)
    read, labels = image_grid.load(str(tmp_path / "given.npz"))
    assert (read == x).all() and (labels == y).all() and labels.dtype == np.int32
    np.savez(tmp_path / "bare.npz", x)
    assert image_grid.load(str(tmp_path / "bare.npz"))[1] is None
    np.savez(tmp_path / "odd.npz", x[:, :14])
    with pytest.raises(ValueError, match="sides must be multiples of 4, the patch size, not 14x16"):
        command.run(tmp_path, ["training"], budget=9, tiny=True, images=str(tmp_path / "odd.npz"), start=command.here)
    assert not (tmp_path / "sections").exists()  # before anything was measured
    for wrong, shape in ((x[..., 0], r"\(16, 16, 16\)"), (x[..., :2], r"\(16, 16, 16, 2\)")):
        np.savez(tmp_path / "wrong.npz", wrong)
        with pytest.raises(ValueError, match=rf"arr_0 must be uint8 \[N, H, W, 3\], not uint8 {shape}"):
            image_grid.load(str(tmp_path / "wrong.npz"))
    wanted = "arr_1 must be 16 integers from 0 on, the labels, not "
    wrong_labels = (y - 9, rf"{wanted}-\d"), (y.astype(str), rf"{wanted}<U"), (y[1:], rf"{wanted}int32 \(15,\)")
    for labels, match in (*wrong_labels, (y.astype(float), rf"{wanted}float64 \(16,\)")):
        np.savez(tmp_path / "wrong.npz", x, labels)
        with pytest.raises(ValueError, match=match):
            image_grid.load(str(tmp_path / "wrong.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"can be read there \(it is no npz file, or holds objects\)"):
        image_grid.load(str(tmp_path / "text.npz"))
    with pytest.raises(ValueError, match="there is no such file"):
        command.run(tmp_path, ["training"], budget=9, tiny=True, images="nowhere.npz", start=command.here)
    with pytest.raises(ValueError, match="results cannot be written there"):
        command.run(tmp_path / "text.npz", ["patch"], budget=9, tiny=True, start=command.here)


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(record):
        record.run({"first": record_attempt(lambda: {"fine": 1}), "second": record_attempt(lambda: 1 / 0)})
        raise RuntimeError("the section broke")

    monkeypatch.setitem(sections.OURS, "patch", broken)
    monkeypatch.setitem(sections.OURS, "digits", lambda record: record.run({"next": record_attempt(dict)}))
    text = command.run(tmp_path, ["patch", "digits"], budget=1e5, tiny=True, start=command.here)
    values = record.read(tmp_path, "patch")
    assert values["rows"]["first"]["fine"] == 1 and "ZeroDivisionError" in values["errors"]["second"]
    assert "the section broke" in values["error"]
    assert "ZeroDivisionError" in text and "the section broke" in text
    assert list(record.read(tmp_path, "digits")["rows"]) == ["next"]
    assert "| patch | its JSON cannot be put into words | KeyError" in text


def record_attempt(measure):
    return record.Attempt(0, 0, measure)


def test_a_budget_that_is_used_up_leaves_sections_out_and_says_so(tmp_path):
    text = command.run(tmp_path, report.SECTIONS, budget=0, tiny=True, start=command.here)
    for name in report.SECTIONS:
        values = record.read(tmp_path, name)
        assert not values["rows"] and "all of it: the budget was used up" in values["left_out"]
        assert f"- {name}: all of it: the budget was used up" in text


def test_an_attempt_too_long_for_what_is_left_is_left_out(tmp_path):
    short = record.Record(tmp_path, "patch", time.time() + 30)
    short.run({"long": record.Attempt(10, 50, dict), "short": record.Attempt(1, 0, dict)})
    assert list(short.values["rows"]) == ["short"]
    assert short.values["left_out"][0].startswith("long: about 60 s needed, ")


def test_shares_that_are_not_used_go_to_those_that_follow(tmp_path):
    asked = []
    start = lambda task, record, grace: asked.append((task.section, record.left()))  # noqa: E731
    command.run(tmp_path, ["patch", "training"], budget=100, tiny=True, start=start)
    given = dict(asked)
    assert given["machine"] == pytest.approx(100 * 15 / (15 + 22 + 32), abs=1)
    assert given["training"] == pytest.approx(100, abs=1)


def sleeping(seconds, status=0):
    script = f"import time, sys; time.sleep({seconds}); sys.exit({status})"
    return subprocess.Popen([sys.executable, "-c", script], start_new_session=True)


def test_programs_are_compiled_several_at_a_time_and_what_was_not_is_said(tmp_path, capsys):
    fine, bad, long = (prepare.Piece("digits", "ours", "fine"), *[prepare.Piece("unet", "ours", n) for n in "bl"])
    peer_pieces = [prepare.Piece("unet", "peer", f"PyTorch {i}") for i in range(3)]
    begun, together = [], []

    def start(piece):
        alive = [p.part for p, process in begun if process.poll() is None]
        together.append((len(alive), alive.count("peer") if piece.part == "peer" else 0))
        begun.append((piece, sleeping(60 if piece == long else 0.3, status=piece == bad)))
        return begun[-1][1]

    begin = time.time()
    result = prepare.prepare(tmp_path, [*peer_pieces, fine, bad, long], time.time() + 8, start, at_once=3)
    assert time.time() - begin < 40 and len(begun) == 6
    assert max(n for n, _ in together) == 2 and max(peers for _, peers in together) == 1
    assert all(process.poll() is not None for _, process in begun)  # ended, none left behind
    assert set(result["seconds"]) == {"digits:ours:fine", *(":".join(piece) for piece in peer_pieces)}
    assert (result["failed"], result["not_reached"]) == (["unet:ours:b"], ["unet:ours:l"])
    assert json.loads(record.prepared_path(tmp_path).read_text()) == result
    said = capsys.readouterr().out
    assert re.search(rf"unet, ours, b: failed after \d+ s, see {re.escape(str(prepare.log(tmp_path, bad)))}", said)
    assert "not compiled before, for lack of time: unet:ours:l" in said

    def needed(section, name, programs=(), part="ours"):
        return record.Record(tmp_path, section, 0, part=part).needed(name, record.Attempt(10, 50, dict, programs))

    assert needed("digits", "fine") == 10 and needed("digits", "other") == 60
    assert needed("digits", "other", ("fine",)) == 10 and needed("digits", "other", ("fine", "b")) == 60
    assert needed("unet", "PyTorch 0", part="peer") == 10 and needed("unet", "PyTorch 0") == 60
    write_machine(tmp_path, "gpu")
    text = report.report(report.collected(tmp_path))
    assert "4 programs were compiled in" in text and "unet:ours:b (failed), unet:ours:l (not reached)" in text


def write_machine(folder, backend):
    record.write_json(record.path(folder, "machine"), {"machine": {"backend": backend, "device": "a card"}})


@pytest.mark.parametrize(
    ("backend", "cores", "sections_", "compiles"),
    [("gpu", 12, ["digits"], True), ("tpu", 12, ["digits"], False), ("gpu", 3, ["digits"], False)]
    + [("gpu", 12, ["patch"], False)],
)
def test_programs_are_compiled_first_where_that_helps(tmp_path, monkeypatch, backend, cores, sections_, compiles):
    given = []
    monkeypatch.setattr(prepare, "prepare", lambda folder, wanted, until, start, at_once: given.append(wanted))
    monkeypatch.setattr(prepare, "room", lambda: cores)
    write_machine(tmp_path, backend)
    command.compile_first(tmp_path, sections_, time.time() + 100, None)
    assert [len(wanted) for wanted in given] == ([2] if compiles else [])


def test_all_that_is_long_to_compile_is_compiled_first(monkeypatch):
    wanted = prepare.pieces(report.SECTIONS)
    programs = {(s, name) for s, make in sections.PROGRAMS.items() for name in make(False)}
    assert {(p.section, p.name) for p in wanted if p.part == "ours"} == {
        (s, name) for s, name in programs if s not in ("machine", "patch")
    }
    assert {p.section for p in prepare.pieces(["digits", "patch"])} == {"digits"}
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    assert not any(p.part == "peer" for p in prepare.pieces(report.SECTIONS))


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """(section, part) -> the attempts of its full size."""
    x, y = image_grid.made(16, 64)
    np.savez(tmp_path / "images.npz", x, y)

    def of(section, part):
        found = {}
        with monkeypatch.context() as m:
            m.setattr(record.Record, "run", lambda self, attempts: found.update(attempts))
            full = record.Record(tmp_path, section, time.time() + 1e6, part=part, images=str(tmp_path / "images.npz"))
            (peers.PEERS if part == "peer" else sections.OURS)[section](full)
        return found

    return of


def test_what_was_compiled_first_fits_into_eight_minutes(planned):
    """Each task's attempts, once compiled, fit into its share when compilation has taken 100 of the 480 seconds."""
    rest = [task for task in command.TASKS if task.section != "machine"]
    budget = 480 - 12 - 100  # the machine's section took 12 seconds on an H200
    for task in rest:
        if task.part == "peer" and not importlib.util.find_spec("torch"):
            continue
        attempts = planned(task.section, task.part)
        if task.part == "peer":
            parity = {name for name in attempts if "same network" in name}
            attempts = {name: attempts[name] for name in {*peers.FIRST[task.section], *parity}}
        needed = 6 + sum(attempt.seconds for attempt in attempts.values()) + command.CLOSING
        assert needed <= budget * task.share / sum(t.share for t in rest), task


def test_attempts_name_programs_that_there_are(planned):
    for section in {p.section for p in prepare.pieces(report.SECTIONS) if p.part == record.OURS}:
        programs = set(sections.PROGRAMS[section](False))
        attempts = planned(section, "ours")
        assert programs == {p for name, a in attempts.items() for p in a.programs or (name,)}, section
    if importlib.util.find_spec("torch"):
        for section, names in peers.FIRST.items():
            assert set(names) <= set(planned(section, "peer"))


@pytest.mark.slow
def test_a_program_that_was_compiled_before_is_found_by_its_section(tmp_path, monkeypatch):
    """Both ask JAX for the same program in the same environment, which is what its cache goes by."""
    asked = []

    def compile_(self, where=None, **options):
        asked.append((str(jax.make_jaxpr(self.function)(*self.args)), self.options, where, options))
        raise RuntimeError("seen")

    monkeypatch.setattr(jobs.Program, "compile", compile_)
    piece = prepare.Piece("digits", "ours", "1 step a dispatch")
    with pytest.raises(RuntimeError, match="seen"):
        prepare.here(piece, tmp_path, None)
    measured = record.Record(tmp_path, "digits", time.time() + 1e6)
    sections.OURS["digits"](measured)
    assert "RuntimeError: seen" in measured.values["errors"][piece.name]
    assert asked[0] == asked[1] and asked[0] != asked[2]
    for task in command.TASKS:
        first = command.environment(tmp_path, prepare.Piece(task.section, task.part, "any"), tiny=False)
        assert first == command.environment(tmp_path, task, tiny=False)
        assert first["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path))


@pytest.mark.slow
def test_a_rehearsal_does_the_work_of_one_attempt_once(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    rows = []

    class Tiny(record.Record):
        def __init__(self, *args, **options):
            super().__init__(*args, tiny=True, **options)
            self.rows = rows.append(self.values["rows"])

    monkeypatch.setattr(prepare, "Record", Tiny)
    command.run(tmp_path, ["machine"], budget=1e5, tiny=True, start=command.here)
    before = sorted(tmp_path.rglob("*"))
    prepare.here(prepare.Piece("jit_train", "peer", "PyTorch, batch 4"), tmp_path, None)
    assert list(rows[-1]) == ["PyTorch, batch 4"] and "timings" not in rows[-1]["PyTorch, batch 4"]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        prepare.here(prepare.Piece("jit_train", "peer", "PyTorch, batch 5"), tmp_path, None)


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_and_what_it_planned_is_left_out(tmp_path, monkeypatch):
    script = "import sys, time; print('begun', flush=True); time.sleep(600)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", script], **options))
    late = record.Record(tmp_path, "patch", time.time() + 2)
    late.values["planned"] = ["patchify"]
    late.save()
    begin = time.time()
    command.in_process(command.Task("patch", command.OURS, 1), late, 0)
    values = record.read(tmp_path, "patch")
    assert time.time() - begin < 60 and "its share of the budget being used up" in values["error"]
    assert "begun" in values["error"] and values["left_out"] == ["patchify: not reached"]


@pytest.mark.slow
def test_as_a_command_without_an_accelerator_or_optional_packages(tmp_path):
    """As users type it, every package blocked that a device image may lack; each section a process of its own."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {MISSING!r}:\n"
        "            raise ModuleNotFoundError(f'blocked: {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    out = tmp_path / "out"
    arguments = ["--only=patch", f"--out={out}", "--budget_s=200"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.accelerator", *arguments],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "JAX_PLATFORMS": "cpu",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This machine has no accelerator" in done.stdout and "| patch | patchify, P = 4 |" in done.stdout
    assert len(record.read(out, "patch")["rows"]) == 8


MISSING = (
    "ml_collections",
    "tensorflow_datasets",
    "orbax",
    "PIL",
    "tqdm",
    "matplotlib",
    "mlxtend",
    "torch",
    "safetensors",
)


def test_sections_and_cards_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"--only=jit: \['jit'\] are not among machine, jit_train"):
        command.chosen(["jit"])
    assert command.chosen(["training", "unet"]) == ("unet", "training")
    with pytest.raises(ValueError, match="no such card is described in targets/, only h100"):
        compile_ahead.target("abacus")
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jax-cuda12-plugin\[with-cuda\]=="):
        compile_ahead.prepare()


@pytest.mark.slow
def test_programs_are_compiled_ahead_at_their_full_size():
    """Those that are quickly made are traced, which is where a wrong shape or field is found; none is compiled."""
    for name, make, options in compile_ahead.programs(report.SECTIONS, tiny=False):
        assert bool(options) == name.startswith("numbers")
        if name.startswith(("machine", "patch", "digits, 1 step")):
            program = make()
            jax.eval_shape(program.function, *program.args)


def test_the_text_of_a_program_is_counted():
    text = """
      %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop
      %c.1 = (f32[2]{0}, s8[4]{0}) custom-call(%fusion.1), custom_call_target="__cublas$gemm"
      %c.2 = f32[2]{0} custom-call(%c.1), custom_call_target="__cublas$gemm"
      %r.1 = f32[2]{0} all-reduce-start(%c.2)
    """
    assert program_text.calls(text) == {
        "fusions": 1,
        "library_calls": {"__cublas$gemm": 2},
        "collectives": {"all-reduce": 1},
    }


def test_what_a_program_moves_is_counted_with_its_loops():
    text = """HloModule jit_f

%fused (p.1: bf16[4,2]) -> bf16[2,4] {
  %p.1 = bf16[4,2]{1,0} parameter(0)
  ROOT %t = bf16[2,4]{1,0} transpose(%p.1), dimensions={1,0}
}

%body.1 (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %x.1 = f32[8]{0} get-tuple-element(%carry), index=1
  %loop_add_fusion = f32[8]{0} fusion(%x.1), kind=kLoop, calls=%fused
  ROOT %out.1 = (s32[], f32[8]{0}) tuple(%x.1, %loop_add_fusion)
}

ENTRY %main.1 (a.1: bf16[4,2]) -> bf16[2,4] {
  %a.1 = bf16[4,2]{1,0} parameter(0)
  %b.1 = (s32[], f32[8]{0}) tuple()
  %loop_transpose_fusion = bf16[2,4]{1,0} fusion(%a.1), kind=kLoop, calls=%fused, metadata={op_name="%a.1"}
  %w.1 = (s32[], f32[8]{0}) while(%b.1), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %m.1 = (bf16[2,2]{1,0}, s8[3]{0}) custom-call(%a.1, %loop_transpose_fusion), custom_call_target="__cublas"
}
"""
    wanted = {"fusion_bytes": 16 + 16 + 5 * (32 + 32), "library_bytes": 8 + 3 + 16 + 16, "transposing_fusions": 1}
    assert program_text.traffic(text) == wanted


def test_of_arrays_of_all_layers_a_loop_moves_a_slice_at_a_time():
    text = """HloModule jit_f

%store (p.1: f32[5,8], p.2: f32[8], p.3: s32[]) -> f32[5,8] {
  %p.1 = f32[5,8]{1,0} parameter(0)
  %p.2 = f32[8]{0} parameter(1)
  %p.3 = s32[] parameter(2)
  %b.1 = f32[1,8]{1,0} bitcast(%p.2)
  ROOT %u = f32[5,8]{1,0} dynamic-update-slice(%p.1, %b.1, %p.3, %p.3)
}

%load (p.4: f32[5,8], p.5: s32[]) -> f32[8] {
  %p.4 = f32[5,8]{1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  %s.1 = f32[1,8]{1,0} dynamic-slice(%p.4, %p.5, %p.5), dynamic_slice_sizes={1,8}
  ROOT %b.2 = f32[8]{0} bitcast(%s.1)
}

%product (p.6: f32[5,8], p.7: s32[]) -> f32[4] {
  %p.6 = f32[5,8]{1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  %s.2 = f32[1,8]{1,0} dynamic-slice(%p.6, %p.7, %p.7), dynamic_slice_sizes={1,8}
  ROOT %c.2 = f32[4]{0} custom-call(%s.2), custom_call_target="__cublas"
}

ENTRY %main.1 (a.1: f32[5,8], a.2: s32[]) -> f32[5,8] {
  %a.1 = f32[5,8]{1,0} parameter(0)
  %a.2 = s32[] parameter(1)
  %l = f32[8]{0} fusion(%a.1, %a.2), kind=kLoop, calls=%load
  %m = f32[4]{0} fusion(%a.1, %a.2), kind=kCustom, calls=%product
  ROOT %r = f32[5,8]{1,0} fusion(%a.1, %l, %a.2), kind=kLoop, calls=%store
}
"""
    load, store, product = 32 + 4 + 32, 32 + 4 + 32, 32 + 4 + 16
    wanted = {"fusion_bytes": load + store, "library_bytes": product, "transposing_fusions": 0}
    assert program_text.traffic(text) == wanted


CONFIGS = {
    "jit_b16": (jit.get_config, jobs.jit_b16, (256, 256, 3), 1000),
    "lsun": (lsun.get_config, jobs.lsun, (256, 256, 3), 0),
    "digits": (mnist.get_config, jobs.digits, (28, 28, 1), 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_jobs_are_the_configs_of_the_same_names(name):
    get_config, make, shape, classes = CONFIGS[name]
    config, job = get_config(), make()
    run = parts.resolve(config, parts.DataSpec(shape, tuple(map(str, range(classes)))))
    assert (job.shape, job.num_classes, job.ema) == (run.spec.shape, classes, config.train.ema[0])
    wanted = jax.eval_shape(lambda: parts.init_params(run))
    assert jax.tree.map(lambda a: a.shape, jobs.params_like(job)) == jax.tree.map(lambda a: a.shape, wanted)
    np.testing.assert_allclose(job.grid, run.grid[-len(job.grid) :])

    def drawn(recipe, t):
        coef = coefficients(recipe.path, t)
        return recipe.path(t), recipe.weight(coef), recipe.times(jax.random.key(0), 64)

    t = jnp.linspace(0.05, 0.95, 5)
    jax.tree.map(np.testing.assert_array_equal, *(quickly(partial(drawn, recipe), t) for recipe in (job, run)))
    # Two steps of each optimiser from the same gradients, the first being one of rate 0.
    params = jobs.random_params(small({k: v for k, v in wanted.items() if k in ("block_0", "middle_0", "head")}))

    def second(optimizer, params):
        _, state = optimizer.update(params, optimizer.init(params), params)
        return optimizer.update(params, state, params)[0]

    steps = [quickly(partial(second, optimizer), params) for optimizer in (job.optimizer, run.optimizer)]
    assert max(abs(a).max() for a in jax.tree.leaves(steps[0])) > 0
    jax.tree.map(np.testing.assert_array_equal, *steps)


def small(like):
    """The same tree with short axes, for an optimiser that knows names and ranks only."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(tuple(min(n, 2) for n in a.shape), a.dtype), like)


def quickly(f, *args):
    """f(*args), compiled with little care."""
    return jax.jit(f).lower(*args).compile(compiler_options=sections.QUICK)(*args)


@pytest.fixture(scope="module")
def torch_unet():
    """Our U-Net and the one in PyTorch with its parameters, tiny, and a batch."""
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_patch_unet

    job = jobs.lsun(tiny=True, dtype=jnp.float32, channel_mult=(1.0, 2.0), attention_resolutions=(8,))
    params = jobs.random_params(jobs.params_like(job))
    params["head"]["kernel"] *= 10  # so that some predictions lie outside [-1, 1], where the sampler clips them
    module = torch_patch_unet.copy_params(torch_patch_unet.UNet(32, 3, **job.fields), params)
    rng = np.random.default_rng(0)
    x0, eps = rng.uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32), rng.standard_normal((4, 32, 32, 3), np.float32)
    return torch, torch_patch_unet, job, params, module, x0, eps


@pytest.mark.slow
def test_the_pytorch_unet_has_our_loss_at_both_ends_of_the_chain(torch_unet):
    torch, peer, job, params, module, x0, eps = torch_unet
    i = np.array([1, 2, 500, 1000])
    drawn = loss.Draw(jnp.asarray(i / 1000, jnp.float32), jnp.asarray(eps))
    value, grads = quickly(jax.value_and_grad(lambda p: jobs.loss_at(job, p, drawn, x0, None)), params)
    module.zero_grad()
    theirs = peer.loss_at(module, peer.linear_chain("cpu"), *map(torch.from_numpy, (x0, i, eps)))
    theirs.backward()
    assert theirs.item() == pytest.approx(float(value), rel=1e-4)
    slopes = peer.copy_params(peer.UNet(32, 3, **job.fields), jax.tree.map(np.asarray, grads))
    pairs = [(p.grad, g) for p, g in zip(module.parameters(), slopes.parameters(), strict=True)]
    assert sum((a - b).square().sum() for a, b in pairs) < 1e-6 * sum(b.square().sum() for _, b in pairs)


@pytest.mark.slow
def test_the_pytorch_unet_samples_as_ours_without_noise(torch_unet, monkeypatch):
    """Both samplers from the same start, the noise of every step taken for zero."""
    torch, peer, job, params, module, _, eps = torch_unet
    from diffusion import sample

    steps = [1000, 600, 200, 1, 0]
    monkeypatch.setattr(sample, "normal", lambda keys, like: jnp.zeros_like(like))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)

    def sampled(params, x1):
        denoise = job.guided(lambda xt, t, y: job.model.apply(params, xt, t))
        settings = dict(prediction="x0", sampler=job.sampler)
        return sample.sample(jax.random.key(0), denoise, job.path, x1, np.array(steps) / 1000, **settings)

    x = quickly(sampled, params, jnp.asarray(eps))
    theirs = peer.sample(module, peer.linear_chain("cpu"), torch.from_numpy(eps), steps).numpy()
    ours = np.round((np.clip(x, -1, 1) + 1) * 127.5)
    assert abs(ours - theirs).max() <= 1 and theirs.std() > 1


def test_a_unet_that_pytorch_lacks_is_refused(torch_unet):
    _, peer, job, params, *_ = torch_unet
    with pytest.raises(ValueError, match="do not halve evenly"):
        peer.UNet(20, 3, **job.fields)
    with pytest.raises(ValueError, match="learned_variance='head' only"):
        peer.UNet(32, 3, **job.fields | {"learned_variance": "none"})
    with pytest.raises(ValueError, match="no counterpart"):
        peer.copy_params(peer.UNet(32, 3, **job.fields), {"more": np.zeros(1), **params})


def test_the_pytorch_sampler_of_the_transformer_is_ours():
    torch = pytest.importorskip("torch")
    from diffusion import sample

    job = jobs.jit_b16(tiny=True, dtype=jnp.float32)
    network = lambda x, t, y: x * t[:, None, None, None] + 0.01 * y[:, None, None, None]  # noqa: E731
    x1 = np.random.default_rng(0).standard_normal((3, *job.shape), np.float32)
    y, grid = np.array([0, 1, 2], np.int32), np.linspace(1, 0, 4)
    settings = dict(prediction="x0", sampler=job.sampler)
    ours = sample.sample(
        jax.random.key(0), job.guided(network), job.path, jnp.asarray(x1), grid, jnp.asarray(y), **settings
    )
    scales = [2.9 if t <= 0.9 else 1.0 for t in grid]
    start = torch.from_numpy(x1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "randn", lambda *shape, device: start)
        theirs = peers.heun(
            torch, network, torch.from_numpy(y), job.shape, grid.tolist(), job.num_classes, scales
        ).numpy()
    assert abs(np.round((np.clip(ours, -1, 1) + 1) * 127.5) - theirs).max() <= 1 and theirs.std() > 1
