"""Define the colours and shapes that all figures of the lab share."""

from consistency_reg.tracking.palette import COLOURS

NO_TERM = "#595959"  # of runs without a consistency term
# The same on a dark page: blue and vermilion lighter, black and grey turned about.
ON_DARK = ("#4DA6DE", "#F0843F", "#1FBF8F", "#DE96BC", "#F2B84B", "#7FCBF5", "#FFFFFF")
NO_TERM_ON_DARK = "#A6A6A6"

SHAPES = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h")  # as matplotlib names them
PATHS = {  # the same as Vega and SVG draw them, in a square from -1 to 1
    "o": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "s": "M-.9,-.9H.9V.9H-.9Z",
    "^": "M0,-1L1,.85H-1Z",
    "D": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "v": "M0,1L1,-.85H-1Z",
    "P": "M-.4,-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z",
    "X": "M-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0L-1,-.5Z",
    "p": "M0,-1L.95,-.31L.59,.81H-.59L-.95,-.31Z",
    "*": "M0,-1.1L.27,-.37L1.05,-.34L.44,.14L.65,.89L0,.46L-.65,.89L-.44,.14L-1.05,-.34L-.27,-.37Z",
    "h": "M0,-1L.87,-.5V.5L0,1L-.87,.5V-.5Z",
    "x": "M-1,-1L1,1M1,-1L-1,1",
    "_": "M-1,-.4H1V.4H-1Z",
}


def css_name(colour: str) -> str:
    """Return the CSS variable that stands for a colour of the palette on a light and on a dark page.

    Example:
        >>> css_name("#D55E00"), css_name(NO_TERM)
        ('var(--c1)', 'var(--none)')
    """
    return f"var(--c{COLOURS.index(colour)})" if colour in COLOURS else "var(--none)"
