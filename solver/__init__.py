"""Packing of denoising steps onto the board GPU x time: numbers in, numbers out (numpy and PuLP only)."""
