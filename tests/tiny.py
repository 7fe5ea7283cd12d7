"""Pipelines of diffusers with small random networks, built without downloads, and their runs to latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor

F = torch.float32
SIZE = 8
"""Height and width of the latents."""


def _seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 5, channels: int = 3, size: int = 2 * SIZE) -> Tensor:
    return torch.rand((1, channels, size, size), generator=torch.Generator().manual_seed(seed))


def mask(size: int = 2 * SIZE) -> Tensor:
    values = torch.zeros(1, 1, size, size)
    values[..., : size // 2] = 1.0
    return values


# ---- networks --------------------------------------------------------------------------------------------------------


def unet2d(channels: int = 3, **options: Any) -> Any:
    _seeded()
    sizes = dict(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return diffusers.UNet2DModel(**(sizes | options)).eval()


def unet(**options: Any) -> Any:
    _seeded()
    sizes = dict(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.UNet2DConditionModel(**(sizes | options)).eval()


def vae(channels: int = 4, **options: Any) -> Any:
    _seeded()
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **options,
    ).eval()


# ---- pipelines -------------------------------------------------------------------------------------------------------


def sd_scheduler(kind: str = "DDIMScheduler", **options: Any) -> Any:
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    rest = dict(clip_sample=False, set_alpha_to_one=False) if kind == "DDIMScheduler" else {}
    return getattr(diffusers, kind)(**betas, **rest, **options)


def ddim() -> Any:
    return quiet(diffusers.DDIMPipeline(unet2d(), diffusers.DDIMScheduler(clip_sample=False)))


_SD = dict(
    text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
)


def sd(kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    own = dict(vae=vae(), unet=unet(), scheduler=sd_scheduler()) | _SD
    return quiet(getattr(diffusers, kind)(**(own | parts)))


def texts() -> dict[str, Any]:
    """A tokenizer of a few words and a text encoder, for pipelines that take prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "a", "red", "blue", "green", "cat", "dog", "ship"]
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    _seeded(3)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(words))
    config = CLIPTextConfig(**sizes, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=8)
    return dict(tokenizer=fast, text_encoder=CLIPTextModel(config).eval())


def controlnet() -> Any:
    _seeded()
    net = diffusers.ControlNetModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        in_channels=4,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        conditioning_embedding_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    ).eval()
    for part in net.controlnet_down_blocks:
        torch.nn.init.normal_(part.weight, std=0.5)
    return sd("StableDiffusionControlNetPipeline", controlnet=net)


def sd_call(images: int = 2, guidance_scale: float = 7.5) -> dict[str, Any]:
    return dict(
        prompt_embeds=noise(images, 4, 8, seed=2),
        negative_prompt_embeds=noise(images, 4, 8, seed=3),
        guidance_scale=guidance_scale,
    )


def sdxl(kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    net = unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    own = dict(vae=vae(), unet=net, scheduler=sd_scheduler("EulerDiscreteScheduler"))
    own |= dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    return quiet(getattr(diffusers, kind)(**(own | parts)))


def sdxl_call(images: int = 2) -> dict[str, Any]:
    pooled = dict(pooled_prompt_embeds=noise(images, 8, seed=6), negative_pooled_prompt_embeds=noise(images, 8, seed=7))
    return sd_call(images, 5.0) | pooled | dict(height=2 * SIZE, width=2 * SIZE)


def sd3(kind: str = "StableDiffusion3Pipeline", **parts: Any) -> Any:
    _seeded()
    net = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=8,
    ).eval()
    own = dict(
        transformer=net,
        vae=vae(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **{f"{name}{k}": None for name in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")},
    )
    return quiet(getattr(diffusers, kind)(**(own | parts)))


def sd3_call(images: int = 2) -> dict[str, Any]:
    return dict(
        prompt_embeds=noise(images, 4, 16, seed=2),
        negative_prompt_embeds=noise(images, 4, 16, seed=3),
        pooled_prompt_embeds=noise(images, 8, seed=6),
        negative_pooled_prompt_embeds=noise(images, 8, seed=7),
        guidance_scale=5.0,
        height=2 * SIZE,
        width=2 * SIZE,
    )


def flux(kind: str = "FluxPipeline", **parts: Any) -> Any:
    _seeded()
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    own = dict(
        transformer=net,
        vae=vae(1, shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **{f"{name}{k}": None for name in ("text_encoder", "tokenizer") for k in ("", "_2")},
    )
    return quiet(getattr(diffusers, kind)(**(own | parts)))


def flux_call(images: int = 2) -> dict[str, Any]:
    return dict(
        prompt_embeds=noise(images, 4, 16, seed=2),
        pooled_prompt_embeds=noise(images, 8, seed=6),
        guidance_scale=3.5,
        height=2 * SIZE,
        width=2 * SIZE,
    )


def dit() -> Any:
    _seeded()
    net = diffusers.DiTTransformer2DModel(
        sample_size=SIZE,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()
    return quiet(diffusers.DiTPipeline(net, vae(), diffusers.DDIMScheduler(clip_sample=False)))


def pixart() -> Any:
    _seeded()
    net = diffusers.PixArtTransformer2DModel(
        sample_size=SIZE,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    ).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return quiet(diffusers.PixArtAlphaPipeline(None, None, vae(), net, scheduler))


def pixart_call(images: int = 2) -> dict[str, Any]:
    masks = {k: torch.ones(images, 4) for k in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return (
        sd_call(images, 4.5)
        | masks
        | dict(negative_prompt=None, height=2 * SIZE, width=2 * SIZE, use_resolution_binning=False)
    )


def wan() -> Any:
    nets = []
    for seed in (0, 1):
        _seeded(seed)
        nets.append(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=8,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
                rope_max_seq_len=32,
            ).eval()
        )
    _seeded()
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    parts = dict(tokenizer=None, text_encoder=None, vae=decoder, scheduler=scheduler)
    return quiet(diffusers.WanPipeline(transformer=nets[0], transformer_2=nets[1], boundary_ratio=0.875, **parts))


def wan_call(images: int = 1) -> dict[str, Any]:
    return dict(
        prompt_embeds=noise(images, 4, 8, seed=2),
        negative_prompt_embeds=noise(images, 4, 8, seed=3),
        guidance_scale=4.0,
        height=32,
        width=32,
        num_frames=5,
    )


def svd() -> Any:
    """Stable Video Diffusion: v prediction, continuous timesteps ln(sigma) / 4, levels up to 700, an image as the prompt."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    _seeded()
    sizes = dict(hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    net = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        transformer_layers_per_block=1,
        num_attention_heads=2,
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ).eval()
    decoder = diffusers.AutoencoderKLTemporalDecoder(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    ).eval()
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    processor = CLIPImageProcessor(crop_size=16, size=16)
    return quiet(diffusers.StableVideoDiffusionPipeline(decoder, encoder, net, scheduler, processor))


def svd_call(images: int = 2) -> dict[str, Any]:
    pictures = torch.cat([image(seed) for seed in range(5, 5 + images)])
    return dict(image=pictures, height=2 * SIZE, width=2 * SIZE, num_frames=2, decode_chunk_size=2)


# ---- runs ------------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(pipe: Any) -> Iterator[list[Tensor]]:
    """The states that the pipeline's scheduler returns in the block."""
    scheduler, states = pipe.scheduler, []
    step = scheduler.step

    def recording(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        states.append(found[0] if isinstance(found, tuple) else found.prev_sample)
        return found

    scheduler.step = recording
    try:
        yield states
    finally:
        del scheduler.step


def latents(pipe: Any, scheduler: Any = None, **call: Any) -> Tensor:
    """The final latents of a call, under another scheduler if one is given."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    with recorded(pipe) as states:
        pipe(**call)
    return states[-1]


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())
