"""Bringing experts into slots: the order of a GPU's work on stand-ins for its streams, and reads that fail in part."""

import mmap
import os
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from offloading import logits, save
from safetensors.torch import save_file
from tiny_models import token_ids

from consistency_reg import OffloadedExperts
from consistency_reg.offload.checkpoint import read_header
from consistency_reg.offload.layers import ExpertLayer
from consistency_reg.offload.memory import FastMemory
from consistency_reg.offload.reading import FileReader
from consistency_reg.offload.sources import Sources, WeightSource
from consistency_reg.offload.stores import DiskStore, HostStore, OntoGPU, Opening

E, K, SHAPE = 8, 2, (3, 4)
LAYER = ExpertLayer("layer", torch.nn.Identity(), E, {"weight": SHAPE})
WEIGHTS = torch.arange(E).float()[:, None, None].expand(E, *SHAPE).contiguous()


class Work:
    """Something that a stream is told to do, after other work."""

    def __init__(self, kind, place, after):
        self.kind, self.place = kind, place
        self.earlier = set(after).union(*(one.earlier for one in after))


class Stream:
    """A stand-in for a CUDA stream that keeps what its work has to wait for, and does nothing by itself."""

    def __init__(self, device=None):
        self.pending = []

    def add(self, kind, place):
        self.pending = [Work(kind, place, self.pending)]
        return self.pending[0]

    def wait_stream(self, other):
        self.pending = [*self.pending, *other.pending]

    def wait_event(self, event):
        self.pending = [*self.pending, *event]

    def record_event(self):
        return tuple(self.pending)

    def synchronize(self):
        """Do nothing: copies are made at once."""


class GPU:
    """Streams, the copies and the computing on them, in the order in which the host asked for them."""

    def __init__(self):
        self.current, self.log = Stream(), []

    def add(self, kind, place):
        self.log.append(self.current.add(kind, place))

    def races(self):
        """Pairs of a copy into a slot and computing with it that no stream keeps apart."""
        return [
            (first.kind, second.kind)
            for number, second in enumerate(self.log)
            for first in self.log[:number]
            if first.place == second.place and first.kind != second.kind and first not in second.earlier
        ]


@pytest.fixture
def gpu(monkeypatch):
    """Puts stand-ins into the place of the streams; tensors stay on the CPU, and copies into slots are noted."""
    gpu, copy, empty_like = GPU(), torch.Tensor.copy_, torch.empty_like

    @contextmanager
    def on(stream):
        gpu.current, before = stream, gpu.current
        yield
        gpu.current = before

    def noted(tensor, source, **options):
        gpu.add("copy", tensor.data_ptr())
        return copy(tensor, source)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: empty_like(tensor))
    return gpu


def disk_store(folder, name="weight", **options):
    save_file({name: WEIGHTS}, folder / "model.safetensors")
    stored = read_header(Path(folder) / "model.safetensors")[name]
    source = WeightSource("weight", SHAPE, [[stored.row(expert)] for expert in range(E)])
    return DiskStore(Sources([[source]], {}), None, [LAYER], Opening(**options))


@pytest.fixture(params=["host", "disk"])
def store(request, tmp_path):
    return HostStore([{"weight": WEIGHTS.clone()}], 1) if request.param == "host" else disk_store(tmp_path)


def decode(gpu, store, tokens=40):
    """Compute tokens whose experts change, with one buffer beside the slots; check what each slot holds."""
    onto = OntoGPU(store, torch.device("cpu"))
    options = {"policy": "lru", "usage": None, "shared": False, "read_ahead": 1}
    memory = FastMemory([LAYER], [3], torch.float32, torch.device("cpu"), **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(tokens):
        visit = memory.visit(0, [torch.randperm(E, generator=generator)[:K].tolist()], onto)
        for expert in visit.hits_first:
            rows = visit.rows(expert)
            assert torch.equal(rows["weight"], WEIGHTS[expert])
            gpu.add("compute", rows["weight"].data_ptr())
            visit.done(expert)
    onto.close()


def test_no_copy_and_no_computing_overtake_each_other_in_a_slot(gpu, store):
    decode(gpu, store)
    assert {work.kind for work in gpu.log} == {"copy", "compute"}
    assert len({work.place for work in gpu.log}) >= 3
    assert gpu.races() == []


@pytest.mark.parametrize(("lacking", "race"), [("wait_stream", "copy"), ("wait_event", "compute")])
def test_the_stand_ins_see_what_a_lacking_wait_would_do(gpu, store, lacking, race, monkeypatch):
    monkeypatch.setattr(Stream, lacking, lambda stream, other: None)
    decode(gpu, store)
    assert race in {second for _, second in gpu.races()}


def test_an_error_is_raised_when_no_read_of_the_expert_is_under_way(tmp_path, monkeypatch):
    save_file({"gate": WEIGHTS, "up": WEIGHTS.clone()}, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    rows = [[stored[name].row(expert) for name in ("gate", "up")] for expert in range(E)]
    store = DiskStore(Sources([[WeightSource("weight", (6, 4), rows)]], {}), None, [LAYER], Opening())
    slow, over = threading.Event(), []

    def read_into(self, destination, offset):
        if offset == stored["gate"].offset:
            raise OSError("the disk is gone")
        slow.wait(5)
        over.append(offset)

    monkeypatch.setattr(FileReader, "read_into", read_into)
    wait = store.fetch(0, 0, {"weight": torch.empty(6, 4)})
    threading.Timer(0.2, slow.set).start()
    with pytest.raises(OSError, match="the disk is gone"):
        wait()
    assert over == [stored["up"].offset]
    store.close()


class Buffer(mmap.mmap):
    """A buffer that can be counted for as long as it is held."""

    held: ClassVar[weakref.WeakSet["Buffer"]] = weakref.WeakSet()

    def __init__(self, *_):
        self.held.add(self)


def test_a_thread_has_one_buffer_for_all_files_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", Buffer)
    folder = save(tmp_path, "olmoe", shard="10KB")
    offloaded = OffloadedExperts(folder, slots=K, threads=2)
    with offloaded as model:
        Buffer.held.clear()
        logits(model, token_ids(1, 30))
        assert len(list(tmp_path.glob("*.safetensors"))) > 4
        assert sum(map(len, Buffer.held)) <= offloaded.statistics().buffer_bytes


def test_a_file_that_cannot_be_opened_leaves_none_open(tmp_path, monkeypatch):
    folder, whole, opened = save(tmp_path, "olmoe"), os.open, []
    offloaded = OffloadedExperts(folder)

    def denied(path, *options, **named):
        if {*opened} - {path}:
            raise PermissionError(13, "Permission denied", str(path))
        opened.append(path)
        return whole(path, *options, **named)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(PermissionError):
        offloaded.attach()
    assert opened
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link)]
