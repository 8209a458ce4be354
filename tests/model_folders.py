"""Small diffusers-format model folders with random weights, made for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from small_processor import SmallProcessor
from tokenizers import pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tetriserve.models.embedded.build import make_flux, make_text_stack, make_vae

VAE_CHANNELS = (8, 8, 8, 8)
VIDEO_VAE: dict[str, Any] = {
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1] * 16,
    "latents_std": [1.5] * 16,
}
"""Of Wan's and Qwen-Image's, which is Wan's."""


def tiny_flux(folder: Path, *, guidance_embeds: bool = True, heads: int = 4) -> Path:
    """FLUX with 4 heads (dev by default, schnell without `guidance_embeds`)."""
    make_flux(
        folder,
        heads=heads,
        head_dim=12,
        double_blocks=1,
        single_blocks=2,
        guidance_embeds=guidance_embeds,
        vae_channels=VAE_CHANNELS,
    )
    return folder


def tiny_kontext(folder: Path) -> Path:
    """FLUX.1 Kontext: FLUX.1 dev's parts in another pipeline."""
    parts = FluxPipeline.from_pretrained(tiny_flux(folder)).components
    FluxKontextPipeline(**parts).save_pretrained(folder, safe_serialization=True)
    return folder


def flux_lora(file: Path, folder: Path, *, seed: int, text: bool) -> Path:
    """A LoRA of random weights for a FLUX folder, with `text` for its CLIP too."""
    torch.manual_seed(seed)
    pipeline = FluxPipeline.from_pretrained(folder)
    parts = {"transformer": pipeline.transformer} | ({"text_encoder": pipeline.text_encoder} if text else {})
    layers = {}
    for name, module in parts.items():
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if name == "transformer" else ["q_proj", "v_proj"]
        module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
    FluxPipeline.save_lora_weights(file.parent, weight_name=file.name, **layers)
    return file


def tiny_sd3(folder: Path, *, dual_attention: bool = True) -> Path:
    """SD3 (SD3.5 medium with `dual_attention`: a second attention over the image, and query-key norms)."""
    torch.manual_seed(0)
    first = make_text_stack(width=32, projected=True)
    second = make_text_stack(width=32, projected=True)
    transformer = SD3Transformer2DModel(
        sample_size=64,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None,
    )
    t5 = make_text_stack(width=64)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(VAE_CHANNELS),
        text_encoder=first["clip"],
        tokenizer=first["clip_tokenizer"],
        text_encoder_2=second["clip"],
        tokenizer_2=second["clip_tokenizer"],
        text_encoder_3=t5["t5"],
        tokenizer_3=t5["t5_tokenizer"],
    ).save_pretrained(folder, safe_serialization=True)
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(*more: str) -> Qwen2Tokenizer:
    """A token for each byte, and `more`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )


def tiny_flux2_klein(folder: Path, *, distilled: bool = False) -> Path:
    """FLUX.2 klein, whose text is the states behind layers 9, 18 and 27."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(qwen3(tokenizer, layers=28)),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance=False),
        is_distilled=distilled,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def flux2_transformer(*, guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


TEXT_OF_USER = (
    "{% for message in messages if message.role == 'user' %}{% for part in message.content %}{{ part.text }}"
    "{% endfor %}{% endfor %}"
)


def tiny_flux2_dev(folder: Path) -> Path:
    """FLUX.2 dev, whose text is the states behind layers 10, 20 and 30; with a tokenizer where it has a processor,
    which needs torchvision."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEXT_OF_USER
    text = {"model_type": "mistral", "num_hidden_layers": 31, "head_dim": 16, "vocab_size": len(tokenizer)}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = Mistral3Config(
        text_config={**text, **small, "num_key_value_heads": 2}, vision_config={**vision, **small}
    )
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance=True),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_z_image(folder: Path) -> Path:
    """Z-Image with 3 heads, which neither 2 nor 4 divides, as neither 4 nor 8 divides the 30 of the real one."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text_encoder = Qwen3Model(qwen3(tokenizer, layers=2))
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=36,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=32,
        axes_dims=[4, 4, 4],
        axes_lens=[512, 64, 64],
    )
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(VAE_CHANNELS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def qwen25_text(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }


def tiny_qwen_image(folder: Path) -> Path:
    QwenImagePipeline(**qwen_image_parts(qwen_tokenizer())).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_qwen_image_edit(folder: Path, *, plus: bool = False) -> Path:
    """With a text encoder that sees pictures; `plus` for the later ones (2509, 2511)."""
    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    tokenizer = qwen_tokenizer(*special)
    start, image, end = tokenizer.convert_tokens_to_ids(special)
    parts = qwen_image_parts(
        tokenizer,
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=0,
    )
    processor = SmallProcessor(tokenizer, Qwen2VLImageProcessorPil())
    pipeline_class = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    pipeline_class(**parts, processor=processor).save_pretrained(folder, safe_serialization=True)
    return folder


def qwen_image_parts(tokenizer: Qwen2Tokenizer, **of_text_encoder: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    text = qwen25_text(tokenizer)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, **VIDEO_VAE)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **of_text_encoder)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }


def tiny_wan(folder: Path, *, experts: bool = False, per_token: bool = False) -> Path:
    """Wan 2.1, or 2.2 with two `experts` (A14B), or 2.2 with a time for each token (TI2V-5B)."""
    torch.manual_seed(0)
    tokenizer = make_text_stack(width=32)["t5_tokenizer"]
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        )

    WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderKLWan(base_dim=4, **VIDEO_VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer(),
        transformer_2=transformer() if experts else None,
        boundary_ratio=0.875 if experts else None,
        expand_timesteps=per_token,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_hunyuan_video(folder: Path) -> Path:
    """HunyuanVideo-1.5, text to video; its text has 1985 tokens, always."""
    torch.manual_seed(0)
    tokenizer, glyphs = qwen_tokenizer(), ByT5Tokenizer()
    HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**qwen25_text(tokenizer))),
        tokenizer=tokenizer,
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=33,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=24,
            image_embed_dim=20,
            rope_axes_dim=(4, 4, 4),
            task_type="t2v",
        ),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=16,
            block_out_channels=(32, 32, 32, 32, 32),
            layers_per_block=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(glyphs), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_2=glyphs,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    ).save_pretrained(folder, safe_serialization=True)
    return folder
