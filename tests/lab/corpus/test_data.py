"""Packed rows, their order, resuming, and that models keep the documents of a row apart."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from reference import packed_rows
from tiny_models import KINDS, tiny_model
from tokenizers import normalizers
from torch.utils.data import ConcatDataset, default_collate
from transformers import AutoTokenizer

from consistency_reg.lab.corpus.data import TextDataModule, check_attention, model_inputs
from consistency_reg.lab.corpus.disk_cache import cache_root
from consistency_reg.lab.corpus.packing import MixedRows, PackedRows, ResumableLoader
from consistency_reg.lab.corpus.sources import DataSource, local_source
from consistency_reg.lab.corpus.text import DOMAINS
from consistency_reg.lab.corpus.tokens import Tokens, tokenize

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def tokens(documents):
    """Documents, given as lists of ids, the way that ``tokenize`` keeps them."""
    lengths = [len(document) for document in documents]
    ids = np.array([token for document in documents for token in document], np.uint16)
    return Tokens(ids, np.cumsum([0, *lengths])[: len(lengths)], text_bytes=sum(lengths), text_tokens=sum(lengths))


def numbered_documents(lengths, first=2):
    counter = iter(range(first, first + sum(lengths)))
    return [[next(counter) for _ in range(length)] for length in lengths]


# --- packing ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(2, 11))
def test_rows_are_what_a_walk_over_the_tokens_gives(lengths, sequence_length):
    documents = numbered_documents(lengths)
    rows = PackedRows(tokens(documents), sequence_length, domain=3, pad_id=1)
    expected = packed_rows(documents, sequence_length, pad_id=1)
    assert len(rows) == len(expected)
    keys = ("input_ids", "labels", "attention_mask", "document_ids", "position_ids")
    for index, row in enumerate(expected):
        item = rows[index]
        assert [tuple(values) for values in zip(*(item[key].tolist() for key in keys), strict=True)] == row
        assert item["domain"] == 3
        assert item["attention_mask"].dtype == torch.bool
        assert all(item[key].dtype == torch.int64 for key in keys if key != "attention_mask")
    assert rows.predicted_tokens == sum(label != -100 for row in expected for _, label, _, _, _ in row)


def test_row_needs_two_tokens_and_must_exist():
    with pytest.raises(ValueError, match=r"sequence_length must be at least 2.*got 1"):
        PackedRows(tokens([[2, 3]]), 1)
    with pytest.raises(IndexError, match=r"row must lie in 0..0, got 1"):
        PackedRows(tokens([[2, 3]]), 2)[1]


# --- attention ----------------------------------------------------------------------------------------------------

DOCUMENT_LENGTHS = (5, 4, 7, 1, 6)  # two rows of 12, the second one padded by 1


def packed_batch():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in DOCUMENT_LENGTHS]
    rows = PackedRows(tokens(documents), 12, pad_id=0)
    return documents, default_collate([rows[0], rows[1]])


def run(model, batch):
    with torch.no_grad():
        return model(**model_inputs(batch)).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_do_not_see_each_other(kind, attention):
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    check_attention(model)
    documents, batch = packed_batch()
    before = run(model, batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 2] = (changed["input_ids"][0, 2] + 1 - 3) % 61 + 3  # within the first document
    after = run(model, changed)
    assert (after[0, 2:5] - before[0, 2:5]).abs().max() > 1e-3
    torch.testing.assert_close(after[0, 5:], before[0, 5:], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)

    alone = model(input_ids=torch.tensor(documents[1:2]), use_cache=False).logits.detach()
    torch.testing.assert_close(before[0, 5:9], alone[0], rtol=0, atol=1e-6)
    last = model(input_ids=torch.tensor(documents[4:5]), use_cache=False).logits.detach()
    torch.testing.assert_close(before[1, 5:11], last[0], rtol=0, atol=1e-6)


def test_padding_changes_nothing():
    model = tiny_model("olmoe")
    _, batch = packed_batch()
    padded = {**batch, "input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], 7)}
    assert int((~batch["attention_mask"]).sum()) == 1
    torch.testing.assert_close(run(model, padded)[1, :11], run(model, batch)[1, :11], rtol=0, atol=1e-6)


def test_loss_of_a_packed_batch_is_that_of_its_documents():
    model = tiny_model("olmoe")
    documents, batch = packed_batch()
    pieces = [documents[0], documents[1], documents[2][:3], documents[2][3:], documents[4]]  # the third one is cut
    total, count = 0.0, 0
    for piece in pieces:
        ids = torch.tensor([piece])
        log_probabilities = model(input_ids=ids, use_cache=False).logits.detach().log_softmax(-1)
        total -= sum(float(log_probabilities[0, t, piece[t + 1]]) for t in range(len(piece) - 1))
        count += len(piece) - 1
    assert int((batch["labels"] != -100).sum()) == count
    loss = model(**model_inputs(batch)).loss
    torch.testing.assert_close(loss.detach(), torch.tensor(total / count), rtol=1e-5, atol=1e-6)


def test_attention_that_would_mix_documents_is_refused():
    model = tiny_model("olmoe")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation must be one of .*got 'flash_attention_2'"):
        check_attention(model)


# --- order --------------------------------------------------------------------------------------------------------


def drawn(order, epochs=(0,)):
    rows = []
    for epoch in epochs:
        order.set_epoch(epoch)
        rows += list(order)
    return rows


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 3))
def test_every_round_has_each_domain_and_every_cycle_each_row(sizes, seed):
    D, epochs = len(sizes), 4
    rows = np.array(drawn(MixedRows(sizes, seed=seed), range(epochs))).reshape(-1, D)
    bounds = np.cumsum([0, *sizes])
    domains = np.searchsorted(bounds, rows, side="right") - 1
    assert (np.sort(domains, axis=1) == np.arange(D)).all()
    assert len(rows) * D >= epochs * sum(sizes)
    for domain, size in enumerate(sizes):
        of_domain = rows[domains == domain] - bounds[domain]
        for first in range(0, len(of_domain) - size + 1, size):  # goes on from epoch to epoch without a gap
            assert sorted(of_domain[first : first + size]) == list(range(size))


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return drawn(MixedRows([9, 9, 5], seed=seed), range(2))

    assert order(0) == order(0) != order(1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert order(0) == drawn(MixedRows([9, 9, 5], seed=0), range(2))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_rows_of_each_step(world_size):
    B = 8 // world_size
    one = drawn(MixedRows([16, 24], seed=1))
    ranks = [drawn(MixedRows([16, 24], seed=1, rank=r, world_size=world_size)) for r in range(world_size)]
    for step in range(len(one) // 8):
        together = {row for rows in ranks for row in rows[step * B : (step + 1) * B]}
        assert together == set(one[step * 8 : step * 8 + 8])


def loader(batch_size=2, workers=0, seed=0, **rank):
    domains = [PackedRows(tokens(numbered_documents([4] * n, 100 * d)), 4, domain=d) for d, n in enumerate((9, 6, 9))]
    order = MixedRows([len(rows) for rows in domains], seed=seed, **rank)
    return ResumableLoader(
        ConcatDataset(domains), batch_size=batch_size, sampler=order, drop_last=True, num_workers=workers
    )


def seen(batches):
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_batches_are_the_same_with_workers():
    assert seen(loader()) == seen(loader(workers=2))


def test_pass_that_was_broken_off_does_not_shift_the_next_one():
    data = loader()
    first = seen([next(iter(data))])
    assert seen(data)[:1] == first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5, 12])
def test_loader_goes_on_where_its_state_was_taken(stop, workers):
    data = loader(workers=workers)
    data.sampler.set_epoch(1)
    whole = seen(data)
    batches = iter(data)
    given = [next(batches) for _ in range(stop)]
    state = data.state_dict() if stop else {"epoch": 1, "rows": 0}
    resumed = loader(workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert seen(given) + seen(resumed) == whole
    assert seen(resumed) == whole  # and the next pass is a whole one


def test_state_serves_other_batch_sizes_and_numbers_of_processes():
    data = loader(batch_size=4)
    batches = iter(data)
    for _ in range(2):
        next(batches)
    state = data.state_dict()
    rest = [row for batch in seen(loader(batch_size=1))[8:] for row in batch]
    ranks = []
    for rank in range(2):
        resumed = loader(batch_size=1, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        ranks.append([row for batch in seen(resumed) for row in batch])
    assert [row for pair in zip(*ranks, strict=True) for row in pair] == rest


def test_state_of_a_new_epoch_begins_at_zero():
    data = loader()
    list(data)
    assert data.state_dict() == {"epoch": 0, "rows": 24}
    data.sampler.set_epoch(1)
    assert data.state_dict() == {"epoch": 1, "rows": 0}


# --- data module --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def corpus(cache, **options):
    options = {"sequence_length": 32, "batch_size": 4, "vocab_size": 300, "validation_tokens": 96, **options}
    return TextDataModule(
        **{"domains": ["math", "speeches", "scripture"], "corpus_bytes": 20_000, "cache_dir": cache, **options}
    )


def ready(module):
    module.prepare_data()
    module.setup()
    return module


def write_lines(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def test_domains_are_mixed_in_training_and_apart_in_validation(cache):
    module = ready(corpus(cache, batch_size=3))
    assert module.domains == ["math", "speeches", "scripture"]
    for batch, _ in zip(module.train_dataloader(), range(5), strict=False):
        assert sorted(batch["domain"].tolist()) == [0, 1, 2]
        assert batch["input_ids"].shape == (3, 32)
    for domain, dataloader in enumerate(module.val_dataloader()):
        batches = list(dataloader)
        assert sum(batch["input_ids"].numel() for batch in batches) == 96
        assert all(batch["attention_mask"].all() for batch in batches)
        assert {index for batch in batches for index in batch["domain"].tolist()} == {domain}


def test_seed_orders_training_and_changes_nothing_else(cache):
    first, same, other = (ready(corpus(cache, seed=seed)) for seed in (0, 0, 1))
    assert seen(first.train_dataloader()) == seen(same.train_dataloader()) != seen(other.train_dataloader())
    assert first.corpus_sha256 == other.corpus_sha256
    for mine, theirs in zip(first.val_dataloader(), other.val_dataloader(), strict=True):
        assert seen(mine) == seen(theirs)


def test_loading_leaves_the_random_state_alone(cache):
    module = ready(corpus(cache))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(module.train_dataloader())
    list(module.val_dataloader()[0])
    assert torch.equal(torch.rand(3), expected)


def test_tokenizer_loses_no_text(cache):
    module = ready(corpus(cache))
    tokenizer = module.tokenizer
    assert len(tokenizer) <= module.vocab_size == 300
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    for text in ("Größe \t\n  x", "日本 🤗", "\\frac{1}{2}"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    first = module.texts["speeches"].validation
    assert first.ids[0] == 0
    assert first.bytes_per_token == first.text_bytes / (len(first.ids) - len(first.starts))


def test_special_tokens_within_text_are_text(tmp_path, cache):
    path = write_lines(tmp_path / "a.jsonl", ["one <|endoftext|> two"] * 9)
    module = ready(corpus(cache, domains=None, data={"own": {"path": "json", "data_files": path}}))
    train = module.texts["own"].train
    assert [int(place) for place in np.flatnonzero(train.ids == 0)] == train.starts.tolist()


def test_warm_cache_is_read_and_other_settings_are_not_mixed_up(tmp_path):
    cache = tmp_path / "cache"
    small, large = (ready(corpus(str(cache), vocab_size=size)) for size in (280, 320))
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    times = [path.stat().st_mtime_ns for path in files]
    again = ready(corpus(str(cache), vocab_size=280))
    assert [path.stat().st_mtime_ns for path in files] == times
    assert seen(again.train_dataloader()) == seen(small.train_dataloader())
    assert len(small.tokenizer) == 280 < len(large.tokenizer)
    assert len(small.texts["math"].train.ids) > len(large.texts["math"].train.ids)


def test_local_data_takes_the_place_of_the_corpus_or_stands_beside_it(tmp_path, cache):
    texts = [f"document number {i} of this file, which has words in it" for i in range(40)]
    own = {"path": "json", "data_files": write_lines(tmp_path / "a.jsonl", texts, "body"), "text_column": "body"}
    alone = ready(corpus(cache, domains=None, data={"own": own}))
    assert alone.domains == ["own"]
    assert len(alone.texts["own"].train.starts) == 36
    assert len(alone.texts["own"].validation.starts) == 4
    beside = ready(corpus(cache, domains=["math"], data={"own": own}))
    assert beside.domains == ["math", "own"]
    given = ready(
        corpus(cache, domains=None, data={"own": {**own, "split": "train[:50%]", "validation_split": "train[50%:]"}})
    )
    assert len(given.texts["own"].validation.starts) == 20
    write_lines(tmp_path / "a.jsonl", [*texts, "one more document with words in it"], "body")
    changed = ready(corpus(cache, domains=None, data={"own": own}))
    assert changed.corpus_sha256 != alone.corpus_sha256


def test_tokenizer_of_somebody_else(tmp_path, cache):
    ready(corpus(cache)).tokenizer.save_pretrained(tmp_path / "theirs")
    theirs = str(tmp_path / "theirs")
    module = ready(corpus(cache, tokenizer=theirs))
    assert module.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(theirs).get_vocab()
    with pytest.raises(ValueError, match=r"vocab_size must be at least 300 for tokenizer=.*got 299"):
        corpus(cache, tokenizer=theirs, vocab_size=299)


def test_tokenizers_of_one_vocabulary_do_not_share_ids(tmp_path):
    cache = tmp_path / "cache"
    plain = ready(corpus(str(cache), domains=["math"]))
    plain.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    plain.tokenizer.save_pretrained(tmp_path / "lower")
    lower = ready(corpus(str(cache), domains=["math"], tokenizer=str(tmp_path / "lower")))
    assert lower.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    written, lowered = (plain.tokenizer.decode(module.texts["math"].train.ids) for module in (plain, lower))
    assert lowered == written.lower() != written


def test_truncation_and_padding_change_no_ids_and_stay_the_users(tmp_path):
    cache = tmp_path / "cache"
    plain = ready(corpus(str(cache), domains=["math"]))
    plain.tokenizer.save_pretrained(tmp_path / "saved")
    module = corpus(str(cache), domains=["math"], tokenizer=str(tmp_path / "saved"))
    folders = sorted((cache / "tokens").iterdir())
    module.tokenizer.backend_tokenizer.enable_truncation(5)
    module.tokenizer.backend_tokenizer.enable_padding(length=5)
    assert np.array_equal(ready(module).texts["math"].train.ids, plain.texts["math"].train.ids)
    assert sorted((cache / "tokens").iterdir()) == folders
    assert module.tokenizer.backend_tokenizer.truncation["max_length"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["math", "cooking"]}, rf"domains must be among .*{next(iter(DOMAINS))}.*got \['cooking'\]"),
        ({"domains": []}, "domains must name at least one domain"),
        ({"domains": ["math", "math"]}, r"once, got \['math'\] again"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_tokens": 31}, "validation_tokens must be at least 32, got 31"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        (
            {"data": {"own": {"path": "json", "txt_column": "a"}}},
            r"data\['own'\] must have .*'text_column'.*txt_column",
        ),
    ],
)
def test_bad_arguments_are_named_at_once(options, message, cache):
    with pytest.raises(ValueError, match=message):
        corpus(cache, **options)


def test_vocabulary_without_room_for_all_bytes(cache):
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258.*got 100"):
        corpus(cache, vocab_size=100).prepare_data()


def test_wrong_column_is_named(tmp_path, cache):
    own = {"path": "json", "data_files": write_lines(tmp_path / "a.jsonl", ["x"] * 9, "body")}
    with pytest.raises(ValueError, match=r"text_column of 'json' of .*a\.jsonl must be .*\['body'\], got 'text'"):
        corpus(cache, data={"own": own}).prepare_data()


@pytest.mark.parametrize("kind", ["json", "text"])
def test_an_empty_file_is_named(tmp_path, kind):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=rf"no documents could be read from '{kind}' of .*empty.txt: is it empty"):
        DataSource(kind, data_files=str(tmp_path / "empty.txt")).load()


def test_data_sets_that_were_saved_to_disk_are_read_whole(tmp_path):
    texts = [f"document {number}" for number in range(20)]
    every = datasets.Dataset.from_dict({"text": texts})
    every.save_to_disk(tmp_path / "one", num_shards=3)
    found = DataSource(str(tmp_path / "one")).load()
    assert sorted([*found.train["text"], *found.validation["text"]]) == sorted(texts)
    parts = {"train_sft": every.select(range(15)), "test_sft": every.select(range(15, 20))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"Unknown split \"train\"\. Should be one of \['train_sft', 'test_sft'\]"):
        DataSource(str(tmp_path / "parts")).load()
    found = DataSource(str(tmp_path / "parts"), split="train_sft[:10]", validation_split="test_sft").load()
    assert (found.train["text"][:], found.validation["text"][:]) == (texts[:10], texts[15:])


def test_a_file_is_read_by_the_end_of_its_name_and_others_are_refused(tmp_path):
    path = write_lines(tmp_path / "MINE.JSONL", ["some words"] * 9)
    assert local_source(path) == DataSource("json", data_files=path)
    (tmp_path / "mine.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"must end with one of \.json, \.jsonl, .*, got .*mine\.jsonl\.gz"):
        local_source(str(tmp_path / "mine.jsonl.gz"))


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_text_without_a_token_to_predict_is_refused(tmp_path, cache, empty):
    texts = {
        "train": ["some words to learn from"] * 50,
        "validation": ["some words to learn from"] * 50,
        empty: [""] * 9,
    }
    for split, documents in texts.items():
        write_lines(tmp_path / f"{split}.jsonl", documents)
    own = {"path": str(tmp_path), "validation_split": "validation"}
    module = corpus(cache, domains=["math"], data={"own": own})
    module.prepare_data()
    with pytest.raises(ValueError, match=f"the {empty} text of domain 'own' has no token to predict"):
        module.setup()


def test_less_text_than_a_batch_and_less_than_validation_wants(tmp_path, cache):
    own = {"path": "json", "data_files": write_lines(tmp_path / "a.jsonl", ["a few words"] * 20)}
    module = ready(corpus(cache, domains=None, data={"own": own}, validation_tokens=3200, batch_size=999))
    with pytest.raises(ValueError, match=r"batch_size must be at most \d+, .*got 999"):
        module.train_dataloader()
    with pytest.warns(UserWarning, match=r"domain 'own' has \d+ tokens .*validation_tokens=3200"):
        (dataloader,) = module.val_dataloader()
    assert len(list(dataloader)) == 1


def test_cache_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the cache cannot be written .*CONSISTENCY_REG_CACHE"):
        corpus(str(tmp_path / "file")).prepare_data()


# --- under a trainer ----------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Learns nothing; remembers what it was given."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.rows = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.rows.append(batch["input_ids"][:, :2].tolist())
        return (self.weight * batch["domain"].float()).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(cache, folder, steps, ckpt_path=None, fail_at=None, every=1000, num_workers=0):
    module = Recorder(fail_at)
    checkpoints = ModelCheckpoint(
        folder,
        save_last=True,
        save_top_k=0,
        every_n_train_steps=every,
        save_on_exception=True,
        enable_version_counter=False,
    )
    trainer = Trainer(
        max_steps=steps, callbacks=[checkpoints], logger=False, limit_val_batches=0, default_root_dir=folder, **QUIET
    )
    data = corpus(cache, batch_size=160, num_workers=num_workers)
    if fail_at is None:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.rows, trainer


def checkpoint_of(folder):
    return str(max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", ["mid-epoch", "end of epoch", "first batch of the second epoch"])
def test_resumed_run_sees_the_batches_that_were_left(stop, workers, cache, tmp_path):
    whole, trainer = fit(cache, tmp_path / "whole", 25)
    per_epoch = trainer.num_training_batches
    assert 4 < per_epoch < 12  # so that these are more than two epochs
    at = {"mid-epoch": per_epoch + 3, "end of epoch": per_epoch, "first batch of the second epoch": per_epoch + 1}[stop]
    first, _ = fit(cache, tmp_path / "part", at, every=at, num_workers=workers)
    rest, _ = fit(cache, tmp_path / "part", 25, ckpt_path=checkpoint_of(tmp_path / "part"), num_workers=workers)
    assert first == whole[:at]
    assert rest == whole[at:]


def test_run_that_broke_within_a_step_repeats_that_step(cache, tmp_path):
    whole, _ = fit(cache, tmp_path / "whole", 12)
    first, _ = fit(cache, tmp_path / "part", 12, fail_at=5)
    rest, _ = fit(cache, tmp_path / "part", 12, ckpt_path=checkpoint_of(tmp_path / "part"))
    assert first == whole[:5]
    assert rest == whole[5:]


def test_digests_are_logged(cache, tmp_path):
    data = corpus(cache)
    logger = CSVLogger(tmp_path)
    trainer = Trainer(max_steps=1, limit_val_batches=1, logger=logger, enable_checkpointing=False, **QUIET)
    trainer.fit(Recorder(), data)
    assert set(data.corpus_sha256) == {"math", "speeches", "scripture"}
    assert logger.experiment.hparams["corpus_sha256"] == data.corpus_sha256
    assert all(len(digest) == 64 for digest in data.corpus_sha256.values())


# --- chats --------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory, cache):
    """The folder of a tokenizer with a template and its special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ready(corpus(cache, domains=["math"])).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_chats(path, chats):
    rows = [[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)] for chat in chats]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return {"path": "json", "data_files": str(path)}


def test_chats_are_what_the_tokenizers_template_makes_of_them(tmp_path, cache, chat_tokenizer):
    chats = [[f"how much is {i} + 1 ?", f"it is {i + 1}", "thanks <|end|>"] for i in range(40)]
    source = write_chats(tmp_path / "chats.jsonl", chats)
    module = ready(corpus(cache, domains=None, data={"chats": source}, tokenizer=chat_tokenizer, vocab_size=400))
    tokenizer, tokens = module.tokenizer, module.texts["chats"].train
    ends = [*tokens.starts[1:], len(tokens.ids)]
    found = {tokenizer.decode(tokens.ids[a:b].tolist()) for a, b in zip(tokens.starts, ends, strict=True)}
    expected = {f"<|user|>{a}<|end|><|assistant|>{b}<|end|><|user|>{c}<|end|>" for a, b, c in chats}
    assert len(found) == 36
    assert found <= expected
    first = tokens.ids[:1].tolist()
    assert tokenizer.convert_ids_to_tokens(first) == ["<|user|>"]  # no start token before that of the template
    assert tokens.text_tokens == len(tokens.ids)


def test_chats_without_a_template_are_refused_with_the_way_out(tmp_path, cache):
    source = write_chats(tmp_path / "chats.jsonl", [["a", "b"]] * 20)
    with pytest.raises(ValueError, match="the data of chats are chats, which need a tokenizer with a chat template"):
        corpus(cache, domains=None, data={"chats": source}).prepare_data()
    corpus(cache, domains=["math"]).prepare_data()
    ready(corpus(cache, domains=["math"])).tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="which need a tokenizer with a chat template"):
        corpus(cache, domains=None, data={"chats": source}, tokenizer=str(tmp_path / "plain")).prepare_data()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user"}]}', 'line 2: expected a list of {"role", "content"} under the key'),
        ('{"messages": "hello"}', "line 2: expected a list of"),
    ],
)
def test_a_malformed_chat_is_named_by_its_line(tmp_path, line, message):
    good = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    (tmp_path / "chats.jsonl").write_text("\n".join([good, line, good, good]))
    for column in ("messages", "text"):
        source = DataSource("json", data_files=str(tmp_path / "chats.jsonl"), text_column=column)
        with pytest.raises(ValueError, match=message):
            source.load()


def test_rows_without_text_are_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["some words", None, "more words", "and more"])
    with pytest.warns(UserWarning, match=r"1 of the 4 rows of .*a\.jsonl have no 'text': left out"):
        DataSource("json", data_files=path).load()


# --- where things are kept ----------------------------------------------------------------------------------------


def test_a_domains_name_cannot_leave_the_cache(tmp_path):
    source = {"path": "json", "data_files": write_lines(tmp_path / "a.jsonl", ["x"] * 9)}
    for name in ("../../x", "/x", ".x", "a/b"):
        with pytest.raises(ValueError, match="the name of a domain must be of letters, digits and"):
            TextDataModule(data={name: source})
        with pytest.raises(ValueError, match="the name of a domain must be of letters, digits and"):
            tokenize(DataSource(**source).load(), tokenizer=None, name=name, cache_dir=tmp_path)


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CONSISTENCY_REG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "consistency_reg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "consistency_reg"
    monkeypatch.setenv("CONSISTENCY_REG_CACHE", "~/mine")
    assert cache_root() == tmp_path / "mine"
    assert cache_root("given") == Path("given")
