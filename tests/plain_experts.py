"""Says that an expert is stored plain, where a test or a benchmark relies on it; converts nothing."""

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights


def plain(weights: ExpertWeights | QuantisedExpertWeights) -> ExpertWeights:
    """Return `weights` themselves; AssertionError where they are quantised."""
    assert isinstance(weights, ExpertWeights), "a plain expert was expected, this one is quantised"
    return weights
