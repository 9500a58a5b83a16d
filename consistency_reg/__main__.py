"""``python -m consistency_reg`` is ``consistency-reg``."""

import sys

from consistency_reg.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
