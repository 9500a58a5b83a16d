"""Price cache-aware routing: perplexity, misses and balance of a model at several strengths of the bias."""
