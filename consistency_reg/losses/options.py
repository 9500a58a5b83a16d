"""Checks of the options that several losses have."""


def check_number(name: str, value: float) -> float:
    """Return a number of at least 0; raise ValueError otherwise."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value}")
    return float(value)


def check_length(name: str, value: int) -> int:
    """Return a positive number of whole tokens; raise ValueError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be in whole tokens, at least 1, got {value!r}")
    return value
