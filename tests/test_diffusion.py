"""Every formula against an independent derivation, both samplers against diffusers and against a known distribution."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from diffusion import GaussianDiffusion, guided

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


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_one_time_for_all_images_is_as_good_as_a_time_for_each(t):
    x_0, x_t, eps, z = (images(seed=seed) for seed in range(4))
    times = torch.full((len(x_0),), t)
    for call in (lambda t: D.q_sample(x_0, t, eps), lambda t: D.predict_x_0(x_t, t, eps),
                 lambda t: D.predict_eps(x_t, t, x_0), lambda t: D.q_posterior(x_0, x_t, t)[0],
                 lambda t: D.ddpm_step(x_t, t, eps, z), lambda t: D.ddim_step(x_t, t, eps, z, eta=0.5)):
        assert torch.allclose(call(t), call(times), rtol=1e-5, atol=1e-6)


def test_every_t_is_drawn_with_standard_normal_noise():
    x_0 = torch.zeros(20_000, 1, 2, 2)
    t, eps = D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == set(range(1000))
    assert eps.shape == x_0.shape and eps.mean().abs() < 0.02 and eps.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))[1], eps)


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
        if i == 0:  # their variance is clipped to 1e-20, but no noise is added at the last step either
            assert torch.equal(ours, chain.ddpm_step(x_t, torch.full((3,), i), eps_hat, torch.zeros_like(x_t)))
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


@pytest.mark.parametrize("guidance", [1.0, 1.4, 3.0])
def test_a_network_that_learned_its_guided_target_needs_no_guidance(guidance):
    """The mean of eps is known for each label: what the target converges to must be what `guided` makes of that mean."""
    true = torch.tensor([0.3, -1.2, 0.7, 0.1])[:, None, None, None].expand(4, 1, 2, 2)  # three labels and the null class
    x_0, y, t = torch.randn(4, 1, 2, 2), torch.arange(4), torch.tensor([0, 10, 500, 999])
    learned = true
    for _ in range(200):
        learned = D.guided_target(lambda x_t, t, y, now=learned: now[y], x_0, y, t, true, guidance, null_class=3)
    expected = guided(lambda x_t, t, y: true[y], guidance, null_class=3)(x_0, t, y)
    torch.testing.assert_close(learned, expected)
    assert torch.equal(learned[3], true[3])  # the null class has nothing to be guided by


def test_guided_target_shows_the_network_x_t_and_leaves_a_variance_out(open_network):
    x_0, eps = torch.randn(2, 3, 2, 12, 12)
    t, y, seen = torch.tensor([1, 500, 999]), torch.tensor([0, 5, 2]), []

    def with_variance(x_t, t, y):
        seen.append(x_t)
        return torch.cat([open_network(x_t, t, y), torch.full_like(x_t, 1e6)], dim=1)

    target = D.guided_target(with_variance, x_0, y, t, eps, 2.0, null_class=5)
    x_t = D.q_sample(x_0, t, eps)
    torch.testing.assert_close(seen[0], torch.cat([x_t, x_t]))
    expected = eps + 0.5 * (open_network(x_t, t, y) - open_network(x_t, t, torch.full_like(y, 5)))
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad and torch.equal(target[1], eps[1])
    loss = D.loss(open_network, x_0, y, t, eps, "mse", target=target)
    assert loss.item() == pytest.approx(((open_network(x_t, t, y) - target) ** 2).mean().item(), rel=1e-5)


# What a sampler hands out

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
