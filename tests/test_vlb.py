"""The variational bound against closed forms, and the learned variance against diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion import GaussianDiffusion
from inference import generate
from runtime.checkpoint import load_model
from vlb import bits_per_dimension, bound_term, discretized_log_likelihood, gaussian_kl

D = GaussianDiffusion(1000)
TIMES = torch.tensor([0, 1, 10, 500, 998, 999])


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_of_gaussians():
    mean, log_variance, mean_2, log_variance_2 = draws(4, 1000)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(mean_2, (log_variance_2 / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean, log_variance, mean_2, log_variance_2), expected)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.1, 0.9])
def test_likelihoods_of_the_256_grey_levels_sum_to_one(mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_variance = torch.full_like(levels, 2 * math.log(std))
    likelihoods = discretized_log_likelihood(levels, torch.full_like(levels, mean), log_variance).exp()
    assert likelihoods.sum().item() == pytest.approx(1, abs=1e-8)
    if std <= 0.01:  # wider ones leave more to the tails of the outermost levels than to any other
        assert abs(levels[likelihoods.argmax()] - max(mean, -1)) <= 1 / 255


def test_small_likelihoods_are_as_good_in_float32_on_both_sides():
    mean, level = torch.tensor([-0.5, 0.5, 1 - 0.3, 0.3 - 1, 0.2]), torch.tensor([0.0, 0.0, 1.0, -1.0, 0.2])
    log_variance = torch.full_like(mean, 2 * math.log(0.08))  # 0 is six standard deviations away
    found = discretized_log_likelihood(level, mean, log_variance)
    expected = discretized_log_likelihood(level.double(), mean.double(), log_variance.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert -25 < found[0] < -15 and found[0].item() == pytest.approx(found[1].item(), rel=1e-4)


def test_learned_variance_lies_between_beta_tilde_and_beta():
    x_t = draws(6, 1, 2, 2)
    for v, expected in ((-1.0, D.log_beta_tilde), (1.0, D.beta.log()), (0.0, (D.log_beta_tilde + D.beta.log()) / 2)):
        found = D.log_variance(x_t, TIMES, torch.full_like(x_t, v))
        torch.testing.assert_close(found, expected[TIMES].reshape(-1, 1, 1, 1).expand_as(x_t))
    assert torch.equal(D.log_beta_tilde[1:], D.beta_tilde[1:].log()) and D.log_beta_tilde[0] == D.log_beta_tilde[1]
    assert GaussianDiffusion(1).log_beta_tilde.item() == pytest.approx(math.log(1e-4))


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_sampling_step_with_learned_variance_against_diffusers(t, monkeypatch):
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=True)
    x_t, eps_hat, v, z = draws(4, 3, 2, 2, 2).float()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **settings: z)
    theirs = scheduler.step(torch.cat([eps_hat, v], dim=1), t, x_t).prev_sample
    torch.testing.assert_close(D.ddpm_step(x_t, t, torch.cat([eps_hat, v], dim=1), z), theirs, rtol=1e-3, atol=5e-4)


def test_last_step_adds_no_noise():
    x_t, out, z = draws(2, 1, 3, 3), draws(2, 2, 3, 3, seed=1), draws(2, 1, 3, 3, seed=2)
    assert torch.equal(D.ddpm_step(x_t, 0, out, z), D.ddpm_step(x_t, 0, out, -z))
    assert not torch.equal(D.ddpm_step(x_t, 1, out, z), D.ddpm_step(x_t, 1, out, -z))


def test_ddim_does_not_use_the_predicted_variance():
    x_t, eps_hat, v, z = draws(4, 2, 1, 3, 3)
    assert torch.equal(D.ddim_step(x_t, 700, torch.cat([eps_hat, v], dim=1), z, eta=1.0),
                       D.ddim_step(x_t, 700, eps_hat, z, eta=1.0))


def test_bound_terms_against_torch_distributions():
    x_0, eps = draws(6, 1, 2, 2).clamp(-1, 1), draws(6, 1, 2, 2, seed=1)
    x_t = D.q_sample(x_0, TIMES, eps)
    out = torch.cat([eps + 0.1 * draws(6, 1, 2, 2, seed=2), draws(6, 1, 2, 2, seed=3).tanh()], dim=1)
    found = bound_term(D, out, x_0, x_t, TIMES, clip=False)
    for i, t in enumerate(TIMES.tolist()):
        share = (out[i, 1:] + 1) / 2
        std = torch.exp(0.5 * (share * D.beta[t].log() + (1 - share) * D.log_beta_tilde[t]))
        mean = (x_t[i] - D.beta[t] / (1 - D.alpha_bar[t]).sqrt() * out[i, :1]) / D.alpha[t].sqrt()  # DDPM eq. 11
        if t == 0:
            upper, lower = (Normal(mean, std).cdf(x_0[i] + side / 255) for side in (1, -1))
            upper[x_0[i] > 0.999], lower[x_0[i] < -0.999] = 1, 0
            nats = -(upper - lower).clamp(min=1e-12).log()
        else:
            true_mean = (x_t[i] - D.beta[t] / (1 - D.alpha_bar[t]).sqrt() * eps[i]) / D.alpha[t].sqrt()
            nats = kl_divergence(Normal(true_mean, D.beta_tilde[t].sqrt()), Normal(mean, std))
        assert found[i].item() == pytest.approx(nats.mean().item() / math.log(2), rel=1e-6)


def test_the_mean_is_trained_by_l_simple_alone():
    x_0, eps, y = draws(6, 1, 2, 2), draws(6, 1, 2, 2, seed=1), torch.zeros(6).long()
    eps_hat, v = draws(6, 1, 2, 2, seed=2).requires_grad_(), draws(6, 1, 2, 2, seed=3).tanh().requires_grad_()
    D.loss(lambda x_t, t, y: torch.cat([eps_hat, v], dim=1), x_0, y, TIMES, eps, "mse").backward()
    torch.testing.assert_close(eps_hat.grad, 2 * (eps_hat - eps).detach() / eps.numel())
    assert (v.grad != 0).all()
    plain = D.loss(lambda x_t, t, y: eps_hat, x_0, y, TIMES, eps, "mse")
    term = bound_term(D, torch.cat([eps_hat, v], dim=1), x_0, D.q_sample(x_0, TIMES, eps), TIMES, clip=False).mean()
    both = D.loss(lambda x_t, t, y: torch.cat([eps_hat, v], dim=1), x_0, y, TIMES, eps, "mse")
    assert both.item() == pytest.approx(plain.item() + term.item())


def test_bound_of_a_known_distribution():
    """Data N(0, s^2), rounded to the grey levels; with the exact mean and variance of x_t-1 the bound is their entropy."""
    chain, s, N = GaussianDiffusion(1000), 0.3, 4000
    levels = (draws(N, 1, 1, 1) * s).clamp(-1, 1)
    x_0 = (((levels + 1) * 127.5).round() / 127.5 - 1).float()

    def exact(x_t, t, y):
        alpha_bar = chain.alpha_bar[t].reshape(-1, 1, 1, 1)
        eps = (1 - alpha_bar).sqrt() * x_t / (alpha_bar * s**2 + 1 - alpha_bar)
        of_x_0 = s**2 * (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)  # Var(x_0 | x_t)
        weight = (chain.alpha_bar_prev.sqrt() * chain.beta / (1 - chain.alpha_bar))[t].reshape(-1, 1, 1, 1)  # eq. 6
        log_variance = (chain.beta_tilde[t].reshape(-1, 1, 1, 1) + weight**2 * of_x_0).log()
        low, high = (values[t].reshape(-1, 1, 1, 1) for values in (chain.log_beta_tilde, chain.beta.log()))
        return torch.cat([eps, (2 * (log_variance - low) / (high - low) - 1).expand_as(eps)], dim=1).float()

    found = bits_per_dimension(chain, exact, x_0, torch.zeros(N).long(), torch.Generator().manual_seed(0)).mean().item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s**2) - math.log2(2 / 255)
    assert found == pytest.approx(entropy, abs=0.05)


def test_training_with_learned_variance_ends_in_samples(tmp_path, train_tiny):
    status, _, err = train_tiny(tmp_path, "--learn-sigma")
    assert status == 0, err
    model, _ = load_model(tmp_path / "model.pth")
    assert model.config.learn_sigma and model.config.out_channels == 2
    for sampler in ("ddpm", "ddim"):
        images = generate(model, torch.tensor([1, 2]), sampler=sampler, steps=4)
        assert images.shape == (2, 1, 28, 28) and images.isfinite().all()

