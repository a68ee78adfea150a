"""WebDataset shards: what is in them (index), in which order (order), and as batches from any cursor (stream)."""
