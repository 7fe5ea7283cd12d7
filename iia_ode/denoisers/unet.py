"""A small class-conditional U-Net with EDM preconditioning [Karras et al. 2022, section 5 and table 1]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_whole
from ..errors import InputError

__all__ = ["EDMDenoiser", "UNet"]


class _ResBlock(nn.Module):
    """Two 3x3 convolutions. The noise-and-class embedding scales and shifts the second normalization."""

    def __init__(self, c_in: int, c_out: int, emb: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = _Attention(c_out) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]  # the bias exists: it is not switched off above

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))))
        out: Tensor = self.attention(self.skip(x) + h)
        return out


class _Attention(nn.Module):
    """Single-head self-attention over all pixels, residual, zero at initialization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]  # the bias exists: it is not switched off above

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.out(h)
        return out


class UNet(nn.Module):
    """Class-conditional U-Net over square images.

    The resolution halves after every level but the last. Self-attention sits on the coarsest level.

    Parameters
    ----------
    image_channels : channels of the images.
    channels : width of each level, finest first; multiples of 8.
    blocks : residual blocks per level on the way down. The way up has one more block per level.
    classes : number of class labels. Label ``classes`` is the null label of unconditional use.
    embedding : width of the noise-and-class embedding.
    dropout : dropout rate inside the residual blocks, in training only.
    patch : side of the squares of pixels that the network reads as one pixel with more channels. The network computes at
        1/patch of the image's resolution; a patch of 2 makes an evaluation about four times cheaper. The sides of the image
        must be multiples of `patch`.

    Raises
    ------
    InputError : `patch` is below 1.
    """

    def __init__(
        self,
        image_channels: int = 1,
        channels: tuple[int, ...] = (48, 96),
        blocks: int = 2,
        classes: int = 10,
        embedding: int = 128,
        dropout: float = 0.1,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.classes, self.patch = classes, check_whole("patch", patch, least=1)
        pixel = image_channels * patch**2
        self.frequencies: Tensor
        self.config = {
            "image_channels": image_channels,
            "channels": list(channels),
            "blocks": blocks,
            "classes": classes,
            "embedding": embedding,
            "dropout": dropout,
            "patch": patch,
        }
        # Fixed, low frequencies: high-order ODE solvers gain only if the network is a smooth function of the noise level.
        frequencies = math.pi / 4 * torch.arange(1, 17, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise_embedding = nn.Sequential(nn.Linear(32, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.class_embedding = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv2d(pixel, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels[0]], channels[0]
        for level, c in enumerate(channels):
            coarsest = level == len(channels) - 1
            for _ in range(blocks):
                self.down.append(_ResBlock(width, c, embedding, dropout, attention=coarsest))
                skips.append(width := c)
            if not coarsest:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        for level, c in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                coarsest = level == len(channels) - 1
                self.up.append(_ResBlock(width + skips.pop(), c, embedding, dropout, attention=coarsest))
                width = c
            if level:
                self.up.append(nn.ConvTranspose2d(c, c, 2, stride=2))
        self.norm, self.head = nn.GroupNorm(8, width), nn.Conv2d(width, pixel, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]  # the bias exists: it is not switched off above

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        """Compute the raw network output F.

        Parameters
        ----------
        x : scaled noisy images [B, C, H, W].
        c_noise : noise input [B].
        class_labels : integer labels [B].

        Returns
        -------
        The output [B, C, H, W] in the dtype of x.
        """
        angle = c_noise[:, None] * self.frequencies
        emb = self.noise_embedding(torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype))
        emb = F.silu(emb + self.class_embedding(class_labels))
        h = self.stem(x if self.patch == 1 else F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, _ResBlock) else layer(h)
            skips.append(h)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, _ResBlock) else layer(h)
        out: Tensor = self.head(F.silu(self.norm(h)))
        return out if self.patch == 1 else F.pixel_shuffle(out, self.patch)


class EDMDenoiser(nn.Module):
    """Denoiser D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) around a raw network F [Karras et al. 2022, table 1].

    c_in = 1 / sqrt(sigma^2 + sigma_data^2), c_skip = (sigma_data c_in)^2, c_out = sigma sigma_data c_in and
    c_noise = ln(sigma) / 4. Raw networks of this kind are those of EDM, EDM2 and Playground 2.5.

    Parameters
    ----------
    network : module called as ``network(x, c_noise, **conditions)`` with states [B, ...] and c_noise [B]. The network may have
        an attribute ``classes``, the null label: the condition ``class_labels`` then has this label by default.
    sigma_data : standard deviation of the data per element.
    state_shape : shape of one sample, such as (C, H, W), if known.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, state_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network: Any = network
        self.sigma_data = float(sigma_data)
        self.state_shape = None if state_shape is None else tuple(state_shape)

    @property
    def config(self) -> dict[str, Any]:
        """Settings from which the denoiser can be built again, without its weights, JSON-ready.

        Raises
        ------
        InputError : the network is no :class:`UNet`.
        """
        if not isinstance(self.network, UNet) or self.state_shape is None:
            kind = type(self.network).__name__
            raise InputError(
                f"a file describes a UNet of this package with its state_shape, and the network is a {kind}."
            )
        return {"network": self.network.config, "sigma_data": self.sigma_data, "state_shape": list(self.state_shape)}

    def frozen(self) -> EDMDenoiser:
        """Prepare the denoiser for inference, in place.

        The denoiser goes into evaluation mode. Its weights no longer require gradients and get the channels-last layout.

        Returns
        -------
        The denoiser itself.
        """
        # CPU convolutions compute with channels innermost. Channels-last weights spare the reordering of inputs, which
        # takes a fifth to a third of the time.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub leaves this argument out
        return self.eval().requires_grad_(False)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **conditions: Any) -> Tensor:
        """Estimate the clean samples.

        Parameters
        ----------
        x : noisy samples [B, ...] with alpha = 1.
        sigma : noise levels [B].
        class_labels : for a network with ``classes``, integer labels [B], and None for the null label. Any other network
            receives the labels if they are not None.
        conditions : further keywords of the network.

        Returns
        -------
        Data estimates D(x, sigma), [B, ...] in the dtype of x.

        Raises
        ------
        InputError : x is not a batch of images for a :class:`UNet`, or labels are not integers of shape [B].
        """
        if isinstance(self.network, UNet) and x.ndim != 4:
            raise InputError(f"a denoiser of images takes x of shape [B, C, H, W], got {list(x.shape)}.")
        null = getattr(self.network, "classes", None)
        if isinstance(null, int):
            if class_labels is None:
                class_labels = torch.full(x.shape[:1], null, device=x.device)
            elif class_labels.shape != x.shape[:1] or class_labels.is_floating_point():
                raise InputError(
                    f"class_labels must be integers of shape [{len(x)}], got {class_labels.dtype} {list(class_labels.shape)}."
                )
        if class_labels is not None:
            conditions["class_labels"] = class_labels
        # Half-precision networks get their noise level and scalings in float32, because 1/sigma^2 overflows float16.
        wide = torch.promote_types(x.dtype, torch.float32)
        s = sigma.to(wide).reshape(-1, *[1] * (x.ndim - 1))
        d = self.sigma_data
        total = (s * s + d * d).sqrt()
        raw = self.network((x / total).to(x.dtype), sigma.to(wide).log() / 4, **conditions)
        out: Tensor = (d / total) ** 2 * x + s * d / total * raw
        return out.to(x.dtype)
