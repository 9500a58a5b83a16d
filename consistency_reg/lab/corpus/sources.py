"""Hold the text of a domain as two ``datasets.Dataset``, and read it from files, folders and the hub."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consistency_reg.lab.corpus.disk_cache import cache_key
from consistency_reg.lab.corpus.encoding import not_utf8
from consistency_reg.lab.corpus.json_lines import first_mistake
from consistency_reg.optional import require

with require("transformers"):
    import datasets
    from datasets.exceptions import DatasetGenerationError

VALIDATION_SHARE = 0.1
SPLIT_SEED = 0
TEXT, CHAT = "text", "messages"
CHECKED_BYTES = 2**26  # at the beginning of a file: what is wrong is mostly wrong from there on
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
TEXT_FORMATS = ("json", "csv", "text")


@dataclass(frozen=True)
class Text:
    """Holds the documents of one domain.

    Attributes:
        train: one column; a row is a document. The column is "text", or "messages" where a document is a chat, a list
            of {"role", "content"}.
        validation: other documents of the same kind.
        key: changes when the text may have changed; found without reading the text.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    key: str

    @property
    def is_chat(self) -> bool:
        """Return whether the documents are chats, which a tokenizer's template turns into text."""
        return CHAT in self.train.column_names


@dataclass(frozen=True)
class DataSource:
    """Holds a data set of the hub or of this machine, as ``datasets.load_dataset`` takes it.

    Attributes:
        path: a hub id, a folder, or a format ("json", "text", "parquet", ...) with ``data_files``.
        name: the data set's configuration.
        data_files: the files to read, where ``path`` is a format.
        split: the split to train on; slices such as "train[:1%]" work.
        validation_split: the split to validate on; a tenth of the documents of ``split`` when None.
        text_column: the column that holds the documents: strings, or chats. Where there is no "text", "messages" is
            taken for it.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    validation_split: str | None = None
    text_column: str = TEXT

    def load(self) -> Text:
        """Read both splits.

        Raises:
            ValueError: nothing can be read; ``text_column`` is not a column of strings or chats; there are too few
                documents to split. A malformed line is named with its file.
        """
        train = self._read(self.split)
        if self.validation_split is not None:
            validation = self._read(self.validation_split)
        elif len(train) < 2:
            raise ValueError(f"{self._said} must hold at least 2 documents to set some aside, got {len(train)}")
        else:
            parts = train.train_test_split(test_size=VALIDATION_SHARE, seed=SPLIT_SEED)
            train, validation = parts["train"], parts["test"]
        # datasets names its files by what they were made from, so a changed source has other files
        files = [file["filename"] for part in (train, validation) for file in part.cache_files]
        made = [Path(file).stat().st_mtime for file in files]
        key = cache_key(source=asdict(self), files=files, made=made, rows=[len(train), len(validation)])
        return Text(train, validation, key)

    def _read(self, split: str) -> datasets.Dataset:
        if mistake := not_utf8(self._text_files(), CHECKED_BYTES):  # of JSON datasets would make other letters
            raise ValueError(mistake)
        try:
            if (saved := _saved_files(Path(self.path))) is not None:
                data = datasets.load_dataset("arrow", data_files=saved, split=split)
            else:
                data = datasets.load_dataset(self.path, self.name, data_files=self.data_files, split=split)
        except (DatasetGenerationError, StopIteration, RuntimeError) as error:  # all of which an empty file raises
            if mistake := self._mistake() or not_utf8(self._text_files()):
                raise ValueError(mistake) from error
            raise ValueError(f"no documents could be read from {self._said}: is it empty? ({error})") from error
        column, kind = self._column(data)
        if kind == CHAT and (mistake := self._mistake()):  # a message without content is read as one of nothing
            raise ValueError(mistake)
        if empty := data.data.column(column).null_count:
            warnings.warn(f"{empty} of the {len(data)} rows of {self._said} have no {column!r}: left out", stacklevel=3)
        data = data.select_columns([column])
        return data if column == kind else data.rename_column(column, kind)

    def _column(self, data: datasets.Dataset) -> tuple[str, str]:
        """Return the column of the documents, and whether it holds text or chats."""
        kinds = {name: kind for name, feature in data.features.items() if (kind := _kind(feature)) is not None}
        if self.text_column in kinds:
            return self.text_column, kinds[self.text_column]
        if self.text_column == TEXT and kinds.get(CHAT) == CHAT:
            return CHAT, CHAT
        if not kinds and (mistake := self._mistake()):
            raise ValueError(mistake)
        there = f"one of {list(kinds)}" if kinds else f"of which there is none among {data.column_names}"
        raise ValueError(
            f"text_column of {self._said} must be a column of strings or chats, {there}, got {self.text_column!r}"
        )

    @property
    def _said(self) -> str:
        """Return the path and the files, for messages."""
        return f"{self.path!r} of {self.data_files}" if self.data_files else repr(self.path)

    def _named_files(self) -> list[str]:
        return [self.data_files] if isinstance(self.data_files, str) else self.data_files or []

    def _text_files(self) -> list[Path]:
        """Return the files of text that the source names, or that lie in the folder that it names."""
        if self.data_files is not None:
            return [Path(file) for file in self._named_files()] if self.path in TEXT_FORMATS else []
        folder = Path(self.path)
        found = sorted(folder.rglob("*")) if folder.is_dir() else []
        return [file for file in found if FORMATS.get(file.suffix) in TEXT_FORMATS]

    def _mistake(self) -> str | None:
        """Return the first malformed line, where the source is files of JSON lines."""
        if self.path != "json" or self.data_files is None:
            return None
        files, mistake = self._named_files(), None
        if self.text_column != CHAT:
            mistake = first_mistake(files, self.text_column, lambda value: isinstance(value, str), "a string")
        if mistake is None and self.text_column in (TEXT, CHAT):
            mistake = first_mistake(files, CHAT, _is_chat, 'a list of {"role", "content"}')
        return mistake


def local_source(path: str, **options: Any) -> DataSource:
    """Return the source for a file (JSON, JSON lines, CSV, Parquet, text), a folder, or a data set of the hub.

    Args:
        path: of the file, or what ``datasets.load_dataset`` takes.
        options: of :class:`DataSource`.

    Raises:
        FileNotFoundError: it is named as a file and is not there.
        ValueError: it is a file of another kind.

    Example:
        >>> local_source("allenai/c4", name="en").path
        'allenai/c4'
    """
    file = Path(path)
    kind = FORMATS.get(file.suffix.lower())
    if kind is not None and not file.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if kind is not None and file.is_file():
        return DataSource(kind, data_files=path, **options)
    if file.is_file():
        raise ValueError(f"the name of a file of data must end with one of {', '.join(FORMATS)}, got {path}")
    return DataSource(path, **options)


def write_text(folder: Path, train: Sequence[str], validation: Sequence[str]) -> None:
    """Keep the documents of a domain in a folder, for :func:`read_text`."""
    splits = {"train": list(train), "validation": list(validation)}
    data = datasets.DatasetDict({name: datasets.Dataset.from_dict({TEXT: texts}) for name, texts in splits.items()})
    with _no_progress_bars():
        data.save_to_disk(folder)


def read_text(folder: Path) -> Text:
    """Return the documents that :func:`write_text` kept, mapped into memory."""
    data = datasets.load_from_disk(str(folder))
    return Text(data["train"], data["validation"], key=folder.name)


def _saved_files(folder: Path) -> dict[str, list[str]] | None:
    """Return the files of each split of a data set that ``save_to_disk`` kept in a folder; None for other folders."""
    splits, one = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        return {name: files for name in names for files in (_saved_files(folder / name) or {}).values()}
    if one.is_file():
        return {"train": [str(folder / file["filename"]) for file in json.loads(one.read_text())["_data_files"]]}
    return None


def _kind(feature: Any) -> str | None:
    """Return whether a column holds text or chats; None for neither."""
    if str(getattr(feature, "dtype", "")).endswith("string"):
        return TEXT
    inner = getattr(feature, "feature", None)
    return CHAT if isinstance(inner, dict) and {"role", "content"} <= inner.keys() else None


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
