"""Trained runs that tests share, and what makes them quick."""

import copy as copying
import fcntl
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.metrics.features import efficientnet
from experiments import command, finish, inputs, objective, parts, report, sampling
from experiments import config as configs
from experiments.run_dir import RunDir
from tests.experiments.runs import Run, tiny, tiny_blog, tiny_chain, trained


@pytest.fixture(scope="session")
def opened():
    """Data sets that were opened before."""
    return {}


def _kept(make):
    """`make`, called once with the same objects, so that JAX traces what it returns once for each shape."""
    made = {}

    def identity(value):
        return tuple(map(id, value)) if type(value) in (list, tuple) else id(value)

    @functools.wraps(make)
    def get(*given, **options):
        key = (*map(identity, given), *((name, identity(value)) for name, value in sorted(options.items())))
        if key not in made:
            made[key] = make(*given, **options), given, options  # kept too, lest another object gets the id of one
        return made[key][0]

    return get


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once, opened):
    """Data sets are opened once and those of digits are small; the value opens whole ones."""
    open_source = inputs.source

    def source(config, split="train"):
        key = repr((config.data, split))
        if key not in opened:
            found = open_source(config, split)
            if config.data.name == "mnist5k":  # quick to measure
                n = {"train": 450, "test": 250}[split]
                found = found._replace(images=found.images[:n], labels=found.labels[:n])
            opened[key] = found
        return opened[key]

    draw = finish.draw

    def draw_once(config, run, folder, *given):
        if folder.path.name == "digits":  # one program more to compile
            draw(config, run, folder, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "source", source)
        patch.setattr(finish, "draw", draw_once)
        patch.setattr(command, "start", lambda: None)
        patch.setattr(report, "measure", functools.partial(report.measure, resamples=10))
        patch.setattr(efficientnet, "is_installed", lambda: False)  # its features take a second for 50 images
        patch.setenv("PATCH_DIFFUSION_CACHE", str(compiled_once.parent / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled_once))  # of processes that tests start
        yield open_source


@pytest.fixture(scope="module")
def kept(quick):
    """Equal configs have the same parts, whose steps and samplers are traced and compiled once in a module.

    For modules that train the same several times.
    """
    resolve, resolved = parts.resolve, {}

    def resolve_once(config, spec):
        key = repr((config, spec))
        if key in resolved:
            return resolved[key]
        found = resolve(copying.deepcopy(config), spec)  # tests change theirs
        if found.history is None:  # its arrays become those of a state, which training donates
            resolved[key] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "resolve", resolve_once)
        for module, name in ((objective, "make_step"), (sampling, "sample_fn"), (sampling, "denoise_fn")):
            patch.setattr(module, name, _kept(getattr(module, name)))
        yield


def _shared(folder: Path, name: str, config: configs.Config) -> Run:
    """The run `name`, trained by the first process that asks for it."""
    printed = folder / f"{name}.txt"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(trained(config, folder / name).printed)
    return Run(folder / name, config, RunDir(folder / name).report(), printed.read_text())


@pytest.fixture(scope="module")
def run(quick, shared_folder) -> Run:
    """One whole training, of digits, with everything that follows it."""
    return _shared(shared_folder, "digits", tiny())


@pytest.fixture(scope="module")
def blog_run(quick, shared_folder) -> Run:
    """The blog's recipe, which stops early."""
    return _shared(shared_folder, "blog", tiny_blog())


@pytest.fixture(scope="module")
def folder_run(quick, shared_folder) -> Run:
    """A run on a folder of rectangular colour images of two classes, which samples with DPM-Solver++."""
    root = shared_folder / "images"
    with (shared_folder / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rng = np.random.default_rng(0)
        for name in ("cat", "dog") if not root.exists() else ():
            (root / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(root / name / f"{i}.png")
    config = tiny()
    config.data = configs.Data(name=f"folder:{root}", size=(8, 12), flip=True)
    config.model.patch_size, config.train.steps, config.sample.count = 4, 2, 5
    config.sample.sampler = "dpmpp_2m"
    return _shared(shared_folder, "folder", config)


@pytest.fixture(scope="module")
def chain_run(quick, shared_folder) -> Path:
    """Work directory of a run on a chain, with a learned variance and two averages."""
    return _shared(shared_folder, "chain", tiny_chain()).workdir


@pytest.fixture(scope="module")
def expert_runs(quick, shared_folder) -> tuple[list[Path], list[str]]:
    """Work directories of two experts, the second started from the first, and what their trainings printed."""
    runs = []
    for split in (0, 1):
        config = tiny_chain()
        config.process.snr_splits, config.process.split = (0.25,), split
        config.train.init_from = str(shared_folder / "expert0") if split else None
        runs.append(_shared(shared_folder, f"expert{split}", config))
    return [run.workdir for run in runs], [run.printed for run in runs]


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the shared run to be damaged."""
    return shutil.copytree(run.workdir, tmp_path / "copy")


@pytest.fixture
def unmeasured(monkeypatch):
    """Trainings whose samples are not the point are not measured."""
    monkeypatch.setattr(report, "quality", lambda *_: {})
