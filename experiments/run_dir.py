"""The folder of a run: its files, its stored config, its checkpoints; and trained runs, for sampling and measuring."""

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import layers
from diffusion.io import checkpoint, files, stored_config
from diffusion.metrics.report import with_current_names
from experiments import stored_versions
from experiments.checks import CHAINS, TEACHERS
from experiments.config import Config, from_dict, to_dict
from experiments.parts import DataSpec, Parts, resolve


class RunDir(NamedTuple):
    """A work directory. Only this module knows the names of the files in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Training states, by step."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The training state with the lowest held-out loss, for early stopping."""
        return self.path / "best"

    @property
    def averages(self) -> Path:
        """Snapshots of the power-function averages, by step."""
        return self.path / "averages"

    @property
    def metrics(self) -> Path:
        """The log, JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.path / "tensorboard"

    def tracker_id(self) -> str:
        """A name for this run that no other has, the same after an interruption."""
        path = self.path / "tracker_id.txt"
        if not path.exists():
            files.atomic_write(path, lambda file: file.write(f"{secrets.token_hex(4)}\n".encode()))
        return path.read_text().strip()

    @property
    def previews(self) -> Path:
        """Grids of samples during training, by step."""
        return self.path / "previews"

    @property
    def samples(self) -> Path:
        """The samples at the end of training, all of them."""
        return self.path / "samples.npz"

    @property
    def samples_image(self) -> Path:
        """The first rows of them."""
        return self.path / "samples.png"

    @property
    def film_strip(self) -> Path:
        """Some of them on their way from noise."""
        return self.path / "trajectory.png"

    @property
    def nearest_image(self) -> Path:
        """Those that are nearest to a training image, each beside it."""
        return self.path / "nearest.png"

    @property
    def seam_image(self) -> Path:
        """Where neighbouring pixels differ, in samples and in real images."""
        return self.path / "seams.png"

    @property
    def page(self) -> Path:
        """The report to look at, one HTML file."""
        return self.path / "report.html"

    @property
    def command(self) -> Path:
        """The command that trains it."""
        return self.path / "command.txt"

    @property
    def is_run(self) -> bool:
        """Whether the folder holds the config of a run."""
        return (self.path / stored_config.CONFIG).exists()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None without one."""
        return checkpoint.latest(self.checkpoints)

    def open(self, config: Config, spec: DataSpec, command: str | None = None, *, writes: bool = True) -> None:
        """Stores the config in a new folder, or makes sure that the folder is that of a run with the same config.

        The mesh may be another one. `command` is what the user typed, and is stored too. Without `writes`, as in all
        processes of a run but one, the config must be there.

        Raises:
          ValueError: it holds a run with another config; the fields that differ are listed.
          OSError: nothing can be written there, or another process wrote it where this one cannot read.
        """
        resolved = _to_stored(config, spec)
        if not writes:
            for _ in range(20):  # other machines may see a new file of a network mount late
                if self.is_run:
                    break
                time.sleep(0.5)
            else:
                raise OSError(
                    f"the first process wrote to {self.path}, where this one finds nothing: all need one folder"
                )
            self._check_same(resolved)
            return
        files.check_writable(self.path)
        if self.is_run:
            self._check_same(resolved)
        else:
            stored_config.write_config(self.path, resolved)
        if command and self.report() is None:
            files.atomic_write(self.command, lambda file: file.write(f"{command}\n".encode()))

    def _check_same(self, resolved: dict[str, Any]) -> None:
        """Raises ValueError if the stored config is another one."""
        stored = stored_config.read_config(self.path)
        with contextlib.suppress(ValueError, FileNotFoundError):  # one of a later version differs, and is refused below
            stored = _to_stored(*self.stored())
        stored, resolved = ({k: v for k, v in each.items() if k != "mesh"} for each in (stored, resolved))
        differing = stored_config.config_differences(stored, resolved)
        if differing:
            raise ValueError(
                f"{self.path} holds a run with another config (stored -> asked for):\n  "
                + "\n  ".join(differing)
                + "\nPass another --workdir, or the stored values to continue that run."
            )

    def stored(self) -> tuple[Config, DataSpec]:
        """Config and data facts of the run.

        Raises:
          FileNotFoundError: there is no run.
          ValueError: its config was stored by a later version.
        """
        values = stored_versions.upgrade(stored_config.read_config(self.path))
        facts = values.pop("data_spec", None)
        if facts is None:
            raise ValueError(f"{self.path}/config.json was not written by experiments.train; pass another --workdir")
        unknown = sorted(set(facts) - set(DataSpec._fields))
        if unknown:
            raise ValueError(f"the stored config has the facts {unknown} about its data, unknown to this version")
        listed = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return from_dict(values), DataSpec(**listed)  # earlier versions stored shape and class_names alone

    def write_new(self, config: Config, spec: DataSpec, state: Any) -> None:
        """Stores the config and `state` as step 0, for weights that were trained elsewhere."""
        checkpoint.save(self.checkpoints, 0, state)
        stored_config.write_config(self.path, _to_stored(config, spec))  # last: it makes the folder that of a run

    def report(self) -> dict[str, Any] | None:
        """The report of a finished run; None if it is not finished.

        Raises:
          ValueError: report.json is damaged.
        """
        path = self.path / "report.json"
        if not path.exists():
            return None
        try:
            return with_current_names(json.loads(path.read_text()))
        except ValueError as e:
            raise ValueError(
                f"{path} is damaged ({e}): delete it, and the command that trained the run writes it again"
            ) from e

    def write_report(self, report: dict[str, Any]) -> dict[str, Any]:
        """Writes report.json, which marks the run as finished; returns the report."""
        text = json.dumps(report, indent=2) + "\n"
        files.atomic_write(self.path / "report.json", lambda file: file.write(text.encode()))
        return report

    def weights(self, step: int | None = None, decay: float | None = None) -> tuple[Any, int]:
        """Averaged weights as NumPy arrays, and the step that they are from; see `trained`."""
        decays = self.stored()[0].train.ema
        if decay is not None and decay not in decays:
            raise ValueError(f"--ema={decay}: {self.path} has averages with the decays {', '.join(map(str, decays))}")
        averages, step = checkpoint.restore_ema(self.checkpoints, step, report=print, on_host=True)
        return averages[str(0 if decay is None else decays.index(decay))], step

    def check_teacher(self, config: Config) -> None:
        """Makes sure that the run can be the teacher of one with this config, which evaluates it as its own network.

        Raises:
          FileNotFoundError: there is no run.
          ValueError: it learned something else, or fields differ that make it another function; they are listed.
        """
        teacher, kind = self.stored()[0], config.objective.kind
        if teacher.objective.kind not in TEACHERS[kind]:
            raise ValueError(
                f"--config.train.init_from={self.path} learned objective.kind={teacher.objective.kind}, and a teacher "
                f"of kind={kind} one of {', '.join(TEACHERS[kind])}: pass another run"
            )
        found = []
        for each in (teacher, config):
            values = to_dict(each)
            process = noising(each) | {name: values["process"][name] for name in _CHAIN if name not in _PATH}
            of_data = {name: values["data"][name] for name in ("low", "high")}
            model = {name: value for name, value in values["model"].items() if name not in ("scan", "remat")}
            found.append({"process": process, "data": of_data, "model": model})
        if differing := stored_config.config_differences(*found):
            raise ValueError(
                f"--config.train.init_from={self.path} is no teacher for this run, which evaluates it with its own "
                "config; they differ in (teacher -> this run):\n  "
                + "\n  ".join(differing)
                + "\nSet these fields as in the teacher, or pass another run."
            )

    def initial_weights(self, like: Any) -> Any:
        """The averaged weights, as initial weights of a network with the parameters `like`, scanned or not.

        Raises:
          FileNotFoundError: there is no run.
          ValueError: its network is another one; the first differences are listed.
        """
        found, _ = self.weights()
        shapes = [
            {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
            for tree in (jax.eval_shape(layers.unstacked, like), layers.unstacked(found))
        ]
        differing = [
            f"{name}: {shapes[0].get(name, 'nothing')} here, {shapes[1].get(name, 'nothing')} there"
            for name in sorted(shapes[0] | shapes[1])
            if shapes[0].get(name) != shapes[1].get(name)
        ]
        if differing:
            raise ValueError(
                f"--config.train.init_from={self.path} is another network; {len(differing)} parameters differ:\n  "
                + "\n  ".join(differing[:5])
            )
        return layers.stacked(layers.unstacked(found), like)


class Trained(NamedTuple):
    """A trained run: `params` of its network, or a tuple of those of each expert.

    `members` are the configs of all experts; sampling follows `config`, of which a changed copy may be resolved.
    """

    config: Config
    spec: DataSpec
    params: Any
    step: int
    members: tuple[Config, ...] = ()

    def parts(self) -> tuple[Parts, tuple[Parts, ...]]:
        """The parts of the run, and those of each expert."""
        return resolve(self.config, self.spec), tuple(resolve(member, self.spec) for member in self.members)


def default_workdir(config: Config) -> Path:
    """Where a run goes without --workdir: runs/NAME; each expert has its own."""
    split = config.process.split
    return Path("runs") / (config.name if split is None else f"{config.name}_split{split}")


def trained(
    workdirs: Sequence[Path], step: int | None = None, decay: float | None = None, *, on_host: bool = False
) -> Trained:
    """The run in a work directory, or the experts in several, in any order, one for every range.

    Args:
      on_host: leave the parameters NumPy arrays, to be placed on a mesh.
      step: of training; default the newest.
      decay: which of the averaged weights; default the first of the run's list.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: one expert alone, experts that do not belong together, or no such decay.
    """
    if len(workdirs) == 1:
        config, spec = RunDir(workdirs[0]).stored()
        if config.process.split is not None:
            raise ValueError(
                f"{workdirs[0]} holds expert {config.process.split} of {len(config.process.snr_splits) + 1}, which "
                "cannot sample alone: pass --workdir=A,B with the work directories of all"
            )
        params, step = RunDir(workdirs[0]).weights(step, decay)
        return Trained(config, spec, params if on_host else jax.tree.map(jnp.asarray, params), step)
    runs = sorted(
        ((*RunDir(workdir).stored(), workdir) for workdir in workdirs), key=lambda run: run[0].process.split or 0
    )
    first, spec, first_dir = runs[0]
    found = [config.process.split for config, _, _ in runs]
    if found != list(range(len(first.process.snr_splits) + 1)):
        raise ValueError(
            f"--workdir={','.join(map(str, workdirs))} holds the experts {found}, but the thresholds "
            f"{first.process.snr_splits} need each of 0..{len(first.process.snr_splits)} once"
        )
    for config, known, workdir in runs[1:]:
        differing = stored_config.config_differences(_common(first), _common(config))
        if differing or known != spec:
            raise ValueError(
                f"{workdir} does not belong to the experts of {first_dir}; they differ in:\n  "
                + "\n  ".join(differing or ["the images or the classes that they were trained on"])
            )
    params, steps = zip(*(RunDir(workdir).weights(step, decay) for _, _, workdir in runs), strict=True)
    params = params if on_host else jax.tree.map(jnp.asarray, params)
    config = replace(first, process=replace(first.process, split=None))
    return Trained(config, spec, params, max(steps), tuple(config for config, _, _ in runs))


def digest(configs: Sequence[Config], params: Any) -> str:
    """What tells trained runs apart, wherever they lie: hexadecimal SHA-256 of their configs and of weights."""
    found = hashlib.sha256(json.dumps([to_dict(config) for config in configs]).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _to_stored(config: Config, spec: DataSpec) -> dict[str, Any]:
    """What config.json of a run holds: enough to rebuild its network without its data."""
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in spec._asdict().items()}
    return to_dict(config) | {"data_spec": facts}


def noising(config: Config) -> dict[str, Any]:
    """The fields of the noising path; runs that work together have the same."""
    return {name: getattr(config.process, name) for name in _PATH if name != "steps" or config.process.path in CHAINS}


def _common(config: Config) -> dict[str, Any]:
    """What experts must have in common: the chain, and the format of their images."""
    values, sections = to_dict(config), {"process": _CHAIN, "data": ("low", "high"), "condition": ("size", "noise")}
    return {section: {name: values[section][name] for name in names} for section, names in sections.items()}


_PATH = ("path", "noise_scale", "betas", "rate", "steps")
_CHAIN = (*_PATH, "prediction", "variance", "snr_splits")
