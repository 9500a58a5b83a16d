"""Name the measures that a report compares runs by, as validation logs them."""

from consistency_reg import measures
from consistency_reg.measures import USUAL_LENGTH
from consistency_reg.measures.reading import DEPLOYED, VALIDATION, Reading

PERPLEXITY = measures.PERPLEXITY.at().within(VALIDATION)
DENSE_PERPLEXITY = measures.DENSE_PERPLEXITY.at().within(VALIDATION)
HITS = measures.HIT_RATE.at(share=0.25).within(VALIDATION)
SRP = measures.SRP.at(USUAL_LENGTH).within(VALIDATION)
STATIC_SRP = measures.STATIC_SRP.at().within(VALIDATION)
LOCAL_GAIN = measures.LOCAL_GAIN.at(USUAL_LENGTH).within(VALIDATION)
GLOBAL_CV = measures.GLOBAL_CV.at().within(VALIDATION)
LOCAL_CV = measures.LOCAL_CV.at(USUAL_LENGTH).within(VALIDATION)
BALANCE_SD = measures.BALANCE_SD.at().within(VALIDATION)
MIN_SHARE = measures.MIN_SHARE.at().within(VALIDATION)
MAX_MEAN = measures.MAX_MEAN.at().within(VALIDATION)


def before(reading: Reading) -> Reading:
    """Return the same measure of the checkpoint that a fine-tuned run began with."""
    return reading.within(f"{VALIDATION}/before")


def deployed(reading: Reading) -> Reading:
    """Return the same measure of the validation with cache-aware routing."""
    return reading.within(DEPLOYED)
