"""Run a model over rows of text and record what its routers decide."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from consistency_reg.capture import RouterCapture
from consistency_reg.lab.evaluate.models import Candidate, expert_bytes
from consistency_reg.lab.evaluate.text import Rows
from consistency_reg.lab.evaluate.traces import Recording, compact
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace

with require("transformers"):
    from tqdm import tqdm

Result = TypeVar("Result")
SAMPLE_TOKENS = 96
FIRST_BATCH = {"cuda": 64}  # rows that are tried first
FIRST_BATCH_ELSEWHERE = 8  # a system that runs out of memory may end the program instead of saying so
LOGITS = 2**27  # at a time: half a gigabyte in float32
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@torch.inference_mode()
def record(
    candidate: Candidate,
    texts: Mapping[str, Rows],
    *,
    batch_size: int | None = None,
    about: dict[str, Any] | None = None,
) -> Recording:
    """Record the routing of a model on the rows of each domain, and its loss on them. Every row is read by itself.

    An encoder-decoder reads each row in its encoder, and in its decoder, one token late, as what it is to say; its loss
    would be that of a copy, and is not recorded.

    Args:
        candidate: the model.
        texts: token ids by domain.
        batch_size: rows of a batch to begin with; halved whenever memory does not suffice.
        about: settings to keep with the recording.

    Raises:
        ValueError: a model without routers that are known, ids or scores of a router that are no such.
        RuntimeError: not enough memory for one row; routers that did not run.
    """
    body = candidate.body
    device = next(body.parameters()).device
    rows = [torch.tensor(row) for of_domain in texts.values() for row in of_domain]
    length_N = torch.tensor([len(row) for row in rows])
    valid = torch.arange(int(length_N.max())) < length_N[:, None]
    loss_N = torch.zeros(len(rows), dtype=torch.float64)
    predicts = candidate.predicts
    layers: list[Tensor] = []
    capture = RouterCapture(body)

    token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    late_ids = _one_token_late(candidate, token_ids) if candidate.is_encoder_decoder else None

    def read(index: Tensor) -> tuple[RoutingTrace, Tensor | None]:
        batch = index, slice(int(length_N[index].max()))
        mask = valid[batch].to(device)
        inputs: dict[str, Any] = {"input_ids": token_ids[batch].to(device), "attention_mask": mask.long()}
        if late_ids is not None:
            inputs |= {"decoder_input_ids": late_ids[batch].to(device), "decoder_attention_mask": mask.long()}
        output = (candidate.model if predicts else body)(**inputs, use_cache=False)
        trace = capture.trace(valid=mask)
        trace.check_values()
        return trace, _row_losses(output.logits, inputs["input_ids"], mask).cpu() if predicts else None

    progress = tqdm(total=int(length_N.sum()), desc=candidate.name, unit="token", disable=None, leave=False)
    with capture, progress:
        longest_first = length_N.argsort(descending=True, stable=True)  # so that memory runs out at once or never
        size = batch_size or FIRST_BATCH.get(device.type, FIRST_BATCH_ELSEWHERE)
        if predicts and batch_size is None:
            size = max(1, min(size, LOGITS // (int(length_N.max()) * candidate.vocabulary)))
        for index, (trace, losses) in in_batches(longest_first, read, size):
            if not layers:
                layers = [_storage(layer.expert_ids, layer.num_experts, valid) for layer in trace]
                num_experts = [layer.num_experts for layer in trace]
            for stored, layer in zip(layers, trace, strict=True):
                stored[index, : trace.shape[1]] = layer.expert_ids.to(stored.dtype).cpu()
            if losses is not None:
                loss_N[index] = losses
            progress.update(int(length_N[index].sum()))
    domain_ids = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts.values()]))
    sample_row = int((length_N >= min(SAMPLE_TOKENS, int(length_N.max()))).nonzero()[0])
    sample = rows[sample_row][:SAMPLE_TOKENS].tolist()
    return Recording(
        model=candidate.name,
        expert_ids=layers,
        num_experts=num_experts,
        layer_names=capture.layer_names,
        valid=valid,
        domain_ids=domain_ids,
        domains=list(texts),
        token_ids=token_ids,
        decoder_token_ids=late_ids,
        expert_bytes=expert_bytes(body, capture.layer_names, num_experts),
        text_loss=_by_domain(list(texts), domain_ids, loss_N, length_N - 1) if predicts else {},
        sample_row=sample_row,
        sample=[candidate.text_of(token) for token in sample],
        about=about or {},
    )


def in_batches(items: Tensor, run: Callable[[Tensor], Result], size: int) -> Iterator[tuple[Tensor, Result]]:
    """Yield (batch, result of ``run``) for batches of ``size`` items, halved for good whenever memory does not suffice.

    Raises:
        RuntimeError: there is not enough memory for one item.
    """
    first = 0
    while first < len(items):
        batch = items[first : first + size]
        result = _unless_out_of_memory(run, batch)
        if result is None:
            if len(batch) == 1:
                raise RuntimeError(
                    "out of memory with a batch of one row: give shorter rows, or another dtype or device"
                )
            size = len(batch) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield batch, result
        first += len(batch)


def _unless_out_of_memory(run: Callable[[Tensor], Result], batch: Tensor) -> Result | None:
    # Ends before the next try: an exception that is being handled keeps the tensors of its frames alive.
    try:
        return run(batch)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in OUT_OF_MEMORY):
            return None
        raise


def _row_losses(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """Return the summed loss in nats of each row's tokens but the first: [B, T, V], [B, T] and [B, T] -> [B]."""
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(
                row_logits[:-1][row_valid[1:]].float(), row_ids[1:][row_valid[1:]], reduction="sum"
            ).double()
            for row_logits, row_ids, row_valid in zip(logits, ids, valid, strict=True)
        ]
    )


def _by_domain(
    domains: Sequence[str], domain_ids: Tensor, loss_N: Tensor, predicted_N: Tensor
) -> dict[str, tuple[float, int]]:
    return {
        name: (float(loss_N[domain_ids == domain].sum()), int(predicted_N[domain_ids == domain].sum()))
        for domain, name in enumerate(domains)
    }


def _one_token_late(candidate: Candidate, ids: Tensor) -> Tensor:
    late = ids.roll(1, dims=1)
    late[:, 0] = _decoder_start(candidate)
    return late


def _decoder_start(candidate: Candidate) -> int:
    config, generation = candidate.model.config, getattr(candidate.model, "generation_config", None)
    known: Sequence[int | None] = (
        getattr(config, "decoder_start_token_id", None),
        getattr(generation, "decoder_start_token_id", None),
        getattr(config, "pad_token_id", None),  # what T5 and its kin start with
    )
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise ValueError(f"{candidate.name} must have a decoder_start_token_id in its configuration, got none")
    return found


def _storage(expert_ids: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    return torch.zeros(*valid.shape, expert_ids.shape[-1], dtype=compact(num_experts))
