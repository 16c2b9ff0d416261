"""experiments.studies: cells are measured once, a study that was stopped goes on, and what the studies consist of."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure

from diffusion import loss, process
from experiments import inputs, parts
from experiments.parts import DataSpec
from experiments.studies import cells, nine_way, toy

DIGITS = DataSpec((28, 28, 1), tuple("0123456789"))


def study(measure, names=("a", "b", "c"), **settings):
    return cells.Study(
        name="letters",
        settings={"steps": 3, "sizes": (1, 2), **settings},
        cells=[{"name": name, "seed": 0} for name in names],
        measure=measure,
        figure=lambda rows: Figure(),
        paragraph=lambda rows: ", ".join(row["name"] for row in rows),
    )


def test_a_study_that_was_stopped_goes_on_and_measures_no_cell_twice(tmp_path):
    seen = []

    def stopped(cell):
        if cell["name"] == "b":
            raise KeyboardInterrupt
        seen.append(cell["name"])
        return {"value": 1.5}

    with pytest.raises(KeyboardInterrupt):
        cells.measured(tmp_path, study(stopped))
    assert json.loads((tmp_path / "study.json").read_text())["rows"][0]["value"] == 1.5

    def going_on(cell):
        seen.append(cell["name"])
        return {"value": 2.0}

    rows = cells.measured(tmp_path, study(going_on))
    assert seen == ["a", "b", "c"] and [row["value"] for row in rows] == [1.5, 2.0, 2.0]
    # More cells later: only they are measured, and rows come in the order that was asked for.
    rows = cells.measured(tmp_path, study(going_on, names=("d", "a")))
    assert seen == ["a", "b", "c", "d"] and [row["name"] for row in rows] == ["d", "a"]
    assert [row["name"] for row in json.loads((tmp_path / "study.json").read_text())["rows"]] == ["a", "b", "c", "d"]


def test_numbers_that_are_not_finite_are_stored_as_none(tmp_path):
    found = {"value": math.nan, "list": [1.0, math.inf], "dict": {"x": -math.inf, "y": 2}}
    (row,) = cells.measured(tmp_path, study(lambda cell: found, names=("a",)))
    assert (row["value"], row["list"], row["dict"]) == (None, [1.0, None], {"x": None, "y": 2})
    (again,) = cells.measured(tmp_path, study(lambda cell: pytest.fail("measured twice"), names=("a",)))
    assert again == row


def test_a_folder_holds_one_study_with_one_set_of_settings(tmp_path):
    numbers = lambda cell: {"value": 1}  # noqa: E731
    cells.measured(tmp_path, study(numbers))
    cells.measured(tmp_path, study(numbers))
    with pytest.raises(ValueError, match=r"other settings; use them again, or pass another --outdir:\n  steps: 3 -> 4"):
        cells.measured(tmp_path, study(numbers, steps=4))
    with pytest.raises(ValueError, match="holds the study 'letters', not 'numbers'"):
        cells.measured(tmp_path, study(numbers)._replace(name="numbers"))
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match="damaged or not that of a study .*; delete it or pass another --outdir"):
        cells.measured(tmp_path, study(numbers))


def test_rows_are_grouped_in_order():
    rows = [{"p": 2, "seed": 0}, {"p": 1, "seed": 0}, {"p": 2, "seed": 1}]
    assert cells.groups(rows, "p") == {(2,): [rows[0], rows[2]], (1,): [rows[1]]}


def test_the_toy_measures_nine_pairs_in_the_largest_space_and_three_in_others():
    found = toy.study([512, 2], [0, 1], 10, 8).cells
    pairs = [(cell["dimensions"], cell["prediction"], cell["loss_in"]) for cell in found if cell["seed"] == 1]
    assert len(found) == 24 and len(set(pairs)) == 12
    assert {space for d, _, space in pairs if d == 2} == {"flow"}
    with pytest.raises(ValueError, match="--dimensions=1 must be at least 2"):
        toy.study([1, 4], [0], 10, 8)


@pytest.mark.parametrize("study", [toy, nine_way])
def test_the_flags_of_a_study_have_defaults_that_can_be_read(monkeypatch, study):
    own = flags.FlagValues()
    monkeypatch.setattr(cells, "define_flags", lambda argv: None)
    for name in ("list", "float", "integer"):
        monkeypatch.setattr(flags, f"DEFINE_{name}", partial(getattr(flags, f"DEFINE_{name}"), flag_values=own))
    study.define_flags([])
    own(["study"])
    lists = [value for value in own.flag_values_dict().values() if isinstance(value, list)]
    assert lists and all(isinstance(each, str) for value in lists for each in value)


@pytest.mark.slow
def test_the_points_of_the_toy_lie_in_a_plane(key):
    points, q = toy.spiral(key, 4000), toy.plane(jax.random.key(1), 7)
    assert 0.9 < float(jnp.square(points).sum(1).mean()) < 1.1
    np.testing.assert_allclose(q.T @ q, np.eye(2), atol=1e-6)
    params = toy.init(jax.random.key(2), 7)
    assert [w.shape for w, _ in params] == [(10, 256), (256, 256), (256, 256), (256, 256), (256, 7)]
    np.testing.assert_array_equal(toy.apply(params, jnp.ones((3, 7)), jnp.ones(3)), 0)


@pytest.mark.parametrize("prediction", toy.PREDICTIONS)
def test_a_loss_in_another_space_is_the_error_there(key, prediction):
    """The nine pairs of both studies: the weight turns the error of the prediction into that of the space."""
    x0, t = jax.random.normal(key, (6, 3)), jnp.linspace(0.2, 0.8, 6)
    given = loss.Draw(t, jax.random.normal(jax.random.key(1), x0.shape))
    off = lambda xt, t, y: jnp.sin(xt)  # noqa: E731 - any prediction
    errors = {}
    for space in toy.PREDICTIONS:
        weight = None if space == prediction else loss.measured_in(space, prediction)
        errors[space], _ = loss.loss_at(given, off, toy.PATH, x0, prediction=prediction, weight=weight)
    np.testing.assert_allclose(errors["x0"] * jnp.square((1 - t) / t), errors["eps"], rtol=1e-5)
    np.testing.assert_allclose(errors["x0"] / jnp.square(t), errors["flow"], rtol=1e-5)


@pytest.mark.slow
def test_the_toy_is_learned_in_the_plane_and_not_in_many_dimensions():
    """A short training: the prediction of x0 stays in the plane, that of the velocity leaves it."""
    common = {"dimensions": 300, "loss_in": "flow", "seed": 0, "steps": 60, "batch_size": 64}
    inside, outside = (toy.measure(prediction=p, **common) for p in ("x0", "flow"))
    assert inside["outside"] < 0.01 < 10 < outside["outside"]
    assert inside["distance"] > inside["reference"] > 0 and np.shape(inside["samples"]) == (toy.SHOWN, 2)


@pytest.mark.slow
def test_every_cell_of_the_nine_way_table_is_a_run():
    found = nine_way.study(["vit", "unet"], [2, 4, 7, 14], [0], 1.0, 20)
    assert len(found.cells) == 72
    for cell in found.cells:
        run = parts.resolve(nine_way.config_of(**cell, samples=20), DIGITS)
        assert run.prediction == cell["prediction"] and (run.weight is None) == (cell["loss_in"] == run.prediction)
        if cell["prediction"] == cell["loss_in"] == "x0" and cell["patch_size"] == 14:  # 2x2 positions
            x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
            y, t = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
            params = jax.eval_shape(run.model.init, jax.random.key(0), x, t, y)
            assert jax.eval_shape(run.model.apply, params, x, t, y).shape == x.shape
    with pytest.raises(ValueError, match=r"--patch_sizes=\[3\] do not divide the 28 pixels"):
        nine_way.study(["vit"], [2, 3], [0], 1.0, 20)


def rows_of(found, **numbers):
    return [{**cell, **numbers, "seconds": 1.0} for cell in found.cells]


def test_figures_and_paragraphs_have_every_cell_and_stand_collapsed_ones():
    found = nine_way.study(["vit", "unet"], [4, 14], [0, 1], 1.0, 20)
    rows = rows_of(found, ratio=2.0, agreement=0.9)
    rows[0]["ratio"] = None
    assert len(found.figure(rows).axes) == 4 + 1
    words = found.paragraph(rows)
    assert "x0, error in x0" in words and "inf x, 90%" in words and "means of 2 seeds" in words
    found = toy.study([2, 512], [0, 1], 10, 8)
    rows = rows_of(found, distance=0.5, reference=0.01, outside=1.0, samples=[[0.0, 1.0], [None, None]])
    rows[-1]["distance"] = None
    assert len(found.figure(rows).axes) == 3 * 4
    assert "D=512, flow, error in flow" in found.paragraph(rows) and "inf" in found.paragraph(rows)


@pytest.mark.slow
def test_a_cell_of_the_nine_way_table_trains_for_its_time_and_is_measured(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(nine_way, "SNR", (4.0, 0.25))
    config = nine_way.config_of("vit", 14, "eps", "flow", seed=0, samples=20)
    config.sample.steps, config.model.depth, config.model.width = 2, 1, 32
    found = nine_way.measure(config, 0.2)
    assert found["steps"] >= 1 and found["finite"] == 1 and found["ratio"] > 1 and 0 <= found["agreement"] <= 1
    assert list(found["error"]) == ["4.0", "0.25"] and all(v > 0 for v in found["error"].values())


@pytest.mark.slow
def test_the_denoising_error_of_a_network_is_that_of_its_x0_hat(quick, monkeypatch):
    """A network of zeros that predicts x0 has the mean square of the digits at every SNR."""
    config = nine_way.config_of("vit", 14, "x0", "flow", seed=0, samples=20)
    config.model.depth, config.model.width = 1, 32
    source = inputs.source(config)
    run = parts.resolve(config, inputs.data_spec(config, source))
    zeros = jax.tree.map(jnp.zeros_like, parts.init_params(run))
    x0 = parts.to_float(run, jnp.asarray(inputs.source(config, "test").images[:]))
    errors = nine_way.denoising_error(config, run, zeros)
    np.testing.assert_allclose(errors, float(jnp.square(x0).mean()), rtol=1e-5)
    assert isinstance(run.path, process.Linear)
