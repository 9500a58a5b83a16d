"""Numbers of bytes as people write them."""

import re

UNITS = {
    **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
}


def parse_bytes(text: str | int | float, name: str = "memory") -> int:
    """Return a number of bytes.

    Args:
        text: such as 2000000000, "2GB" or "1.5 GiB".
        name: what the user calls it.

    Raises:
        ValueError: it is none of these, or not positive.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1.5 MiB")
        (2000000000, 1572864)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].lower() not in UNITS or not float(found[1]) > 0:
        raise ValueError(f"{name} must be a positive number of bytes such as 500MB, 2GB or 1.5GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


def parse_bandwidth(text: str | int | float, name: str = "read_bandwidth") -> int:
    """Return a number of bytes per second, given with or without "/s".

    Example:
        >>> parse_bandwidth("1.5GB/s"), parse_bandwidth("300MB")
        (1500000000, 300000000)
    """
    return parse_bytes(str(text).strip().removesuffix("/s"), name)


def show_bytes(number: float) -> str:
    """Return a number of bytes with a unit.

    Example:
        >>> show_bytes(1_179_648), show_bytes(500)
        ('1.18 MB', '500 B')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} B"
