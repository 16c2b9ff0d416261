"""Trained runs on disk, for the commands that use them: one run, or one for each expert."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffusion.io import checkpoint, stored_config
from experiments import build
from experiments.config import Config, to_dict


class Trained(NamedTuple):
    """What was trained: `params` of `config`'s network, or of each network of a `team` of experts.

    Everything but the network, above all the sampler, is read from `config`, which may be changed.
    """

    config: Config
    seen: build.Seen
    params: Any
    step: int
    team: tuple[Config, ...] = ()


def default_workdir(config: Config) -> Path:
    """Where a run goes if nothing else is said: experts side by side."""
    split = config.process.split
    return Path("runs") / (config.name if split is None else f"{config.name}_split{split}")


def trained(workdirs: Sequence[Path], step: int | None = None, decay: float | None = None) -> Trained:
    """The run in a work directory, or the experts in several, in any order, one for every range.

    Args:
      step: of training; default the newest.
      decay: which of the averaged weights; default the first of the run's list.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: one expert alone, experts that do not belong together, or no such decay.
    """
    if len(workdirs) == 1:
        config, seen = build.stored(workdirs[0])
        if config.process.split is not None:
            raise ValueError(
                f"{workdirs[0]} holds expert {config.process.split} of {len(config.process.snr_splits) + 1}, which "
                "draws nothing alone: pass --workdir=A,B with the work directories of all"
            )
        return Trained(config, seen, *weights(workdirs[0], config, step, decay))
    runs = sorted(
        ((*build.stored(workdir), workdir) for workdir in workdirs), key=lambda run: run[0].process.split or 0
    )
    first, seen, _ = runs[0]
    found = [config.process.split for config, _, _ in runs]
    if found != list(range(len(first.process.snr_splits) + 1)):
        raise ValueError(
            f"--workdir={','.join(map(str, workdirs))} holds the experts {found}, but the thresholds "
            f"{first.process.snr_splits} need each of 0..{len(first.process.snr_splits)} once"
        )
    for config, known, workdir in runs[1:]:
        differing = stored_config.config_differences(_common(first), _common(config))
        if differing or known != seen:
            raise ValueError(
                f"{workdir} does not belong to the experts of {runs[0][2]}; they differ in:\n  "
                + "\n  ".join(differing or ["the pictures or the classes that they have seen"])
            )
    restored = [weights(workdir, config, step, decay) for config, _, workdir in runs]
    config = build.stored(runs[0][2])[0]
    config.process.split = None
    params, steps = zip(*restored, strict=True)
    return Trained(config, seen, params, max(steps), tuple(config for config, _, _ in runs))


def weights(workdir: Path, config: Config, step: int | None = None, decay: float | None = None) -> tuple[Any, int]:
    """The averaged weights of the run in `workdir` and the step that they are from; see `trained`."""
    decays = config.train.ema
    if decay is not None and decay not in decays:
        raise ValueError(f"--ema={decay}: {workdir} has averages with the decays {', '.join(map(str, decays))}")
    averages, step = checkpoint.restore_ema(workdir / "checkpoints", step, report=print)
    return averages[str(0 if decay is None else decays.index(decay))], step


def begin_with(workdir: Path, params: Any) -> Any:
    """The averaged weights of the run in `workdir` in place of `params`, for a network of the same shape.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its network is another one; the first differences are listed.
    """
    found, _ = weights(workdir, build.stored(workdir)[0])
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (params, found)
    ]
    differing = [
        f"{name}: {shapes[0].get(name, 'nothing')} here, {shapes[1].get(name, 'nothing')} there"
        for name in sorted(shapes[0] | shapes[1])
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if differing:
        raise ValueError(
            f"--config.train.init_from={workdir} is another network; {len(differing)} parameters differ:\n  "
            + "\n  ".join(differing[:5])
        )
    return found


def _common(config: Config) -> dict[str, Any]:
    """What experts must have in common: the chain, and what their pictures are like."""
    values, fields = to_dict(config), {"process": _CHAIN, "data": ("low", "high"), "condition": ("size", "noise")}
    return {section: {name: values[section][name] for name in names} for section, names in fields.items()}


_CHAIN = ("path", "betas", "rate", "steps", "prediction", "variance", "snr_splits")
