"""What text is here (two ``datasets.Dataset`` a domain), and where it comes from if not from the default corpus."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from consistency_reg.lab.corpus.disk_cache import cache_key
from consistency_reg.optional import require

with require("transformers"):
    import datasets
    from datasets.exceptions import DatasetGenerationError

VALIDATION_SHARE = 0.1
SPLIT_SEED = 0


@dataclass(frozen=True)
class Text:
    """The documents of one domain.

    Attributes:
        train: one column, "text"; a row is a document.
        validation: other documents of the same kind.
        key: changes when the text may have changed; found without reading the text.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    key: str


@dataclass(frozen=True)
class DataSource:
    """A data set of the hub or of this machine, as ``datasets.load_dataset`` takes it.

    Attributes:
        path: a hub id, a folder, or a format ("json", "text", "parquet", ...) with ``data_files``.
        name: the data set's configuration.
        data_files: the files to read, where ``path`` is a format.
        split: the split to train on; slices such as "train[:1%]" work.
        validation_split: the split to validate on; a tenth of the documents of ``split`` when None.
        text_column: the column that holds the documents.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    validation_split: str | None = None
    text_column: str = "text"

    def load(self) -> Text:
        """Read both splits.

        Raises:
            ValueError: nothing can be read; ``text_column`` is not a column of strings; there are too few documents to
                split.
        """
        train = self._read(self.split)
        if self.validation_split is not None:
            validation = self._read(self.validation_split)
        elif len(train) < 2:
            raise ValueError(f"{self.path!r} must hold at least 2 documents to set some aside, got {len(train)}")
        else:
            parts = train.train_test_split(test_size=VALIDATION_SHARE, seed=SPLIT_SEED)
            train, validation = parts["train"], parts["test"]
        # datasets names its files by what they were made from, so a changed source has other files
        files = [file["filename"] for part in (train, validation) for file in part.cache_files]
        made = [Path(file).stat().st_mtime for file in files]
        key = cache_key(source=asdict(self), files=files, made=made, rows=[len(train), len(validation)])
        return Text(train, validation, key)

    def _read(self, split: str) -> datasets.Dataset:
        try:
            data = datasets.load_dataset(self.path, self.name, data_files=self.data_files, split=split)
        except (DatasetGenerationError, StopIteration, RuntimeError) as error:  # all of which an empty file raises
            files = f" of {self.data_files}" if self.data_files else ""
            raise ValueError(f"no documents could be read from {self.path!r}{files}: is it empty? ({error})") from error
        strings = [name for name, feature in data.features.items() if getattr(feature, "dtype", "").endswith("string")]
        if self.text_column not in strings:
            raise ValueError(
                f"text_column of {self.path!r} must be a column of strings, one of {strings}, got {self.text_column!r}"
            )
        data = data.select_columns([self.text_column])
        return data if self.text_column == "text" else data.rename_column(self.text_column, "text")


def write_text(folder: Path, train: Sequence[str], validation: Sequence[str]) -> None:
    """Keep the documents of a domain in a folder, for :func:`read_text`."""
    splits = {"train": list(train), "validation": list(validation)}
    data = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()})
    with _no_progress_bars():
        data.save_to_disk(folder)


def read_text(folder: Path) -> Text:
    """The documents that :func:`write_text` kept, mapped into memory."""
    data = datasets.load_from_disk(str(folder))
    return Text(data["train"], data["validation"], key=folder.name)


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
