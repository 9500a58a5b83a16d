"""Measure what a language model knows without training for it: which of four continuations is a passage's own.

:mod:`.items` makes the questions of held-out text, :mod:`.answers` lets a model answer them, and :mod:`.command` is
``consistency-reg cloze``.
"""
