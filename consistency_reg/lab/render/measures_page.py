"""The table of measures as a page of the documentation: ``python -m consistency_reg.lab.render.measures_page PAGE``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from consistency_reg import measures
from consistency_reg.lab.render.markdown import update
from consistency_reg.lab.render.table import Table
from consistency_reg.measures.reading import Measure, Reading

SOURCE = "consistency_reg/measures/__init__.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Renew the table in each page that is named."""
    for page in sys.argv[1:] if argv is None else argv:
        update(Path(page), SOURCE, [measures_table()])
    return 0


def measures_table() -> Table:
    """Return a row for each measure, in the order of its panel.

    Example:
        >>> measures_table().rows[0][:2]
        ['val/ppl', 'perplexity']
    """
    rows = [
        [
            example(measure).within(measure.stages[0]).name,
            example(measure).label,
            measure.meaning,
            measure.unit,
            measure.better,
            ", ".join(measure.of),
            ", ".join(measure.stages),
            measure.logged_by,
        ]
        for measure in measures.MEASURES
    ]
    header = ["name", "label", "what it is", "unit", "good", "of each", "stage", "logged by"]
    return Table("Measures", header, rows)


def example(measure: Measure) -> Reading:
    """Return a measure at usual parts of its key: m = 16, an LRU cache of 2K slots, domains."""
    return measure.at(16, ratio=2)


if __name__ == "__main__":
    sys.exit(main())
