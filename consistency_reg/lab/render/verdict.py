"""When a router counts as balanced."""

COLLAPSED_BELOW = 0.1  # smallest usage of an expert, as a share of its fair share
