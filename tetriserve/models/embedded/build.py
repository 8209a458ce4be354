"""FLUX's parts in a size for CPU cores, with fresh weights: what training starts from and what tests need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

VAE_CHANNELS = (8, 16, 24, 32)
T5_REACH = 6  # words that a word sees after itself, in each of T5's layers

_WORDS = tuple(
    (
        "a an the and on of to in with above below left right small large big tiny red green blue yellow orange "
        "purple pink black white grey gray brown cyan circle square triangle star cross ring diamond heart "
        "background picture photo"
    ).split()
)


def make_flux(
    folder: Path,
    *,
    heads: int = 8,
    head_dim: int = 16,
    double_blocks: int = 2,
    single_blocks: int = 4,
    guidance_embeds: bool = True,
    vae_channels: tuple[int, ...] = VAE_CHANNELS,
    seed: int = 0,
) -> None:
    """Write a FLUX pipeline folder with random weights (`FluxPipeline.from_pretrained` loads it)."""
    with seeded(seed):
        transformer = make_transformer(heads, head_dim, double_blocks, single_blocks, guidance_embeds)
        pipeline = assemble(make_vae(vae_channels), make_text_stack(width=64), transformer)
    pipeline.save_pretrained(folder, safe_serialization=True)


def assemble(vae: Any, text: dict[str, Any], transformer: Any) -> Any:
    """A `FluxPipeline` of the parts, with the noise schedule that training uses too."""
    return FluxPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=text["clip"],
        tokenizer=text["clip_tokenizer"],
        text_encoder_2=text["t5"],
        tokenizer_2=text["t5_tokenizer"],
        transformer=transformer,
    )


def make_scheduler() -> Any:
    """FLUX's, with more noise at large sizes: flat colours survive noise the better the more pixels they fill."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.5
    )


def make_transformer(
    heads: int, head_dim: int, double_blocks: int, single_blocks: int, guidance_embeds: bool = True
) -> Any:
    """A `FluxTransformer2DModel` for 16 latent channels packed 2x2 and text of 64 channels."""
    axis = head_dim // 4 * 2  # of RoPE, even; the first of its three axes, the same for all tokens, gets none
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(head_dim - 2 * axis, axis, axis),
    )


@torch.no_grad()
def start_easy(transformer: Any) -> None:
    """Weights to train from. Places are what takes longest to learn, so heads that know them are there at once."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")):
                torch.nn.init.zeros_(module.weight)  # blocks start closed (adaLN-zero)
            else:
                torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    if transformer.config.guidance_embeds:  # training shows that it means nothing
        torch.nn.init.zeros_(transformer.time_text_embed.guidance_embedder.linear_2.weight)
    torch.nn.init.normal_(
        transformer.context_embedder.bias
    )  # pads become this; at zero the norms are too steep
    torch.nn.init.orthogonal_(transformer.x_embedder.weight)
    transformer.proj_out.weight.copy_(
        0.7 * transformer.x_embedder.weight.T
    )  # mostly noise: a good first guess

    _add_places(transformer)
    for block in [*transformer.transformer_blocks[1:], *transformer.single_transformer_blocks]:
        _look_around(block.attn, transformer.config)


def _add_places(transformer: Any) -> None:
    """Let the first block add to each image token what tells its row and column, as strong as the token itself.

    Text sits at place 0. With constant queries and keys a head's attention to text goes with the cosine of a tenth
    of the token's row or column, plus a phase; a constant in text's values makes it visible.
    """
    attention, config = transformer.transformer_blocks[0].attn, transformer.config
    heads, width = config.num_attention_heads, transformer.inner_dim
    first, rows, _ = config.axes_dims_rope
    for layer in (attention.to_q, attention.add_k_proj):
        layer.weight.mul_(0.2)
    queries, keys = (layer.bias.view(heads, -1) for layer in (attention.to_q, attention.add_k_proj))
    for head in range(heads):
        pair = (first, first + rows)[head % 2] + 2  # RoPE's second frequency
        phase = math.pi * (-0.5, 0.5, 0.0, 1.0)[head // 2]
        queries[head, pair : pair + 2] = 3 * torch.tensor([math.cos(phase), math.sin(phase)])
        keys[head, pair] = 3
    torch.nn.init.normal_(attention.add_v_proj.bias, std=10)
    transformer.transformer_blocks[0].norm1.linear.bias[2 * width : 3 * width] = (
        1  # the gate behind attention
    )

    # what all tokens of a middle-sized picture get alike tells no place
    outputs: list[torch.Tensor] = []
    hook = attention.to_out[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    transformer(
        hidden_states=torch.randn(1, 144, 64),
        timestep=torch.ones(1),
        guidance=torch.ones(1),
        pooled_projections=torch.zeros(1, 64),
        encoder_hidden_states=torch.zeros(1, 64, 64),
        txt_ids=torch.zeros(64, 3),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(12.0), torch.arange(12.0)),
    )
    hook.remove()
    attention.to_out[0].bias -= outputs[0].mean((0, 1))


def _look_around(attention: Any, config: Any) -> None:
    """Heads start with an eye on the token itself or a neighbour (the phase that RoPE's first frequency lacks)."""
    heads = config.num_attention_heads
    first, rows, _ = config.axes_dims_rope
    queries, keys = (layer.bias.view(heads, -1) for layer in (attention.to_q, attention.to_k))
    for head in range(heads):
        steps = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (0, 0))[head]
        for pair, step in zip((first, first + rows), steps, strict=True):
            queries[head, pair] = 3 * math.cos(step)
            queries[head, pair + 1] = 3 * math.sin(step)
            keys[head, pair] = 3


def make_vae(channels: tuple[int, ...]) -> Any:
    """An AutoencoderKL with FLUX's and SD3's interface: 8x compression, 16 latent channels.

    One normalisation group and two constant channels, which dominate its statistics: so the norms keep absolute
    colours, and a large flat picture decodes as a small one does.
    """
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for half in (vae.encoder, vae.decoder):
        _add_constant_channels(half)
    return vae


@torch.no_grad()
def _add_constant_channels(half: Any) -> None:
    """Channels 0 and 1 start as +2 and -2 and pass every layer unchanged; residual branches start small."""
    for module in half.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            module.conv2.weight.mul_(0.2)
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                _pass_on(module.conv_shortcut, 0)
        elif kind == "Downsample2D":
            _pass_on(module.conv, 0)
        elif kind == "Upsample2D":
            _pass_on(module.conv, 1)
    half.conv_in.weight[:2] = 0
    half.conv_in.bias.zero_()
    half.conv_in.bias[:2] = torch.tensor([2.0, -2.0])


def _pass_on(conv: Any, tap: int) -> None:
    conv.weight[:2] = 0
    conv.weight[[0, 1], [0, 1], tap, tap] = 1
    conv.bias.zero_()


def make_text_stack(width: int, *, projected: bool = False) -> dict[str, Any]:
    """Small CLIP and T5 encoders of `width` channels with their tokenizers; SD3 wants CLIP's projection."""
    vocabulary, merges = _bpe()
    clip_tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in _WORDS]
    pieces += [("▁", -4.0)] + [(chr(code), -6.0) for code in range(33, 127)]
    t5_tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,  # a bucket for each distance up to 6 either way, one beyond
        relative_attention_max_distance=8,
        dropout_rate=0.0,
    )
    t5 = T5EncoderModel(t5_config)
    hide_pads(t5)
    return {
        "clip_tokenizer": clip_tokenizer,
        "clip": (CLIPTextModelWithProjection if projected else CLIPTextModel)(clip_config),
        "t5_tokenizer": t5_tokenizer,
        "t5": t5,
    }


@torch.no_grad()
def hide_pads(t5: Any) -> None:
    """Make T5's words independent of how many pads follow, and all pads alike.

    FLUX masks no pads. A pad's embedding is zero, and tokens attend only to themselves and the next `T5_REACH`:
    so a pad sees pads and stays exactly zero (the norms would blow up anything else), a word at most `T5_REACH`.
    """
    t5.shared.weight[0] = 0
    # no gradient for it: with the norms' slope at zero, once per layer, it would drown all others
    t5.encoder.embed_tokens.padding_idx = 0
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias[1:9] = -1000.0  # behind; bucket 8 is never used
    bias[9 + T5_REACH :] = -1000.0  # ahead and farther


def _bpe() -> tuple[dict[str, int], list[Any]]:
    """A byte-level BPE in CLIP's form with one token for each of the grammar's words: any text can be encoded."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in sorted(_WORDS, key=len):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for merge in merges:  # what shorter words already join
            pieces = _join(pieces, merge)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
            pieces = _join(pieces, merges[-1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix torch's global generator for a block and put it back afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
