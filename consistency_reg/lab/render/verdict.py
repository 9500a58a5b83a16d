"""The verdict that stands at the end of a command and at the top of a page, in two sentences.

The first says what was saved, what it cost and whether balance held; the second says what to try next.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from consistency_reg.lab.render.table import change, number, percent
from consistency_reg.measures import (
    CACHE_RATIO,
    COLLAPSED_BELOW,
    GLOBAL_CV,
    HIT_RATE,
    MIN_SHARE,
    PERPLEXITY,
    SRP,
    STATIC_SRP,
    STRENGTH,
    USUAL_LENGTH,
    parse,
)
from consistency_reg.measures.reading import DEPLOYED, VALIDATION, Reading

CV_RATIO_AT_MOST = 1.5  # of the baseline's global CV: what a run may give up of balance and still be compared
WORTH_ITS_COST = 0.005  # more perplexity than this is too much for what it saves
LEAST_SEEDS = 3
WITHOUT_TERM = "--consistency.weight 0"
WITH_TERM = "Next: the same command with --consistency.weight 0.35, and consistency-reg report on both."
Values = Mapping[str, float]  # measures by their name in a log, with or without "val/" before it


@dataclass(frozen=True)
class Verdict:
    """Holds what was found and what to try next, a sentence each."""

    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found} {self.advice}"


@dataclass(frozen=True)
class Outcome:
    """Holds the changes of a model against its baseline; NaN where something was not measured.

    Attributes:
        name: of the model.
        against: what the baseline is called.
        misses: relative change of the cache misses.
        cache: which misses these are, such as "LRU misses at 25% of the experts".
        perplexity: relative change of the perplexity.
        smallest_share: usage of the least used expert, as a share of its fair share.
        cv_ratio: global CV of the usage, as a multiple of the baseline's.
        seeds: how many pairs these are the means of.
    """

    name: str
    against: str
    misses: float
    cache: str
    perplexity: float
    smallest_share: float
    cv_ratio: float
    seeds: int = 1

    @property
    def is_balanced(self) -> bool:
        """Return whether no expert is dead and global balance is near the baseline's, as far as measured."""
        return not (self.smallest_share < COLLAPSED_BELOW or self.cv_ratio > CV_RATIO_AT_MOST)

    def __str__(self) -> str:
        known = not math.isnan(self.misses)
        saved = in_words(self.misses, self.cache) if known else "no cache misses that were measured"
        cost = "perplexity not measured" if math.isnan(self.perplexity) else f"{change(self.perplexity)} perplexity"
        over = f", the means of {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{self.name} has {saved} for {cost} against {self.against}{over}, {self._balance()}."

    def _balance(self) -> str:
        known = {
            "smallest share": number(2)(self.smallest_share),
            "global CV over the baseline's": number(2)(self.cv_ratio),
        }
        said = ", ".join(f"{name} {value}" for name, value in known.items() if value)
        if not said:
            return "and balance was not measured"
        said = f"at worst {said}" if self.seeds > 1 else said
        return f"and balance held ({said})" if self.is_balanced else f"but balance did not hold ({said})"


def in_words(change: float, misses: str) -> str:
    """Return a relative change of misses in words.

    Example:
        >>> in_words(-0.305, "LRU misses")
        '30.5% fewer LRU misses'
    """
    return f"{abs(100 * change):.1f}% {'fewer' if change <= 0 else 'more'} {misses}"


def compare(name: str, values: Values, against: str, baseline: Values) -> Outcome:
    """Return what one model changes against another, from the measures of both.

    Example:
        >>> on = {"cache/lru_25pct": 0.75, "ppl": 71.0, "balance/min_share": 0.4, "balance/cv": 0.3}
        >>> off = {"cache/lru_25pct": 0.5, "ppl": 70.0, "balance/min_share": 0.4, "balance/cv": 0.3}
        >>> print(compare("on", on, "off", off))  # doctest: +NORMALIZE_WHITESPACE
        on has 50.0% fewer LRU misses at 25% of the experts for +1.4% perplexity against off, and balance held (smallest
        share 0.40, global CV over the baseline's 1.00).
    """
    cache = _cache([values, baseline])

    def compared(reading: Reading) -> float:
        return reading.compare(_get(values, reading), _get(baseline, reading))

    return Outcome(
        name=name,
        against=against,
        misses=compared(cache) if cache else math.nan,
        cache=cache.complement if cache else "cache misses",
        perplexity=compared(PERPLEXITY.at()),
        smallest_share=compared(MIN_SHARE.at()),
        cv_ratio=compared(GLOBAL_CV.at()),
    )


def describe(name: str, values: Values, *, one_domain: bool = False) -> str:
    """Return a sentence about a model that stands by itself: what it misses, and whether experts are dead.

    Args:
        name: name of the model.
        values: its measures.
        one_domain: whether the text was of one domain, which may leave experts idle that have not collapsed.

    Example:
        >>> values = {"val/cache/lru_2k": 0.75, "val/ppl": 71.0, "val/srp/m16": 0.6, "val/static_srp": 0.25}
        >>> describe("first", values)
        'first has LRU misses at 2 x K of 25.0% at perplexity 71.0, SRP m=16 60.0% (static SRP 25.0%), and balance was not measured.'
    """  # noqa: E501
    cache = _cache([values])
    parts = [f"{cache.complement} of {percent(1 - _get(values, cache))}%"] if cache else ["no measured cache"]
    if (perplexity := number(1)(_get(values, PERPLEXITY.at()))) != "":
        parts[0] += f" at perplexity {perplexity}"
    srp = SRP.at(USUAL_LENGTH)
    if consistency := percent(_get(values, srp)):
        static = percent(_get(values, STATIC_SRP.at()))
        parts.append(f"{srp.label} {consistency}%" + (f" (static SRP {static}%)" if static else ""))
    share = _get(values, MIN_SHARE.at())
    if math.isnan(share):
        balance = "and balance was not measured"
    elif share < COLLAPSED_BELOW and one_domain:
        balance = f"and on text of this domain alone an expert is used at {share:.2f} of its fair share"
    elif share < COLLAPSED_BELOW:
        balance = f"but its router collapsed: an expert is used at {share:.2f} of its fair share"
    else:
        cv = number(2)(_get(values, GLOBAL_CV.at()))
        balance = f"and no expert is dead (smallest share {share:.2f}{f', global CV {cv}' if cv else ''})"
    return f"{name} has {', '.join([*parts, balance])}."


def advise(outcome: Outcome, *, heavier: bool = True) -> str:
    """Return what to try next with a consistency term.

    Args:
        outcome: of the term against its baseline.
        heavier: whether a larger weight is still to be tried.
    """
    if not outcome.is_balanced:
        return "Next: a smaller --consistency.weight, or a larger --model.balance_weight."
    if outcome.perplexity > WORTH_ITS_COST:
        return f"Next: a smaller --consistency.weight; more than {100 * WORTH_ITS_COST:+g}% perplexity is dear."
    if not outcome.misses < 0:
        return "Next: a larger --consistency.weight, or more steps: nothing is saved yet."
    if outcome.seeds < LEAST_SEEDS:
        return (
            f"Next: the same pair with other seeds, {LEAST_SEEDS} in all: a seed alone moves perplexity by as much as "
            "the term does."
        )
    if heavier and outcome.perplexity < WORTH_ITS_COST / 2:
        return f"Next: a larger --consistency.weight: up to {100 * WORTH_ITS_COST:+g}% perplexity there is room."
    return "Next: evaluate the model on text of your own (consistency-reg evaluate MODEL --data FILE)."


def of_run(
    name: str,
    metrics: Values,
    *,
    has_term: bool,
    before: Values | None = None,
    baseline: tuple[str, Values] | None = None,
    without_term: str = WITHOUT_TERM,
) -> Verdict:
    """Return the verdict on one run: next to its baseline, to the checkpoint that it began with, or by itself.

    Args:
        name: of the run.
        metrics: of its last validation.
        has_term: whether it was trained with a consistency term.
        before: measures of the checkpoint that it began with, on the same text; none for a run from scratch.
        baseline: name and measures of the run that differs in the term alone, where there is one.
        without_term: options with which the same command trains without the term.
    """
    both = f"the same command with {without_term}, and consistency-reg report on both."
    reference = baseline or (("the checkpoint before", before) if before else None)
    if reference is None:
        deployed = as_deployed(name, metrics, "the model as it is", metrics)
        return Verdict(f"{describe(name, metrics)}{deployed}", f"Next: the baseline, {both}" if has_term else WITH_TERM)
    outcome = compare(name, metrics, *reference)
    found = f"{outcome}{as_deployed(name, metrics, *reference)}"
    if baseline is None and not has_term:
        return Verdict(found, WITH_TERM)
    if baseline is None and outcome.is_balanced:
        return Verdict(found, f"Next: the control, {both}")
    return Verdict(found, advise(outcome))


def as_deployed(name: str, values: Values, against: str, baseline: Values) -> str:
    """Return a sentence about a run's validation with cache-aware routing, a space first; "" where there was none.

    Args:
        name: name of the run.
        values: measures of its last validation.
        against: what the baseline is called.
        baseline: measures of the baseline, as it is.

    Example:
        >>> off = {"val/ppl": 70.0, "val/cache/lru_2k": 0.6}
        >>> on = off | {"val/deployed/ppl": 70.21, "val/deployed/cache/lru_2k": 0.92}
        >>> on |= {"val/deployed/strength": 0.1, "val/deployed/cache_ratio": 2.0}
        >>> as_deployed("on", on, "off", off)
        ' As deployed (cache-aware routing of strength 0.1, 2 x K slots) on has 80.0% fewer LRU misses for +0.3% perplexity against off.'
    """  # noqa: E501
    settings = [one.at().within(DEPLOYED).name for one in (STRENGTH, CACHE_RATIO)]
    strength, ratio = (values.get(name, math.nan) for name in settings)
    if not strength > 0 or math.isnan(ratio):
        return ""
    hits = HIT_RATE.at(ratio=round(ratio, 6))  # logged as float32
    misses, perplexity = (
        one.compare(values.get(one.within(DEPLOYED).name, math.nan), _get(baseline, one))
        for one in (hits, PERPLEXITY.at())
    )
    if math.isnan(misses) or math.isnan(perplexity):
        return ""
    saved = f"{in_words(misses, 'LRU misses')} for {change(perplexity)} perplexity"
    how = f"cache-aware routing of strength {strength:g}, {ratio:g} x K slots"
    return f" As deployed ({how}) {name} has {saved} against {against}."


def of_models(values: Mapping[str, Values], advice: str = "", *, one_domain: bool = False) -> Verdict:
    """Return the verdict on models that were measured on the same text: the one that misses least, next to the first.

    Args:
        values: the measures of each model by its name; the first model is what the others are compared with.
        advice: what to try next; something general when empty.
        one_domain: whether the text was of one domain.
    """
    names = list(values)
    cache = _cache(list(values.values()))
    misses = {name: 1 - _get(values[name], cache) if cache else math.nan for name in names}
    best = min(names, key=lambda name: misses[name] if misses[name] == misses[name] else math.inf)
    if best == names[0] or not cache:
        return Verdict(describe(best, values[best], one_domain=one_domain), advice)
    outcome = compare(best, values[best], names[0], values[names[0]])
    return Verdict(str(outcome), advice or advise(outcome))


def _cache(every: Sequence[Values]) -> Reading | None:
    """Return the LRU cache to speak of that all were measured at: a quarter of the experts, 2K slots, or any other."""
    found = [{parse(name).within() for name in values if _is_lru(name)} for values in every]  # type: ignore[union-attr]
    common = set.intersection(*found) if found else set()
    wanted = (HIT_RATE.at(share=0.25), HIT_RATE.at(ratio=2))
    first = next((reading for reading in wanted if reading in common), None)
    return first or min(common, key=lambda reading: reading.name, default=None)


def _is_lru(name: str) -> bool:
    reading = parse(name)
    return (
        reading is not None
        and reading.measure is HIT_RATE
        and reading.cache == "lru"
        and reading.stage in ("", VALIDATION)
        and reading.layer is None
        and not reading.domain
    )


def _get(values: Values, reading: Reading) -> float:
    return values.get(reading.name, values.get(reading.within(VALIDATION).name, math.nan))
