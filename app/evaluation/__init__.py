"""Evaluate a checkpoint on labelled images."""
