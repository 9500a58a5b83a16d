"""``consistency-reg offload``: run models whose experts are read from disk, and compare what a token takes."""
