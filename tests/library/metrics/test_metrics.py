"""The metrics give what the functions give on the whole data, however the data comes in."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_processes
from reference import (
    best_f1_oracle,
    cache_hits_oracle,
    documents,
    fixed_set_hits_oracle,
    poisson_weight_oracle,
    resampled_means_oracle,
    window_histograms_oracle,
)
from strategies import joined_documents, models, models_with_one_cache, on_cases, trace_of

from consistency_reg.cache_policies import POLICIES
from consistency_reg.functional.balance import local_cv, overlap_rate, usage_balance, usage_counts
from consistency_reg.functional.bootstrap import poisson_weights
from consistency_reg.functional.cache_hits import cache_hit_rate
from consistency_reg.functional.sch import sch
from consistency_reg.functional.specialization import (
    domain_specialization,
    grouped_usage,
    pearson,
    spearman,
    vocabulary_specialization,
)
from consistency_reg.functional.srp import srp
from consistency_reg.metrics import (
    CacheHitRate,
    ExpertSpecialization,
    RoutingBalance,
    SegmentCacheHitRate,
    SegmentRoutingPerformance,
)
from consistency_reg.metrics.resampled import ResampledMetric
from consistency_reg.routing import RoutingTrace


def random_trace(rows=12, tokens=24, experts=(8, 5), top_k=(2, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.rand(rows, tokens, E, generator=generator).topk(K).indices for E, K in zip(experts, top_k, strict=True)
    ]
    valid = torch.rand(rows, tokens, generator=generator) < 0.95
    documents = (torch.rand(rows, tokens, generator=generator) < 0.1).cumsum(dim=1)
    return RoutingTrace(ids, experts, valid=valid, document_ids=documents)


def rows_of(trace, rows):
    ids = [layer[rows] for layer in trace.expert_ids]
    return RoutingTrace(ids, trace.num_experts, valid=trace.valid[rows], document_ids=trace.document_ids[rows])


def batches(trace, sizes):
    return [
        rows_of(trace, torch.arange(len(trace.valid))[rows]) for rows in torch.arange(len(trace.valid)).split(sizes)
    ]


def updated(metric, traces):
    for trace in traces:
        metric.update(trace, **what_else(metric, trace))
    return metric


def what_else(metric, trace):
    """What a metric wants to know of a batch beyond its routing; something that goes with the rows."""
    if isinstance(metric, ExpertSpecialization):
        return {"domain_ids": trace.document_ids % 3, "token_ids": trace.expert_ids[0].sum(dim=-1)}
    return {}


def assert_equal_values(found, expected):
    """Equal to the last bit, but for the quantities whose state is a sum of reals."""
    assert found.keys() == expected.keys()
    for name in expected:
        tolerance = 1e-12 if name.startswith("local_cv") or "_rho" in name else 0
        assert float(found[name]) == pytest.approx(float(expected[name]), abs=tolerance, rel=0), name


METRICS = {
    "srp": lambda trace: SegmentRoutingPerformance.from_trace(trace, (2, 6), replicates=20),
    "balance": lambda trace: RoutingBalance.from_trace(trace, (3, 8)),
    "specialization": lambda trace: ExpertSpecialization.from_trace(trace, 3, 20, segment_length=4, favourites=2),
    "sch": lambda trace: SegmentCacheHitRate.from_trace(trace, (2, 6), shared=True, replicates=20),
    "lru": lambda trace: CacheHitRate.from_trace(trace, "lru", replicates=20),
    "fixed": lambda trace: CacheHitRate.from_trace(trace, "fixed", shared=True, replicates=20),
}
every_metric = pytest.mark.parametrize("make", METRICS.values(), ids=METRICS.keys())


@every_metric
@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_the_size_of_batches_changes_nothing_not_even_the_intervals(make, sizes):
    trace = random_trace()
    whole = updated(make(trace), [trace])
    assert_equal_values(updated(make(trace), batches(trace, sizes)).compute(), whole.compute())


@every_metric
def test_forward_gives_the_batch_alone_and_adds_it(make):
    trace = random_trace()
    metric = make(trace)
    for batch in batches(trace, [5, 5, 2]):
        alone = metric(batch, **what_else(metric, batch))
        expected = updated(make(trace), [batch]).compute()
        assert_equal_values(alone, {name: value for name, value in expected.items() if name in alone})
        assert not any(name.endswith("_low") for name in alone)
    assert_equal_values(metric.compute(), updated(make(trace), [trace]).compute())


@every_metric
def test_merging_metrics_equals_one_metric(make):
    trace = random_trace()
    parts = []
    for rows in torch.arange(12).split([7, 5]):
        metric, batch = make(trace), rows_of(trace, rows)
        number = {"sequence_index": rows} if isinstance(metric, ResampledMetric) else {}
        metric.update(batch, **what_else(metric, batch), **number)
        parts.append(metric)
    parts[0].merge_state(parts[1])
    assert_equal_values(parts[0].compute(), updated(make(trace), [trace]).compute())


@every_metric
def test_a_checkpoint_goes_on_where_it_stopped(make):
    trace = random_trace()
    first, second = batches(trace, [7, 5])
    metric = make(trace)
    metric.persistent(True)
    saved = copy.deepcopy(updated(metric, [first]).state_dict())
    resumed = make(trace)
    resumed.load_state_dict(saved)
    assert_equal_values(updated(resumed, [second]).compute(), updated(make(trace), [trace]).compute())


@every_metric
def test_the_precision_of_the_module_around_changes_nothing(make):
    trace = random_trace()
    first, second = batches(trace, [7, 5])
    module = torch.nn.ModuleDict({"metric": updated(make(trace), [first])}).to(torch.bfloat16).half()
    assert_equal_values(updated(module["metric"], [second]).compute(), updated(make(trace), [trace]).compute())


@every_metric
def test_reset_forgets_everything(make):
    trace = random_trace()
    metric = updated(make(trace), [random_trace(seed=1)])
    metric.reset()
    assert_equal_values(updated(metric, [trace]).compute(), updated(make(trace), [trace]).compute())


@every_metric
def test_inference_mode_may_come_and_go(make):
    trace = random_trace()
    metric = make(trace)
    with torch.inference_mode():
        metric.reset()
        updated(metric, [trace])
    updated(metric, [trace])
    with torch.inference_mode():
        updated(metric, [trace])
    assert_equal_values(metric.compute(), updated(make(trace), [trace] * 3).compute())


class NoKernel:
    """Stands for a kernel whose launch does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@every_metric
def test_update_never_waits_for_the_device(make, monkeypatch):
    pytest.importorskip("triton")
    from consistency_reg.kernels import cache_hits, srp

    monkeypatch.setattr("consistency_reg.devices.has_kernels", lambda tensor: True)
    for module, kernel in ((cache_hits, "_simulate"), (srp, "_count_windows")):
        monkeypatch.setattr(module, kernel, NoKernel())
    update_without_values(make)


@pytest.mark.parametrize("name", ["srp", "balance", "specialization"])
def test_without_kernels_update_of_these_does_not_wait_either(name):
    update_without_values(METRICS[name])


def update_without_values(make):
    trace = random_trace()
    metric = make(trace).to("meta")  # a meta tensor has no values to read
    ids = [layer.to("meta") for layer in trace.expert_ids]
    valid, document_ids = trace.valid.to("meta"), trace.document_ids.to("meta")
    updated(metric, [RoutingTrace(ids, trace.num_experts, valid=valid, document_ids=document_ids)])


@every_metric
def test_a_plot_is_drawn(make):
    pytest.importorskip("matplotlib").use("Agg")
    trace = random_trace()
    figure, axes = updated(make(trace), [trace]).plot()
    assert axes.figure is figure
    assert axes.get_xlabel()
    assert axes.get_ylabel()


@every_metric
def test_a_trace_of_another_model_is_refused(make):
    metric = make(random_trace())
    with pytest.raises(ValueError, match=r"the metric is for layers of \(8, 5\) experts, got a trace of \(8, 6\)"):
        metric.update(random_trace(experts=(8, 6)))
    with pytest.raises(TypeError, match="update takes a RoutingTrace, got Tensor"):
        metric.update(torch.zeros(1, 1, 1))
    if isinstance(metric, ResampledMetric):
        with pytest.raises(ValueError, match=r"sequence_index must be \[B\] = \[12\] int64"):
            metric.update(random_trace(), sequence_index=torch.arange(3))
    repeated = random_trace()
    repeated.expert_ids[0][:] = 1
    with pytest.raises(ValueError, match="must not repeat an expert within a token"):
        metric.update(repeated)


def on_two_processes(rank, names):
    """Each process takes every second sequence, the second one fewer, in batches that do not match."""
    trace = random_trace(rows=11)
    rows, sizes = torch.arange(rank, 11, 2), ([4, 2], [1, 1, 1, 1, 1])[rank]
    found = {}
    for name in names:
        metric = updated(METRICS[name](trace), batches(rows_of(trace, rows), sizes))
        found[name] = metric.compute()
        metric.results()  # synchronizes once more, and must not disturb the metric
        found[name + " again"] = updated(metric, []).compute()
    return found


def test_two_processes_equal_one(tmp_path):
    found = on_processes(2, on_two_processes, tmp_path, list(METRICS))
    trace = random_trace(rows=11)
    for name, make in METRICS.items():
        expected = updated(make(trace), [trace]).compute()
        for process in found:
            assert_equal_values(process[name], expected)
            assert_equal_values(process[name + " again"], expected)


def test_metrics_refuse_bad_options():
    with pytest.raises(ValueError, match="num_experts must be a positive number for each layer, got 0"):
        SegmentRoutingPerformance(0)
    with pytest.raises(ValueError, match="replicates must be 0 or more, got -1"):
        SegmentRoutingPerformance(4, replicates=-1)
    with pytest.raises(ValueError, match=r"segment_lengths must be .* of at least 1, got \[0\]"):
        SegmentRoutingPerformance(4, [0])
    with pytest.raises(ValueError, match="num_domains or vocab_size must be given"):
        ExpertSpecialization(4)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        ExpertSpecialization(4, vocab_size=0)
    with pytest.raises(ValueError, match="layer_names must be distinct names for 2 layers"):
        SegmentRoutingPerformance([4, 4], layer_names=["a", "a"])


# --- SRP


@settings(max_examples=50, deadline=None)
@given(models(), st.sets(st.integers(1, 8), min_size=1, max_size=3).map(tuple), st.integers(1, 3))
def test_srp_of_batches_equals_srp_of_the_whole(layers, lengths, size):
    trace = trace_of(layers)
    metric = updated(SegmentRoutingPerformance.from_trace(trace, lengths), batches(trace, size))
    expected = srp(trace.expert_ids, trace.num_experts, lengths, trace.valid, trace.document_ids)
    for m, result in metric.results().items():
        for found, by_function in zip((result, *result.layers), (expected[m], *expected[m].layers), strict=True):
            for name in ("srp", "size_ratio", "threshold", "static_srp", "local_gain", "histogram"):
                assert torch.equal(getattr(found, name), getattr(by_function, name)), name


@on_cases(100, st.integers(-(2**62), 2**62), st.integers(0, 2000), st.integers(0, 2**63 - 1))
def test_bootstrap_weights_equal_the_oracle(sequence, replicate, seed):
    found = poisson_weights(torch.tensor([sequence]), replicate + 1, seed)[replicate, 0]
    assert found == poisson_weight_oracle(sequence, replicate, seed)


@on_cases(20, models(max_rows=5), st.integers(1, 4), st.integers(0, 10))
def test_intervals_are_those_of_resampled_histograms(layers, m, seed):
    trace = trace_of(layers)
    metric = updated(SegmentRoutingPerformance.from_trace(trace, m, replicates=15, seed=seed), [trace])
    result = metric.results()[m]
    weights = poisson_weights(torch.arange(trace.shape[0]), 15, seed).numpy()
    H = [
        window_histograms_oracle(layer.expert_ids.numpy(), layer.num_experts, m, *layer.arrays).sum(axis=1)
        for layer in layers
    ]
    for found, by_sequence in zip((result, *result.layers), (sum(H), *H), strict=True):
        replicates = [best_f1_oracle((w[:, None] * by_sequence).sum(axis=0)) for w in weights]
        used = [float(F1) for F1, _, _, _, A in replicates if A]
        expected = np.quantile(used, [0.025, 0.975]) if used else [np.nan, np.nan]
        assert found.interval.tolist() == pytest.approx(list(expected), abs=1e-12, nan_ok=True)


def test_an_interval_covers_the_value_and_narrows_with_data():
    widths = []
    for rows in (20, 320):
        trace = random_trace(rows=rows)
        result = updated(SegmentRoutingPerformance.from_trace(trace, 4, replicates=200), [trace]).results()[4]
        low, high = result.interval.tolist()
        assert low < float(result.srp) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_bootstrap_weights_are_poisson_and_independent():
    weights = poisson_weights(torch.arange(4000), 200, seed=3).double()
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)
    assert float(weights.var()) == pytest.approx(1, abs=0.02)
    share = [float((weights == k).double().mean()) for k in range(4)]
    assert share == pytest.approx([0.3679, 0.3679, 0.1839, 0.0613], abs=0.003)
    between_replicates = weights.corrcoef().fill_diagonal_(0).abs().max()
    between_sequences = weights[:, :200].T.corrcoef().fill_diagonal_(0).abs().max()
    assert float(between_replicates) < 0.1
    assert float(between_sequences) < 0.4
    assert not torch.equal(weights, poisson_weights(torch.arange(4000), 200, seed=4).double())


def test_a_long_update_is_the_sum_of_its_parts():
    trace = random_trace(rows=600, tokens=8)
    whole = updated(SegmentRoutingPerformance.from_trace(trace, 4, replicates=5), [trace])
    parts = updated(SegmentRoutingPerformance.from_trace(trace, 4, replicates=5), batches(trace, [300, 250, 50]))
    assert_equal_values(whole.compute(), parts.compute())


def test_a_long_update_takes_a_trace_that_holds_the_inputs_of_routers():
    trace = random_trace(rows=300, tokens=4)
    with_inputs = replace(trace, inputs=[torch.zeros(300, 4, 3)] * 2)
    of_both = [updated(SegmentRoutingPerformance.from_trace(trace, 2), [one]).compute() for one in (trace, with_inputs)]
    assert_equal_values(*of_both)


# --- caches


def whole_data(name, ids, experts, trace):
    """The function that a metric of this name stands for, on one cache."""
    if name.startswith("sch"):
        return sch(ids, experts, int(name.removeprefix("sch_m")), trace.valid, trace.document_ids)
    return cache_hit_rate(ids, experts, name, trace.valid, trace.document_ids)


@settings(max_examples=40, deadline=None)
@given(models(max_tokens=8), st.sampled_from(["sch_m3", *POLICIES]), st.integers(1, 3))
def test_hit_rates_of_batches_equal_the_functions_on_the_whole(layers, name, size):
    trace = trace_of(layers)
    if not trace.valid.any():
        return
    experts = [layer.num_experts for layer in layers]
    make = CacheHitRate if name in POLICIES else SegmentCacheHitRate
    metric = make(experts, name if name in POLICIES else 3, shared=True, cache_ratios=(0.5, 1, 2, 100))
    updated(metric, batches(trace, size))
    model = metric.results() if name in POLICIES else metric.results()[3]
    for found, layer in zip(model.layers, layers, strict=True):
        expected = whole_data(name, layer.expert_ids, layer.num_experts, trace)
        assert found.hit_rate.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
        assert found.top_k == layer.expert_ids.shape[-1]
    expected = whole_data(name, trace.expert_ids, experts, trace)
    assert model.shared.hit_rate.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    scalars = metric.compute()
    assert float(scalars[f"{name}_rho100"]) == pytest.approx(
        sum(float(x.hit_rate[-1]) for x in model.layers) / len(layers)
    )
    assert float(scalars[f"{name}_rho1_shared"]) == float(model.shared.hit_rate[model.shared.top_k - 1])


@on_cases(20, models_with_one_cache, st.sampled_from(["sch_m3", *POLICIES]), st.integers(0, 10))
def test_intervals_of_hit_rates_are_those_of_resampled_documents(layers, name, seed):
    trace, (rows, _) = trace_of(layers), layers[0].valid.shape
    make, what = (CacheHitRate, name) if name in POLICIES else (SegmentCacheHitRate, 3)
    metric = make.from_trace(trace, what, shared=True, cache_ratios=(2,), replicates=15, seed=seed)
    results = updated(metric, batches(trace, 1)).results()
    results = results if name in POLICIES else results[3]
    weights = [[poisson_weight_oracle(row, replicate, seed) for row in range(rows)] for replicate in range(15)]
    where = [n for n, _, _ in documents(*layers[0].arrays)]

    def intervals(simulated):
        return [resampled_interval(list(zip(where, of_size, strict=True)), weights) for of_size in simulated]

    of_layers = [hit_rates_oracle(*joined_documents([layer]), name) for layer in layers]
    for found, simulated in zip(results.layers, of_layers, strict=True):
        assert found.interval.numpy() == pytest.approx(np.array(intervals(simulated)), abs=1e-12, nan_ok=True)
    shared = hit_rates_oracle(*joined_documents(layers), name)
    assert results.shared.interval.numpy() == pytest.approx(np.array(intervals(shared)), abs=1e-12, nan_ok=True)
    at = [of_layer[found.slots(2) - 1] for found, of_layer in zip(results.layers, of_layers, strict=True)]
    mean = [sum(of_layers) / len(of_layers) for of_layers in zip(*at, strict=True)]
    assert results.intervals[2].numpy() == pytest.approx(intervals([mean])[0], abs=1e-12, nan_ok=True)


def hit_rates_oracle(corpus, num_experts, name):
    """For every cache size the hit rate of every document."""
    sizes = range(1, num_experts + 1)
    if name == "fixed":
        hits = np.array(fixed_set_hits_oracle(corpus, num_experts)).T
    else:
        policy, m = ("sch", 3) if name == "sch_m3" else (name, None)
        hits = [[cache_hits_oracle(doc, size, policy, m) for doc in corpus] for size in sizes]
    return [[h / (len(doc) * len(doc[0])) for h, doc in zip(of_size, corpus, strict=True)] for of_size in hits]


def resampled_interval(rates_by_row, weights):
    means = [mean for mean in resampled_means_oracle(rates_by_row, weights) if mean == mean]
    return np.quantile(means, [0.025, 0.975]) if means else np.full(2, np.nan)


def test_bad_cache_options_are_named():
    with pytest.raises(ValueError, match="policy must be one of"):
        CacheHitRate(4, policy="random")
    with pytest.raises(ValueError, match="cache_ratios must be positive numbers"):
        SegmentCacheHitRate(4, cache_ratios=(0, 1))
    with pytest.raises(ValueError, match="cache_ratios must be positive numbers"):
        CacheHitRate(4, cache_ratios=(1, float("inf")))


# --- balance and specialization


@settings(max_examples=50, deadline=None)
@given(models(), st.integers(1, 8), st.integers(1, 3))
def test_balance_of_batches_equals_the_functions_on_the_whole(layers, m, size):
    trace = trace_of(layers)
    metric = updated(RoutingBalance.from_trace(trace, m), batches(trace, size))
    results, scalars = metric.results(), metric.compute()
    for i, layer in enumerate(layers):
        ids = (layer.expert_ids, layer.num_experts)
        balance = usage_balance(usage_counts(*ids, layer.valid), torch.tensor(layer.tokens))
        assert results.layers[i] == balance
        assert float(results.overlap[i]) == float(overlap_rate(*ids, **layer.masks))
        for segment in (m, None):
            expected = float(local_cv(*ids, segment, **layer.masks))
            assert float(results.local_cv[segment][i]) == pytest.approx(expected, abs=1e-12)
    assert float(scalars["balance_min_share"]) == min(float(layer.min_share) for layer in results.layers)
    assert float(scalars[f"local_cv_m{m}"]) == pytest.approx(float(results.local_cv[m].mean()))


def test_specialization_of_batches_equals_the_functions_on_the_whole():
    trace = random_trace(experts=(8, 5, 8), top_k=(2, 1, 3))
    metric = updated(METRICS["specialization"](trace), batches(trace, [5, 5, 2]))
    ids = what_else(metric, trace)
    tokens = torch.stack([((ids["domain_ids"] == d) & trace.valid).sum() for d in range(3)])
    domain, vocabulary, srp_of_experts = [], [], []
    for layer in trace:
        by_domain = grouped_usage(layer.expert_ids, layer.num_experts, ids["domain_ids"], 3, trace.valid)
        by_token = grouped_usage(layer.expert_ids, layer.num_experts, ids["token_ids"], 20, trace.valid)
        domain.append(domain_specialization(by_domain, tokens))
        vocabulary.append(vocabulary_specialization(by_token, 2))
        result = srp(layer.expert_ids, layer.num_experts, 4, trace.valid, trace.document_ids)
        srp_of_experts.append(result.per_expert)
    results = metric.results()
    for found, expected in (
        (results.srp, srp_of_experts),
        (results.domain.layers, domain),
        (results.vocabulary.layers, vocabulary),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for kind, expected in ((results.domain, domain), (results.vocabulary, vocabulary)):
        assert torch.equal(kind.mean, torch.cat(expected).mean())
        assert torch.equal(kind.pearson, pearson(torch.cat(expected), torch.cat(srp_of_experts)))
        assert torch.equal(kind.spearman, spearman(torch.cat(expected), torch.cat(srp_of_experts)))


def test_specialization_wants_the_ids_that_it_was_made_for():
    trace = random_trace()
    with pytest.raises(ValueError, match="domain_ids must be given to a metric made as this one"):
        ExpertSpecialization.from_trace(trace, 3).update(trace)
    with pytest.raises(ValueError, match="token_ids must not be given to a metric made as this one"):
        ExpertSpecialization.from_trace(trace, 3).update(trace, trace.document_ids % 3, trace.document_ids)
