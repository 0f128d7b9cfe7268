"""Hidden states of texts, on disk or as a stream."""
