"""The rules of the house: who may import what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"jax", "numpy", "diffusion"}
# Modules that own a heavier dependency; only their own package imports these modules at its top, and not its __init__.
OWNERS = {
    "optimize.py": {"optax"},
    "train.py": {"optax"},
    "patch_kernels.py": {"numba", "llvmlite"},
    "patch_random.py": {"numba"},
    "checkpoint.py": {"orbax", "ml_dtypes"},
    "mnist5k.py": {"tensorflow_datasets", "PIL"},
    "pictures.py": {"PIL"},
    "tfds.py": {"tensorflow_datasets"},
}
# Which rooms of the core may open a door to which.
DOORS = {
    "geometry": set(),
    "patch": {"geometry"},
    "patch_numpy": {"geometry"},
    "patch_kernels": set(),
    "patch_random": set(),
    "patch_numba": {"geometry", "patch_kernels", "patch_random", "patch_numpy"},
    "process": set(),
    "predict": {"process"},
    "variance": {"predict", "process"},
    "loss": {"predict", "process", "variance"},
    "history": {"loss"},
    "guide": {"predict", "process"},
    "experts": {"loss", "predict", "process"},
    "sample": {"predict", "process", "variance"},
    "likelihood": {"predict", "process", "sample", "variance"},
    "optimize": set(),
    "train": set(),
    "checkpoint": {"files"},
    "files": set(),
    "stored_config": {"files"},
    "torch_file": set(),
    "interop": {"models", "torch_file"},
    "evaluate": {"data", "models"},
    "models/base": {"patch"},
    "models/blog": {"models", "patch", "process"},
    "models/vit": {"geometry", "models", "patch", "predict"},
    "models/unet": {"geometry", "models", "patch", "predict"},
    "models/unet_flops": {"geometry", "models"},
    "models/vit_flops": {"geometry"},
}
WITHOUT_JAX = (
    "geometry.py",
    "patch_numpy.py",
    "patch_numba.py",
    "patch_kernels.py",
    "patch_random.py",
    "files.py",
    "stored_config.py",
    "data/",
)
FILES = sorted((ROOT / "diffusion").rglob("*.py"))


def imports(path, nested=True):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def roots(path, nested):
    return {name.split(".")[0] for name in imports(path, nested)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_imports_what(path):
    top, everything = roots(path, nested=False), roots(path, nested=True)
    allowed = CORE | OWNERS.get(path.name, set()) | ({"flax"} if path.parent.name == "models" else set())
    assert top <= allowed, "import heavier packages in the module that owns them, or lazily"
    assert not everything & {"absl", "ml_collections", "torch", "experiments"}
    assert "flax" not in everything or path.parent.name == "models"
    if path.relative_to(ROOT / "diffusion").as_posix().startswith(WITHOUT_JAX):
        assert not top & {"jax", "flax", "optax"}


@pytest.mark.parametrize("room", DOORS)
def test_doors(room):
    opened = {
        name.split(".")[1] for name in imports(ROOT / "diffusion" / f"{room}.py") if name.startswith("diffusion.")
    }
    assert opened <= DOORS[room]


def test_no_module_calls_itself_utils():
    assert not [p for p in ROOT.glob("*/**/*.py") if "util" in p.stem or "helper" in p.stem]


def test_import_is_light():
    program = "import diffusion, diffusion.data, sys; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"numba", "tensorflow_datasets", "orbax", "absl", "PIL", "matplotlib", "safetensors", "tqdm", "torch"}
    assert "diffusion" in loaded and not loaded & heavy
