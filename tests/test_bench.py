"""The benchmarks, tiny: each runs, checks other programs against ours, and returns numbers for a table and for JSON."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion import models
from diffusion.models.vit import ViT
from diffusion.patch import patchify, unpatchify
from experiments.bench import (
    blog,
    commands,
    decoding,
    features,
    jax_run,
    metrics,
    patch,
    patch_implementations,
    patch_report,
    patch_size,
    patch_size_cases,
    patch_size_report,
    peers,
    scan,
    startup,
    tables,
    timing,
    vit,
)
from experiments.config import Config, Data, Process, Sample, Train
from experiments.configs import blog as blog_config
from experiments.parts import DataSpec, resolve

NAMES = ("slow", "fast")
ROOT = Path(__file__).parent.parent
SPEC = DataSpec((8, 12, 2), tuple("abcde"))


def tiny() -> Config:
    """A network with all the fields that the PyTorch one has, small."""
    return Config(
        data=Data(size=(8, 12), channels=2),
        model=ViT(
            patch_size=4,
            width=16,
            depth=1,
            heads=2,
            bottleneck=6,
            norm="rms",
            mlp="swiglu",
            qk_norm=True,
            positions=("sincos", "learned", "rotary"),
            class_tokens=2,
        ),
        process=Process(times_mean=0.8),
        train=Train(batch_size=4, ema=(0.9,)),
        sample=Sample(batch_size=3, steps=4, guidance=2.0, guidance_high=0.7),
    )


def consistent(rows: dict, names: set[str]) -> None:
    """A `timing.summary` of these names, whose numbers follow from its timings."""
    assert set(rows) == names
    for name, row in rows.items():
        assert set(row["speed_over"]) == names - {name}
        assert row["per_second"] == pytest.approx(row["work"] / statistics.median(row["timings"]))


def test_speeds_are_medians_of_ratios_within_a_round():
    rows = timing.summary({"slow": [2.0, 4.0, 30.0], "fast": [1.0, 4.0, 3.0]}, {"slow": 2, "fast": 1})
    consistent(rows, set(NAMES))
    assert rows["fast"]["speed_over"] == {"slow": 1.0}  # of 1, 0.5 and 5
    assert rows["slow"]["seconds"] == 2.0
    assert tables.over(rows["fast"], "slow") == "1.00 x"
    assert tables.over(rows["slow"], "slow") == "1"


def test_programs_take_turns_and_every_other_round_runs_backwards():
    order = []
    programs = {name: lambda name=name: order.append(name) for name in NAMES}
    seconds = timing.interleave(programs, 3)
    assert order == [*NAMES, *NAMES, *NAMES[::-1], *NAMES]
    assert {name: len(s) for name, s in seconds.items()} == dict.fromkeys(NAMES, 3)


def test_calls_of_a_program_count_as_work():
    calls = []
    rows = timing.compare({"one": lambda: calls.append(1)}, work=3, rounds=2, calls=5)
    consistent(rows, {"one"})
    assert len(calls) == 5 * (1 + 2) and rows["one"]["work"] == 15


def test_a_result_that_cannot_be_written_fails_before_anything_is_measured(tmp_path):
    with pytest.raises(OSError):
        commands.check_json(str(tmp_path / "missing" / "result.json"))
    commands.check_json(None)
    commands.write_json(str(tmp_path / "result.json"), {"a": 1})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}


def test_targets_say_which_side_is_better():
    text = tables.targets([("speed", 2.0, "at least", 1.0), ("memory", 2.0, "at most", 1.0)])
    speed, memory = text.splitlines()[2:]
    assert speed.split()[-1] == "yes" and memory.split()[-1] == "NO"


@pytest.mark.parametrize("error", [2 * peers.TOLERANCE, float("nan")])
def test_programs_that_differ_are_not_the_same(error):
    assert peers.check_same("it", {"outputs": 0.0}) == {"outputs": 0.0}
    with pytest.raises(AssertionError, match="it does not compute what ours does"):
        peers.check_same("it", {"outputs": 0.0, "gradients": error})


@pytest.mark.slow
def test_vit_against_pytorch():
    pytest.importorskip("torch")
    config = tiny()
    result = vit.run(config, modes=("eager",), rounds=1, num_classes=5, peak_tflops=0.5)
    assert max(result["parity"].values()) < peers.TOLERANCE
    for kind in ("train", "sample"):
        consistent(result[kind], {"ours", "PyTorch eager"})
        assert all(row["mfu"] == pytest.approx(row["tflops"] / 0.5) for row in result[kind].values())
    assert json.loads(json.dumps(result)) == result
    assert "PyTorch eager" in vit.report(result)
    from experiments.bench import vit_peer

    config = jax_run.with_model(config, scan=True, depth=2)
    params = jax_run.params(resolve(config, SPEC), vit.NOISE)
    assert "blocks_0_2" in params and max(vit_peer.parity(config, SPEC, params).values()) < peers.TOLERANCE


@pytest.mark.slow
def test_a_scanned_network_beside_the_unrolled_one():
    config = jax_run.with_model(tiny(), depth=2, class_tokens_from=1)
    result = scan.run(config, {"tiny": config}, images=1, rounds=1)
    assert result["parity"]["outputs"] < peers.TOLERANCE
    consistent(result["train"], {"unrolled", "scanned"})
    assert all(row["trace"] > 0 and row["compile"] > 0 for row in result["compiled"]["tiny"].values())
    assert json.loads(json.dumps(result)) == result
    assert "training step of tiny, 1 images" in scan.report(result)
    with pytest.raises(ValueError, match="scan is a field of vit, not of blog"):
        scan.run(blog_config.get_config(), {})


@pytest.mark.slow
def test_features_against_pytorch():
    """Both networks, at every tap of the feature functions, spatial features included."""
    pytest.importorskip("torch")
    result = features.run(images=1, rounds=1)
    for name in ("efficientnet", "inception"):
        assert set(result[name]["errors"]) == {"PyTorch, channels first", "PyTorch, channels last"}
        assert max(result[name]["errors"].values()) < 1e-5
        consistent(result[name]["programs"], {"Flax", *result[name]["errors"]})
    assert json.loads(json.dumps(result)) == result
    assert "inception, batches of 1" in features.report(result)


@pytest.mark.slow
def test_another_network_is_not_timed(monkeypatch):
    """Parity can fail: it is run with a network in PyTorch that forgets one thing."""
    pytest.importorskip("torch")
    from experiments.bench import torch_vit, vit_peer

    copy = torch_vit.copy_params

    def other(network, params):
        params = jax.tree.map(lambda p: p, params)
        params["block_0"]["out"]["kernel"] = params["block_0"]["out"]["kernel"] * 2
        return copy(network, params)

    monkeypatch.setattr(torch_vit, "copy_params", other)
    config = tiny()
    with pytest.raises(AssertionError, match="does not compute what ours does"):
        vit_peer.parity(config, SPEC, jax_run.params(resolve(config, SPEC), vit.NOISE))


def test_flops_are_those_of_the_matrix_products():
    """XLA's count of a forward pass of the network, which has other operations too."""
    config = jax_run.with_model(tiny(), width=64, heads=2, bottleneck=32)
    model, x = resolve(config, SPEC).model, jax.ShapeDtypeStruct((1, *SPEC.shape), np.float32)
    t, y = jax.ShapeDtypeStruct((1,), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)
    counted = jax.jit(model.apply).lower(params, x, t, y).cost_analysis()["flops"]
    assert vit.forward_flops(config, SPEC) < counted < 1.15 * vit.forward_flops(config, SPEC)


def test_a_network_that_pytorch_lacks_is_refused():
    with pytest.raises(ValueError, match="model.dropout=0 only, not 0.5"):
        vit.peer_module(jax_run.with_model(tiny(), dropout=0.5))


def test_without_pytorch_a_comparison_says_how_to_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[torch\]', or pass --peer=none"):
        vit.peer_module(tiny())


def test_another_network_than_vit_is_refused():
    with pytest.raises(ValueError, match="times the network vit, not blog"):
        vit.run(tiny_blog())


def tiny_blog():
    config = blog_config.get_config()
    config.model = dataclasses.replace(config.model, depth=1, heads=2, head_dim=4)
    config.train = dataclasses.replace(config.train, batch_size=2, repeat=3)
    return config


@pytest.mark.slow
def test_blog():
    result = blog.run(tiny_blog(), compare=False, rounds=1, sample_steps=2)
    assert {"ours, 1 at a time", "ours, 64 at a time"} <= set(result["sample"])
    consistent(result["sample"], set(result["sample"]))
    assert result["train"]["ours"]["work"] == 6
    assert json.loads(json.dumps(result)) == result
    assert "sampling, per image" in blog.report(result)


def test_blog_against_keras():
    pytest.importorskip("tensorflow", reason="the published program needs the bench extra")
    result = blog.run(tiny_blog(), compare=True, rounds=1, sample_steps=2)
    assert result["parity"] and max(result["parity"].values()) < peers.TOLERANCE


def interpreted(types, signature, **_):
    """In guvectorize's place: the function itself, called for each image."""

    def decorate(f):
        def call(images, shape, out=None):
            out = np.zeros_like(shape) if out is None else out
            for each in zip(images, shape, out, strict=True):
                f(*each)
            return out

        return call

    return decorate


@pytest.mark.slow
def test_patch(tmp_path, monkeypatch):
    """The blog's versions, which Numba takes long for, are compiled by colab/patching.ipynb (test_notebooks)."""
    monkeypatch.setattr(patch_implementations, "njit", lambda f: f)
    monkeypatch.setattr(patch_implementations, "guvectorize", interpreted)
    result = patch.run(["28x28/7"], fraction=0.0002, rounds=2)
    case = result["cases"]["28x28/7"]
    assert case["bytes"] == 12 * 28 * 28 * 4
    promised = {"COPY", "COPIES", "NUMBA", "NUMBAS", "FUSEDS"}
    names = {getattr(patch_implementations, name) for name in promised} | set(patch_implementations.BLOG)
    assert names <= set(case["host"])
    consistent(case["host"], set(case["host"]))
    assert json.loads(json.dumps(result))["generator"] == result["generator"]
    assert "28x28/7" in patch_report.report(result)
    patch_report.plot(result, tmp_path / "patch.png")
    assert (tmp_path / "patch.png").stat().st_size and (tmp_path / "patch_against_copy.png").stat().st_size


@pytest.mark.slow
def test_patch_as_a_command_knows_its_flags():
    command = [sys.executable, "-m", "experiments.bench.patch", "--rounds=1", "--cases=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--cases=['none'] are not among" in done.stdout + done.stderr


def test_startup(monkeypatch):
    executed, started = [], []
    monkeypatch.setattr(startup, "execute", executed.append)
    monkeypatch.setattr(startup, "first_step", lambda arguments, cache: started.append((arguments, cache)))
    result = startup.run(["--config=here"], rounds=1, runs=2)
    consistent(result["import"], set(startup.PROGRAMS))
    consistent(result["first_step"], {"cold cache", "warm cache"})
    assert set(executed) == set(startup.PROGRAMS.values())
    assert all(arguments == ["--config=here"] for arguments, _ in started)
    caches = [cache for _, cache in started]
    assert sorted(map(caches.count, set(caches))) == [1, 1, 1, 3]  # three times a new one, three times the same
    assert "import diffusion" in startup.report(result)


def test_the_programs_that_are_timed_run(monkeypatch):
    monkeypatch.setattr(startup.subprocess, "run", lambda command, check: exec(command[2], {}))
    for program in startup.PROGRAMS.values():
        startup.execute(program)


def test_the_first_step_ends_the_job(tmp_path, monkeypatch):
    """A job that logs the step, leaves a file in its cache, and would go on for ten minutes."""
    job = (
        "import os, pathlib, sys, time\n"
        "workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))\n"
        "workdir.mkdir()\n"
        "(pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']) / sys.argv[1]).touch()\n"
        "(workdir / 'metrics.jsonl').write_text('1')\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(startup, "JOB", [sys.executable, "-c", job])
    startup.first_step(["--given"], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["--given"]


@pytest.mark.slow
def test_the_first_step_of_the_main_job_ends_it(tmp_path):
    small = ["--config.model.width=16", "--config.model.depth=1", "--config.train.steps=1000000"]
    startup.first_step(["--config=experiments/configs/smoke.py", *small], str(tmp_path))
    assert list(tmp_path.iterdir())  # the cache that a next start finds


@pytest.mark.slow
def test_a_main_job_that_cannot_start_is_told(tmp_path):
    with pytest.raises(ValueError, match="made no first step(.|\n)*--config.model.depht"):
        startup.first_step(["--config.model.depht=1"], str(tmp_path))


def linear_unet(*, patch_size, dtype, **fields):
    """In the U-Net's place, since that compiles for long: a matrix on the channels of a patch."""

    def init(key, xt, t, y=None):
        width = xt.shape[-1] * patch_size**2
        return {"kernel": jax.random.normal(key, (width, width), dtype)}

    def apply(params, xt, t, y=None, *, key=None):
        return unpatchify(patchify(xt, patch_size) @ params["kernel"], xt.shape[1:-1], patch_size)

    return models.Model(init, apply)


@pytest.mark.slow
def test_patch_size(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_size_cases, "unet", linear_unet)
    fields = {"num_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [4]}
    result = patch_size.run(size=8, patch_sizes=[1, 2], grid=4, fields=fields, batch_size=2, rounds=1)
    names = ["8 px, P = 1", "8 px, P = 2", "4 px, P = 1"]
    assert result["same_image"] == names[:2] and result["same_grid"] == names[:0:-1]
    for kind in ("train", "sample"):
        consistent(result[kind], set(names))
    cases = [result["cases"][name] for name in names]
    assert [case["positions"] for case in cases] == [64, 16, 16]
    assert [case["parameters"] for case in cases] == [3**2, 12**2, 3**2]
    assert all(case["bytes"]["train"] > 16 * case["parameters"] + 4 * 2 * case["size"] ** 2 * 3 for case in cases)
    assert json.loads(json.dumps(result)) == result
    text = patch_size_report.report(result)
    assert all(name in text for name in names) and "PyTorch is left out" in text
    claims = {what: (got, side) for what, got, side, _ in patch_size_report.claims(result)}
    (patched,), (pixels,) = (result["train"][name]["timings"] for name in names[1:])
    assert claims["training time, 8 px, P = 2 over 4 px, P = 1"] == (pytest.approx(patched / pixels), "at most")
    got, side = claims["sampling speed, 8 px, P = 2 over P = 1"]
    assert side == "at least" and got == result["sample"][names[1]]["speed_over"][names[0]]
    patch_size_report.plot(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size


@pytest.mark.slow
def test_operations_of_a_patch_size_are_counted_alike_twice():
    """By hand and by XLA, of a network as wide as the command's; nothing is compiled."""
    fields = {"num_channels": 64, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [32]}
    case = patch_size_cases.Case(256, 4)
    training = patch_size_cases.lowered_train(*patch_size_cases.network(case, fields, "float32"), case.shape(2))
    found = patch_size_cases.operations(case, fields, "float32", training, 2)
    for kind, flops in found["flops"].items():
        assert 0.95 < found["xla_flops"][kind] / flops < 1.05


def test_patch_sizes_and_peers_that_cannot_be_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delattr(patch_size, "measured")
    asked = {"size": 8, "grid": 4, "fields": {}}
    with pytest.raises(ValueError, match=r"--patch_sizes=\[0, 3\] do not divide --size=8"):
        patch_size.run(patch_sizes=[1, 0, 3], **asked)
    with pytest.raises(ValueError, match="is no checkout of PatchDiffusion-Pytorch"):
        patch_size.run(patch_sizes=[1], peer=str(tmp_path), **asked)


def test_another_published_network_is_not_timed(tmp_path):
    """A program with a network of the same name and arguments, and of other parameters."""
    pytest.importorskip("torch")
    from experiments.bench import torch_unet

    (tmp_path / "patch_diffusion").mkdir()
    (tmp_path / "patch_diffusion" / "unet.py").write_text(
        "import torch\n"
        "class UNetModel(torch.nn.Conv2d):\n"
        "    def __init__(self, in_channels, out_channels, **fields):\n"
        "        super().__init__(in_channels, out_channels, 3, padding=1)\n"
        "    def forward(self, x, clock):\n"
        "        return super().forward(x) + clock[:, None, None, None] / 1000\n"
    )
    fields = {"num_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [4]}
    case = patch_size_cases.Case(8, 2)
    amounts = {"batch_size": 2, "steps": 1, "sample_steps": 2}
    with pytest.raises(ValueError, match="does not fit this network"):
        patch_size_cases.compared(torch_unet, str(tmp_path), case, fields, "float32", ("eager",), **amounts)
    torch_unet.torch.manual_seed(0)
    module = torch_unet.network(str(tmp_path), size=8, patch_size=2, channels=3, fields=fields)
    before = [p.detach().clone() for p in module.parameters()]
    settings = {"mode": "eager", "dtype": "float32"}
    samples = torch_unet.sample(module, (2, 8, 8, 3), 2, **settings)()
    assert samples.shape == (2, 3, 8, 8) and samples.dtype == np.uint8
    torch_unet.train(module, np.ones((2, 8, 8, 3), np.float32), 3, rate=0.1, ema=0.9, **settings)()
    moved = [abs(p.detach() - b).max() for p, b in zip(module.parameters(), before, strict=True)]
    assert min(moved) > 0.05


@pytest.mark.slow
def test_decoding_reads_the_same_pixels_and_notices_others(monkeypatch):
    # Grain needs flags of the command line.
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(decoding, "SIZE", 16)
    monkeypatch.setattr(decoding, "BATCH", 4)
    result = decoding.run(images=7, rounds=1)
    assert result["images"] == 4 and {"diffusion.data", decoding.PILLOW, decoding.ROOF} == set(result["programs"])
    assert "4 JPEGs of 16x16" in decoding.report(result)
    monkeypatch.setattr(decoding, "ours", lambda source, order: 0)
    with pytest.raises(AssertionError, match="Pillow does not compute what ours does"):
        decoding.run(images=4, rounds=1)


@pytest.mark.slow
def test_metrics_are_compared_with_other_programs(monkeypatch):
    result = metrics.run(neighbours=40, images=60, features=5, rounds=1)
    assert json.loads(json.dumps(result))["errors"]["Frechet distance"] < 1e-9
    assert {"ours", "SciPy"} == result["frechet"].keys() and "ours" in result["neighbours"]
    text = metrics.report(result)
    assert "Frechet distance, 60 x 5" in text and "precision to coverage, 40 x 40 x 64" in text and "x SciPy" in text
    monkeypatch.setattr(metrics, "distance", lambda a, b: 1.0)
    with pytest.raises(AssertionError, match="does not compute what ours does"):
        metrics.run(neighbours=40, images=60, features=5, rounds=1)
