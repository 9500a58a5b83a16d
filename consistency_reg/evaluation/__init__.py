"""What ``consistency-reg evaluate`` does: text -> model -> recorded routing -> measures -> advice, tables, figures.

:mod:`~consistency_reg.evaluation.text` chooses the text, :mod:`~consistency_reg.evaluation.models` loads a model,
:mod:`~consistency_reg.evaluation.run` records its routing, :mod:`~consistency_reg.evaluation.traces` keeps that in a
file, :mod:`~consistency_reg.evaluation.measure` measures it; the others show what came out.
"""
