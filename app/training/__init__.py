"""Training a classifier, on transformers' Trainer. Needs the extra `train`."""
