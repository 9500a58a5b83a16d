"""Triton versions of what is slow on a GPU as tensor operations: each equals its ``functional/`` version bit for bit.

Triton is not needed: where it is missing, and on a CPU, the ``functional/`` versions do the work. The modules of this
package import it, so they are imported where :func:`consistency_reg.devices.has_kernels` says yes, and nowhere else.
"""
