"""Qwen-Image (2512 too), after `QwenImagePipeline`; Qwen-Image-Edit, after `QwenImageEditPipeline`, and its later
ones (2509, 2511), after `QwenImageEditPlusPipeline`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState, beside, pictures_of
from tetriserve.engine.company import Call, Flat, Members, Predicting, Streams
from tetriserve.images import NO_EDITING, Editing
from tetriserve.model_info import ModelInfo
from tetriserve.models.flow import set_timesteps, shift
from tetriserve.models.wan_vae import frames
from tetriserve.request import GenerateRequest


def _positions(
    forward: Any, members: Members, shapes: Any, *args: Any, max_txt_seq_len: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables, each picture's as if it were alone."""
    texts = members.lengths["encoder_hidden_states"]
    tables = [
        forward([own], *args, max_txt_seq_len=text, **kwargs) for own, text in zip(shapes, texts, strict=True)
    ]
    pictures, words = zip(*tables, strict=True)
    return torch.cat(pictures), torch.cat(words)


class QwenImageAdapter(ModelAdapter):
    """Double blocks throughout; guidance only beside a negative prompt, as in the pipeline."""

    pipeline_class: ClassVar[Any] = QwenImagePipeline
    family = "qwen-image"
    dtypes = ("float32", "bfloat16")
    editing = NO_EDITING
    # the shapes: one list a picture; of several sizes only the first would count
    batched: Streams = ("hidden_states", "timestep", "encoder_hidden_states")
    flat: Flat | None = Flat(
        tokens={"hidden_states": 1, "encoder_hidden_states": 1},
        rows=("timestep", "img_shapes"),
        modulated=(
            ("transformer_blocks.*.img_mod", ("hidden_states",)),
            ("transformer_blocks.*.txt_mod", ("encoder_hidden_states",)),
            ("norm_out.linear", ("hidden_states",)),
        ),
        joint=("encoder_hidden_states", "hidden_states"),
        instead={"pos_embed.forward": _positions},
    )

    def _info(self, limits: ModelLimits) -> ModelInfo:
        pipeline, config = self.pipeline, self.pipeline.transformer.config
        self._text_tokens = limits.text_tokens(512, pipeline.tokenizer_max_length, "Qwen-Image")
        if config.zero_cond_t:  # references have another timestep than the picture
            self.flat, self.batched = None, ()
        side = 2 * pipeline.vae_scale_factor
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=self._text_tokens,
            heads=config.num_attention_heads,
            cfg_field="true_cfg_scale",
            steps=50,
            default_guidance_scale=0.0,
            default_true_cfg_scale=4.0,
            editing=self.editing,
        )

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        """One prompt at a time: there is no padding, and so no mask."""
        prompts = {"embeds": request.prompt}
        if self.info.guided(request):
            prompts["negative_embeds"] = request.negative_prompt or ""
        conditioning = {}
        for name, prompt in prompts.items():
            conditioning[name], mask = self.pipeline.encode_prompt(
                prompt=prompt,
                device=self.device,
                max_sequence_length=self._text_tokens,
                **self._seen_by_encoder(request),
            )
            assert mask is None
        return conditioning

    def _seen_by_encoder(self, request: GenerateRequest) -> dict[str, Any]:
        """What the text encoder gets beside the prompt."""
        return {}

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        latents = self._prepare(request, conditioning)
        sampler = self.new_sampler()
        assert request.num_inference_steps is not None
        mu = shift(sampler.config, self.info.tokens(request.shape))
        set_timesteps(sampler, request.num_inference_steps, mu, self.device)
        return RequestState(request, conditioning, latents, sampler)

    def _prepare(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor], *images: Any) -> Any:
        """What the pipeline prepares, with `images` where it takes some."""
        return self.pipeline.prepare_latents(
            *images,
            1,
            self.pipeline.transformer.config.in_channels // 4,
            request.height,
            request.width,
            conditioning["embeds"].dtype,
            self.device,
            self.generator(request),
        )

    def predicting(self, state: RequestState, timestep: torch.Tensor) -> Predicting:
        noise = yield from self._forward(state, timestep, "embeds")
        if self.info.guided(state.request):
            assert state.request.true_cfg_scale is not None
            negative = yield from self._forward(state, timestep, "negative_embeds")
            guided = negative + state.request.true_cfg_scale * (noise - negative)
            norms = (torch.norm(x, dim=-1, keepdim=True) for x in (noise, guided))
            noise = guided * (next(norms) / next(norms))
        return noise

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        pipeline = self.pipeline
        unpacked = pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)
        return unpacked[:, :, 0]

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """By a VAE for video, which sees one frame."""
        return frames(self.pipeline.vae, latents.unsqueeze(2))[:, :, 0]

    def _forward(self, state: RequestState, timestep: torch.Tensor, text: str) -> Predicting:
        request, latents, conditioning = state.request, state.latents, state.conditioning
        token = self.info.token_pixels
        shapes = [(1, request.height // token, request.width // token)]
        arguments = {
            "hidden_states": beside(latents, conditioning, "references"),
            "timestep": timestep.expand(1).to(latents.dtype) / 1000,
            "guidance": None,
            "encoder_hidden_states": conditioning[text],
            "encoder_hidden_states_mask": None,
            "img_shapes": [[*shapes, *conditioning.get("reference_shapes", ())]],
        }
        noise = yield Call(self.pipeline.transformer, arguments)
        return noise[:, : latents.shape[1]]


class QwenImageEditPlusAdapter(QwenImageAdapter):
    """The text encoder sees the pictures too, small, and they stand beside the one that is made."""

    pipeline_class: ClassVar[Any] = QwenImageEditPlusPipeline
    family = "qwen-image-edit-plus"
    editing = Editing(max_images=4, needs_image=True, enlarges=True)
    encoder_pixels = CONDITION_IMAGE_SIZE

    def begin_from(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        state, processor = self.begin(request, conditioning), self.pipeline.image_processor
        token, pixels = self.info.token_pixels, []
        for picture in pictures_of(request):
            width, height = _sides(picture, self.info.editing.reference_pixels)
            pixels.append(processor.preprocess(picture, height, width).unsqueeze(2))
        _, references = super()._prepare(request, conditioning, self._as_taken(pixels))
        shapes = [(1, one.shape[-2] // token, one.shape[-1] // token) for one in pixels]
        state.conditioning |= {"references": references, "reference_shapes": shapes}
        return state

    def _seen_by_encoder(self, request: GenerateRequest) -> dict[str, Any]:
        resized = []
        for picture in pictures_of(request):
            width, height = _sides(picture, self.encoder_pixels)
            resized.append(self.pipeline.image_processor.resize(picture, height, width))
        return {"image": self._as_taken(resized)}

    def _prepare(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor], *images: Any) -> Any:
        latents, _ = super()._prepare(request, conditioning, None)
        return latents

    def _as_taken(self, images: list[Any]) -> Any:
        """By the pipeline."""
        return images or None


class QwenImageEditAdapter(QwenImageEditPlusAdapter):
    """The first one: a single picture, which the text encoder sees as large as the transformer."""

    pipeline_class = QwenImageEditPipeline
    family = "qwen-image-edit"
    editing = Editing(max_images=1, needs_image=True, enlarges=True)
    encoder_pixels = editing.reference_pixels

    def _as_taken(self, images: list[Any]) -> Any:
        return images[0] if images else None


def _sides(picture: Image.Image, area: int) -> tuple[int, int]:
    """(width, height) of about that area, as these pipelines choose them."""
    width, height = calculate_dimensions(area, picture.width / picture.height)
    return width, height
