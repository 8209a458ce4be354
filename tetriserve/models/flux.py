"""FLUX.1 (dev: distilled guidance; schnell: none), after `FluxPipeline` and `FluxImg2ImgPipeline`; Kontext, after
`FluxKontextPipeline`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState, beside, pictures_of
from tetriserve.engine.company import Call, Flat, Predicting
from tetriserve.images import Editing
from tetriserve.model_info import ModelInfo
from tetriserve.models.flow import image_to_image, set_timesteps, shift
from tetriserve.request import GenerateRequest


class FluxAdapter(ModelAdapter):
    pipeline_class: ClassVar[Any] = FluxPipeline
    family = "flux"
    dtypes = ("float32", "bfloat16")  # activations of its late blocks leave float16's range: black pictures
    editing = Editing(max_images=1, default_strength=0.6)
    batched = ("hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states")
    flat = Flat(
        tokens={"hidden_states": 1, "encoder_hidden_states": 1, "txt_ids": 0, "img_ids": 0},
        rows=("timestep", "guidance", "pooled_projections"),
        modulated=(
            ("transformer_blocks.*.norm1.linear", ("hidden_states",)),
            ("transformer_blocks.*.norm1_context.linear", ("encoder_hidden_states",)),
            ("single_transformer_blocks.*.norm.linear", ("encoder_hidden_states", "hidden_states")),
            ("norm_out.linear", ("hidden_states",)),
        ),
        joint=("encoder_hidden_states", "hidden_states"),
    )
    no_picture: ClassVar[tuple[None, ...]] = ()
    """What its pipeline prepares latents from where there is none."""

    def _info(self, limits: ModelLimits) -> ModelInfo:
        config = self.pipeline.transformer.config
        self._distilled = bool(config.guidance_embeds)
        longest = 512 if self._distilled else 256  # schnell was trained on 256 text tokens
        self._text_tokens = limits.text_tokens(longest, 512, "FLUX")
        self._image_ids = lru_cache(maxsize=32)(self._make_image_ids)
        self._text_ids = lru_cache(maxsize=32)(self._make_text_ids)
        side = self.pipeline.vae_scale_factor * 2
        return limits.info(
            family=self.family,
            side=side,
            text_tokens=self._text_tokens,
            heads=config.num_attention_heads,
            cfg_field="true_cfg_scale",
            steps=28 if self._distilled else 4,
            default_guidance_scale=3.5 if self._distilled else 0.0,
            editing=self.editing,
        )

    def encode(self, request: GenerateRequest) -> dict[str, torch.Tensor]:
        prompts = {"": request.prompt}
        if self.info.guided(request):
            prompts["negative_"] = request.negative_prompt or ""
        conditioning = {}
        for prefix, prompt in prompts.items():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=self._text_tokens
            )
            conditioning[f"{prefix}embeds"] = embeds
            conditioning[f"{prefix}pooled"] = pooled
        return conditioning

    def begin(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        latents, *_ = self._prepare(self.pipeline, request, conditioning, *self.no_picture)
        return RequestState(request, conditioning, latents, self._sampler(request))

    def begin_from(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        """Noise over the picture, and the last steps only."""
        sampler = self._sampler(request)
        pipeline, pixels = image_to_image(self, FluxImg2ImgPipeline, request, sampler)
        latents, _ = self._prepare(pipeline, request, conditioning, pixels, sampler.timesteps[:1])
        return RequestState(request, conditioning, latents, sampler)

    def _prepare(
        self, pipeline: Any, request: GenerateRequest, conditioning: dict[str, torch.Tensor], *first: Any
    ) -> Any:
        """What a pipeline prepares; `first` is what its own takes before everything else."""
        return pipeline.prepare_latents(
            *first,
            1,
            pipeline.transformer.config.in_channels // 4,
            request.height,
            request.width,
            conditioning["embeds"].dtype,
            self.device,
            self.generator(request),
        )

    def _sampler(self, request: GenerateRequest) -> Any:
        assert request.num_inference_steps is not None
        sampler = self.new_sampler()
        mu = shift(sampler.config, self.info.tokens(request.shape))
        set_timesteps(sampler, request.num_inference_steps, mu, self.device)
        return sampler

    def predicting(self, state: RequestState, timestep: torch.Tensor) -> Predicting:
        noise = yield from self._forward(state, timestep, "")
        if self.info.guided(state.request):
            assert state.request.true_cfg_scale is not None
            negative = yield from self._forward(state, timestep, "negative_")
            noise = negative + state.request.true_cfg_scale * (noise - negative)
        return noise

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        pipeline = self.pipeline
        return pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)

    def _forward(self, state: RequestState, timestep: torch.Tensor, prefix: str) -> Predicting:
        request, latents, conditioning = state.request, state.latents, state.conditioning
        embeds = conditioning[f"{prefix}embeds"]
        ids = self._image_ids(request.height, request.width, latents.dtype)
        guidance = None
        assert request.guidance_scale is not None
        if self._distilled:
            guidance = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        arguments = {
            "hidden_states": beside(latents, conditioning, "references"),
            "timestep": timestep.expand(1).to(latents.dtype) / 1000,
            "guidance": guidance,
            "pooled_projections": conditioning[f"{prefix}pooled"],
            "encoder_hidden_states": embeds,
            "txt_ids": self._text_ids(embeds.shape[1], latents.dtype),
            "img_ids": beside(ids, conditioning, "reference_ids", dim=0),
        }
        noise = yield Call(self.pipeline.transformer, arguments)
        return noise[:, : latents.shape[1]]

    def _make_text_ids(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tokens, 3, device=self.device, dtype=dtype)

    def _make_image_ids(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        token = self.info.token_pixels
        return self.pipeline._prepare_latent_image_ids(1, height // token, width // token, self.device, dtype)


class FluxKontextAdapter(FluxAdapter):
    """A picture to be edited stands beside the one that is made; it also draws without one."""

    pipeline_class = FluxKontextPipeline
    family = "flux-kontext"
    editing = Editing(max_images=1, enlarges=True)
    no_picture = (None,)

    def begin_from(self, request: GenerateRequest, conditioning: dict[str, torch.Tensor]) -> RequestState:
        state, processor = self.begin(request, conditioning), self.pipeline.image_processor
        (picture,) = pictures_of(request)
        height, width = processor.get_default_height_width(picture)
        aspect, side = width / height, self.info.token_pixels
        # those that Kontext was trained on, as the pipeline chooses
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        pixels = processor.preprocess(picture, height // side * side, width // side * side)
        _, references, _, ids = self._prepare(self.pipeline, request, conditioning, pixels)
        state.conditioning |= {"references": references, "reference_ids": ids}
        return state
