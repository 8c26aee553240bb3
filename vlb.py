"""The variational bound of DDPM (section 2, eq. 5), in bits a dimension: what a learned variance is trained with.

iDDPM = Nichol & Dhariwal 2021. `chain` is a `GaussianDiffusion`.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusion import GaussianDiffusion, Model


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(mean_2, variance_2)) in nats, for each value on its own."""
    difference = log_variance_2 - log_variance
    return 0.5 * (difference - 1 + (-difference).exp() + (mean - mean_2) ** 2 * (-log_variance_2).exp())


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the weight that N(mean, variance) gives to the grey level of x_0, one of 256 in [-1, 1] (DDPM eq. 13).

    The outermost levels take the tails, so that the 256 weights sum to 1. In nats, for each value on its own.
    """
    inverse_std = torch.exp(-0.5 * log_variance)

    def below(difference: Tensor) -> Tensor:
        """The weight of what lies below mean + difference; unlike torch.special.ndtr, good for small ones in float32."""
        return 0.5 * torch.special.erfc(-difference * inverse_std / math.sqrt(2))

    difference, half = x_0 - mean, 1 / 255
    # The same on both sides of the mean: computed below it, where small weights are differences of small numbers.
    inside = below(half - difference.abs()) - below(-half - difference.abs())
    weight = torch.where(x_0 < -0.999, below(difference + half), torch.where(x_0 > 0.999, below(half - difference), inside))
    return weight.clamp(min=1e-12).log()


def bound_term(chain: "GaussianDiffusion", out: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Tensor:
    """One term of DDPM eq. 5, KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)); for the last step, -log p(x_0 | x_1).

    In bits a dimension. out: what the network returned for x_t, (N, C, H, W) or with the variance (N, 2C, H, W); t: (N,).
    Returns (N,).
    """
    mean, log_variance = chain.p_mean_log_variance(x_t, t, out, clip)
    true_mean, _ = chain.q_posterior(x_0, x_t, t)
    nats = torch.where(t.reshape(-1, 1, 1, 1) > 0,
                       gaussian_kl(true_mean, chain.log_variance(x_t, t), mean, log_variance),
                       -discretized_log_likelihood(x_0, mean, log_variance))
    return nats.flatten(1).mean(dim=1) / math.log(2)


@torch.no_grad()
def bits_per_dimension(chain: "GaussianDiffusion", model: "Model", x_0: Tensor, y: Tensor,
                       generator: torch.Generator | None = None) -> Tensor:
    """The whole bound: the terms of all times, one draw of x_t each, and the prior's, KL(q(x_T | x_0) || N(0, I)). (N,)."""
    last = torch.full_like(y, len(chain) - 1)
    zero = torch.zeros_like(x_0)
    variance = torch.full_like(x_0, 1 - chain.alpha_bar[-1].item())
    prior = gaussian_kl(chain.q_sample(x_0, last, zero), variance.log(), zero, zero)
    total = prior.flatten(1).mean(dim=1) / math.log(2)
    for i in reversed(range(len(chain))):
        t = torch.full_like(y, i)
        x_t = chain.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator, device=x_0.device))
        out = model(x_t, torch.full_like(y, int(chain.timesteps[i])), y)
        total += bound_term(chain, out, x_0, x_t, t, clip=True)
    return total
