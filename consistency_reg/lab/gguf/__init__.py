"""``consistency-reg export``: write a model as GGUF, for llama.cpp and the engines that are built on it."""
