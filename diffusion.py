"""The diffusion: forward process, loss, posterior, samplers, guidance, terms of the NLL bound.

DDPM is Ho et al. 2020; DDIM, Song et al. 2020; iDDPM, Nichol & Dhariwal 2021. Time is counted from
0 in the code: t = 0, ..., T-1 here is t = 1, ..., T in the papers. x_0 is the clean image, as in
the papers; x_t with t = 0 is their x_1. In every formula, images and noise are (N, C, H, W), t is
(N,), ints in [0, T), one per image, and y is (N,), class labels.

A model is any callable out = model(x_t, t, y). `out` is eps_hat, (N, C, H, W); a network that also
predicts the variance returns eps_hat and var_out, (N, 2C, H, W): see `p_mean_log_variance`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from config import BETA, T, require

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Generators = torch.Generator | list[torch.Generator] | None


class GaussianDiffusion:
    """DDPM eq. 2, q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t I), and its learned reversal.

    The schedule is that of DDPM section 4, in float64. Its values are cast when they are used.
    device: where t and the images will be.
    timesteps: (steps,), the times the chain visits, by default all. In a respaced chain, which is
    for sampling only, t is an index into `timesteps`; the model receives the time itself.
    """

    def __init__(self, timesteps: Tensor | None = None, device: torch.device | str = "cpu"):
        beta = torch.linspace(*BETA, T, dtype=torch.float64, device="cpu")
        if timesteps is not None:  # beta between the kept times (iDDPM eq. 19)
            alpha_bar = torch.cumprod(1 - beta, dim=0)[timesteps]
            beta = 1 - alpha_bar / _shifted(alpha_bar)
        self.timesteps = torch.arange(T, device="cpu") if timesteps is None else timesteps
        # Apple's GPUs lack float64, so for them the tables stay on the CPU.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.beta = beta.to(self.device)
        self.alpha = 1 - self.beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)
        self.alpha_bar_prev = _shifted(self.alpha_bar)
        self.beta_tilde = self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)  # DDPM eq. 7
        # beta_tilde is 0 at t = 0; its logarithm uses the next value there, as iDDPM's code does.
        next_value = self.beta_tilde[1:2] if len(beta) > 1 else self.beta
        self.log_beta_tilde = torch.cat([next_value, self.beta_tilde[1:]]).log()

    def respaced(self, steps: int) -> "GaussianDiffusion":
        """The same process at `steps` evenly spaced times, T-1 included (DDIM D.2, "linear").

        SettingError unless 1 <= steps <= T.
        """
        require(1 <= steps <= T, f"steps must lie in [1, {T}], not {steps}")
        kept = (torch.arange(1, steps + 1, device="cpu") * T / steps).round().long() - 1
        return self if steps == T else GaussianDiffusion(kept, self.device)

    @property
    def schedule(self) -> list[float]:
        """What a checkpoint keeps, to compare: T, first and last beta, last alpha_bar, rounded."""
        return [T, *(float(f"{x:.6g}") for x in (self.beta[0], self.beta[-1], self.alpha_bar[-1]))]

    def scales(self, t: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sigma = sqrt(1 - alpha_bar_t), not DDPM's sigma_t: (N, 1, 1, 1)."""
        return _at(self.alpha_bar.sqrt(), t, images), _at((1 - self.alpha_bar).sqrt(), t, images)

    # Forward process and its inversion

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM eq. 4)."""
        signal, sigma = self.scales(t, x_0)
        return signal * x_0 + sigma * eps

    def predict_x_0(self, x_t: Tensor, t: Tensor, eps: Tensor, clip: bool = False) -> Tensor:
        """Eq. 4 solved for x_0 (DDPM eq. 15). clip: into [-1, 1], the range of x_0, not of x_t."""
        signal, sigma = self.scales(t, x_t)
        x_0 = (x_t - sigma * eps) / signal
        return x_0.clamp(-1, 1) if clip else x_0

    def predict_eps(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """Eq. 4 solved for eps."""
        signal, sigma = self.scales(t, x_t)
        return (x_t - signal * x_0) / sigma

    def as_eps(self, model: Model, predicts: Literal["eps", "x_0", "v"]) -> Model:
        """`model`, with its output read as eps by eq. 4.

        predicts: what the output is: eps, x_0 (Li & He 2025, arXiv 2511.13720), or
        v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022), which with eq. 4
        gives eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t.
        """
        def eps_model(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out, var_out = split(model(x_t, t, y), x_t)
            signal, sigma = self.scales(t, x_t)
            eps = self.predict_eps(x_t, t, out) if predicts == "x_0" else signal * out + sigma * x_t
            return eps if var_out is None else torch.cat([eps, var_out], dim=1)

        return model if predicts == "eps" else eps_model

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C, H, W), variance (N, 1, 1, 1) of q(x_t-1 | x_t, x_0) (DDPM eq. 6 and 7)."""
        x_0_weight = self.alpha_bar_prev.sqrt() * self.beta / (1 - self.alpha_bar)
        x_t_weight = self.alpha.sqrt() * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        mean = _at(x_0_weight, t, x_t) * x_0 + _at(x_t_weight, t, x_t) * x_t
        return mean, _at(self.beta_tilde, t, x_t)

    def p_mean_log_variance(self, x_t: Tensor, t: Tensor, out: Tensor, clip: bool
                            ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_t-1 | x_t). out: the model's output.

        The mean is eq. 7 at the predicted x_0. If x_0 is not clipped, that is DDPM eq. 11 (a test
        compares them): (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t).
        """
        eps_hat, var_out = split(out, x_t)
        mean, _ = self.q_posterior(self.predict_x_0(x_t, t, eps_hat, clip), x_t, t)
        low, high = (_at(table, t, x_t) for table in (self.log_beta_tilde, self.beta.log()))
        if var_out is None:
            return mean, low
        v = (var_out + 1) / 2  # as in iDDPM's code, the output runs from -1 to 1
        return mean, v * high + (1 - v) * low  # iDDPM eq. 15

    # Training

    def draw_t_and_eps(self, x_0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t ~ U{0, ..., T-1}, (N,), and eps ~ N(0, I) (DDPM Algorithm 1, lines 3 and 4)."""
        t = torch.randint(T, (len(x_0),), generator=generator, device=x_0.device)
        return t, torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)

    def loss(self, model: Model, x_0: Tensor, y: Tensor, t: Tensor, eps: Tensor,
             kind: Literal["l1", "mse"] = "mse", min_snr: float = 0.0) -> Tensor:
        """L_simple (DDPM eq. 14; Algorithm 1, line 5), or with "l1" the mean of |eps - eps_hat|.

        x_0: in [-1, 1]; min_snr: gamma of `min_snr_weight`; 0 for equal weights. A scalar.
        """
        x_t = self.q_sample(x_0, t, eps)
        eps_hat, var_out = split(model(x_t, t, y), x_t)
        error = (eps - eps_hat).abs() if kind == "l1" else (eps - eps_hat).square()  # DDPM eq. 14
        loss = (self.min_snr_weight(t, min_snr, x_0) * error if min_snr else error).mean()
        if var_out is not None:  # L_hybrid (iDDPM eq. 16); T times one term estimates L_vlb
            out = torch.cat([eps_hat.detach(), var_out], dim=1)  # it trains the variance only
            loss = loss + 0.001 * T * self.vlb_term(out, x_0, x_t, t, clip=False).mean()
        return loss

    def min_snr_weight(self, t: Tensor, gamma: float, images: Tensor) -> Tensor:
        """min(SNR_t, gamma) / SNR_t (Hang et al. 2023: for mse, gamma 5), less for small t."""
        snr = self.alpha_bar / (1 - self.alpha_bar)
        return _at(snr.clamp(max=gamma) / snr, t, images)

    def vlb_term(self, out: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Tensor:
        """A term of the bound (DDPM eq. 5): KL(q(x_t-1 | x_t, x_0) || p), or -log p(x_0 | x_1).

        out: the model's output for x_t; t: (N,). Returns (N,), in bits/dim.
        """
        moments = ((self.q_posterior(x_0, x_t, t)[0], _at(self.log_beta_tilde, t, x_t)),
                   self.p_mean_log_variance(x_t, t, out, clip))
        # Without validation, which would wait for a GPU and cannot be part of a CUDA graph.
        q, p = (Normal(mean, (log_var / 2).exp(), validate_args=False) for mean, log_var in moments)
        nats = torch.where(t.reshape(-1, 1, 1, 1) > 0, kl_divergence(q, p),
                           -discretized_log_likelihood(x_0, p))
        return nats.flatten(1).mean(dim=1) / math.log(2)

    # Reverse process

    def ddpm_step(self, x_t: Tensor, t: Tensor, out: Tensor, z: Tensor, clip: bool) -> Tensor:
        """x_t-1 ~ p(x_t-1 | x_t) (DDPM Algorithm 2, lines 3, 4). out: the model's; z ~ N(0, I)."""
        mean, log_variance = self.p_mean_log_variance(x_t, t, out, clip)
        return mean + (t > 0).reshape(-1, 1, 1, 1) * (log_variance / 2).exp() * z

    def ddim_step(self, x_t: Tensor, t: Tensor, out: Tensor, z: Tensor, clip: bool,
                  eta: float) -> Tensor:
        """x_t-1 from x_t (DDIM eq. 12, whose alpha is DDPM's alpha_bar). out, z: as above.

        eta = 0 is deterministic, eta = 1 has variance beta_tilde. A learned variance is ignored.
        """
        eps_hat, _ = split(out, x_t)
        x_0_hat = self.predict_x_0(x_t, t, eps_hat, clip)
        if clip:
            eps_hat = self.predict_eps(x_t, t, x_0_hat)  # so that it fits the clipped x_0_hat
        variance = eta**2 * self.beta_tilde  # DDIM eq. 16, squared
        direction = (1 - self.alpha_bar_prev - variance).sqrt()  # 0 at t = 0: x_0_hat is the result
        return (_at(self.alpha_bar_prev.sqrt(), t, x_t) * x_0_hat
                + _at(direction, t, x_t) * eps_hat + _at(variance.sqrt(), t, x_t) * z)

    @torch.no_grad()
    def sample(self, model: Model, x_T: Tensor, y: Tensor, *, sampler: str = "ddpm", steps: int = T,
               eta: float = 0.0, clip: bool = True, generator: Generators = None,
               on_step: Callable[[int, Tensor], None] = lambda t, x_t: None) -> Tensor:
        """x_T ~ N(0, I) to x_0 (DDPM Algorithm 2; DDIM section 4.2). Returns (N, C, H, W).

        y: (N,) labels; sampler: "ddpm" or "ddim"; steps: of a respaced chain; generator: of z, see
        `noise`; on_step(t, x_t): called with each x_t, from x_T to x_0; this t is the papers'.
        """
        chain, x_t = self.respaced(steps), x_T
        step = chain.ddpm_step if sampler == "ddpm" else partial(chain.ddim_step, eta=eta)
        random = sampler == "ddpm" or eta > 0  # else z has weight 0
        for i in reversed(range(steps)):
            time = int(chain.timesteps[i])
            on_step(time + 1, x_t)
            out = model(x_t, torch.full_like(y, time), y)
            z = noise(x_t.shape, generator).to(x_t) if random else torch.zeros_like(x_t)
            x_t = step(x_t, torch.full_like(y, i), out, z, clip)
        on_step(0, x_t)
        return x_t


def noise(shape: Sequence[int], generator: Generators = None) -> Tensor:
    """N(0, I) in float32, made on the CPU: a seed gives the same digits on every device.

    Several generators make equal shares of the images, in order.
    """
    if isinstance(generator, list):
        part = shape[0] // len(generator), *shape[1:]
        return torch.cat([noise(part, one) for one in generator])
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def guided(model: Model, guidance: float, null_class: int) -> Model:
    """Classifier-free guidance of all channels (CFG eq. 6; DiT section 3.1, "s" = 1 + w).

    eps_hat = eps(null) + guidance * (eps(y) - eps(null)) = (1 + w) eps(y) - w eps(null). 1 turns it
    off. DiT guides 3 of 4 channels (appendix A). A predicted variance is eps(y)'s, as in its code.
    """
    def guided_model(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([y, torch.full_like(y, null_class)])
        out = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        (eps_y, var_out), (eps_null, _) = (split(half, x_t) for half in out.chunk(2))
        eps_hat = eps_null + guidance * (eps_y - eps_null)
        return eps_hat if var_out is None else torch.cat([eps_hat, var_out], dim=1)

    return model if guidance == 1 else guided_model


def split(out: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """eps_hat (N, C, H, W) and var_out, or None if the variance is fixed. x_t: (N, C, H, W)."""
    C = x_t.shape[1]
    return out[:, :C], out[:, C:] if out.shape[1] == 2 * C else None


def discretized_log_likelihood(x_0: Tensor, p: Normal) -> Tensor:
    """log probability under p of the grey level of x_0, one of 256 in [-1, 1] (DDPM eq. 13).

    The first and last levels include the tails, so the 256 probabilities sum to 1. In nats.
    """
    # Mirrored into the lower tail, where small probabilities keep their digits.
    side = torch.where(x_0 > p.mean, -1.0, 1.0)
    x, mean = side * x_0, side * p.mean
    lower, upper = (0.5 * torch.special.erfc((mean - edge) / (p.stddev * math.sqrt(2)))
                    for edge in (x - 1 / 255, x + 1 / 255))  # levels are 2/255 apart
    probability = torch.where(x > 0.999, 1.0, upper) - torch.where(x < -0.999, 0.0, lower)
    return probability.clamp(min=1e-12).log()  # finite, as in the papers' code


def _shifted(alpha_bar: Tensor) -> Tensor:
    """alpha_bar of the time before each one; x_0, before the first, has no noise: 1."""
    return F.pad(alpha_bar[:-1], (1, 0), value=1.0)


def _at(values: Tensor, t: Tensor, images: Tensor) -> Tensor:
    """values[t] as (N, 1, 1, 1), in the images' dtype and on their device."""
    return values[t.to(values.device)].to(images.dtype).to(images.device).reshape(-1, 1, 1, 1)
