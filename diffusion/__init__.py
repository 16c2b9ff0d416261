"""Patch-based image diffusion in JAX: pure functions that compose."""
