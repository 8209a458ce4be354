"""The embedded model: a FLUX pipeline folder small enough for CPU cores, made with no network.

Weights are random but seeded, so every machine makes the same folder; pictures are coloured noise until a
trained model takes its place. `make_text_stack` and `make_vae` also build the small folders of the tests.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
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
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tetriserve.cache import cache_folder

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
VERSION = "embedded-flux-v1"

_WORDS = tuple(
    (
        "a an the and on of to in with above below left right small large big tiny red green blue yellow orange "
        "purple pink black white grey gray brown cyan circle square triangle star cross ring diamond heart "
        "background picture photo"
    ).split()
)


def embedded_folder() -> Path:
    """The folder of the embedded model, made on first use. Safe with several processes at once."""
    root = cache_folder("models")
    folder = root / VERSION
    if not (folder / "model_index.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=VERSION, dir=root))
        try:
            make_flux(draft)
            draft.rename(folder)
        except OSError:  # another process was first
            if not (folder / "model_index.json").exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    logger.warning("embedded model: seeded random weights, pictures are coloured noise (%s)", folder)
    return folder


def make_flux(
    folder: Path,
    *,
    heads: int = 8,
    head_dim: int = 24,
    double_blocks: int = 2,
    single_blocks: int = 4,
    guidance_embeds: bool = True,
    vae_channels: tuple[int, ...] = (8, 16, 24, 32),
    seed: int = 0,
) -> None:
    """Write a FLUX pipeline folder with random weights (`FluxPipeline.from_pretrained` loads it)."""
    with _seeded(seed):
        text = make_text_stack(width=64)
        axis = head_dim // 2 // 3 * 2  # three RoPE axes, each even
        transformer = FluxTransformer2DModel(
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
        pipeline: Any = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
            ),
            vae=make_vae(vae_channels),
            text_encoder=text["clip"],
            tokenizer=text["clip_tokenizer"],
            text_encoder_2=text["t5"],
            tokenizer_2=text["t5_tokenizer"],
            transformer=transformer,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)


def make_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """An AutoencoderKL with FLUX's and SD3's interface: 8x compression, 16 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


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
    )
    return {
        "clip_tokenizer": clip_tokenizer,
        "clip": (CLIPTextModelWithProjection if projected else CLIPTextModel)(clip_config),
        "t5_tokenizer": t5_tokenizer,
        "t5": T5EncoderModel(t5_config),
    }


def _bpe() -> tuple[dict[str, int], list[Any]]:
    """A byte-level BPE in CLIP's form, trained on the grammar's words: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_WORDS, trainer)
    vocabulary = tokenizer.get_vocab()
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(f"{symbol}</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return vocabulary, merges


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fix torch's global generator for a block and put it back afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
