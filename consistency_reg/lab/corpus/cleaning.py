"""Pure functions that turn files into documents and documents into samples."""

import ast
import hashlib
import html
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence


def unminified(sources: Iterable[str], longest_line: int = 1000) -> Iterator[str]:
    """Leave out the source files that no human wrote: those with a line over ``longest_line`` characters."""
    return (source for source in sources if max(map(len, source.split("\n"))) <= longest_line)


def without_build_guard(source: str) -> str:
    """Cut the lines that torch's build wraps around each of its headers."""
    first, last = (
        r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n",
        r"\n#else\n#error [^\n]*TORCH_STABLE_ONLY[^\n]*\n#endif[^\n]*\s*\Z",
    )
    return re.sub(f"{first}(.*){last}", r"\1\n", source, flags=re.DOTALL)


def without_licence(source: str) -> str:
    """Cut the comment on top of a C++ file if it speaks of copyright or licence.

    Example:
        >>> without_licence("// Copyright 2024\\n// All rights reserved.\\n\\n#pragma once\\n")
        '#pragma once\\n'
    """
    comment = re.match(r"\s*(/\*.*?\*/|(//[^\n]*\n)+)\s*", source, re.DOTALL)
    if comment and re.search(r"copyright|licen[cs]e", comment[0], re.IGNORECASE):
        return without_licence(source[comment.end() :])
    return source


def without_docstrings(source: str) -> str:
    """Cut the docstrings of Python code; "" for what this Python cannot parse.

    Example:
        >>> without_docstrings('def f():\\n    "what it does"\\n    return 1\\n')
        'def f():\\n    return 1\\n'
    """
    lines = source.encode().split(b"\n")  # ast counts columns in bytes of UTF-8
    removed: set[int] = set()
    tree = _parsed(source)
    for docstring, alone in _docstrings(tree):
        assert docstring.end_lineno is not None
        first, last = docstring.lineno - 1, docstring.end_lineno - 1
        before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        lines[first] = before + (b"..." if alone else b"") + after
        removed.update(range(first if not lines[first].strip() else first + 1, last + 1))
    return b"\n".join(line for index, line in enumerate(lines) if index not in removed).decode() if tree.body else ""


def prose_paragraphs(source: str) -> Iterator[str]:
    """Yield the paragraphs of a Python file's docstrings that read as text: no code, tables or directives.

    Example:
        >>> prose = "A sentence that has more than ten words is what we look for here, and eighty letters too."
        >>> list(prose_paragraphs(f'\"\"\"Title.\\n\\n{prose}\\n\\n>>> 1 + 1\\n2\\n\"\"\"')) == [prose]
        True
    """
    for docstring, _ in _docstrings(_parsed(source)):
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(str(docstring.value))):
            if is_prose(paragraph := paragraph.strip()):
                yield paragraph


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph has 80 characters, 10 words and 60% letters, and is no doctest or directive."""
    return (
        len(paragraph) >= 80
        and len(paragraph.split()) >= 10
        and sum(map(str.isalpha, paragraph)) >= 0.6 * len(paragraph)
        and ">>>" not in paragraph
        and not re.search(r"^\s*\.\.|::", paragraph, re.MULTILINE)
    )


def texts_within(tree: object) -> Iterator[str]:
    """Yield every string under a key "text" of nested JSON.

    Example:
        >>> list(texts_within({"Area": {"total": {"text": "3 sq km"}, "note": "left out"}}))
        ['3 sq km']
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "text" and isinstance(value, str):
                yield value
            else:
                yield from texts_within(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from texts_within(value)


def without_tags(markup: str) -> str:
    """Return HTML as one line of text.

    Example:
        >>> without_tags("<p>Ti&amp;Ta<br>Tu</p>")
        'Ti&Ta Tu'
    """
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def take_bytes(documents: Iterable[str], size: int, seen: set[bytes], at_least: int = 1) -> list[str]:
    """Return documents until they hold ``size`` bytes of UTF-8, without empty ones and those ``seen`` before."""
    taken: list[str] = []
    total = 0
    for document in documents:
        encoded = document.encode()
        digest = hashlib.sha256(encoded.strip()).digest()
        if digest in seen or not encoded.strip():
            continue
        seen.add(digest)
        taken.append(document)
        total += len(encoded)
        if total >= size and len(taken) >= at_least:
            break
    return taken


def split_documents(documents: Sequence[str], validation_share: float) -> tuple[list[str], list[str]]:
    """Return (train, validation): validation gets the first documents that hold its share, train at least one.

    Example:
        >>> split_documents(["aa", "b", "cccccccc"], 0.1)
        (['b', 'cccccccc'], ['aa'])
    """
    wanted = validation_share * sum(len(document.encode()) for document in documents)
    held_out, total = 0, 0
    while total < wanted and held_out < len(documents) - 1:
        total += len(documents[held_out].encode())
        held_out += 1
    return list(documents[held_out:]), list(documents[:held_out])


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # for another Python, or with null bytes
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[tuple[ast.Constant, bool]]:
    """Yield the docstrings of the definitions under a node, and whether each is all of its definition's body."""
    for field in (
        "body",
        "orelse",
        "handlers",
        "finalbody",
    ):  # statements only: walking expressions takes 10 times as long
        statements = getattr(node, field, [])
        if not isinstance(statements, list):
            continue
        if field == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            match statements:
                case [ast.Expr(value=ast.Constant(value=str()) as docstring), *rest]:
                    yield docstring, not (rest or isinstance(node, ast.Module))
        for statement in statements:
            yield from _docstrings(statement)
