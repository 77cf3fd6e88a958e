"""One layer, forward and backward, on one rank and on two: python examples/quickstart.py"""

from concurrent.futures import ThreadPoolExecutor

import flashmoe
import torch

torch.manual_seed(0)
x = torch.randn(256, 64)
layer = flashmoe.MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
y, routing = layer(x, return_routing=True)
y.square().mean().backward()
print("tokens per expert", routing.tokens_per_expert.tolist())
print("gradient of w_up ", tuple(layer.w_up.grad.shape), f"norm {layer.w_up.grad.norm():.4f}")


def on_rank(group: flashmoe.Group) -> torch.Tensor:
    """Half of the tokens and half of the experts; each token still reaches all experts."""
    experts = slice(4 * group.rank, 4 * group.rank + 4)
    mine = x[128 * group.rank : 128 * group.rank + 128]
    weights = (layer.w_router, layer.w_up[experts], layer.w_down[experts])
    return flashmoe.moe(mine, *weights, top_k=2, group=group)[0].detach()


groups = flashmoe.local_group(2)  # two ranks as threads; with torchrun: a torch process group
with ThreadPoolExecutor(2) as threads:
    halves = list(threads.map(on_rank, groups))
print(f"two ranks against one: largest difference {(torch.cat(halves) - y).abs().max():.1e}")
