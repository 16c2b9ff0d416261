"""Edits of images with the parts of a run: guidance with a memory is in all of them."""

import numpy as np
import pytest

from diffusion.methods import edit
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import edits, parts
from experiments.parts import DataSpec
from tests.experiments.runs import noisy

MASK = (np.arange(8) < 4)[None, :, None, None]
EDITS = {
    "sdedit": lambda run: edits.sdedit(run, 0.8),
    "inpainting": lambda run: edits.inpainting(run, MASK, 1, 1),
    "given": lambda run: edits.restoration(run, edit.downscale(4), 0.5, None),
    "dps": lambda run: edits.restoration(run, edit.downscale(4), 0.5, 0.1),
}


def resolved(**fields) -> parts.Parts:
    config = configs.Config(model=ViT(patch_size=8, width=4, depth=1, heads=1))
    config.sample = configs.Sample(steps=3, **fields)
    return parts.resolve(config, DataSpec((8, 8, 1), ("a", "b")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdedit", *(pytest.param(n, marks=pytest.mark.slow) for n in list(EDITS)[1:])])
def test_guidance_with_a_memory_guides_edits(name):
    made = []
    for scale in (1.0, 4.0):
        run = resolved(guidance=scale, guidance_kind="apg", guidance_momentum=-0.5)
        params = noisy(parts.init_params(run), 0.3)
        images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
        made.append(np.asarray(edits.edit_fn(run, EDITS[name](run))(params, np.arange(2), np.arange(2), images)[-1]))
    assert np.isfinite(made).all() and np.abs(made[0] - made[1]).max() > 1e-2


def test_a_memory_of_earlier_steps_cannot_be_inverted():
    with pytest.raises(ValueError, match="--invert .* guidance that remembers .*: pass --guidance_momentum=0"):
        edits.inversion(resolved(guidance=2.0, guidance_kind="apg", guidance_momentum=-0.5), 0.1)
    edits.inversion(resolved(guidance=2.0, guidance_kind="apg"), 0.1)
