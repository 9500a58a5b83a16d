"""Small MoE language models, their text and their training; needs the extras `lightning` and `transformers`."""
