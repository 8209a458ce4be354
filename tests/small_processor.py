"""Qwen2-VL's processor without its part for videos, which needs torchvision, which there is none of here for a torch
without CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BatchFeature, ProcessorMixin, Qwen2Tokenizer, Qwen2VLImageProcessorPil

IMAGE = "<|image_pad|>"


class SmallProcessor(ProcessorMixin):
    """Text with a place for each picture, and the pictures, to what Qwen2.5-VL takes."""

    def __init__(self, tokenizer: Qwen2Tokenizer, images: Qwen2VLImageProcessorPil) -> None:
        self.tokenizer, self.images = tokenizer, images

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> BatchFeature:
        (prompt,) = text
        seen = {} if images is None else dict(self.images(images=images, return_tensors="pt"))
        merged = self.images.merge_size**2
        counts = [int(grid.prod()) // merged for grid in seen.get("image_grid_thw", ())]
        head, *rest = prompt.split(IMAGE)
        # a place without a picture stays one token, as in the original
        places = [IMAGE * n for n in counts] + [IMAGE] * (len(rest) - len(counts))
        prompt = head + "".join(place + part for place, part in zip(places, rest, strict=True))
        return BatchFeature({**self.tokenizer([prompt], return_tensors="pt"), **seen})

    def save_pretrained(self, folder: str, **options: Any) -> None:
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> SmallProcessor:
        assert Path(folder).is_dir()
        return cls(Qwen2Tokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder))
