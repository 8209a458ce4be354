"""One adapter per model family over diffusers components."""
