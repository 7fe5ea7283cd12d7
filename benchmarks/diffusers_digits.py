"""A pipeline of diffusers with a fitted solver against its own schedulers: python benchmarks/diffusers_digits.py.

The pipeline is a DDIMPipeline with a small UNet2DModel, trained on scikit-learn's digits with noise prediction on DDPM's
linear table. The error is the root mean square distance of the last states to the accurate solution from the same noise, on
noise that took no part in the fit. Every scheduler gets its best spacing and sigmas. `--train` trains the network again and
writes it to benchmarks/unet2d_digits (about ten minutes on one core).
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

import iia_ode as iia
from iia_ode.denoisers import digits_data

FOLDER = Path(__file__).parent / "unet2d_digits"
STEPS, BATCH, RATE, DECAY = 2500, 64, 1.5e-3, 0.998


def train() -> None:
    """Train the network and write it to `FOLDER`."""
    torch.manual_seed(0)
    images = digits_data()[0].float()
    scheduler = DDPMScheduler()
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    recent = 0.0
    for step in range(STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        noise, t = torch.randn_like(x), torch.randint(1000, (BATCH,))
        loss = (unet(scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        kept = min(DECAY, (1 + step) / (10 + step))
        for name, value in unet.state_dict().items():
            averaged[name].lerp_(value, 1 - kept)
        recent += 0.01 * (loss.item() - recent)
        if step % 250 == 249:
            print(f"step {step + 1}: loss {recent:.4f}", flush=True)
    unet.load_state_dict(averaged)
    unet.save_pretrained(FOLDER)


def schedulers() -> Iterator[tuple[str, Any, int]]:
    """The schedulers of diffusers with their options, and the steps of a run of at most eight evaluations."""
    spacings = ("linspace", "leading", "trailing")
    sigmas: tuple[dict[str, bool], ...] = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True})
    for spacing, clip in product(spacings, (False, True)):
        yield f"DDIM, {spacing}, clip {clip}", DDIMScheduler(timestep_spacing=spacing, clip_sample=clip), 8
    for spacing, kind in product(spacings, sigmas):
        name = ", ".join([spacing, *kind])
        for order in (2, 3):
            options: dict[str, Any] = {"solver_order": order, "timestep_spacing": spacing, **kind}
            yield f"DPM++ {order}M, {name}", DPMSolverMultistepScheduler(**options), 8
            yield f"UniPC {order}, {name}", UniPCMultistepScheduler(**options), 8
            yield f"DEIS {order}, {name}", DEISMultistepScheduler(**options), 8
        # Two evaluations in each step but the last.
        yield f"Heun, {name}", HeunDiscreteScheduler(timestep_spacing=spacing, **kind), 4


@torch.no_grad()
def last_state(unet: UNet2DModel, scheduler: Any, steps: int, noise: Tensor) -> Tensor:
    """The end of a pipeline's loop from standard normal noise [B, 1, 8, 8]."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


def compare(nfe: int, draws: int, unseen: int, budget: str) -> None:
    """Print the errors of the fitted pipeline and of every scheduler."""
    unet = UNet2DModel.from_pretrained(FOLDER)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    ode = iia.ProbabilityFlowODE(
        iia.diffusers.denoiser(unet), iia.diffusers.schedule_of(pipe.scheduler), prediction="noise"
    )
    fit = iia.fit(ode, nfe, shape=(1, 8, 8), samples=draws, budget=budget, weights="scalars")
    pipe.scheduler = iia.diffusers.IIAScheduler.of(fit, pipe.scheduler)

    seeds = list(range(10_000, 10_000 + unseen))
    noise = iia.noise.seeded_noise(seeds, (1, 8, 8))
    exact = iia.Teacher.solve(ode, noise, ode.schedule.t_noise, ode.schedule.t_data, steps=120, chunk_size=128)

    def error(states: Tensor) -> float:
        return float((states - exact.final).square().mean().sqrt())

    ours = last_state(unet, pipe.scheduler, nfe, noise)
    images = pipe(unseen, generator=iia.noise.seed_generators(seeds), num_inference_steps=nfe, output_type="np").images
    shown = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    found = sorted((error(last_state(unet, s, n, noise)), name) for name, s, n in schedulers())
    best, name = found[0]
    print(f"reference error (estimate): {exact.record.error:.2g}; {unseen} unseen images")
    print(f"pipe(...) against the loop: largest difference {float((torch.from_numpy(images) - shown).abs().max()):.2g}")
    print(f"fitted pipeline, {nfe} evaluations: {error(ours):.4f}")
    print(f"best of {len(found)} schedulers, 8 evaluations: {best:.4f} ({name})")
    print(f"ratio: {error(ours) / best:.3f}")
    for value, other in found[1:6]:
        print(f"  {value:.4f} {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="train the network again")
    parser.add_argument("--nfe", type=int, default=5, help="evaluations of the fitted pipeline")
    parser.add_argument("--draws", type=int, default=64, help="draws of the fit")
    parser.add_argument("--unseen", type=int, default=256, help="images of the comparison")
    parser.add_argument("--budget", default="closed-form", help="budget of the fit")
    options = parser.parse_args()
    if options.train:
        train()
    compare(options.nfe, options.draws, options.unseen, options.budget)


if __name__ == "__main__":
    main()
