"""The Triton kernels equal the functional versions bit for bit: on a GPU, and elsewhere in Triton's interpreter.

Triton chooses its interpreter when it is imported: without a GPU the tests of this file run in a process of their own.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import routings

from consistency_reg import devices
from consistency_reg.functional.cache_aware import cache_aware_choice
from consistency_reg.functional.cache_hits import cache_hit_counts
from consistency_reg.functional.cache_simulation import Simulation, row_hit_rates, row_use_shares
from consistency_reg.functional.srp_counts import srp_counts
from consistency_reg.routing import RoutingTrace
from consistency_reg.routing.documents import document_positions

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
POLICIES = ("lru", "lfu", "belady", "sch")

in_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU, or Triton's interpreter")
small = routings(max_rows=2, max_tokens=9).filter(lambda routing: routing.num_experts < 256)


@contextmanager
def segments_of(tokens):
    """One program sees to so many tokens of a row."""
    from consistency_reg.kernels import cache_hits, srp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_hits, "SEGMENT_TOKENS", tokens)
        patch.setattr(srp, "SEGMENT_TOKENS", tokens)
        yield


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_XDIST_AUTO_NUM_WORKERS": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


def test_a_cpu_tensor_goes_to_no_kernel():
    assert not devices.has_kernels(torch.zeros(1))


def test_importing_the_package_does_not_import_triton():
    command = (
        "import sys, consistency_reg.functional.cache_hits, consistency_reg.kernels; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


def assert_caches_equal(ids, E, m, masks, cold="free"):
    from consistency_reg.kernels import cache_hits

    position = document_positions(ids.shape[:2], **masks)
    on_device, position_on_device = ids.to(DEVICE), position.to(DEVICE)
    for policy in POLICIES:
        simulation = Simulation(policy, m, cold=cold)
        expected = cache_hit_counts(ids, E, policy, **masks, segment_length=m, cold=cold).hits
        found = cache_hits.document_hits(on_device, E, position_on_device, len(expected), simulation)
        assert torch.equal(found.cpu(), expected)
        by_row = row_hit_rates(RoutingTrace([ids], E, **masks), simulation)
        rates = cache_hits.row_hit_rates(on_device, E, position_on_device, simulation).cpu()
        assert torch.allclose(rates, by_row.total, rtol=0, atol=1e-13)
        assert torch.equal(by_row.documents, (position == 0).sum(dim=1))


def assert_windows_equal(ids, E, lengths, masks):
    from consistency_reg.kernels.srp import window_counts

    expected = srp_counts(ids, E, lengths, **masks, per_sequence=True)
    position = document_positions(ids.shape[:2], **masks).to(DEVICE)
    for m in lengths:
        windows, sequences = window_counts(ids.to(DEVICE), E, position, m, per_sequence=True)
        assert torch.equal(windows.cpu(), expected.windows[m])
        assert torch.equal(sequences.cpu(), expected.sequence_windows[m])
    assert window_counts(ids.to(DEVICE), E, position, 1)[0][:, 1].tolist() == expected.usage.tolist()


@in_kernels
@pytest.mark.parametrize("tokens", [512, 2])
@settings(max_examples=40 if ON_GPU else 4, deadline=None)
@given(routing=small, m=st.integers(1, 12), cold=st.sampled_from(["free", "miss"]))
def test_cache_kernel_equals_the_functional_version(tokens, routing, m, cold):
    with segments_of(tokens):
        assert_caches_equal(routing.expert_ids, routing.num_experts, m, routing.masks, cold)


@in_kernels
@pytest.mark.parametrize("tokens", [512, 2])
@settings(max_examples=40 if ON_GPU else 10, deadline=None)
@given(routing=small, m=st.integers(1, 12))
def test_srp_kernel_equals_the_functional_version(tokens, routing, m):
    with segments_of(tokens):
        assert_windows_equal(routing.expert_ids, routing.num_experts, [m], routing.masks)


@in_kernels
@settings(max_examples=40 if ON_GPU else 6, deadline=None)
@given(
    routing=small,
    K=st.integers(1, 3),
    extra=st.integers(0, 3),
    strength=st.sampled_from([0.0, 0.2, 1.0]),
    guaranteed=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_cache_aware_kernel_equals_the_functional_version(routing, K, extra, strength, guaranteed, seed):
    from consistency_reg.kernels import cache_aware

    E, masks = max(routing.num_experts, K), routing.masks
    scores = torch.randn(2, *routing.valid.shape, E, generator=torch.Generator().manual_seed(seed))
    options = {"top_k": K, "slots": K + extra, "strength": strength, "guaranteed": guaranteed, **masks}
    T = scores.shape[-2] // 2
    expected = cache_aware_choice(scores, **options)
    before = cache_aware_choice(scores[:, :, :T], **parts_of(options, slice(0, T)))
    on_device = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        scanned = []
        patch.setattr(cache_aware, "scan", lambda *args, scan=cache_aware.scan: scanned.append(1) or scan(*args))
        patch.setattr(devices, "has_kernels", lambda tensor: True)
        found = cache_aware_choice(scores.to(DEVICE), **on_device)
        state = type(before.state)(*(value.to(DEVICE) for value in vars(before.state).values()))
        rest = parts_of(on_device, slice(T, None))
        continued = cache_aware_choice(scores[:, :, T:].to(DEVICE), **rest, state=state)
    assert scanned
    real = routing.valid
    assert torch.equal(found.expert_ids.cpu()[:, real], expected.expert_ids[:, real])
    assert torch.equal(found.residents.cpu()[:, real], expected.residents[:, real])
    assert torch.equal(found.state.last_use.cpu(), expected.state.last_use)
    assert torch.equal(continued.expert_ids.cpu()[:, real[:, T:]], expected.expert_ids[:, :, T:][:, real[:, T:]])
    assert torch.equal(continued.state.last_use.cpu(), expected.state.last_use)


def parts_of(options, tokens):
    """The options of a choice for some of its tokens."""
    return options | {name: options[name][:, tokens] for name in ("valid", "document_ids")}


@in_kernels
def test_cache_aware_kernel_leaves_out_experts_that_were_ruled_out(monkeypatch):
    scores = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(3))
    scores[..., 3:] = -torch.inf
    expected = cache_aware_choice(scores, 3, 4, 0.4)
    monkeypatch.setattr(devices, "has_kernels", lambda tensor: True)
    found = cache_aware_choice(scores.to(DEVICE), 3, 4, 0.4)
    assert torch.equal(found.expert_ids.cpu(), expected.expert_ids)
    short = cache_aware_choice(scores.to(DEVICE), 4, 4, 0.4).expert_ids.cpu()
    assert (short.sort().values.diff() > 0).all()


def compile_for_h100(kernel, pointers, integers, constants):
    """Compile as a launch does, without a GPU: integer arguments of 1 become constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    absent = {name: None for name, dtype in pointers.items() if dtype is None}
    constants = constants | absent | {name: 1 for name, value in integers.items() if value == 1}
    signature = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("kind", ["policy", "sch"])
@pytest.mark.parametrize(("by_document", "K", "m", "bits"), [(True, 8, 16, 28), (False, 1, 1, 40)])
def test_cache_kernel_compiles_for_a_gpu(kind, by_document, K, m, bits):
    pytest.importorskip("triton")
    import triton.language as tl

    from consistency_reg.kernels import cache_hits

    priorities = "*i32" if kind == "policy" and by_document else None
    document, out = ("*i64", "*i64") if by_document else (None, "*fp64")
    ids = {"ids": "*i64", "starts": "*i32", "lengths": "*i32"}
    keys = {"EXPERT_BITS": 6, "CLOCK_BITS": 13, "BITS": bits, "KEY": tl.int32 if bits <= 30 else tl.int64}
    compile_for_h100(
        cache_hits._simulate,
        ids | {"priorities": priorities, "document": document, "out": out},
        {"T": 512, "K": K, "E": 64, "m": m},
        keys | {"SCH": kind == "sch", "COLD_HITS": by_document, "SEGMENT": 512, "X": 64},
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("sequences", ["*i64", None])
@pytest.mark.parametrize(("K", "m"), [(8, 16), (1, 1)])
def test_srp_kernel_compiles_for_a_gpu(sequences, K, m):
    pytest.importorskip("triton")
    from consistency_reg.kernels import srp

    pointers = {"ids": "*i64", "position": "*i64", "windows": "*i64", "sequences": sequences}
    integers = {"T": 512, "K": K, "E": 64, "m": m, "segment": 512}
    compile_for_h100(srp._count_windows, pointers, integers, {"REPLICAS": 16, "X": 64})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize(("K", "scores"), [(8, "*fp32"), (1, "*fp64")])
def test_cache_aware_kernel_compiles_for_a_gpu(choose, K, scores):
    pytest.importorskip("triton")
    from consistency_reg.kernels import cache_aware

    pointers = dict.fromkeys(("base", "preferred"), scores) | dict.fromkeys(("key", "start", "last_use", "ids"), "*i64")
    pointers |= {"depth": "*i32", "residents": "*u8"}
    integers = {"T": 512, "E": 64, "K": K, "C": 16}
    compile_for_h100(cache_aware._walk, pointers, integers, {"CHOOSE": choose, "X": 64})


@in_kernels
def test_functions_hand_over_to_the_kernels(monkeypatch):
    ids = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0)).topk(2).indices
    valid = torch.arange(7) < torch.tensor([[7], [3]])

    def everything(ids, valid):
        yield from (cache_hit_counts(ids, 5, policy, valid).hits for policy in ("lru", "fixed"))
        yield cache_hit_counts(ids, 5, "sch", segment_length=3).hits
        trace = RoutingTrace([ids], 5, valid=valid)
        yield from (row_hit_rates(trace, Simulation(policy, 3)).total for policy in POLICIES)
        yield row_hit_rates(trace, Simulation("lru", replay="access")).total
        yield row_use_shares(trace).total
        counts = srp_counts(ids, 5, [2, 99], valid, per_sequence=True)
        yield from (*counts.windows.values(), *counts.sequence_windows.values(), counts.usage)
        assert srp_counts(ids, 5, [2], valid).sequence_windows == {}

    expected = list(everything(ids, valid))
    monkeypatch.setattr(devices, "has_kernels", lambda tensor: True)
    for found, right in zip(everything(ids.to(DEVICE), valid.to(DEVICE)), expected, strict=True):
        assert torch.allclose(found.cpu(), right, rtol=0, atol=1e-13)


@in_kernels
def test_kernels_on_nothing():
    from consistency_reg.kernels import cache_hits
    from consistency_reg.kernels.srp import window_counts

    for shape in ((0, 4, 2), (3, 0, 2)):
        ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        position = document_positions(ids.shape[:2], device=ids.device)
        assert cache_hits.document_hits(ids, 5, position, 0, Simulation("lru")).shape == (0, 5)
        assert cache_hits.row_hit_rates(ids, 5, position, Simulation("lru")).tolist() == [[0] * 5] * shape[0]
        assert window_counts(ids, 5, position, 2)[0].sum() == 0


@in_kernels
def test_keys_of_64_bits(monkeypatch):
    ids = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices
    monkeypatch.setattr("consistency_reg.kernels.cache_hits.INT32_BITS", 0)
    assert_caches_equal(ids, 6, 3, {})


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("E", "K", "T"), [(64, 8, 600), (256, 8, 300), (60, 4, 3000), (8, 2, 5000), (5, 5, 40)])
def test_kernels_on_routing_of_real_sizes(E, K, T):
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(9, T, E, generator=generator).topk(K).indices
    valid = torch.arange(T) < torch.randint(1, T + 1, (9, 1), generator=generator)
    document_ids = (torch.rand(9, T, generator=generator) < 0.01).cumsum(dim=1)
    for masks in ({}, {"valid": valid}, {"valid": valid, "document_ids": document_ids}):
        assert_caches_equal(ids, E, 16, masks)
        assert_windows_equal(ids, E, [4, 64, 4096], masks)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_tensors_on_a_gpu_go_to_the_kernels_and_the_host_does_not_wait():
    ids = torch.rand(4, 50, 16).topk(4).indices
    valid = torch.arange(50) < torch.tensor([[50], [3], [0], [20]])

    def both(ids, valid):
        return row_hit_rates(RoutingTrace([ids], 16, valid=valid), Simulation("sch", 4)), srp_counts(
            ids, 16, [4], valid
        )

    expected = both(ids, valid)
    ids, valid = ids.cuda(), valid.cuda()
    both(ids, valid)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        rates, windows = both(ids, valid)
        whole_rows = cache_hit_counts(ids, 16, "lru")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(rates.total.cpu(), expected[0].total, rtol=0, atol=1e-13)
    assert torch.equal(windows.windows[4].cpu(), expected[1].windows[4])
    assert torch.equal(whole_rows.hits.cpu(), cache_hit_counts(ids.cpu(), 16, "lru").hits)
