"""Check the options that several losses have."""

SCOPES = ("global", "batch", "sequence")


def check_positive(name: str, value: float) -> float:
    """Return a finite number above 0; raise ValueError otherwise."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value}")
    return float(value)


def check_number(name: str, value: float) -> float:
    """Return a finite number of at least 0; raise ValueError otherwise."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value}")
    return float(value)


def check_length(name: str, value: int) -> int:
    """Return a positive number of whole tokens; raise ValueError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be in whole tokens, at least 1, got {value!r}")
    return value


def check_scope(scope: str) -> str:
    """Return what shares one value; raise ValueError unless it is one of :data:`SCOPES`."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    return scope
