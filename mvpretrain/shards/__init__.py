"""WebDataset shards as files: packed (pack, plans), found (urls), indexed (headers, index) and checked (check)."""
