"""Numbers of bytes are read and shown as people write them."""

import pytest

from consistency_reg.byte_sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("2GB", 2e9), ("1.5GiB", 1.5 * 2**30), (" 300 mb ", 3e8), ("1 TB", 1e12), ("2TiB", 2**41)),
        *(("12", 12), (12, 12), (1.5e3, 1500), ("7B", 7)),
    ],
)
def test_bytes_as_people_write_them(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "2GG", "1 GB more", "1e"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ValueError, match="memory must be a positive number of bytes"):
        parse_bytes(text)


def test_shown_bytes_are_read_again():
    assert [show_bytes(number) for number in (5, 1_500, 2_000_000, 3_210_000_000)] == [
        "5 B",
        "1.5 kB",
        "2 MB",
        "3.21 GB",
    ]
    assert [parse_bytes(show_bytes(number)) for number in (2_000_000, 4_000_000_000_000)] == [2e6, 4e12]
