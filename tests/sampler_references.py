"""Samples by the package diffusers, stored in tests/data/samplers.npz so that tests need neither it nor PyTorch.

    python -m tests.sampler_references        needs pip install 'patch-diffusion[torch]'

Of every case: `CASE` the result, and from where: `x1` for steps of the chain, `sigmas` for variance-exploding ones, `z`
the noise of the steps. The networks are `network`, `raw` and `scaled`, any functions that JAX and PyTorch share.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "samplers.npz"
STEPS = 8
BETAS = (1000, 1e-4, 0.02, "linear")


def network(xp, x):
    """A prediction of noise, or of what a case says, on the chain."""
    return 0.9 * xp.tanh(x)


def raw(xp, x, c_noise):
    """The raw network of a preconditioned one, which sees its level of noise."""
    return 0.9 * xp.tanh(x) + 0.1 * c_noise


def scaled(xp, x, sigma):
    """A prediction of noise on a variance-exploding path."""
    return 0.9 * xp.tanh(x / xp.sqrt(sigma**2 + 1))


def main() -> None:
    import diffusers
    import torch

    rng = np.random.default_rng(0)
    x1 = rng.standard_normal((2, 3, 3, 1)).astype(np.float32)
    z = rng.standard_normal((STEPS, *x1.shape)).astype(np.float32)
    found = {"x1": x1, "z": z, "version": diffusers.__version__}

    def chain(scheduler, noisy=None):
        scheduler.set_timesteps(STEPS)
        x, out = torch.tensor(x1), []
        for i, t in enumerate(scheduler.timesteps):
            given = {} if noisy is None else {**noisy, "variance_noise": torch.tensor(z[i])}
            x = scheduler.step(network(torch, x), t, x, **given).prev_sample
            out.append(x.numpy())
        return np.stack(out)

    common = {"timestep_spacing": "trailing"}
    ddim = {**common, "clip_sample": False, "set_alpha_to_one": True}
    found["ddim"] = chain(diffusers.DDIMScheduler(*BETAS, **ddim), {"eta": 0.0})
    found["ddim_half"] = chain(diffusers.DDIMScheduler(*BETAS, **ddim), {"eta": 0.5})
    ended = {**common, "final_sigmas_type": "zero"}
    found["dpmpp_2m"] = chain(diffusers.DPMSolverMultistepScheduler(*BETAS, **ended))
    sde = diffusers.DPMSolverMultistepScheduler(*BETAS, **ended, algorithm_type="sde-dpmsolver++")
    found["dpmpp_2m_sde"] = chain(sde, {})
    for order in (1, 2):
        scheduler = diffusers.UniPCMultistepScheduler(*BETAS, **ended, solver_order=order, solver_type="bh2")
        found[f"unipc_{order}"] = chain(scheduler)
    # Without its lower order in the last steps, which end before the data.
    kept = {**common, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    found["unipc_3"] = chain(diffusers.UniPCMultistepScheduler(*BETAS, **kept, solver_order=3, solver_type="bh2"))

    heun = diffusers.HeunDiscreteScheduler(*BETAS, use_karras_sigmas=True)
    heun.set_timesteps(STEPS)
    x = torch.tensor(x1) * heun.sigmas[0]
    for i, t in enumerate(heun.timesteps):
        # Its list has every sigma but the first and the last twice, once for each evaluation there.
        x = heun.step(scaled(torch, x, heun.sigmas[i]), t, x).prev_sample
    found |= {"heun_sigmas": np.append(heun.sigmas[:-1:2].numpy(), 0.0), "heun": x.numpy()}

    edm = diffusers.EDMDPMSolverMultistepScheduler()
    edm.set_timesteps(STEPS)
    x, out = torch.tensor(x1) * edm.sigmas[0], []
    for t in edm.timesteps:
        x = edm.step(raw(torch, edm.scale_model_input(x, t), t), t, x).prev_sample
        out.append(x.numpy())
    found |= {"edm_sigmas": edm.sigmas.numpy(), "edm_dpmpp_2m": np.stack(out)}

    euler = diffusers.EDMEulerScheduler()
    euler.set_timesteps(STEPS)
    x, out = torch.tensor(x1) * euler.sigmas[0], []
    for t in euler.timesteps:
        x = euler.step(raw(torch, euler.scale_model_input(x, t), t), t, x).prev_sample
        out.append(x.numpy())
    found["edm_euler"] = np.stack(out)

    # One last step with noise, from 0 so that it shows; theirs evaluates the network before it adds the noise, so the
    # estimate is given to it.
    euler = diffusers.EDMEulerScheduler()
    euler.set_timesteps(STEPS)
    euler.set_begin_index(STEPS - 1)
    euler.precondition_outputs = lambda sample, output, sigma: 0.5 * sample + 0.1 * sigma
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0))
    options = {"s_churn": 2.4, "s_noise": 1.007}
    churned = euler.step(
        torch.zeros(x1.shape), euler.timesteps[-1], torch.zeros(x1.shape), generator=generator, **options
    )
    found |= {"churned": churned.prev_sample.numpy(), "churned_z": drawn.numpy()}
    np.savez(FILE, **found)
    print(f"{FILE}: {', '.join(found)}")


if __name__ == "__main__":
    main()
