"""The names of the default corpus's domains, for those who need nothing of their text."""

DOMAIN_NAMES = ("cpp", "python", "symbolic", "docs", "math", "speeches", "encyclopedia", "scripture")
