"""Classify millions of images, shard by shard: from folders, Parquet and WebDataset to Parquet, on one machine or on Ray."""
