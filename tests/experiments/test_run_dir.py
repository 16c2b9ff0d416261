"""The folder of a run: stored configs of every version, averages, initial weights, experts that belong together."""

import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest

from diffusion import sharding
from diffusion.io import stored_config
from diffusion.models.unet import ADM, UNet
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import inputs, objective, parts, run_dir, stored_versions, train
from experiments.bench import jax_run
from experiments.configs import blog, patch_unet_mnist, smoke
from experiments.parts import DataSpec
from experiments.run_dir import RunDir, trained
from tests.experiments import runs
from tests.experiments.runs import call, samples, tiny

# Written by the code that had no version: three config.json, and a whole run that was stopped after 2 of 4 steps.
VERSION_1 = runs.ROOT / "tests" / "data" / "version_1"


# Version 1


def version_1(name):
    return json.loads((VERSION_1 / f"{name}.json").read_text())


@pytest.mark.parametrize("file", [smoke, blog, patch_unet_mnist], ids=lambda file: file.__name__.rpartition(".")[2])
def test_configs_of_version_1_are_those_of_today(file, tmp_path):
    config = file.get_config()
    values = version_1(config.name)
    assert "version" not in values and values["model"]["name"] == configs.network_name(config.model)
    before = json.dumps(values)
    stored_config.write_config(tmp_path, values)
    found, spec = RunDir(tmp_path).stored()
    assert found == config
    assert spec == DataSpec((28, 28, 1), tuple("0123456789") if config.data.labels else ())
    stored_versions.upgrade(values)
    assert json.dumps(values) == before
    RunDir(tmp_path).open(config, spec)  # so the same command continues the run


def test_fields_that_were_renamed_keep_their_values():
    values = version_1("patch_unet_mnist")
    values["model"] |= {"heads": 8, "adm": True, "conditional": False, "num_head_channels": None}
    values["process"] |= {"bound": 0.25, "bound_alone": True}
    config = configs.from_dict(_without_facts(values))
    assert (config.process.vlb_weight, config.process.vlb_only) == (0.25, True)
    assert config.model.num_heads == 8 and not config.data.labels
    assert {name: getattr(config.model, name) for name in ADM} == ADM


def _without_facts(values):
    return {name: value for name, value in values.items() if name != "seen"}


def test_fields_that_version_1_did_not_store_take_the_defaults_of_version_1():
    values = _without_facts(version_1("smoke"))
    for field in ("width", "depth", "heads", "conditional"):
        del values["model"][field]
    config = configs.from_dict(values)
    assert (config.model.width, config.model.depth, config.model.heads, config.data.labels) == (128, 6, 4, True)
    del values["model"]
    assert configs.from_dict(values).model.patch_size == 4


@pytest.mark.slow
def test_a_run_of_version_1_is_continued_and_sampled_from(quick, tmp_path, monkeypatch, unmeasured):
    monkeypatch.setattr(inputs, "source", quick)  # all of the digits, as that run had
    with zipfile.ZipFile(VERSION_1 / "run.zip") as file:
        file.extractall(tmp_path / "run")
    wanted, labels = samples(tmp_path / "run")  # of the four steps, by that code
    logged = runs.rows(tmp_path / "run")
    run = trained([tmp_path / "run"])
    assert (run.step, run.config.train.optimizer, run.config.model.clock) == (2, "muon", "index")
    call(tmp_path / "run", "--num_samples=4", "--batch_size=4", f"--outdir={tmp_path / 'early'}")
    again = runs.trained(run.config, tmp_path / "run")
    assert "continuing after step 2 of 4" in again.printed
    found, found_labels = samples(tmp_path / "run")
    np.testing.assert_array_equal(found_labels, labels)
    assert np.abs(found.astype(int) - wanted).max() <= 2  # another processor may round differently
    assert np.abs(samples(tmp_path / "early")[0].astype(int) - wanted).max() > 2
    for new, old in zip(runs.rows(tmp_path / "run"), logged, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-3)
        assert new["vlb" if new["step"] > 2 else "bound"] == pytest.approx(old["bound"], rel=1e-3)


# Stored configs


@pytest.mark.parametrize("network", [ViT(), UNet()], ids=configs.network_name)
def test_what_was_true_or_false_of_remat_is_a_name(network):
    for stored, name in ((True, "all"), (False, "none")):
        values = configs.to_dict(configs.Config(model=network)) | {"version": 2}
        values["model"]["remat"] = stored
        config = configs.from_dict(values)
        assert config.model.remat == name and values["model"]["remat"] is stored
        assert configs.from_dict(configs.to_dict(config)) == config


def test_a_config_of_a_later_version_is_refused(tmp_path):
    values = configs.to_dict(tiny()) | {"version": 4, "data_spec": {"shape": [28, 28, 1], "class_names": []}}
    stored_config.write_config(tmp_path, values)
    with pytest.raises(ValueError, match="the config has version 4, of a later release; this release reads versions"):
        RunDir(tmp_path).stored()
    with pytest.raises(ValueError, match="holds a run with another config"):
        RunDir(tmp_path).open(tiny(), DataSpec((28, 28, 1)))


def test_a_report_has_the_names_of_today(tmp_path):
    folder = RunDir(tmp_path)
    assert folder.report() is None and folder.latest_step is None and not folder.is_run
    assert folder.write_report({"distance": 1.5, "floor": 1.0}) == {"distance": 1.5, "floor": 1.0}
    assert folder.report() == {"distance": 1.5, "reference": 1.0}  # the name of earlier versions


# Averages and initial weights


def test_averages_are_chosen_by_their_decay(chain_run):
    fast, slow = (RunDir(chain_run).weights(decay=decay)[0] for decay in (0.0, 0.9))
    first, step = RunDir(chain_run).weights()
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, first, fast)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True))
    with pytest.raises(ValueError, match=r"--ema=0.7: .* averages with the decays 0.0, 0.9"):
        RunDir(chain_run).weights(decay=0.7)


def test_initial_weights_are_the_average_of_the_other_run(expert_runs):
    first = RunDir(expert_runs[0][0])
    average, _ = first.weights()
    like = jax.tree.map(np.zeros_like, average)
    jax.tree.map(np.testing.assert_array_equal, first.initial_weights(like), average)
    leaves, structure = jax.tree.flatten(like)
    other = structure.unflatten([np.zeros((3, 3)), *leaves[1:]])
    with pytest.raises(ValueError, match=r"is another network; 1 parameters differ:\n.*\(3, 3\) here"):
        first.initial_weights(other)


def test_initial_weights_may_be_those_of_a_scanned_network_or_not(tmp_path):
    config, spec = tiny(), DataSpec((28, 28, 1))
    config.model.depth = 3
    forms = {"plain": config, "scanned": jax_run.with_model(config, scan=True, remat="all")}
    params = {name: parts.init_params(parts.resolve(form, spec)) for name, form in forms.items()}
    assert "blocks_0_3" in params["scanned"] and "block_0" in params["plain"]
    for here, there in (("plain", "scanned"), ("scanned", "plain")):
        folder, moved = RunDir(tmp_path / there), jax.tree.map(lambda p: p + 1, params[there])
        folder.write_new(forms[there], spec, objective.init_state(parts.resolve(forms[there], spec), moved))
        found = folder.initial_weights(params[here])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), found, params[here])
        folder.check_teacher(dataclasses.replace(forms[here], objective=configs.Objective(kind="progressive")))
    deeper = parts.init_params(parts.resolve(jax_run.with_model(forms["scanned"], depth=4), spec))
    with pytest.raises(ValueError, match=r"is another network; .* parameters differ:\n.*block_3.* nothing there"):
        folder.initial_weights(deeper)


def test_training_starts_from_those_weights_and_needs_them_only_once(expert_runs, tmp_path, monkeypatch):
    first, second = expert_runs[0]
    config, spec = RunDir(second).stored()
    assert config.train.init_from == str(first)
    state, placed, step = train.restored(config, parts.resolve(config, spec), RunDir(tmp_path), sharding.make_mesh())
    assert all(jax.tree.leaves(jax.tree.map(lambda x, where: x.sharding == where, state, placed)))
    for tree in (state.params, *state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, RunDir(first).weights()[0])
    assert step == 0
    monkeypatch.setattr(run_dir.RunDir, "initial_weights", None)
    assert "is finished" in runs.trained(config, second).printed


# Experts


def test_runs_that_are_not_experts_of_one_model_are_refused(expert_runs, tmp_path):
    workdirs, _ = expert_runs
    with pytest.raises(ValueError, match="holds expert 0 of 2, which cannot sample alone: pass --workdir=A,B"):
        trained(workdirs[:1])
    with pytest.raises(ValueError, match=r"holds the experts \[0, 0\], .* each of 0..1 once"):
        trained([workdirs[0], workdirs[0]])
    stranger = tmp_path / "stranger"
    config = stored_config.read_config(workdirs[1])
    config["process"]["betas"], config["data"]["data_dir"] = "linear", "elsewhere"
    stored_config.write_config(stranger, config)
    with pytest.raises(ValueError, match=r"does not belong to the experts of[^\n]*in:\n  process.betas[^\n]*$"):
        trained([workdirs[0], stranger])


def test_each_expert_has_a_default_folder_of_its_own():
    config = configs.Config(name="digits")
    assert str(run_dir.default_workdir(config)) == "runs/digits"
    config.process.split = 1
    assert str(run_dir.default_workdir(config)) == "runs/digits_split1"
