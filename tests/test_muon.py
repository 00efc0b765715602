"""Orthogonalised steps, against singular value decompositions and the method written out."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils import flop_counter

import engine
from muon import Muon, orthogonalize
from utils import RECIPES


@pytest.mark.parametrize("shape", [(2, 24, 60), (3, 60, 24), (1, 32, 32)])
def test_singular_values_become_about_one_and_singular_vectors_stay(
    shape: tuple[int, int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator) * 1e-3
    found = orthogonalize(matrices, torch.float32)
    assert found.shape == matrices.shape
    for before, after in zip(matrices.double(), found.double(), strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        inside = left.T @ after @ right.T  # diagonal, if the singular vectors are the same
        values = inside.diagonal()
        assert (inside - values.diag()).abs().max() < 1e-4
        # The smallest ones of a square matrix may be too small for five rounds.
        least = 0.65 if shape[1] != shape[2] else 0.0
        assert least < values.min() and values.max() < 1.25
        assert values.median() > 0.65


@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 60, 24)])
def test_the_smaller_of_the_two_products_with_itself_is_computed(
    shape: tuple[int, int, int],
) -> None:
    """Five rounds of 4 m^2 n + 2 m^3 for each matrix, m the shorter side; else up to ten times."""
    with flop_counter.FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(shape), torch.float32)
    assert counter.get_total_flops() == 3 * 5 * (4 * 24**2 * 60 + 2 * 24**3)


def test_a_weight_without_gradient_gets_no_step() -> None:
    """As the convolutions of a residual branch that starts at zero have none at first."""
    assert orthogonalize(torch.zeros(2, 8, 24), torch.float32).abs().max() == 0
    assert orthogonalize(torch.zeros(2, 8, 24), torch.bfloat16).abs().max() == 0


class Small(nn.Module):
    """Convolutions that are wide and tall as matrices, a linear layer as wide, and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall = nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 48, 1)
        self.narrow, self.linear = nn.Conv2d(48, 6, 1), nn.Linear(48, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.tall(self.wide(images))
        pooled = self.linear(images.amax((2, 3)))
        return torch.cat([self.narrow(images).flatten(1), pooled, images.flatten(1)], dim=1)


def new_small() -> tuple[Small, Muon]:
    model = Small().to(memory_format=torch.channels_last)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.2}]
    optimizer = Muon(groups, torch.float32, momentum=0.8, lr=0.05, fused=True)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return model, optimizer


def loss_of(model: Small, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, 4, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    return model(images).square().mean()


def written_out(matrix: torch.Tensor) -> torch.Tensor:
    """The quintic iteration on a single matrix in float64, one term after another."""
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def test_the_step_is_the_method_written_out() -> None:
    model, optimizer = new_small()
    plain = Small().double()
    momentum = {name: torch.zeros_like(weight) for name, weight in plain.named_parameters()}
    scales = {
        "wide.weight": 1,  # of 8 x 36
        "tall.weight": math.sqrt(48 / 8),
        "narrow.weight": 1,  # of 6 x 48, as the linear layer's
        "linear.weight": math.sqrt(6 / 48),
    }
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for parameter in plain.parameters():
            parameter.grad = None
        generator = torch.Generator().manual_seed(step)
        plain(torch.randn(2, 4, 5, 5, generator=generator).double()).square().mean().backward()
        with torch.no_grad():
            for name, weight in plain.named_parameters():
                momentum[name] = 0.8 * momentum[name] + weight.grad
                update = weight.grad + 0.8 * momentum[name]
                if weight.ndim > 1:
                    rows, columns = weight.shape[0], weight[0].numel()
                    update = written_out(update.reshape(rows, columns)).view(weight.shape)
                    update = update * scales[name]
                # Decoupled: the momentum holds nothing of it.
                weight.sub_(0.05 * (update + (0.1 if weight.ndim > 1 else 0.2) * weight))
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.double(), plain.state_dict()[name], atol=2e-5), name


def test_loss_scaling_changes_nothing_and_an_overflow_skips_the_step() -> None:
    plain, optimizer = new_small()
    scaled, scaled_optimizer = new_small()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
        scaled_optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.step(scaled_optimizer)
        scaler.update()
    for name, weight in plain.state_dict().items():
        assert torch.allclose(scaled.state_dict()[name], weight, atol=1e-6), name

    before = {name: weight.clone() for name, weight in scaled.state_dict().items()}
    buffers = [state["momentum_buffer"].clone() for state in scaled_optimizer.state.values()]
    scaled_optimizer.zero_grad()
    scaler.scale(loss_of(scaled, 2) * torch.inf).backward()
    scaler.step(scaled_optimizer)
    scaler.update()
    assert scaler.get_scale() == 128
    for name, weight in scaled.state_dict().items():
        assert torch.equal(weight, before[name]), name
    for state, buffer in zip(scaled_optimizer.state.values(), buffers, strict=True):
        assert torch.equal(state["momentum_buffer"], buffer)


def test_only_what_has_one_dimension_is_spared_weight_decay() -> None:
    changed = {"precision": "fp32", "decay_norm_and_bias": False}
    run = engine.new_run(dataclasses.replace(RECIPES["fast"].config, **changed), 3)
    assert isinstance(run.optimizer, Muon)
    names = {parameter: name for name, parameter in run.model.model.named_parameters()}
    groups = {
        group["weight_decay"]: [names[parameter] for parameter in group["params"]]
        for group in run.optimizer.param_groups
    }
    assert set(groups) == {RECIPES["fast"].config.weight_decay, 0.0}
    decayed = groups[RECIPES["fast"].config.weight_decay]
    assert len(decayed) == 54
    assert {"conv1.weight", "fc.weight"} < set(decayed)
    assert all("conv" in n or "downsample.0" in n or n == "fc.weight" for n in decayed)
    assert all("bn" in n or "downsample.1" in n or n == "fc.bias" for n in groups[0.0])
