"""Memory for what a mixture-of-experts layer computes between its parts, made once a step and used by every layer."""

import torch


class Workspace:
    """Fresh memory in each layer would cost a page fault for every 4 KB of it."""

    __slots__ = ("experts_TK", "normed_TD", "num_tokens", "routed_to", "scores_TK", "shared_TD")

    def __init__(self, num_tokens: int, width: int, experts_per_token: int) -> None:
        self.num_tokens = num_tokens
        self.normed_TD = torch.empty(num_tokens, width)
        self.shared_TD = torch.empty(num_tokens, width)
        self.experts_TK = torch.empty(num_tokens, experts_per_token, dtype=torch.int64)
        self.scores_TK = torch.empty(num_tokens, experts_per_token)
        # Where the router writes, ready for the call.
        self.routed_to = (self.normed_TD.data_ptr(), self.experts_TK.data_ptr(), self.scores_TK.data_ptr())
