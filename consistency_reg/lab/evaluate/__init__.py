"""The command ``consistency-reg evaluate``: text -> model -> recorded routing -> measures -> advice, tables, figures.

:mod:`.text` chooses the text, :mod:`.models` loads a model, :mod:`.run` records its routing, :mod:`.traces` keeps that
in a file, :mod:`.measure` measures it; the others show what came out.
"""
