"""experiments.blog_figures: all figures of the blog, from a run on its path."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import blog_figures, inputs, parts, sampling
from experiments.run_dir import RunDir
from tests.experiments.runs import call


@pytest.mark.slow
def test_the_blogs_figures(blog_run):
    printed = call(blog_run.workdir, command=blog_figures)
    names = [Path(line).name for line in printed.splitlines() if line.endswith(".png")]
    grids = [f"{name}_step_scaling_{n}.png" for n in (10, 1) for name in ("without", "with")]
    assert names == ["noising.png", "denoising.png", *grids, "blog.png"]
    sizes, contents = {}, set()
    for name in names:
        with Image.open(blog_run.workdir / "figures" / name) as image:
            assert image.format == "PNG"
            sizes[name] = image.size
            contents.add(image.convert("L").tobytes())
    assert len(contents) == len(names)
    assert sizes["noising.png"][0] > 2 * sizes["noising.png"][1]
    assert all(sizes["blog.png"][1] > sizes[name][1] for name in names[:-1])


@pytest.mark.slow
def test_strips_of_the_blog_begin_and_end_where_they_should(blog_run):
    config, spec = RunDir(blog_run.workdir).stored()
    params, _ = RunDir(blog_run.workdir).weights()
    strip = blog_figures.noising(config, spec)
    assert strip["names"] == [f"n = {n}" for n in (0, 2, 4, 6, 8, 10)]
    np.testing.assert_array_equal(strip["images"][0], inputs.source(config, "test").images[0])
    changed = [np.abs(frame.astype(int) - strip["images"][0]).mean() for frame in strip["images"]]
    assert changed == sorted(changed)

    labels = np.zeros(1, int)
    strip = blog_figures.denoising(config, spec, params, labels)
    assert strip["names"] == [f"n = {n}" for n in (10, 8, 6, 4, 2, 0)]
    config.sample.steps, config.sample.overstep = 10, 1.5
    (sampled,) = sampling.sample_fn(parts.resolve(config, spec))(params, np.zeros(1, int), labels)
    np.testing.assert_array_equal(strip["images"][-1], sampled)
    assert (strip["images"][0] != strip["images"][-1]).any()


def test_the_blogs_figures_need_a_run_on_its_path(run, tmp_path):
    with pytest.raises(ValueError, match=r"was trained on the linear path.*--config=experiments/configs/blog\.py"):
        call(run.workdir, command=blog_figures)
    assert not (run.workdir / "figures").exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        call(tmp_path / "nowhere", command=blog_figures)
