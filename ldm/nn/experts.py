"""Feed-forward layers made of experts, each of which chooses the tokens that it computes on."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.tokens import tokens_at, tokens_put


class ExpertChoice(nn.Module):
    """Experts of two layers with a GELU between them: (B, N, width) to (B, N, width), at the cost of `capacity` layers.

    By a softmax over the experts each token has a share in every one. Of the N tokens of a sample each expert takes the
    capacity N / num_experts with the largest share in it, and gives what it makes of them, times their share. A token
    gets the sum: zero, where no expert takes it. CUDA adds up in any order, unless trainer.deterministic is set.

    Args:
        width, hidden: of a layer.
        num_experts: of which each has weights of its own.
        capacity: how many experts take a token, on average.

    Source: Zhou et al. 2022.
    """

    def __init__(self, width: int, hidden: int, *, num_experts: int, capacity: float) -> None:
        super().__init__()
        self.capacity = capacity
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.initialize(0.02)

    def initialize(self, out_std: float) -> None:
        """Normal weights of standard deviation 0.02, and out_std for the way out."""
        for weight, std in ((self.gate.weight, 0.02), (self.w1, 0.02), (self.w2, out_std)):
            nn.init.trunc_normal_(weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the tokens; float32 is added up under autocast."""
        num = tokens.shape[1]
        num_experts = len(self.w1)
        shares = F.softmax(self.gate(tokens), dim=-1).mT
        shares, places = shares.topk(int(self.capacity * num / num_experts), dim=-1)
        places = places.flatten(1)
        taken = rearrange(tokens_at(tokens, places), "b (e k) d -> e (b k) d", e=num_experts)
        made = torch.bmm(F.gelu(torch.bmm(taken, self.w1)), self.w2)
        made = rearrange(made, "e (b k) d -> b (e k) d", b=len(tokens))
        return tokens_put(shares.flatten(1)[..., None] * made, places, num=num)
