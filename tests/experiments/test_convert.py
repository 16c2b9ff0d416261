"""experiments.convert: published weights become a run that the other commands take up."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from diffusion.io import checkpoint, stored_config
from diffusion.models.vit import ViT
from diffusion.pretrained import layouts
from experiments import config as configs
from experiments import convert, objective, parts
from experiments.parts import DataSpec
from experiments.run_dir import RunDir
from tests.experiments.runs import ROOT, call, samples
from tests.pretrained.test_layouts import value


def tiny() -> configs.Config:
    config = configs.Config(name="dit")
    config.data.size, config.data.channels = (8, 8), 1
    config.model = ViT(patch_size=4, width=8, depth=1, heads=2)
    config.process = configs.Process(path="vp", prediction="eps", loss_in=None, times="grid")
    config.train = configs.Train(steps=2, batch_size=2, warmup=0, log_every=1)
    config.sample = configs.Sample(count=4, steps=2, batch_size=4)
    return config


def dit(config: configs.Config, classes: int) -> dict[str, np.ndarray]:
    """A state dict as DiT's program has it."""
    w, p, c = config.model.width, config.model.patch_size, config.data.channels
    shapes = {
        "pos_embed": (1, 4, w),
        "x_embedder.proj.weight": (w, c, p, p),
        "x_embedder.proj.bias": (w,),
        "t_embedder.mlp.0.weight": (w, 256),
        "t_embedder.mlp.0.bias": (w,),
        "t_embedder.mlp.2.weight": (w, w),
        "t_embedder.mlp.2.bias": (w,),
        "y_embedder.embedding_table.weight": (classes + 1, w),
        "blocks.0.attn.qkv.weight": (3 * w, w),
        "blocks.0.attn.qkv.bias": (3 * w,),
        "blocks.0.attn.proj.weight": (w, w),
        "blocks.0.attn.proj.bias": (w,),
        "blocks.0.mlp.fc1.weight": (4 * w, w),
        "blocks.0.mlp.fc1.bias": (4 * w,),
        "blocks.0.mlp.fc2.weight": (w, 4 * w),
        "blocks.0.mlp.fc2.bias": (w,),
        "blocks.0.adaLN_modulation.1.weight": (6 * w, w),
        "blocks.0.adaLN_modulation.1.bias": (6 * w,),
        "final_layer.linear.weight": (p * p * c, w),
        "final_layer.linear.bias": (p * p * c,),
        "final_layer.adaLN_modulation.1.weight": (2 * w, w),
        "final_layer.adaLN_modulation.1.bias": (2 * w,),
    }
    return {name: value(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A converted run, made by the command line."""
    folder = tmp_path_factory.mktemp("convert")
    np.savez(folder / "dit.npz", **dit(tiny(), 3))
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    (folder / "config.py").write_text(
        f"from experiments.config import *\nfrom diffusion.models.vit import ViT\ndef get_config(): return {tiny()!r}\n"
    )
    command = f"""{sys.executable} -m experiments.convert --source={folder}/dit.npz --layout=dit
        --config={folder}/config.py --classes={folder}/classes.txt --workdir={folder}/run"""
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "now step 0" in done.stdout and f"experiments.sample --workdir={folder}/run" in done.stdout
    return folder / "run"


def test_the_run_describes_itself_and_holds_the_weights(converted):
    config, spec = RunDir(converted).stored()
    assert config == tiny() and spec == DataSpec((8, 8, 1), ("ant", "bee", "cat"))
    ema, step = checkpoint.restore_ema(converted / "checkpoints")
    run = parts.resolve(config, spec)
    like = jax.eval_shape(lambda: parts.init_params(run))
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, ema["0"], layouts.from_torch(dit(config, 3), like, layouts.dit(4)))


@pytest.mark.slow
def test_the_weights_of_an_entry_of_a_training_checkpoint_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in dit(tiny(), 3).items()}
    torch.save({"ema": tensors, "step": 7}, tmp_path / "dit.pt")
    convert.convert(
        tiny(), tmp_path / "run", str(tmp_path / "dit.pt"), layouts.dit(4), class_names=("a", "b", "c"), entry="ema"
    )
    found = RunDir(tmp_path / "run").weights()[0]
    np.testing.assert_array_equal(found["embed"]["bias"], dit(tiny(), 3)["x_embedder.proj.bias"])


@pytest.mark.slow
def test_a_run_of_one_set_of_weights_has_one_average(tmp_path, monkeypatch):
    config = tiny()
    config.train.ema = (0.9999, 0.9996)
    decays = {None: 0.9999, "model_ema1": 0.9999, "model_ema2": 0.9996, "model_ema3": 0.9999, "ema": 0.9999}
    assert {entry: convert.one_average(config, entry).train.ema for entry in decays} == {
        entry: (decay,) for entry, decay in decays.items()
    }
    np.savez(tmp_path / "dit.npz", **dit(tiny(), 3))
    read = layouts.read
    monkeypatch.setattr(layouts, "read", lambda source, entry: read(source, None))
    source = str(tmp_path / "dit.npz")
    convert.convert(config, tmp_path / "run", source, layouts.dit(4), class_names=("a", "b", "c"), entry="model_ema2")
    assert RunDir(tmp_path / "run").stored()[0].train.ema == (0.9996,)
    assert set(checkpoint.restore_ema(tmp_path / "run" / "checkpoints")[0]) == {"0"}


def test_it_is_sampled_from(converted, tmp_path):
    printed = call(converted, f"--outdir={tmp_path / 'sampled'}", "--num_samples=3", "--labels=bee,cat")
    assert "from step 0" in printed
    images, labels = samples(tmp_path / "sampled")
    assert images.shape == (3, 8, 8, 1) and labels.tolist() == [1, 2, 1]
    assert images.std() > 0


def test_training_goes_on_from_it(converted):
    """The state is the one that training would have started with, had it initialised these parameters."""
    config, spec = RunDir(converted).stored()
    params = jax.tree.map(jnp.asarray, checkpoint.restore_ema(converted / "checkpoints")[0]["0"])
    wanted = objective.init_state(parts.resolve(config, spec), params)
    state, step = checkpoint.restore(converted / "checkpoints", wanted)
    assert step == 0 and jax.tree.structure(state) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    RunDir(converted).open(config, spec)  # the same config continues it


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path):
    source, workdir = tmp_path / "dit.npz", tmp_path / "run"
    np.savez(source, **dit(tiny(), 3))
    names = ("0", "1", "2")

    def refused(message, *, change=lambda config: None, source=source, layout=None, class_names=names):
        config = tiny()
        change(config)
        with pytest.raises((ValueError, OSError), match=message):
            convert.convert(config, workdir, source, layout or layouts.dit(4), class_names=class_names)
        assert not (workdir / stored_config.CONFIG).exists() and not (workdir / "checkpoints").exists()

    refused("--source is missing", source=None)
    refused("none.pt: there is no such file", source=tmp_path / "none.pt")
    refused(r"--config\.data\.size=None", change=lambda c: setattr(c.data, "size", None))
    refused(r"--config\.data\.channels=None", change=lambda c: setattr(c.data, "channels", None))
    refused(r"data\.range=\(0, 1\): published weights are", change=lambda c: setattr(c.data, "range", (0, 1)))
    refused(r"3 classes need --config\.data\.labels", change=lambda c: setattr(c.data, "labels", False))
    refused(r"unexpected key: y_embedder\.embedding_table\.weight \[4, 8\]", class_names=())
    refused(
        r"shape mismatch: x_embedder\.proj\.bias is \[8\], must be \[16\]",
        change=lambda c: setattr(c.model, "width", 16),
    )
    refused("no entry for the parameter block_0", layout=layouts.patch_unet())
    broken = dit(tiny(), 3)
    broken["blocks.0.attn.proj.bias"] = broken["blocks.0.attn.proj.bias"] * [np.inf, np.nan, *[1] * 6]
    np.savez(tmp_path / "broken.npz", **broken)
    refused(r"broken\.npz: 2 values are NaN or infinite, in block_0/.*bias: download", source=tmp_path / "broken.npz")
    refused("sample.sampler='rk4'", change=lambda c: setattr(c.sample, "sampler", "rk4"))
    workdir.mkdir(exist_ok=True)
    (workdir / stored_config.CONFIG).write_text(json.dumps({}))
    with pytest.raises(ValueError, match="holds a run already; pass another --workdir"):
        convert.convert(tiny(), workdir, source, layouts.dit(4), class_names=names)


def test_flags_name_layout_and_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("tench\ngold fish\n")
    assert convert.class_names("0") == () and convert.class_names("3") == ("0", "1", "2")
    assert convert.class_names(str(tmp_path / "classes.txt")) == ("tench", "gold fish")
    with pytest.raises(FileNotFoundError, match=r"--classes=.*none.txt is neither a number nor a file"):
        convert.class_names(str(tmp_path / "none.txt"))
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbftench\r\ngold fish\r\n\r\n")  # as Windows writes it
    assert convert.class_names(str(tmp_path / "classes.txt")) == ("tench", "gold fish")
    for text, message in (("a\n\nb\n", "line 2 is blank"), ("a\nb\na\n", "two classes of one name: 0 and 2 are")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            convert.class_names(str(tmp_path / "classes.txt"))
    shapes = {("classes", "embedding"): (4, 8)}
    rows = {}
    for name in ("patch_unet", "adm_unet", "dit", "jit"):
        for null in ("", "--null_class", "--nonull_class"):
            with flagsaver.flagsaver():
                flags.FLAGS.unparse_flags()
                flags.FLAGS(["convert", f"--layout={name}", *filter(None, [null])])
                (entry,) = convert.layout(tiny()).entries(shapes).values()
            rows[name, null] = entry.shape[0]
    wanted = {("patch_unet", ""): 4, ("adm_unet", ""): 3, ("dit", ""): 4, ("jit", ""): 4}
    assert {k: v for k, v in rows.items() if not k[1]} == wanted
    assert {v for k, v in rows.items() if k[1] == "--null_class"} == {4}
    assert {v for k, v in rows.items() if k[1] == "--nonull_class"} == {3}
    with flagsaver.flagsaver(), pytest.raises(ValueError, match="--layout is missing: pass one of patch_unet"):
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["convert"])
        convert.layout(tiny())
