"""What runs on one GPU: sequence-parallel groups, the step loop, latents and their hand-off."""
