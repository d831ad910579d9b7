"""Train a classifier with the Trainer of transformers. Requires the extra `train`."""
