"""A cell: one scheduler actor and the GPU replicas that it drives."""
