"""Compiles every program of every section for a GPU that is not there, and says what each needs.

    bytes = arguments + results - results in the place of arguments + temporary arrays              (1)

XLA needs a description of the card, `bench/targets/NAME.txtpb`, and the compiler of JAX's CUDA plugin. Kernels are not
tuned, since that needs the card: matrix products are all cuBLAS's here, where on the card Triton's may win. What does
not compile here, or does not fit, would not have run there.
"""

import importlib.util
import os
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.bench.accelerator import program_text
from experiments.bench.accelerator.record import write_json

TARGETS = Path(__file__).parents[1] / "targets"
FRACTION = 0.92  # of the card's memory that a process may take; see `command.environment`


def main(card: str, sections: Sequence[str], folder: Path, *, tiny: bool = False) -> None:
    """Compiles, prints a line for each program, and writes compile_CARD.json.

    Raises:
      ValueError: the card or the plugin is missing.
      SystemExit: a program does not compile or does not fit.
    """
    text = target(card)
    prepare()
    memory = int(re.search(r"device_memory_size: (\d+)", text).group(1))
    devices = topology(card, text)
    results, bad = {}, []
    print(f"For {card}, {memory / 2**30:.1f} GiB:", flush=True)
    for name, make, options in programs(sections, tiny):
        try:
            results[name] = row = compiled(make, devices, options)
            fits = row["bytes"] <= FRACTION * memory
            bad += [] if fits else [name]
            print(f"{name}: {line(row)}{'' if fits else '  DOES NOT FIT'}", flush=True)
        except Exception as e:
            results[name] = {"error": f"{type(e).__name__}: {e}"[:3000]}
            bad.append(name)
            print(f"{name}: FAILED: {type(e).__name__}: {e!s:.500}", flush=True)
        write_json(folder / f"compile_{card}.json", results)
    if bad:
        raise SystemExit(f"{len(bad)} programs do not compile or do not fit: {', '.join(bad)}")


def target(card: str) -> str:
    """XLA's description of a card.

    Raises:
      ValueError: there is none of that name.
    """
    file = TARGETS / f"{card}.txtpb"
    if not file.is_file():
        known = sorted(p.stem for p in TARGETS.glob("*.txtpb"))
        raise ValueError(f"--compile_for={card}: no such card is described in {TARGETS.name}/, only {', '.join(known)}")
    return file.read_text()


def prepare() -> None:
    """Sets the environment that JAX reads when it is imported.

    Raises:
      ValueError: JAX has no CUDA plugin.
    """
    if (package := missing_plugin()) is not None:
        raise ValueError(
            f"--compile_for needs the compiler of JAX's CUDA plugin (3 GB, no GPU): pip install '{package}', best "
            "in an environment of its own"
        )
    os.environ.update(environment())


def missing_plugin() -> str | None:
    """What to install to compile for a GPU, if it is not there."""
    if any(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin")):
        return None
    return f"jax-cuda12-plugin[with-cuda]=={version('jax')}"


def environment() -> dict[str, str]:
    """The variables that JAX must find when it is imported, to compile for a GPU on the CPU."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (nvidia.submodule_search_locations if nvidia else [])]
    libraries = [found.parents[1] for folder in folders for found in folder.glob("*/nvvm/libdevice")]
    given = ["--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
    given += [f"--xla_gpu_cuda_data_dir={found}" for found in libraries[:1]]
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {"XLA_FLAGS": " ".join(flags + [flag for flag in given if flag not in flags]), "JAX_PLATFORMS": "cpu"}


def topology(card: str, text: str) -> Any:
    """The one device to compile for, as a sharding."""
    import jax

    return jax.sharding.SingleDeviceSharding(devices_of(card, text)[0])


def devices_of(card: str, text: str, hosts: int = 1, each: int = 1) -> list[Any]:
    """Devices to compile for: `each` on every host."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(card, "cuda", topology=f"1x{hosts}x{each}", target_config=text)
    return list(found.devices)


def programs(sections: Sequence[str], tiny: bool) -> Any:
    """(name, a function that makes the program, options of the compiler) of every program."""
    from experiments.bench.accelerator.sections import PROGRAMS

    for section in sections:
        options = {"xla_gpu_deterministic_ops": True} if section == "numbers" else {}
        for name, make in PROGRAMS[section](tiny).items():
            yield f"{section}, {name}", make, options


def compiled(make: Any, where: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What a program needs on the device, eq. (1), and what it calls."""
    begin = time.perf_counter()
    done = make().compile(where, **options)
    m, text = done.memory_analysis(), done.as_text()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {
        "seconds": time.perf_counter() - begin,
        "bytes": held + m.temp_size_in_bytes,
        "held_bytes": held,
        "temporary_bytes": m.temp_size_in_bytes,
        **program_text.calls(text),
        **program_text.traffic(text),
    }


def line(row: dict[str, Any]) -> str:
    """A row in print."""
    library = ", ".join(f"{n} {name.removeprefix('__')}" for name, n in row["library_calls"].items()) or "no library"
    collectives = ", ".join(f"{n} {name}" for name, n in row["collectives"].items()) or "no collectives"
    gib = lambda name: f"{row[name] / 2**30:.2f}"  # noqa: E731
    memory = f"{gib('bytes')} GiB ({gib('held_bytes')} held, {gib('temporary_bytes')} temporary)"
    moved = f"{row['fusion_bytes'] / 1e9:.1f} GB by fusions, {row['library_bytes'] / 1e9:.1f} GB by library calls"
    fusions = f"{row['fusions']} fusions ({row['transposing_fusions']} transpose)"
    return f"{row['seconds']:.1f} s, {memory}; {fusions}, {library}, {collectives}; {moved}"
