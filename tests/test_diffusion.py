"""Every formula against an independent derivation; samplers against diffusers and known answers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from config import ModelConfig
from diffusion import GaussianDiffusion, discretized_log_likelihood, guided
from dit import DiT

D = GaussianDiffusion()
TIMES = torch.tensor([0, 1, 10, 500, 998, 999])
BETA = np.array([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])  # DDPM section 4


def images(N: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 2, 3, 3, generator=generator, dtype=torch.float64)


def at_times(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[TIMES].reshape(-1, 1, 1, 1)


# Forward process and loss

def test_q_sample_is_the_chain_of_single_steps():
    """Mean and variance of eq. 2 applied t + 1 times, step by step."""
    np.testing.assert_allclose(D.beta.numpy(), BETA, rtol=1e-12)
    mean, variance = np.ones(1000), np.zeros(1000)
    for t, b in enumerate(BETA):  # the steps up to t are part of every x_s with s >= t
        mean[t:], variance[t:] = math.sqrt(1 - b) * mean[t:], (1 - b) * variance[t:] + b
    zero, t = torch.zeros(1000, 1, 1, 1).double(), torch.arange(1000)
    np.testing.assert_allclose(D.q_sample(zero + 1, t, zero).flatten(), mean, rtol=1e-10)
    np.testing.assert_allclose(D.q_sample(zero, t, zero + 1).flatten() ** 2, variance, rtol=1e-10)


@pytest.mark.parametrize("predicts", ["x_0", "v"])
def test_outputs_read_as_eps(predicts):
    """A network that knows the answer, in whatever form, predicts eps; its variance stays."""
    x_0, eps, alpha_bar = images(seed=1), images(seed=2), at_times(np.cumprod(1 - BETA))
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
    answer = torch.cat([{"x_0": x_0, "v": v}[predicts], 2 * x_0], dim=1)
    network = D.as_eps(lambda *batch: answer, predicts)
    found = network(D.q_sample(x_0, TIMES, eps), TIMES, TIMES)
    torch.testing.assert_close(found, torch.cat([eps, 2 * x_0], dim=1))


@pytest.mark.parametrize("min_snr", [0, 5])
@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_loss(kind, min_snr):
    """The mean distance of eps_hat from eps, weighted by min(SNR, gamma) / SNR of each image."""
    x_0, eps, eps_hat, y = images(seed=1), images(seed=2), images(seed=3), torch.arange(6)

    def model(x_t, t, labels):
        assert torch.equal(x_t, D.q_sample(x_0, TIMES, eps))
        assert torch.equal(t, TIMES) and torch.equal(labels, y)
        return eps_hat

    each = (eps - eps_hat).abs().pow(1 if kind == "l1" else 2).mean(dim=(1, 2, 3))
    alpha_bar = np.cumprod(1 - BETA)[TIMES]
    weights = [min(snr, min_snr) / snr if min_snr else 1 for snr in alpha_bar / (1 - alpha_bar)]
    found = D.loss(model, x_0, y, TIMES, eps, kind, min_snr).item()
    assert found == pytest.approx((torch.tensor(weights) * each).mean().item())


def test_every_t_is_drawn_with_standard_normal_noise():
    x_0 = torch.zeros(20_000, 1, 2, 2)
    t, eps = D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == set(range(1000)) and eps.shape == x_0.shape
    assert eps.mean().abs() < 0.02 and eps.std().item() == pytest.approx(1, abs=0.02)
    again = D.draw_t_and_eps(x_0, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], t) and torch.equal(again[1], eps)


# Reverse process

@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_posterior_by_bayes(steps):
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0): add precisions, weigh means by them."""
    chain, x_0, x_t = D.respaced(steps), images(1, seed=1), images(1, seed=2)
    for i in {1, 2, steps // 2, steps - 1}:
        s, t = chain.timesteps[i - 1:i + 1].tolist()
        kept, prior = np.prod(1 - BETA[s + 1:t + 1]), np.prod(1 - BETA[:s + 1])
        likelihood, prior_precision = kept / (1 - kept), 1 / (1 - prior)
        precision = likelihood + prior_precision  # x_t = sqrt(kept) x_s + noise
        expected = (likelihood / math.sqrt(kept) * x_t
                    + prior_precision * math.sqrt(prior) * x_0) / precision
        mean, variance = chain.q_posterior(x_0, x_t, torch.tensor([i]))
        torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-9)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-7)
    mean, variance = chain.q_posterior(x_0, x_t, torch.tensor([0]))
    torch.testing.assert_close(mean, x_0)
    assert variance.item() == 0


def test_mean_from_eps_is_eq_11():
    """1/sqrt(alpha_t) (x_t - beta_t / sqrt(1 - alpha_bar_t) eps): the sampler never writes it."""
    x_t, eps = images(seed=1), images(seed=2)
    beta, alpha_bar = at_times(BETA), at_times(np.cumprod(1 - BETA))
    expected = (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()
    found = D.ddpm_step(x_t, TIMES, eps, torch.zeros_like(x_t), clip=False)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def random_steps(scheduler, steps: int):
    """Every step of both chains: index and time, and x_t, eps_hat, v and z drawn for it."""
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == D.respaced(steps).timesteps.flip(0).tolist()
    for t, i in zip(scheduler.timesteps.tolist(), reversed(range(steps)), strict=True):
        # z is what a scheduler draws with this seed
        z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(i))
        x_t, eps_hat, v = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(~i))
        yield t, i, x_t, 0.7 * eps_hat, v, z


@pytest.mark.parametrize(("steps", "variance"), [
    (1000, "learned_range"), (250, "fixed_small"), (20, "fixed_small")])
def test_ddpm_against_diffusers(steps, variance):
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type=variance,
                              timestep_spacing="trailing")
    for t, i, x_t, eps_hat, v, z in random_steps(scheduler, steps):
        out = eps_hat if variance == "fixed_small" else torch.cat([eps_hat, v], dim=1)
        theirs = scheduler.step(out, t, x_t, generator=torch.Generator().manual_seed(i))
        ours = D.respaced(steps).ddpm_step(x_t, torch.full((3,), i), out, z, clip=True)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=5e-4, atol=1e-4)


@pytest.mark.parametrize(("steps", "eta"), [(250, 0.5), (50, 0.0), (1000, 1.0), (1, 0.0)])
def test_ddim_against_diffusers(steps, eta):
    """eta = 1 has DDPM's variance; a predicted one is not used."""
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    for t, i, x_t, eps_hat, v, z in random_steps(scheduler, steps):
        theirs = scheduler.step(eps_hat, t, x_t, eta=eta, use_clipped_model_output=True,
                                variance_noise=z)
        ours = D.respaced(steps).ddim_step(x_t, torch.full((3,), i),
                                           torch.cat([eps_hat, v], dim=1), z, True, eta)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("sampler", "settings", "mean", "clip", "rel"), [
    ("ddpm", {}, -0.6, False, 0.02), ("ddim", {"steps": 1000}, -0.6, False, 0.02),
    # Clipping does no harm within [-1, 1]; fewer steps fall short of the deviation.
    ("ddpm", {"steps": 250}, 0.2, True, 0.1), ("ddim", {"steps": 100}, 0.2, True, 0.1)])
def test_samplers_recover_a_known_distribution(sampler, settings, mean, clip, rel):
    """x_0 ~ N(mean, 0.2^2), pixels i.i.d. Standard errors of 40,000: 0.001, and 0.4% of 0.2."""

    def model(x_t, t, y):  # E[eps | x_t], from the joint normal distribution of eps and x_t
        alpha_bar = D.alpha_bar[t].float().reshape(-1, 1, 1, 1)
        variance = alpha_bar * 0.2**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / variance

    generator = torch.Generator().manual_seed(0)
    x_T, y = torch.randn(4, 1, 100, 100, generator=generator), torch.zeros(4).long()
    x_0 = D.sample(model, x_T, y, sampler=sampler, clip=clip, generator=generator, **settings)
    assert x_0.mean().item() == pytest.approx(mean, abs=0.01)
    assert x_0.std().item() == pytest.approx(0.2, rel=rel)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_what_a_sampler_tells_the_network_and_its_caller(name):
    """Times of the full chain; every image; the same bits for the same seed."""
    told, seen, x_T = [], [], torch.randn(2, 1, 4, 4)

    def model(x_t, t, y):
        told.append(t.tolist())
        return 0.1 * x_t

    def sample(seed):
        return D.sample(model, x_T, torch.tensor([0, 1]), sampler=name, steps=4,
                        on_step=lambda t, x_t: seen.append((t, x_t)),
                        generator=torch.Generator().manual_seed(seed))

    out = sample(0)
    assert told == [[999, 999], [749, 749], [499, 499], [249, 249]]
    assert [t for t, _ in seen] == [1000, 750, 500, 250, 0]
    assert torch.equal(seen[0][1], x_T) and torch.equal(seen[-1][1], out)
    assert torch.equal(sample(1), sample(1))
    assert torch.equal(sample(1), sample(2)) == (name == "ddim")


def test_guidance():
    """Of every channel of eps; a predicted variance stays that of the conditional model."""
    x_t, t, y = images(3), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 2])

    def model(x_t, t, y):  # four channels: eps_hat and v; 5 is the null class
        y, t = y.reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1)
        return torch.cat([x_t * (y + t), (y + 10 * t) + 0 * x_t], dim=1)

    eps_y, v = model(x_t, t, y).split(2, dim=1)
    eps_null, _ = model(x_t, t, torch.full((3,), 5)).split(2, dim=1)
    for strength in (0, 0.5, 1, 3.0):
        expected = (1 - strength) * eps_null + strength * eps_y  # CFG eq. 6 with strength = 1 + w
        found = guided(model, strength, 5)(x_t, t, y)
        torch.testing.assert_close(found[:, :2], expected)
        assert torch.equal(found[:, 2:], v)
        plain = guided(lambda *inputs: model(*inputs)[:, :2], strength, 5)
        torch.testing.assert_close(plain(x_t, t, y), expected)


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied from one device to another."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = [value.device for value in args if isinstance(value, Tensor)]
            devices += [torch.device((kwargs or {}).get("device") or devices[0])]
            self.count += len({device.type for device in devices}) > 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("settings", [{}, {"predicts": "v", "learn_sigma": True}], ids=str)
def test_a_training_step_copies_nothing_between_devices(settings):
    """A device without memory stands in for a GPU; reading a value from it fails."""
    model, diffusion = DiT(ModelConfig(**settings)).to("meta"), GaussianDiffusion(device="meta")
    x_0, y = torch.empty(2, 1, 28, 28, device="meta"), torch.empty(2, device="meta").long()
    with Copies() as copies:
        t, eps = diffusion.draw_t_and_eps(x_0, None)
        network = diffusion.as_eps(model, model.config.predicts)
        diffusion.loss(network, x_0, model.y_embedder.drop(y), t, eps, "l1", 0.3).backward()
    with Copies() as seen:
        torch.empty(2).to("meta")
    assert (copies.count, seen.count) == (0, 1)


# Learned variance and the NLL bound

def test_likelihoods_of_the_256_gray_levels_sum_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-1.2, -1.0, 0.1, 0.9):
        for std in (0.001, 0.1, 5.0):
            p = Normal(torch.full_like(levels, mean), std)
            likelihoods = discretized_log_likelihood(levels, p).exp()
            assert likelihoods.sum().item() == pytest.approx(1, abs=1e-8)
            if std == 0.001:  # wider ones leave more to the tails of the outermost levels
                assert abs(levels[likelihoods.argmax()] - max(mean, -1)) <= 1 / 255


def test_small_likelihoods_are_as_good_in_float32_on_both_sides():
    mean = torch.tensor([-0.5, 0.5, 1 - 0.3, 0.3 - 1, 0.2])
    level = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.2])  # 0 is six standard deviations away
    found = discretized_log_likelihood(level, Normal(mean, 0.08))
    expected = discretized_log_likelihood(level.double(), Normal(mean.double(), 0.08))
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert -25 < found[0] < -15


def test_bound_terms_against_torch_distributions():
    """At t = 0, where beta_tilde is 0, the variance is the next one's, as in iDDPM's code."""
    alpha_bar = np.cumprod(1 - BETA)
    beta_tilde = BETA[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    log_beta_tilde = torch.from_numpy(np.log([beta_tilde[0], *beta_tilde]))
    x_0, eps = images(seed=0).clamp(-1, 1), images(seed=1)
    x_t = D.q_sample(x_0, TIMES, eps)
    eps_hat, v = eps + 0.1 * images(seed=2), images(seed=3).tanh()
    found = D.vlb_term(torch.cat([eps_hat, v], dim=1), x_0, x_t, TIMES, clip=False)
    for i, t in enumerate(TIMES.tolist()):
        share = (v[i] + 1) / 2
        std = torch.exp(0.5 * (share * math.log(BETA[t]) + (1 - share) * log_beta_tilde[t]))
        mean, true_mean = (  # DDPM eq. 11
            (x_t[i] - BETA[t] / math.sqrt(1 - alpha_bar[t]) * noise) / math.sqrt(1 - BETA[t])
            for noise in (eps_hat[i], eps[i]))
        if t == 0:
            upper, lower = (Normal(mean, std).cdf(x_0[i] + side / 255) for side in (1, -1))
            upper[x_0[i] > 0.999], lower[x_0[i] < -0.999] = 1, 0
            nats = -(upper - lower).clamp(min=1e-12).log()
        else:
            true_std = (0.5 * log_beta_tilde[t]).exp()
            nats = kl_divergence(Normal(true_mean, true_std), Normal(mean, std))
        assert found[i].item() == pytest.approx(nats.mean().item() / math.log(2), rel=1e-6)


def test_the_mean_is_trained_by_l_simple_alone():
    x_0, eps, y = images(seed=0), images(seed=1), torch.zeros(6).long()
    eps_hat, v = images(seed=2).requires_grad_(), images(seed=3).tanh().requires_grad_()
    out = torch.cat([eps_hat, v], dim=1)
    both = D.loss(lambda x_t, t, y: out, x_0, y, TIMES, eps, "mse")
    both.backward()
    torch.testing.assert_close(eps_hat.grad, 2 * (eps_hat - eps).detach() / eps.numel())
    assert (v.grad != 0).all()
    x_t = D.q_sample(x_0, TIMES, eps)
    term = D.vlb_term(out, x_0, x_t, TIMES, clip=False).mean()  # 0.001 T = 1
    l_simple = (eps_hat - eps).square().mean().item()
    assert both.item() == pytest.approx(l_simple + term.item())
