"""Checkpoints: find, read, convert, write."""
