"""Define the colours of all figures, of the library and of reports.

Okabe and Ito's palette: told apart with every kind of colour vision, and in grey by their lightness.
"""

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
