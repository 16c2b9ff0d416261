"""Averages after the fact: snapshots of a training, experiments.average and experiments.horizons."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from diffusion import averages
from diffusion.io import snapshots
from experiments import average, horizons, preflight, report
from experiments.run_dir import RunDir
from tests.experiments import runs
from tests.experiments.runs import call, tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def power_run(quick, tmp_path_factory):
    """A training with two power-function averages, stored after every other step."""
    config = tiny()
    config.train.ema_power, config.train.snapshot_every = (0.05, 0.2), 2
    return runs.trained(config, tmp_path_factory.mktemp("power") / "run")


def test_snapshots_are_stored_and_nothing_else_of_the_training_changes(run, power_run):
    folder = RunDir(power_run.workdir)
    assert snapshots.steps(folder.averages) == [2, 4, 6]
    assert {p.name for p in folder.averages.iterdir()} == {"0000002.npz", "0000004.npz", "0000006.npz"}
    assert not RunDir(run.workdir).averages.exists()
    plain, power = (runs.state(r.config, r.workdir) for r in (run, power_run))
    assert plain.power == () and len(power.power) == 2
    runs.assert_same_state(plain, power._replace(power=()))
    stored = snapshots.read(folder.averages, 6, 1)
    jax.tree.map(np.testing.assert_array_equal, stored, jax.tree.map(np.asarray, power.power[1]))


def test_the_disk_that_snapshots_take_is_said_before(power_run):
    taken = sum(p.stat().st_size for p in RunDir(power_run.workdir).averages.iterdir())
    said = re.search(r"3 snapshots of averages, (\S+) MB each: 0\.00 GB on disk", power_run.printed)
    assert 3 * float(said[1]) * 1e6 == pytest.approx(taken, rel=0.3)


def test_what_was_tracked_is_reconstructed(power_run):
    found = average.reconstruct(RunDir(power_run.workdir), 0.2)
    tracked = snapshots.read(RunDir(power_run.workdir).averages, 6, 1)
    assert (found.step, found.count) == (6, 6) and found.error < 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, tracked)
    earlier = average.reconstruct(RunDir(power_run.workdir), 0.05, 4)
    tracked = snapshots.read(RunDir(power_run.workdir).averages, 4, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), earlier.params, tracked)


def test_written_averages_can_be_sampled_from(power_run, tmp_path):
    folder = RunDir(power_run.workdir)
    printed = average.make(folder, 0.1, outdir=tmp_path / "run")
    assert "the average of width 0.1 after step 6, from 6 stored ones" in printed
    about = json.loads((tmp_path / "run" / "average.json").read_text())
    assert (about["sigma_rel"], about["step"], about["workdir"]) == (0.1, 6, str(power_run.workdir.resolve()))
    assert f"by {about['error']:.2%}" in printed
    params, _ = RunDir(tmp_path / "run").weights()
    wanted = average.reconstruct(folder, 0.1).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, wanted)
    with pytest.raises(ValueError, match="holds a run already; pass another --outdir"):
        average.make(folder, 0.1, outdir=tmp_path / "run")
    average.make(folder, 0.1, 4)
    assert RunDir(folder.averages / "sigma_rel_0.1_step4").is_run
    shutil.rmtree(folder.averages / "sigma_rel_0.1_step4")
    call(tmp_path / "run", "--num_samples=2", f"--outdir={tmp_path / 'samples'}")
    assert len(runs.samples(tmp_path / "samples")[0]) == 2


def test_what_cannot_be_averaged_is_refused(run, power_run, tmp_path):
    for workdir, arguments, message in (
        (power_run.workdir, (0.5,), r"sigma_rel=0\.5 must lie in \(0, 0\.2886\]"),
        (power_run.workdir, (0.1, 7), "--step=7: .* has snapshots of the steps 2 to 6"),
        (run.workdir, (0.1,), "stored no averages to combine: train with --config.train.ema_power="),
    ):
        with pytest.raises(ValueError, match=message):
            average.make(RunDir(workdir), *arguments, outdir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for power, every, message in (
        ((0.4,), 100, r"--config.train.ema_power=\(0\.4,\): sigma_rel=0\.4 must lie in"),
        ((0.1, 0.1), 100, "lists a width twice"),
        ((), 5, "--config.train.snapshot_every=5 has no effect on this run"),
    ):
        config = tiny()
        config.train.ema_power, config.train.snapshot_every = power, every
        with pytest.raises(ValueError, match=message):
            preflight.check(config)


def test_a_study_of_horizons_is_one_file_and_one_figure_and_goes_on(power_run, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(report, "quality", lambda *_: measured.append(1) or {"ratio": 2.0 - 0.1 * len(measured)})
    folder = RunDir(power_run.workdir)
    horizons.study(folder, tmp_path, [0.05, 0.1], count=4)
    rows = horizons.study(folder, tmp_path, [0.2, 0.05], count=4)
    assert len(measured) == 3, "what the file has is not measured again"
    assert [row["sigma_rel"] for row in rows] == [0.05, 0.1, 0.2]
    stored = json.loads((tmp_path / "horizons.json").read_text())
    assert stored["rows"] == rows and (stored["step"], stored["count"]) == (6, 4)
    assert (tmp_path / "horizons.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="is of step 6 with 4 samples, .* asked for are step 6 and 5 samples"):
        horizons.study(folder, tmp_path, [0.05], count=5)
    longer = shutil.copytree(power_run.workdir, tmp_path / "other")
    values = json.loads((longer / "config.json").read_text())
    values["seed"] = 7
    (longer / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match="is of the run .*run, another one than that in .*other: pass another --outdir"
    ):
        horizons.study(RunDir(longer), tmp_path, [0.05], count=4)
    (tmp_path / "horizons.json").write_text("{")
    with pytest.raises(ValueError, match=r"horizons.json is damaged .*: delete it"):
        horizons.study(folder, tmp_path, [0.05], count=4)
    assert horizons.widths(["0.1", "0.2"]) == [0.1, 0.2]
    with pytest.raises(ValueError, match="--sigma_rel=0.1,x must list numbers"):
        horizons.widths(["0.1", "x"])


def test_widths_resolve_to_powers(power_run):
    _, gammas = average.stored(RunDir(power_run.workdir))
    assert gammas == [averages.gamma_of(0.05), averages.gamma_of(0.2)]
