"""Families that diffusers drives by ModularPipeline blocks: taken apart into phases with nothing known of them.

A family is a class of facts over `ModularAdapter`: its blocks, sizes, limits, defaults and shard plan.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, PipelineState

from tetriserve.engine.adapter import ModelAdapter, ModelLimits, RequestState, eight_bit
from tetriserve.engine.kernels import Kernel
from tetriserve.request import GenerateRequest

MOVES = ("latents", "timesteps")
"""What changes from step to step, or is the sampler's."""


class ModularAdapter(ModelAdapter):
    """A plain pipeline's parts under the family's own blocks.

    Encode is the blocks up to the last encoder, begin those up to the loop, a step the loop's own blocks but for its
    last, which steps the sampler, decode what comes behind. The loop must keep nothing but latents between two steps.
    """

    blocks_class: ClassVar[Any]

    def __init__(self, pipeline: Any, limits: ModelLimits, kernel: Kernel) -> None:
        blocks = self.blocks_class()
        self._modular = blocks.init_pipeline()
        names = set(self._modular.component_names) & set(pipeline.components)
        self._modular.update_components(**{name: getattr(pipeline, name) for name in names})
        flat = list(blocks.get_execution_blocks(prompt="").sub_blocks.items())
        at = next(i for i, (_, block) in enumerate(flat) if isinstance(block, LoopSequentialPipelineBlocks))
        first = max(i + 1 for i, (name, _) in enumerate(flat[:at]) if "encoder" in name.split(".")[0])
        stages = [block for _, block in flat]
        self._encoders, self._begins, self._decoders = stages[:first], stages[first:at], stages[at + 1 :]
        self._loop = stages[at]
        self._inputs = blocks.inputs
        outputs = [output for block in stages[:at] for output in block.intermediate_outputs]
        self._groups = {output.name: output.kwargs_type for output in outputs}
        wanted = {value.name for block in stages[at:] for value in block.inputs}
        self._kept = [name for name in self._groups if name in wanted and name not in MOVES]
        super().__init__(pipeline, limits, kernel)

    def encode(self, request: GenerateRequest) -> dict[str, Any]:
        # asked for without guidance, the blocks of Wan and of HunyuanVideo-1.5 fail: they miss the other prompt
        self._modular.guider = self._guider(max(self._scale(request), 2.0))
        state = self._run(self._encoders, self._state(request, {}))
        made = {name: state.get(name) for name in self._groups if state.get(name) is not None}
        if self.info.guided(request):
            return made
        return {name: value for name, value in made.items() if not name.startswith("negative_")}

    def begin(self, request: GenerateRequest, conditioning: dict[str, Any]) -> RequestState:
        state = self._state(request, conditioning)
        state.set("generator", self.generator(request))
        sampler = self._modular.scheduler = self.new_sampler()
        state = self._run(self._begins, state)
        sampler.set_begin_index(0)
        kept = {name: state.get(name) for name in self._kept if state.get(name) is not None}
        latents: Any = state.get("latents")
        return RequestState(request, kept, latents, sampler)

    def predict_alone(self, state: RequestState, timestep: torch.Tensor) -> torch.Tensor:
        self._modular.scheduler = state.sampler
        self._modular.guider = self._guider(self._scale(state.request))
        values = self._state(state.request, state.conditioning)
        values.set("latents", state.latents)
        values.set("timesteps", state.sampler.timesteps)
        step = self._loop.get_block_state(values)
        for block in list(self._loop.sub_blocks.values())[:-1]:
            _, step = block(self._modular, step, i=state.step, t=timestep)
        noise: torch.Tensor = step.noise_pred
        return noise

    def spatial(self, request: GenerateRequest, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, 0]

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        return self._frames(None, latents.unsqueeze(2))[:, :, 0] * 2 - 1

    def decode(self, request: GenerateRequest, latents: torch.Tensor) -> np.ndarray:
        clip = eight_bit(self._frames(request, latents)[0])
        return clip if request.num_frames > 1 else clip[0]

    def _frames(self, request: GenerateRequest | None, latents: torch.Tensor) -> torch.Tensor:
        """[1, 3, frames, height, width], 0 to 1."""
        state = PipelineState() if request is None else self._state(request, {})
        state.set("latents", latents)
        state.set("output_type", "pt")
        videos: Any = self._run(self._decoders, state).get("videos")
        frames: torch.Tensor = videos.transpose(1, 2)
        return frames

    def _state(self, request: GenerateRequest, conditioning: dict[str, Any]) -> PipelineState:
        state = PipelineState()
        for given in self._inputs:
            value = getattr(request, given.name, None) if given.name else None
            state.set(given.name, given.default if value is None else value, given.kwargs_type)
        for name, value in conditioning.items():
            state.set(name, value, self._groups[name])
        return state

    def _run(self, blocks: list[Any], state: PipelineState) -> PipelineState:
        for block in blocks:
            _, state = block(self._modular, state)
        return state

    def _scale(self, request: GenerateRequest) -> float:
        assert request.guidance_scale is not None
        return request.guidance_scale

    def _guider(self, scale: float) -> Any:
        given = getattr(self.pipeline, "guider", None)
        return given.new(guidance_scale=scale) if given else ClassifierFreeGuidance(guidance_scale=scale)
