"""Trained runs that tests share, and what makes them quick."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from experiments import command, inputs, report
from experiments import config as configs
from tests.experiments.runs import Run, tiny, tiny_blog, tiny_chain, trained

_CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(scope="session")
def opened():
    """Data sets that were opened before."""
    return {}


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """Compiled programs, for all processes of this test session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "xla"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick(few_optimizations, opened, programs):
    """Data sets are opened once, those of digits are small, and a program that was compiled is read from a file."""
    open_source = inputs.source
    before = [getattr(jax.config, name) for name in _CACHE]

    def source(config, split="train"):
        key = repr((config.data, split))
        if key not in opened:
            found = open_source(config, split)
            if config.data.name == "mnist5k":  # quick to measure
                n = {"train": 450, "test": 250}[split]
                found = found._replace(images=found.images[:n], labels=found.labels[:n])
            opened[key] = found
        return opened[key]

    def start():
        for name, value in zip(_CACHE, (str(programs), 0.0), strict=True):
            jax.config.update(name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "source", source)
        patch.setattr(command, "start", start)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
        compilation_cache.reset_cache()
        start()
        yield open_source
    for name, value in zip(_CACHE, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def trained_runs(run_folder):
    return {}


def _once(cache: dict, name: str, make):
    if name not in cache:
        cache[name] = make()
    return cache[name]


@pytest.fixture(scope="module")
def run(quick, trained_runs, run_folder) -> Run:
    """One whole training, of digits, with everything that follows it."""
    return _once(trained_runs, "digits", lambda: trained(tiny(), run_folder / "digits"))


@pytest.fixture(scope="module")
def blog_run(quick, trained_runs, run_folder) -> Run:
    """The blog's recipe, which stops early."""
    return _once(trained_runs, "blog", lambda: trained(tiny_blog(), run_folder / "blog"))


@pytest.fixture(scope="module")
def folder_run(quick, trained_runs, run_folder) -> Run:
    """A run on a folder of rectangular colour images of two classes, which samples with DPM-Solver++."""

    def make():
        root = run_folder / "images"
        rng = np.random.default_rng(0)
        for name in ("cat", "dog"):
            (root / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(root / name / f"{i}.png")
        config = tiny()
        config.data = configs.Data(name=f"folder:{root}", size=(8, 12), flip=True)
        config.model.patch_size, config.train.steps, config.sample.count = 4, 2, 3
        config.sample.sampler = "dpmpp_2m"
        return trained(config, run_folder / "folder")

    return _once(trained_runs, "folder", make)


@pytest.fixture(scope="module")
def chain_run(quick, trained_runs, run_folder) -> Path:
    """Work directory of a run on a chain, with a learned variance and two averages."""
    return _once(trained_runs, "chain", lambda: trained(tiny_chain(), run_folder / "chain")).workdir


@pytest.fixture(scope="module")
def expert_runs(quick, trained_runs, run_folder) -> tuple[list[Path], list[str]]:
    """Work directories of two experts, the second started from the first, and what their trainings printed."""

    def make():
        printed = []
        for split in (0, 1):
            config = tiny_chain()
            config.process.snr_splits, config.process.split = (0.25,), split
            config.train.init_from = str(run_folder / "expert0") if split else None
            printed.append(trained(config, run_folder / f"expert{split}").printed)
        return [run_folder / "expert0", run_folder / "expert1"], printed

    return _once(trained_runs, "experts", make)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the shared run to be damaged."""
    return shutil.copytree(run.workdir, tmp_path / "copy")


@pytest.fixture
def unmeasured(monkeypatch):
    """Trainings whose samples are not the point are not measured."""
    monkeypatch.setattr(report, "quality", lambda *_: {})
