"""Typed `args` of the Serve application: every knob of a cluster YAML, with its bounds and meaning.

Unknown or ill-typed keys are refused with the key's name. The models are frozen and travel to the actors as
they are; nothing below `deployments` imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from solver.policies import POLICIES
from tetriserve.errors import ConfigError
from tetriserve.request import Shape
from tetriserve.reuse import QUALITIES


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraArgs(_Section):
    """A LoRA that requests may choose, loaded beside the model."""

    name: str = Field(pattern=r"^[\w-]{1,64}$", description="What requests call it in `lora`.")
    path: str = Field(min_length=1, description="A .safetensors file, a folder with one, or a hub id.")


class ModelArgs(_Section):
    """Which diffusers pipeline to serve and within which limits."""

    path: str = Field(
        "embedded",
        min_length=1,
        description='A diffusers model folder, a hub id, or "embedded" (or "embedded-light") for the small model '
        "that comes with the package.",
    )
    name: str | None = Field(None, description="Served name; default: the last part of the path.")
    revision: str | None = Field(None, description="Hub revision, passed to from_pretrained.")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_sequence_length: int | None = Field(
        None, ge=1, le=1024, description="Text tokens of the long text encoder; default: the pipeline's own."
    )
    default_steps: int | None = Field(None, ge=1, le=200, description="Default: the pipeline's own.")
    max_steps: int = Field(200, ge=1, le=200)
    max_pixels: int = Field(2048 * 2048, ge=64 * 64, description="Largest height x width.")
    max_frames: int | None = Field(
        None, ge=1, description="Longest clip of a model that makes videos; default: the family's own."
    )
    max_prompt_chars: int = Field(4096, ge=1)
    compile: bool = Field(
        False,
        description="Compile the transformer's blocks at start, for `profile.shapes`: minutes, then faster steps.",
    )
    quantization: Literal["int8", "fp8"] | None = Field(
        None,
        description="Keep the transformer's weights so (torchao, weight-only): half the memory of bfloat16, other "
        "pictures than the model as published, and answers say so. Extra `quantization`.",
    )
    aliases: tuple[str, ...] = Field(
        (), description="Names beside `name` under which requests may ask for it."
    )
    loras: tuple[LoraArgs, ...] = Field((), description="LoRAs that requests may choose. Extra `lora`.")

    @field_validator("loras")
    @classmethod
    def _loras(cls, loras: tuple[LoraArgs, ...]) -> tuple[LoraArgs, ...]:
        names = [lora.name for lora in loras]
        if len(set(names)) < len(names):
            raise ValueError(f"names must differ, got {', '.join(names)}")
        return loras

    @model_validator(mode="after")
    def _fits(self) -> ModelArgs:
        if self.compile and self.loras:
            raise ValueError("compile: not beside loras, every one of their scales would be compiled anew")
        return self


class CellArgs(_Section):
    """One cell: the GPUs of one node under one scheduler."""

    gpus: int = Field(8, ge=1, le=64, description="GPU replicas of the cell, one GPU each.")
    device: Literal["cuda", "cpu"] = "cuda"
    cpus_per_replica: float = Field(1.0, gt=0, description="Ray CPUs reserved for each GPU replica.")
    scheduler_cpus: float = Field(1.0, gt=0, description="Ray CPUs reserved for the cell's scheduler.")
    attention_backend: str = Field(
        "auto",
        min_length=1,
        description='"auto" (torch\'s kernels, cuDNN\'s first on Hopper), a diffusers attention backend ("native", '
        '"flash", "_native_cudnn", ...), or "xfuser" or "xfuser:FLASH_3" for xfuser\'s kernels (extra `gpu`).',
    )
    degrees: tuple[int, ...] | None = Field(
        None, description="Sequence-parallel degrees to use; default: powers of two up to `gpus`."
    )
    step_timeout_factor: float = Field(
        20.0,
        gt=1,
        description="A replica whose step range takes this many times the prediction is replaced ...",
    )
    step_timeout_floor_s: float = Field(
        30.0,
        gt=0,
        description="... but never before this many seconds; after them already if it answers no calls either.",
    )
    load_timeout_s: float = Field(
        900.0,
        gt=0,
        description="A replica that has not loaded the model within this many seconds is replaced.",
    )
    max_losses: int = Field(
        3,
        ge=0,
        description="A GPU whose replica is lost more often than this in ten minutes is cordoned: left out until its "
        "cell starts anew. While it starts, a replica is tried again so often. "
        "A request in so many of whose step ranges (at least 3) a replica died, or the members lost each other, ends "
        "with an error.",
    )

    @field_validator("degrees")
    @classmethod
    def _degrees(cls, degrees: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if degrees is not None and (not degrees or 1 not in degrees or min(degrees) < 1):
            raise ValueError("must contain 1 (encode and decode run on one GPU) and only positive degrees")
        return None if degrees is None else tuple(sorted(set(degrees)))

    @model_validator(mode="after")
    def _fits(self) -> CellArgs:
        if self.degrees and max(self.degrees) > self.gpus:
            raise ValueError(f"degrees: {max(self.degrees)} is above gpus: {self.gpus}")
        return self

    @property
    def all_degrees(self) -> tuple[int, ...]:
        """The configured degrees, or the powers of two up to `gpus`."""
        return self.degrees or tuple(1 << i for i in range(self.gpus.bit_length()))

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources of the cell's placement group: the scheduler's bundle, then one per GPU replica."""
        replica: dict[str, float] = {"CPU": self.cpus_per_replica}
        if self.device == "cuda":
            replica["GPU"] = 1
        return [{"CPU": self.scheduler_cpus}, *(dict(replica) for _ in range(self.gpus))]


class SchedulerArgs(_Section):
    """The round-based scheduler and its packer."""

    policy: str = Field("ilp", description="One of " + ", ".join(POLICIES))
    round_s: float | None = Field(None, gt=0, le=60, description="Round length; default: from the profile.")
    min_round_s: float = Field(0.1, ge=0, le=60, description="Floor of a derived round length.")
    lead_s: float = Field(
        0.04, ge=0, le=1, description="How long before a GPU frees its next step range is decided and queued."
    )
    solver_time_limit_s: float = Field(
        0.02,
        gt=0,
        le=5,
        description="A decision takes no longer; the fallback plan is used after twice this. Keep it below lead_s.",
    )
    max_batch: int = Field(
        8,
        ge=1,
        le=64,
        description="So many requests may share a denoising step, of any shapes where the model can, if the profile "
        "says that it pays; 1: none do.",
    )
    max_open_requests: int = Field(
        256,
        ge=1,
        description="More are answered 503 with Retry-After. With API keys an eighth of them is kept for clients "
        "that have less than their equal share.",
    )
    max_open_per_client: int | None = Field(
        None,
        ge=1,
        description="The same for each API key (without keys all are one client), in each cell; null: no limit.",
    )
    drop_late: bool = Field(
        False,
        description="End a request with an error once its deadline cannot be met, instead of finishing late.",
    )
    reject_infeasible: bool = Field(
        False, description="Answer 503 at once to a request that the first plan cannot have on time."
    )
    default_slo_scale: float | None = Field(
        3.0, gt=0, description="Deadline of requests without one, times the stand-alone time; null: none."
    )

    @field_validator("policy")
    @classmethod
    def _policy(cls, policy: str) -> str:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}, allowed are {', '.join(POLICIES)}")
        return policy


class ProfileArgs(_Section):
    """Where step times come from. Without `path` the cell measures itself at first start and caches it."""

    path: str | None = Field(None, description="A profile file (see `tetriserve profile`).")
    shapes: tuple[str, ...] = Field(
        ("256x256", "512x512", "1024x1024"),
        min_length=1,
        description='"HxW" shapes to measure, "HxWxF" of clips.',
    )
    warmup: int = Field(1, ge=0, le=20, description="Steps before the measured ones, per shape and degree.")
    repeats: int = Field(
        3, ge=1, le=100, description="Measured steps per shape and degree; the median counts."
    )
    cache_dir: str | None = Field(None, description="Default: ~/.cache/tetriserve/profiles.")
    correct: bool = Field(
        True,
        description="Plan with the profile times the median ratio of what the running cell measures to what the "
        "profile says, by shape and degree; false: with the profile as it is.",
    )

    @field_validator("shapes")
    @classmethod
    def _shapes(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Shape.parse(shape)) for shape in shapes)

    @property
    def all_shapes(self) -> tuple[Shape, ...]:
        return tuple(Shape.parse(shape) for shape in self.shapes)


class HTTPArgs(_Section):
    """The HTTP edge: who may use it, and its limits."""

    replicas: int = Field(1, ge=1, le=64, description="Ingress processes; each cell talks to all of them.")
    api_keys_env: str | None = Field(
        None,
        description="Environment variable with the allowed API keys, separated by commas; null: no keys.",
    )
    api_keys_file: str | None = Field(None, description="File with one API key per line, # for comments.")

    cors_allow_origins: tuple[str, ...] = Field(
        (), description='Web pages of these origins may call the API from browsers; ["*"]: of all.'
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="Of requests that do not say."
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Larger bodies are answered 413.")
    max_upload_bytes: int = Field(
        64 << 20, ge=1024, description="The same for bodies with pictures in them; they are held in memory."
    )
    max_images: int = Field(4, ge=1, le=16, description="Pictures that may be sent to be edited at once.")
    max_image_pixels: int = Field(
        4096 * 4096, ge=64 * 64, description="Of each; larger ones are refused before they are unpacked."
    )
    max_n: int = Field(10, ge=1, le=10, description="Largest `n` of one request.")
    public_url: str | None = Field(
        None,
        pattern="^https?://",
        description="Where clients reach this server, for `url` results; default: the request's Host header.",
    )
    url_ttl_s: float = Field(
        300.0, gt=0, le=86400, description="How long the picture of a `url` result is there."
    )
    url_max_bytes: int = Field(
        1 << 28,
        ge=1 << 20,
        description="Bytes of all pictures of `url` results together; beyond, the oldest go first.",
    )

    @property
    def has_keys(self) -> bool:
        return self.api_keys_env is not None or self.api_keys_file is not None


class ReuseArgs(_Section):
    """Steps that are extrapolated instead of computed, where the request or `when` allows it; lossy."""

    low: int = Field(
        2, ge=2, le=8, description="Level low: behind the first ones every so-manieth step is computed."
    )
    high: int = Field(3, ge=2, le=8, description="Level high: the same.")
    level: Literal["low", "high"] = Field("low", description="Of requests that do not say `quality`.")
    when: Literal["never", "late", "always"] = Field(
        "never",
        description="For them: never, where the deadline would be missed otherwise, or always.",
    )

    def every(self, quality: str | None) -> int:
        """Of the steps of a request that says so; 1: each is computed."""
        level = QUALITIES[quality] if quality is not None else self.level if self.when == "always" else None
        return self._of_level(level)

    def every_if_late(self, quality: str | None) -> int:
        """The same where it would be late otherwise."""
        return self._of_level(self.level if quality is None and self.when == "late" else None)

    def _of_level(self, level: str | None) -> int:
        return 1 if level is None else self.low if level == "low" else self.high


class AppArgs(_Section):
    """All of it: the `args` of the application in a Serve config file."""

    # `model_` would otherwise be pydantic's own prefix
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: ModelArgs = ModelArgs()
    cell: CellArgs = CellArgs()
    scheduler: SchedulerArgs = SchedulerArgs()
    profile: ProfileArgs = ProfileArgs()
    http: HTTPArgs = HTTPArgs()
    reuse: ReuseArgs | None = None

    def turned(self, section: str, knobs: Mapping[str, Any]) -> AppArgs:
        """With other knobs in a section. Raises `ConfigError` naming the first wrong one."""
        body = self.model_dump(exclude_unset=True)
        return self.parse(body | {section: body.get(section, {}) | dict(knobs)})

    @classmethod
    def parse(cls, args: dict[str, Any]) -> AppArgs:
        """Validate. Raises `ConfigError`, one line, naming the first wrong key."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "args"
            allowed = ""
            if first["type"] == "extra_forbidden":
                section: Any = cls
                for part in first["loc"][:-1]:
                    in_list = isinstance(part, int)
                    section = get_args(section)[0] if in_list else section.model_fields[part].annotation
                allowed = f"; allowed are {', '.join(section.model_fields)}"
            message = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"args.{key}: {message}{allowed}") from None
