"""Every formula against an independent derivation, both samplers against diffusers and against a known distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion import GaussianDiffusion, discretized_log_likelihood, gaussian_kl, guided
from dit import DiT

D = GaussianDiffusion(1000)


def images(N: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(N, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TIMES = torch.tensor([0, 1, 10, 500, 998, 999])


# Schedule and closed forms

def test_schedule_against_numpy_in_float64():
    assert D.beta.dtype == torch.float64 and len(D) == 1000
    beta = np.array([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])
    np.testing.assert_allclose(D.beta.numpy(), beta, rtol=1e-12)
    assert D.beta[0] == 1e-4 and D.beta[-1] == 0.02
    product, alpha_bar = 1.0, []
    for b in beta:
        product *= 1 - b
        alpha_bar.append(product)
    np.testing.assert_allclose(D.alpha_bar.numpy(), alpha_bar, rtol=1e-12)


def test_q_sample_is_the_chain_of_single_steps():
    """Mean and variance of eq. 2 applied t + 1 times, step by step."""
    mean, variance = 1.0, 0.0
    for t in range(1000):
        b = 1e-4 + (0.02 - 1e-4) * t / 999
        mean, variance = math.sqrt(1 - b) * mean, (1 - b) * variance + b
        if t in TIMES:
            one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            time = torch.tensor([t])
            assert D.q_sample(one, time, zero).item() == pytest.approx(mean, rel=1e-10)
            assert D.q_sample(zero, time, one).item() ** 2 == pytest.approx(variance, rel=1e-10)


def test_x_0_and_eps_are_recovered_from_x_t():
    x_0, eps = images(seed=1), images(seed=2)
    x_t = D.q_sample(x_0, TIMES, eps)
    torch.testing.assert_close(D.predict_x_0(x_t, TIMES, eps), x_0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(D.predict_eps(x_t, TIMES, x_0), eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chain", [D, D.respaced(50), D.respaced(7)], ids=["all", "50", "7"])
def test_posterior_by_bayes(chain):
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): add precisions, weigh means by them."""
    for i in {1, 2, len(chain) // 2, len(chain) - 1}:
        t, s = int(chain.timesteps[i]), int(chain.timesteps[i - 1])
        steps = np.array([1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)])
        likelihood_scale = math.sqrt(np.prod(1 - steps[s + 1:t + 1]))  # x_t = scale * x_s + noise
        likelihood_variance = 1 - np.prod(1 - steps[s + 1:t + 1])
        prior_scale, prior_variance = math.sqrt(np.prod(1 - steps[:s + 1])), 1 - np.prod(1 - steps[:s + 1])
        precision = likelihood_scale**2 / likelihood_variance + 1 / prior_variance
        x_0, x_t = images(1, seed=1), images(1, seed=2)
        expected = (likelihood_scale / likelihood_variance * x_t + prior_scale / prior_variance * x_0) / precision
        mean, variance = chain.q_posterior(x_0, x_t, torch.tensor([i]))
        torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-9)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-7)


def test_posterior_ends_at_x_0():
    x_0 = images(1)
    mean, variance = D.q_posterior(x_0, images(1, seed=3), torch.tensor([0]))
    torch.testing.assert_close(mean, x_0)
    assert variance.item() == 0


def test_mean_from_eps_is_eq_11():
    """1/sqrt(alpha_t) (x_t - beta_t / sqrt(1 - alpha_bar_t) eps), which the sampler never writes down."""
    x_t, eps = images(seed=1), images(seed=2)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    stepped = D.ddpm_step(x_t, TIMES, eps, torch.zeros_like(x_t), clip=False)
    for n, t in enumerate(TIMES.tolist()):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        expected = (x_t[n] - beta / math.sqrt(1 - alpha_bar[t]) * eps[n]) / math.sqrt(1 - beta)
        torch.testing.assert_close(stepped[n], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_loss_is_the_mean_distance_of_eps(kind):
    x_0, eps, y = images(seed=1), images(seed=2), torch.arange(6)
    asked = {}

    def model(x_t, t, labels):
        asked.update(x_t=x_t, t=t, y=labels)
        return torch.zeros_like(x_t)

    loss = D.loss(model, x_0, y, TIMES, eps, kind).item()
    assert loss == pytest.approx(eps.abs().mean().item() if kind == "l1" else (eps**2).mean().item())
    assert torch.equal(asked["x_t"], D.q_sample(x_0, TIMES, eps))
    assert torch.equal(asked["t"], TIMES) and torch.equal(asked["y"], y)


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_min_snr_weights(kind):
    """Hang et al. 2023, section 3.4: min(SNR, gamma) / SNR for a network that predicts eps."""
    x_0, eps, y = images(seed=1), images(seed=2), torch.arange(6)

    def loss(min_snr, part=slice(None)):
        batch = (values[part] for values in (x_0, y, TIMES, eps))
        return D.loss(lambda x_t, t, y: torch.zeros_like(x_t), *batch, kind, min_snr).item()

    snr = D.alpha_bar[TIMES] / (1 - D.alpha_bar[TIMES])
    assert snr.max() > 5 > snr.min()
    each = [loss(0, slice(i, i + 1)) for i in range(6)]
    assert loss(5) == pytest.approx(sum(min(s, 5) / s * one for s, one in zip(snr.tolist(), each, strict=True)) / 6)
    assert loss(1e9) == pytest.approx(loss(0))


def test_every_t_is_drawn_with_standard_normal_noise():
    x_0 = torch.zeros(20_000, 1, 2, 2)
    t, eps = D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == set(range(1000))
    assert eps.shape == x_0.shape and eps.mean().abs() < 0.02 and eps.std().item() == pytest.approx(1, abs=0.02)


def test_t_and_eps_depend_on_the_generator_alone():
    x_0 = torch.zeros(3, 1, 2, 2)
    first = D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))
    torch.rand(1)  # what else draws numbers does not matter
    second = D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Against diffusers, step by step with the same noise

def noise_for(shape, seed):
    """The z that a diffusers scheduler draws from a generator of this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1000, 250, 20])
def test_ddpm_against_diffusers(steps):
    reference = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="fixed_small",
                              clip_sample=True, timestep_spacing="trailing")
    reference.set_timesteps(steps)
    chain = D.respaced(steps)
    assert reference.timesteps.tolist() == chain.timesteps.flip(0).tolist()
    for t, i in zip(reference.timesteps, reversed(range(steps)), strict=True):
        x_t, eps_hat = noise_for((3, 1, 4, 4), 2 * i), 0.7 * noise_for((3, 1, 4, 4), 2 * i + 1)
        theirs = reference.step(eps_hat, int(t), x_t, generator=torch.Generator().manual_seed(i)).prev_sample
        ours = chain.ddpm_step(x_t, torch.full((3,), i), eps_hat, noise_for(x_t.shape, i))
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1000, 50, 10, 1])
def test_ddim_against_diffusers(steps, eta):
    reference = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True,
                              set_alpha_to_one=True, timestep_spacing="trailing")
    reference.set_timesteps(steps)
    chain = D.respaced(steps)
    assert reference.timesteps.tolist() == chain.timesteps.flip(0).tolist()
    for t, i in zip(reference.timesteps, reversed(range(steps)), strict=True):
        x_t, eps_hat = noise_for((3, 1, 4, 4), 2 * i), 0.7 * noise_for((3, 1, 4, 4), 2 * i + 1)
        z = noise_for(x_t.shape, i)
        theirs = reference.step(eps_hat, int(t), x_t, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample
        ours = chain.ddim_step(x_t, torch.full((3,), i), eps_hat, z, eta=eta)
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


# Targets whose eps is known exactly: x_0 ~ N(mean, std^2), each pixel alone

def gaussian_model(mean: float, std: float):
    """E[eps | x_t], from the joint normal distribution of eps and x_t."""

    def eps_hat(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha_bar = D.alpha_bar[t].float().reshape(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)

    return eps_hat


def check_recovers(sampler, mean, std, rel=0.02, **settings):
    """Draw 40,000 pixels: the standard error of their mean is 0.001, of their deviation 0.4%."""
    x_0 = sampler(gaussian_model(mean, std), (4, 1, 100, 100), torch.zeros(4, dtype=torch.long),
                  generator=torch.Generator().manual_seed(0), **settings)
    assert x_0.mean().item() == pytest.approx(mean, abs=0.01)
    assert x_0.std().item() == pytest.approx(std, rel=rel)


DARK = (-0.6, 0.2)  # as most of a digit is: x_t lies within [-1, 1] less often than not
SAMPLERS = {
    "ddpm": (D.ddpm_sample, {}),
    "ddim": (D.ddim_sample, {"steps": 1000}),
    "ddim, eta 1": (D.ddim_sample, {"steps": 1000, "eta": 1.0}),
    "ddpm, 250 steps": (D.ddpm_sample, {"steps": 250, "rel": 0.1}),  # fewer steps fall short of the deviation
    "ddim, 100 steps": (D.ddim_sample, {"steps": 100, "rel": 0.1}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_recover_mean_and_deviation(name):
    sampler, settings = SAMPLERS[name]
    check_recovers(sampler, *DARK, clip=False, **settings)
    check_recovers(sampler, 0.2, 0.2, **settings)  # x_0 is within [-1, 1], so that clipping it does no harm


def test_a_sampler_that_clips_x_t_fails_that_test():
    def ddpm_that_clips_x_t(model, shape, y, generator):
        x_t = torch.randn(shape, generator=generator)
        for t in reversed(range(1000)):
            time = torch.full_like(y, t)
            z = torch.randn(shape, generator=generator)
            x_t = D.ddpm_step(x_t, time, model(x_t, time, y), z, clip=False).clamp(-1, 1)
        return x_t

    with pytest.raises(AssertionError):
        check_recovers(ddpm_that_clips_x_t, *DARK)
    with pytest.raises(AssertionError):
        check_recovers(ddpm_that_clips_x_t, 0.2, 0.2)


def test_eta_1_with_all_steps_has_ddpms_variance_and_mean():
    x_t, eps, z = images(seed=1), images(seed=2), images(seed=3)
    for t in range(1000):
        time = torch.full((6,), t)
        ours = D.ddim_step(x_t, time, eps, z, clip=False, eta=1.0)
        torch.testing.assert_close(ours, D.ddpm_step(x_t, time, eps, z, clip=False), rtol=1e-6, atol=1e-8)


def test_ddim_with_one_step_returns_the_clipped_x_0():
    model, x_T, y = gaussian_model(1.5, 0.2), images().float(), torch.zeros(6, dtype=torch.long)
    out = D.ddim_sample(model, x_T.shape, y, steps=1, x_T=x_T)
    t = torch.full((6,), 999)
    expected = D.predict_x_0(x_T, t, model(x_T, t, y))
    assert expected.max() > 1
    torch.testing.assert_close(out, expected.clamp(-1, 1))


# Guidance

def test_guidance_of_every_channel_with_the_null_class(open_network):
    x_t, t, y = torch.randn(3, 2, 12, 12), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 2])
    null = torch.full((3,), 5)
    eps_y, eps_null = open_network(x_t, t, y), open_network(x_t, t, null)
    assert (eps_y - eps_null).abs().amax(dim=(2, 3)).min() > 1e-4  # in both channels
    assert torch.equal(guided(open_network, 1, 5)(x_t, t, y), eps_y)
    assert torch.equal(guided(open_network, 0, 5)(x_t, t, y), eps_null)
    for strength in (0.5, 1.0001, 3.0):
        torch.testing.assert_close(guided(open_network, strength, 5)(x_t, t, y),
                                   (1 - strength) * eps_null + strength * eps_y, rtol=1e-4, atol=1e-5)


def test_guidance_leaves_a_predicted_variance_alone():
    x_t, t, y = torch.randn(3, 1, 4, 4), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 2])

    def model(x_t, t, y):  # eps is y, v is 10 y
        return torch.cat([y.reshape(-1, 1, 1, 1).expand_as(x_t), 10 * y.reshape(-1, 1, 1, 1).expand_as(x_t)], dim=1).float()

    eps_hat, v = guided(model, 3.0, 10)(x_t, t, y).chunk(2, dim=1)
    assert eps_hat[:, 0, 0, 0].tolist() == [10 + 3 * (label - 10) for label in (0, 1, 2)]
    assert v[:, 0, 0, 0].tolist() == [0, 10, 20]


# What a sampler returns

@pytest.mark.parametrize("name", ["ddpm_sample", "ddim_sample"])
def test_the_same_seed_gives_the_same_images_bit_for_bit(name, open_network):
    def draw(seed):
        return getattr(D, name)(open_network, (3, 2, 12, 12), torch.tensor([0, 1, 2]), steps=20,
                                generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("name", ["ddpm_sample", "ddim_sample"])
def test_on_step_sees_every_image_from_the_noise_to_the_result(name):
    seen = []
    x_T = torch.randn(2, 1, 4, 4)
    out = getattr(D, name)(gaussian_model(0, 0.5), x_T.shape, torch.zeros(2, dtype=torch.long), steps=4, x_T=x_T,
                           on_step=lambda t, x_t: seen.append((t, x_t)))
    assert [t for t, _ in seen] == [1000, 750, 500, 250, 0]
    assert torch.equal(seen[0][1], x_T) and torch.equal(seen[-1][1], out)


def test_the_network_is_told_the_times_of_the_full_chain():
    told = []

    def model(x_t, t, y):
        told.append(t.tolist())
        return torch.zeros_like(x_t)

    D.ddpm_sample(model, (2, 1, 4, 4), torch.zeros(2, dtype=torch.long), steps=5)
    assert told == [[999, 999], [799, 799], [599, 599], [399, 399], [199, 199]]


@pytest.mark.parametrize("steps", [1, 3, 7, 999])
def test_any_number_of_steps_ends_at_the_last_time(steps):
    times = D.respaced(steps).timesteps.tolist()
    assert len(set(times)) == steps and times == sorted(times) and times[-1] == 999


def test_settings_out_of_range_are_refused():
    y = torch.zeros(2, dtype=torch.long)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=r"must lie in \[1, 1000\]"):
            D.ddim_sample(gaussian_model(0, 0.5), (2, 1, 4, 4), y, steps=steps)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            D.ddim_sample(gaussian_model(0, 0.5), (2, 1, 4, 4), y, steps=50, eta=eta)
    with pytest.raises(ValueError, match="at least 1"):
        GaussianDiffusion(0)


# Learned variance and the NLL bound

def test_kl_of_gaussians():
    mean, log_variance, mean_2, log_variance_2 = images(400).reshape(4, -1)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(mean_2, (log_variance_2 / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean, log_variance, mean_2, log_variance_2), expected)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.1, 0.9])
def test_likelihoods_of_the_256_gray_levels_sum_to_one(mean, std):
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
    x_t = images()
    for v, expected in ((-1.0, D.log_beta_tilde), (1.0, D.beta.log()), (0.0, (D.log_beta_tilde + D.beta.log()) / 2)):
        found = D.log_variance(x_t, TIMES, torch.full_like(x_t, v))
        torch.testing.assert_close(found, expected[TIMES].reshape(-1, 1, 1, 1).expand_as(x_t))
    assert torch.equal(D.log_beta_tilde[1:], D.beta_tilde[1:].log()) and D.log_beta_tilde[0] == D.log_beta_tilde[1]
    assert GaussianDiffusion(1).log_beta_tilde.item() == pytest.approx(math.log(1e-4))


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_sampling_step_with_learned_variance_against_diffusers(t, monkeypatch):
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=True)
    x_t, eps_hat, v, z = images(12).float().split(3)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **settings: z)
    theirs = scheduler.step(torch.cat([eps_hat, v], dim=1), t, x_t).prev_sample
    ours = D.ddpm_step(x_t, torch.full((3,), t), torch.cat([eps_hat, v], dim=1), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-4)


def test_only_the_last_step_adds_no_noise():
    x_t, z, out = images(seed=1), images(seed=2), torch.cat([images(seed=3), images(seed=4)], dim=1)
    equal = D.ddpm_step(x_t, TIMES, out, z) == D.ddpm_step(x_t, TIMES, out, -z)
    assert equal[TIMES == 0].all() and not equal[TIMES > 0].any()


def test_ddim_does_not_use_the_predicted_variance():
    x_t, eps_hat, v, z = (images(seed=seed) for seed in range(4))
    assert torch.equal(D.ddim_step(x_t, TIMES, torch.cat([eps_hat, v], dim=1), z, eta=1.0),
                       D.ddim_step(x_t, TIMES, eps_hat, z, eta=1.0))


def test_bound_terms_against_torch_distributions():
    x_0, eps = images(seed=0).clamp(-1, 1), images(seed=1)
    x_t = D.q_sample(x_0, TIMES, eps)
    eps_hat, v = eps + 0.1 * images(seed=2), images(seed=3).tanh()
    found = D.vlb_term(torch.cat([eps_hat, v], dim=1), x_0, x_t, TIMES, clip=False)
    for i, t in enumerate(TIMES.tolist()):
        share = (v[i] + 1) / 2
        std = torch.exp(0.5 * (share * D.beta[t].log() + (1 - share) * D.log_beta_tilde[t]))
        mean = (x_t[i] - D.beta[t] / (1 - D.alpha_bar[t]).sqrt() * eps_hat[i]) / D.alpha[t].sqrt()  # DDPM eq. 11
        if t == 0:
            upper, lower = (Normal(mean, std).cdf(x_0[i] + side / 255) for side in (1, -1))
            upper[x_0[i] > 0.999], lower[x_0[i] < -0.999] = 1, 0
            nats = -(upper - lower).clamp(min=1e-12).log()
        else:
            true_mean = (x_t[i] - D.beta[t] / (1 - D.alpha_bar[t]).sqrt() * eps[i]) / D.alpha[t].sqrt()
            nats = kl_divergence(Normal(true_mean, D.beta_tilde[t].sqrt()), Normal(mean, std))
        assert found[i].item() == pytest.approx(nats.mean().item() / math.log(2), rel=1e-6)


def test_the_mean_is_trained_by_l_simple_alone():
    x_0, eps, y = images(seed=0), images(seed=1), torch.zeros(6).long()
    eps_hat, v = images(seed=2).requires_grad_(), images(seed=3).tanh().requires_grad_()
    out = torch.cat([eps_hat, v], dim=1)
    both = D.loss(lambda x_t, t, y: out, x_0, y, TIMES, eps, "mse")
    both.backward()
    torch.testing.assert_close(eps_hat.grad, 2 * (eps_hat - eps).detach() / eps.numel())
    assert (v.grad != 0).all()
    plain = D.loss(lambda x_t, t, y: eps_hat, x_0, y, TIMES, eps, "mse")
    term = D.vlb_term(out, x_0, D.q_sample(x_0, TIMES, eps), TIMES, clip=False).mean()  # 0.001 T = 1
    assert both.item() == pytest.approx(plain.item() + term.item())


def test_bound_of_a_known_distribution():
    """Data N(0, s^2), rounded to the gray levels; with the exact mean and variance of x_t-1 the bound is their entropy."""
    s, N, generator = 0.3, 4000, torch.Generator().manual_seed(0)
    levels = (s * torch.randn(N, 1, 1, 1, generator=generator)).clamp(-1, 1)
    x_0 = (((levels + 1) * 127.5).round() / 127.5 - 1).float()

    def exact(x_t, t):
        alpha_bar = D.alpha_bar[t].reshape(-1, 1, 1, 1)
        eps = (1 - alpha_bar).sqrt() * x_t / (alpha_bar * s**2 + 1 - alpha_bar)
        of_x_0 = s**2 * (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)  # Var(x_0 | x_t)
        weight = (D.alpha_bar_prev.sqrt() * D.beta / (1 - D.alpha_bar))[t].reshape(-1, 1, 1, 1)  # eq. 6
        log_variance = (D.beta_tilde[t].reshape(-1, 1, 1, 1) + weight**2 * of_x_0).log()
        low, high = (values[t].reshape(-1, 1, 1, 1) for values in (D.log_beta_tilde, D.beta.log()))
        return torch.cat([eps, (2 * (log_variance - low) / (high - low) - 1).expand_as(eps)], dim=1).float()

    found = 0.0  # without the prior's KL: less than 1e-5, as alpha_bar_T is 4e-5
    for t in torch.arange(1000):
        x_t = D.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator))
        found += D.vlb_term(exact(x_t, t), x_0, x_t, t.expand(N)).mean().item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s**2) - math.log2(2 / 255)
    assert found == pytest.approx(entropy, abs=0.05)


def test_a_network_with_learned_variance_trains_and_samples(small_config):
    model, y = DiT(replace(small_config, learn_sigma=True)), torch.tensor([0, 1, 5])
    x_0 = torch.rand(3, 2, 12, 12) * 2 - 1
    D.loss(model, x_0, y, *D.draw_t_and_eps(x_0)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (model.final_layer.linear.bias.grad != 0).all()  # of eps_hat and of v
    for sample in (D.ddpm_sample, D.ddim_sample):
        out = sample(guided(model, 1.5, 5), x_0.shape, y, steps=4)
        assert out.shape == x_0.shape and out.isfinite().all()
