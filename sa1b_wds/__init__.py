"""SA-1B as training-ready WebDataset shards: a one-pass converter and an exact streaming loader."""
