"""Colours and shapes that all figures share."""

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey by their lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h")  # as matplotlib names them
NO_TERM = "0.35"  # the grey of runs without a consistency term, as matplotlib names it
