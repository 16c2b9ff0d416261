"""Programs that show a run while it trains, beside its own log: TensorBoard, Weights & Biases and trackio.

Each is an optional package. Without a network, wandb needs WANDB_MODE=offline; trackio and TensorBoard are local.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.run_dir import RunDir

PROJECT = "patch-diffusion"


class Tracker(NamedTuple):
    """What a run tells such a program.

    scalars  (step, {name: value})
    image    (step, name, uint8 [H, W, 3])
    close    (finished) once, at the end: False if the training was stopped or failed
    """

    scalars: Callable[[int, Mapping[str, float]], Any]
    image: Callable[[int, str, np.ndarray], Any]
    close: Callable[[bool], Any]


def tensorboard(folder: RunDir, name: str, config: Mapping[str, Any]) -> Tracker:
    """Event files in the folder of the run."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder.tensorboard))

    def scalars(step: int, values: Mapping[str, float]) -> None:
        for each, value in values.items():
            writer.add_scalar(each, value, step)

    return Tracker(
        scalars,
        lambda step, each, image: writer.add_image(each, image, step, dataformats="HWC"),
        lambda finished: writer.close(),
    )


def wandb(folder: RunDir, name: str, config: Mapping[str, Any]) -> Tracker:
    """A run of Weights & Biases, its files in the folder of the run; one that is continued has the same id there."""
    import wandb

    try:
        run = wandb.init(
            project=PROJECT, name=name, id=folder.tracker_id(), resume="allow", dir=folder.path, config=dict(config)
        )
    except wandb.errors.Error as e:
        raise ValueError(
            f"--track=wandb cannot start: {str(e).rstrip('.')}. Log in with `wandb login`, or set WANDB_MODE=offline "
            "and upload later with `wandb sync`"
        ) from e
    run.define_metric("*", step_metric="step")  # its own count of steps cannot go back, as a continued training does
    return Tracker(
        lambda step, values: run.log({"step": step, **values}),
        lambda step, each, image: run.log({"step": step, each: wandb.Image(image)}),
        lambda finished: run.finish(exit_code=0 if finished else 1),
    )


def trackio(folder: RunDir, name: str, config: Mapping[str, Any]) -> Tracker:
    """A run of trackio, in its own folder ($TRACKIO_DIR); one that is continued has the same name there."""
    import trackio

    trackio.init(
        project=PROJECT, name=f"{name}-{folder.tracker_id()}", config=dict(config), resume="allow", embed=False
    )
    return Tracker(
        lambda step, values: trackio.log(dict(values), step=step),
        lambda step, each, image: trackio.log({each: trackio.Image(image)}, step=step),
        lambda finished: trackio.finish(),
    )


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


def start(names: Sequence[str], folder: RunDir, name: str, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of these names, for a run `name` with this config.

    Raises:
      ValueError: there is no such tracker, its package is not installed, or it cannot start.
    """
    unknown = [each for each in names if each not in TRACKERS]
    if unknown:
        raise ValueError(f"--track={','.join(names)}: {unknown} are not among {', '.join(TRACKERS)}")
    started = []
    for each in dict.fromkeys(names):
        try:
            started.append(TRACKERS[each](folder, name, config))
        except ImportError as e:
            raise ValueError(f"--track={each} needs {e.name}: pip install -e '.[{each}]'") from None
    return started
