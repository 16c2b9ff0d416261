"""What a patch size costs and saves: Patch Diffusion's U-Net in operations, memory and time, at several patch sizes.

    python -m experiments.bench.patch_size --plot=patch_size.png            minutes on two CPU cores
    python -m experiments.bench.patch_size --peer=PatchDiffusion-Pytorch    and the published program beside it
    python -m experiments.bench.patch_size --num_channels=256 --batch_size=32 --dtype=bfloat16 --steps=20 \\
        --sample_steps=20                                                   on a GPU

An image of n x n pixels in patches of P x P gives the network (n / P)^2 positions, which determine its cost:

    cost(n, P) = cost(n / P, 1)    "P=4 at 256x256 costs only as much as 64x64 at P=1"                     (1)
    cost(n, P) = cost(n, 1) / P^2                                                                          (2)

after Luhman & Luhman 2022 (2207.04316). Only the first and the last convolution see the patch itself. All cases take
turns (`timing`): one image size at every P, and every P at the number of positions that the largest image has in
(1). Operations are counted twice, by `diffusion.ledger` (three times the forward pass for a training step) and by XLA;
memory is what XLA allocates for arguments, results and temporary arrays. A training step is noising, forward, backward,
AdamW and the average of the parameters; a sampling step one of DDIM, the initial noise included.

PyTorch is an extra, pip install -e '.[torch]', for --peer alone (`torch_unet`).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command
from experiments.bench import commands, peers, timing
from experiments.bench.patch_size_cases import DTYPES, Case, compared, measured
from experiments.bench.patch_size_report import KINDS, plot, report
from experiments.paths import define_path


def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    command.start()
    measure = partial(
        run,
        size=given.size,
        patch_sizes=numbers("patch_sizes", int),
        grid=given.grid,
        fields={
            "num_channels": given.num_channels,
            "channel_mult": numbers("channel_mult", float),
            "num_res_blocks": given.num_res_blocks,
            "attention_resolutions": numbers("attention_resolutions", int),
        },
        dtype=given.dtype,
        batch_size=given.batch_size,
        peer=given.peer,
        peer_compile=given.peer_compile,
        **commands.amounts(),
    )
    commands.perform(argv, measure, report, plot)


def define_flags(argv: list[str]) -> None:
    """Defines the flags of all benchmarks, with defaults for steps that take seconds, and those of this one."""
    commands.define_flags(argv)
    for name, value in {"rounds": 5, "steps": 1, "sample_steps": 1}.items():
        flags.FLAGS.set_default(name, value)
    flags.DEFINE_integer("size", 256, "Side of the image that is cut into patches of every size.", lower_bound=1)
    flags.DEFINE_list("patch_sizes", ["1", "2", "4", "8"], "Patch sizes P.")
    flags.DEFINE_integer("grid", 64, "Side, in patches, at which every P is measured too.", lower_bound=1)
    flags.DEFINE_integer("num_channels", 64, "Width of the U-Net at multiplier 1.", lower_bound=1)
    flags.DEFINE_list("channel_mult", ["1", "1", "2", "2"], "Widths of its levels.")
    flags.DEFINE_integer("num_res_blocks", 2, "Blocks of a level.", lower_bound=1)
    flags.DEFINE_list("attention_resolutions", ["16", "8"], "Sides, in patches, of the levels that attend.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the computation; bfloat16 is for accelerators.")
    flags.DEFINE_integer("batch_size", 2, "Images at a time.", lower_bound=1)
    define_path("peer", None, "A checkout of the published program, PatchDiffusion-Pytorch, to compare with.")
    flags.DEFINE_bool("peer_compile", False, "Time it under torch.compile too, which takes minutes to compile.")
    define_path("plot", None, "Also plot the result to this PNG.")


def numbers(name: str, kind: type) -> tuple[Any, ...]:
    """The value of a flag that is a list of numbers.

    Raises:
      ValueError: it is none, or empty.
    """
    given = flags.FLAGS[name].value
    try:
        values = tuple(kind(text) for text in given)
    except ValueError:
        values = ()
    if not values:
        raise ValueError(f"--{name}={','.join(given)} must be numbers ({kind.__name__}) with commas between them")
    return values


def run(
    *,
    size: int,
    patch_sizes: Sequence[int],
    grid: int,
    fields: dict[str, Any],
    dtype: str = "float32",
    batch_size: int = 1,
    rounds: int = 3,
    steps: int = 1,
    sample_steps: int = 1,
    peer: str | None = None,
    peer_compile: bool = False,
) -> dict[str, Any]:
    """All measurements, ready for JSON; `fields` are those of `unet` that all cases share.

    Raises:
      ValueError: a patch size does not divide the image; the published program is not at `peer`, or cannot be run.
      AssertionError: its network and ours are not the same.
    """
    if bad := [p for p in patch_sizes if p < 1 or size % p]:
        raise ValueError(f"--patch_sizes={bad} do not divide --size={size}")
    torch_unet = peer_module(peer) if peer is not None else None
    same_image = [Case(size, p) for p in patch_sizes]
    same_grid = [Case(grid * p, p) for p in patch_sizes if grid * p <= size]
    amounts = {"batch_size": batch_size, "steps": steps, "sample_steps": sample_steps}
    if torch_unet is not None:
        beside = (same_grid or same_image)[-1]
        modes = ("eager", "compile") if peer_compile else ("eager",)
        agreement, both = compared(torch_unet, peer, beside, fields, dtype, modes, **amounts)
    costs, programs = {}, {kind: {} for kind in KINDS}
    for case in dict.fromkeys(same_image + same_grid):
        costs[case.name], own = measured(case, fields, dtype, **amounts)
        for kind in KINDS:
            programs[kind][case.name] = own[kind]
    units = {"train": batch_size * steps, "sample": batch_size * sample_steps}
    result = {
        "machine": timing.machine(),
        "fields": fields,
        "dtype": dtype,
        **amounts,
        "same_image": [case.name for case in same_image],
        "same_grid": [case.name for case in same_grid],
        "cases": costs,
        **{kind: timing.compare(programs[kind], units[kind], rounds) for kind in KINDS},
        "peer": None,
    }
    if torch_unet is not None:
        result["peer"] = {"case": beside.name, "parity": agreement, "torch": torch_unet.torch.__version__}
        result["peer"] |= {kind: timing.compare(both[kind], units[kind], rounds) for kind in KINDS}
    return result


def peer_module(path: str) -> Any:
    """The module `torch_unet`.

    Raises:
      ValueError: PyTorch is missing or cannot use our device, or the published program is not in the folder `path`.
    """
    if not (Path(path) / "patch_diffusion" / "unet.py").is_file():
        raise ValueError(f"--peer={path} is no checkout of PatchDiffusion-Pytorch: it has no patch_diffusion/unet.py")
    return peers.torch_module("torch_unet", without="leave out --peer")


if __name__ == "__main__":
    command.run(main, define_flags)
