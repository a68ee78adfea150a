"""What the embeddings are good for: retrieval, probes, and the report that says so."""
