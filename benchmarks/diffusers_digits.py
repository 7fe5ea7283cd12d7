"""A pipeline of diffusers with a fitted solver against its own schedulers: python benchmarks/diffusers_digits.py.

The pipeline is a DDIMPipeline with a small UNet2DModel, trained on scikit-learn's digits with noise prediction on DDPM's
linear table. `--train` trains the network again and writes it to benchmarks/unet2d_digits (about ten minutes on two cores).
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from iia_ode.denoisers.pretrained import digits_data

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="train the network again")
    options = parser.parse_args()
    if options.train:
        train()


if __name__ == "__main__":
    main()
