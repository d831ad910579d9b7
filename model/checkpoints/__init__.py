"""Checkpoints: locate, read, convert and write."""
