"""Import rules: which module may import which, and which packages an import loads."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "diffusion"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
# Any module may import these at its top. Heavier packages: only the modules or folders that own them.
CORE = {"jax", "numpy", "diffusion"}
OWNERS = {
    "optimize.py": {"optax"},
    "train.py": {"optax"},
    "patch/kernels.py": {"numba", "llvmlite"},
    "patch/random_numbers.py": {"numba"},
    "io/checkpoint.py": {"orbax", "ml_dtypes"},
    "models/": {"flax"},
    "data/": {"tensorflow_datasets", "PIL"},
}
# What the modules of the core, and the packages beside it, may import of each other.
ARROWS = {
    "process": set(),
    "times": set(),
    "layers": set(),
    "optimize": {"layers"},
    "averages": set(),
    "ledger": set(),
    "train": {"averages"},
    "predict": {"process"},
    "grids": {"process"},
    "posterior": {"predict", "process"},
    "guide": {"predict", "process"},
    "superres": {"predict"},
    "sample": {"posterior", "predict", "process"},
    "solvers": {"process", "sample"},
    "vlb": {"posterior", "predict", "process", "sample"},
    "loss": {"predict", "process", "times", "vlb"},
    "experts": {"predict", "process", "times"},
    "methods": {"guide", "loss", "patch", "posterior", "predict", "process", "sample", "times"},
    "cpu": {"patch"},
    "patch": {"cpu"},
    "sharding": set(),
    "io": {"sharding"},
    "data": {"io"},
    "models": {"cpu", "layers", "patch", "predict", "process", "sharding"},
    "metrics": {"data", "models", "pretrained", "sharding"},
    "pretrained": {"layers", "models"},
}
WITHOUT_JAX = ("patch/geometry.py", "patch/views.py", "patch/compiled.py", "patch/kernels.py",
               "patch/random_numbers.py", "io/files.py", "io/stored_config.py", "data/")  # fmt: skip


def imports(path, nested=True):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def roots(path, nested):
    return {name.split(".")[0] for name in imports(path, nested)} - set(sys.stdlib_module_names)


def inside(path, nested=True):
    """The modules of this package that a file imports, as names without "diffusion."."""
    for name in imports(path, nested):
        parts = name.split(".")
        if parts[0] == "diffusion" and len(parts) > 1:
            stem = "/".join(parts[1:])
            found = stem if f"{stem}.py" in FILES or f"{stem}/__init__.py" in FILES else "/".join(parts[1:-1])
            yield found.replace("/", ".")


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_by_their_owners_only(name):
    top, everything = roots(FILES[name], nested=False), roots(FILES[name], nested=True)
    owned = set().union(*(packages for owner, packages in OWNERS.items() if name.startswith(owner)))
    assert top <= CORE | owned, "import heavier packages in the module that owns them, or inside the function"
    assert not everything & {"absl", "ml_collections", "torch", "experiments"}
    assert "flax" not in everything or name.startswith("models/")
    if name.startswith(WITHOUT_JAX):
        assert not top & {"jax", "flax", "optax"}


def test_arrows_point_down():
    """Each module imports what is listed for its package, `cpu` of `patch` the geometry alone."""
    for name, path in FILES.items():
        package = name.removesuffix(".py").split("/")[0]
        if package != "__init__":
            used = {module.split(".")[0] for module in inside(path)} - {package, ""}
            assert used <= ARROWS[package], f"{name} imports {used - ARROWS[package]}"
        if package == "cpu":
            assert set(inside(path)) <= {"patch.geometry"}


def test_there_are_no_import_cycles():
    graph = {}
    for name, path in FILES.items():
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        graph[module] = {used for used in inside(path, nested=False) if used not in (module, "")}
    # A module inside a package may import what its __init__ defines before it imports the module.
    graph = {m: {u for u in used if not m.startswith(f"{u}.")} for m, used in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_library_never_imports_experiments_and_no_module_is_called_utils():
    assert not [name for name, path in FILES.items() if any("experiments" in i.split(".")[0] for i in imports(path))]
    assert not [p for p in FILES.values() if "util" in p.stem or "helper" in p.stem]


PROGRAM = """
import sys, diffusion
assert not {"jax", "numpy"} & set(sys.modules), "import diffusion needs nothing but Python"
from diffusion.patch import views, compiled
import diffusion.data, diffusion.io.files
assert "jax" not in sys.modules and diffusion.patch.views is views and diffusion.patch.geometry.LAYOUTS
assert diffusion.process.Linear and diffusion.patch.patchify and diffusion.sample.ddim() and diffusion.loss.loss
assert "flax" not in sys.modules and "optax" not in sys.modules
print(*{m.split(".")[0] for m in sys.modules})
"""


def test_import_is_light_and_modules_follow_on_access():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy = {"tensorflow_datasets", "orbax", "absl", "PIL", "matplotlib", "safetensors", "tqdm", "torch", "flax"}
    assert not set(done.stdout.split()) & heavy


def test_every_module_of_the_core_is_an_attribute_and_others_are_named():
    assert {name.split("/")[0].removesuffix(".py") for name in FILES} - {"__init__"} <= set(dir(diffusion))
    with pytest.raises(AttributeError, match="has no attribute 'sampler'; its modules are .*sample"):
        diffusion.sampler  # noqa: B018
    with pytest.raises(AttributeError, match="'diffusion.patch' has no attribute 'cut', only fold"):
        diffusion.patch.cut  # noqa: B018
