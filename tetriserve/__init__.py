"""Serving of diffusion transformers under deadlines, with a sequence-parallel degree per denoising step."""

__version__ = "0.1.0"
