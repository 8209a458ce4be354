"""Small transformers of many families with random weights, one prediction of each, and how it is sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from tetriserve.engine.attention import Kinds
from tetriserve.engine.sequence import Joint, ShardPlan

HEIGHT, WIDTH = 7, 13
"""In tokens: neither 2 nor 4 divides their product."""
FRAMES, ROWS, COLUMNS = 3, 5, 7
TEXT = 30
HEADS = {"num_attention_heads": 4, "attention_head_dim": 12}

TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
TABLE = ContextParallelInput(split_dim=0, expected_dims=2)
GATHER = ContextParallelOutput(gather_dim=1, expected_dims=3)


@dataclass
class Case:
    """`predict(model, latents, t)`, with t of shape [1] in (0, 1], gives something shaped like `latents`."""

    model: Any
    latents: torch.Tensor
    predict: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    plan: ShardPlan
    kinds: Kinds = ()


def places(frames: int, height: int, width: int) -> torch.Tensor:
    """[frames * height * width, 3]"""
    return torch.cartesian_prod(*(torch.arange(float(n)) for n in (frames, height, width)))


def half_masked() -> torch.Tensor:
    """Of two prompts, the second is shorter."""
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[1, 17:] = 0
    return mask


def guided(both: torch.Tensor) -> torch.Tensor:
    """[2, ...] of a prompt and its negative, to [1, ...]."""
    return both[1:] + 3 * (both[:1] - both[1:])


def output(answer: Any) -> torch.Tensor:
    return answer[0]


def flux(heads: int = 4) -> Case:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    text, pooled = torch.randn(1, TEXT, 32), torch.randn(1, 16)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output(
            model(
                hidden_states=x,
                timestep=t,
                guidance=torch.full([1], 3.5),
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=torch.zeros(TEXT, 3),
                img_ids=places(1, HEIGHT, WIDTH),
                return_dict=False,
            )
        )

    return Case(model, torch.randn(1, HEIGHT * WIDTH, 16), predict, model._cp_plan)


def flux_of_six_heads() -> Case:
    """Degree 4 does not divide them: keys and values are gathered."""
    return flux(heads=6)


def flux_with_as_many_words_nearly() -> Case:
    """91 tokens of the picture and 90 of text: some rank has as many of either, and cannot tell them apart."""
    case = flux()
    text = torch.randn(1, 90, 32)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output(
            model(
                hidden_states=x,
                timestep=t,
                guidance=torch.full([1], 3.5),
                pooled_projections=torch.ones(1, 16),
                encoder_hidden_states=text,
                txt_ids=torch.zeros(90, 3),
                img_ids=places(1, HEIGHT, WIDTH),
                return_dict=False,
            )
        )

    return Case(case.model, case.latents, predict, case.plan)


def qwen_image() -> Case:
    """A mask of keys over both streams, [batch, 1, 1, keys]."""
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4),
    )
    text = torch.randn(2, TEXT, 32)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(
            hidden_states=x.expand(2, -1, -1),
            timestep=t.expand(2),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=half_masked(),
            img_shapes=[[(1, HEIGHT, WIDTH)]] * 2,
            return_dict=False,
        )
        return guided(output(both))

    return Case(model, torch.randn(1, HEIGHT * WIDTH, 16), predict, model._cp_plan)


def wan(**more: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
        **more,
    )


def wan_video() -> Case:
    """Attention to text is not cut."""
    model, text = wan(), torch.randn(1, TEXT, 32)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output(
            model(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)
        )

    return Case(model, torch.randn(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS), predict, model._cp_plan)


def wan_with_a_time_for_each_token() -> Case:
    """The first frame is given: its tokens are at time 0."""
    case = wan_video()
    times = torch.cat([torch.zeros(ROWS * COLUMNS), torch.ones((FRAMES - 1) * ROWS * COLUMNS)])[None]
    text = torch.randn(1, TEXT, 32)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        timestep = 1000 * t[:, None] * times
        return output(
            model(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)
        )

    return Case(case.model, case.latents, predict, case.plan)


def ltx_video() -> Case:
    """A mask that is added, one for each head; text is kept whole."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, **HEADS, cross_attention_dim=48, num_layers=2, caption_channels=32
    )
    text = torch.randn(2, TEXT, 32)
    split = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    plan = {"": {"hidden_states": TOKENS}, "rope": {0: split, 1: split}, "proj_out": GATHER}

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(
            hidden_states=x.expand(2, -1, -1),
            encoder_hidden_states=text,
            timestep=1000 * t.expand(2),
            encoder_attention_mask=half_masked(),
            num_frames=FRAMES,
            height=ROWS,
            width=COLUMNS,
            return_dict=False,
        )
        return guided(output(both))

    return Case(model, torch.randn(1, FRAMES * ROWS * COLUMNS, 16), predict, plan, (("attn2", "local"),))


def ltx_video_with_text_cut() -> Case:
    """diffusers' own plan: queries and keys are of different lengths, and so is the mask."""
    case = ltx_video()
    return Case(case.model, case.latents, case.predict, case.model._cp_plan)


def ltx2_video_and_sound() -> Case:
    """Sound is not cut; it looks at a picture that is."""
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        **HEADS,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=32,
        rope_type="interleaved",
    )
    text, mask = torch.randn(1, TEXT, 32), torch.ones(1, TEXT, dtype=torch.long)
    mask[0, :9] = 0
    sound, picture = 10, FRAMES * ROWS * COLUMNS * 16

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        video, audio = model(
            hidden_states=x[:, :picture].view(1, -1, 16),
            audio_hidden_states=x[:, picture:].view(1, sound, 8),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=text,
            timestep=1000 * t,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=FRAMES,
            height=ROWS,
            width=COLUMNS,
            fps=24.0,
            audio_num_frames=sound,
            return_dict=False,
        )
        return torch.cat([video.flatten(1), audio.flatten(1)], 1)

    along = Joint(1, ("hidden_states",))
    cut = ("video_rotary_emb", "ca_video_rotary_emb", "temb", "temb_ca_scale_shift", "temb_ca_gate")
    plan = {
        "transformer_blocks.0": {"hidden_states": TOKENS},
        "transformer_blocks.*": dict.fromkeys(cut, along),
        "proj_out": GATHER,
    }
    kinds: Kinds = ((r"\.attn1$", "shard"), ("video_to_audio_attn", "kv"), (".", "local"))
    return Case(model, torch.randn(1, picture + sound * 8), predict, plan, kinds)


def sd3() -> Case:
    """A processor that calls torch's attention itself, and a second attention over the picture alone."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=64,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    text, pooled = torch.randn(2, TEXT, 64), torch.randn(2, 64)
    split = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    plan = {"pos_embed": {0: split}, "context_embedder": {0: split}, "proj_out": GATHER}

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(
            hidden_states=x.expand(2, -1, -1, -1),
            timestep=1000 * t.expand(2),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )
        return guided(output(both))

    return Case(model, torch.randn(1, 16, 2 * HEIGHT, 2 * WIDTH), predict, plan)


def z_image(prompts: int = 2) -> Case:
    """Text and picture in one sequence behind refiners of their own; of two prompts the shorter is masked."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=32,
        axes_dims=[4, 4, 4],
        axes_lens=[256, 64, 64],
    )
    texts = [torch.randn(length, 32) for length in (30, 70)[:prompts]]

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        made = torch.stack(output(model([x[0]] * prompts, t.expand(prompts), texts, return_dict=False)))
        return made if prompts == 1 else guided(made)

    side = dict.fromkeys(("attn_mask", "freqs_cis", "noise_mask"), Joint(1, ("x",)))
    plan = {}
    for stream in ("noise_refiner", "layers"):
        plan |= {f"{stream}.0": {"x": TOKENS}, f"{stream}.*": side, f"{stream}.1": GATHER}
    return Case(model, torch.randn(1, 4, 1, 2 * HEIGHT, 2 * WIDTH), predict, plan)


def z_image_of_one_prompt() -> Case:
    return z_image(prompts=1)


def hunyuan_video_15() -> Case:
    """A square mask, the product of who may look and who is seen; rotary tables come to each block."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        **HEADS,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=24,
        image_embed_dim=20,
        rope_axes_dim=(4, 4, 4),
    )
    text, glyphs = torch.randn(2, TEXT, 32), torch.randn(2, 9, 24)
    glyph_mask = torch.ones(2, 9, dtype=torch.long)
    glyph_mask[1, 3:] = 0
    given = torch.randn(1, 5, FRAMES, ROWS, COLUMNS)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(
            hidden_states=torch.cat([x, given], 1).expand(2, -1, -1, -1, -1),
            timestep=1000 * t.expand(2),
            encoder_hidden_states=text,
            encoder_attention_mask=half_masked(),
            encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=glyph_mask,
            image_embeds=torch.zeros(2, 7, 20),
            return_dict=False,
        )
        return guided(output(both))

    plan = {
        "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
        "transformer_blocks.*": {
            "attention_mask": ContextParallelInput(split_dim=1, expected_dims=2),
            "freqs_cis": [TABLE] * 2,
        },
        "proj_out": GATHER,
    }
    return Case(model, torch.randn(1, 4, FRAMES, ROWS, COLUMNS), predict, plan)


def lumina2() -> Case:
    """Half as many heads for keys as for queries, and prompts of different lengths."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )
    text = torch.randn(2, TEXT, 32)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(
            hidden_states=x.expand(2, -1, -1, -1),
            timestep=t.expand(2),
            encoder_hidden_states=text,
            encoder_attention_mask=half_masked(),
            return_dict=False,
        )
        return guided(output(both))

    side = dict.fromkeys(("attention_mask", "image_rotary_emb"), Joint(1, ("hidden_states",)))
    plan = {}
    for stream in ("noise_refiner", "layers"):
        plan |= {f"{stream}.0": {"hidden_states": TOKENS}, f"{stream}.*": side, f"{stream}.1": GATHER}
    return Case(model, torch.randn(1, 4, 2 * HEIGHT, 2 * WIDTH), predict, plan)


def cogvideox() -> Case:
    """Another one that calls torch's attention itself; its rotary table is an argument."""
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2 * COLUMNS,
        sample_height=2 * ROWS,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    text = torch.randn(2, TEXT, 32)
    tables = torch.randn(FRAMES * ROWS * COLUMNS, 12), torch.randn(FRAMES * ROWS * COLUMNS, 12)

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(
            hidden_states=x.expand(2, -1, -1, -1, -1),
            encoder_hidden_states=text,
            timestep=1000 * t.expand(2),
            image_rotary_emb=tables,
            return_dict=False,
        )
        return guided(output(both))

    plan = {
        "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
        "transformer_blocks.*": {"image_rotary_emb": [TABLE] * 2},
        "proj_out": GATHER,
    }
    return Case(model, torch.randn(1, FRAMES, 4, 2 * ROWS, 2 * COLUMNS), predict, plan)


def chroma() -> Case:
    """A square mask of numbers that are added as they are."""
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        **HEADS,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    text, mask = torch.randn(1, TEXT, 32), torch.ones(1, TEXT + HEIGHT * WIDTH)
    mask[0, 17:TEXT] = 0

    def predict(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output(
            model(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=text,
                txt_ids=torch.zeros(TEXT, 3),
                img_ids=places(1, HEIGHT, WIDTH),
                attention_mask=mask,
                return_dict=False,
            )
        )

    plan = {
        "": {
            "hidden_states": TOKENS,
            "encoder_hidden_states": TOKENS,
            "img_ids": TABLE,
            "txt_ids": TABLE,
            "attention_mask": Joint(1, ("encoder_hidden_states", "hidden_states")),
        },
        "proj_out": GATHER,
    }
    return Case(model, torch.randn(1, HEIGHT * WIDTH, 16), predict, plan)


CASES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        flux,
        flux_of_six_heads,
        flux_with_as_many_words_nearly,
        qwen_image,
        wan_video,
        wan_with_a_time_for_each_token,
        ltx_video,
        ltx_video_with_text_cut,
        ltx2_video_and_sound,
        sd3,
        z_image,
        z_image_of_one_prompt,
        hunyuan_video_15,
        lumina2,
        cogvideox,
        chroma,
    )
}


def make(name: str) -> Case:
    """The same on every call, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    case = CASES[name]()
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    case.model.eval()
    return case
