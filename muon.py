"""Muon: SGD whose steps of a convolution's weights are orthogonalised.

The momentum of a weight matrix is dominated by a few directions; replaced by the nearest orthogonal
matrix, it moves all of them alike. After Keller Jordan, https://kellerjordan.github.io/posts/muon.
PyTorch's own torch.optim.Muon takes matrices only, one at a time, and knows no loss scaling.
"""

from collections import defaultdict
from typing import Any

import torch

# Of the quintic iteration s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 on the singular values, which
# takes any of 0.001 to 1 to between 0.7 and 1.2 in five rounds (the page above).
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, R, C) → about U V^T of each one's singular value decomposition U S V^T, in `dtype`.

    The singular values come out between 0.7 and 1.2, by matrix products alone.
    """
    matrices = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(torch.optim.SGD):
    """torch.optim.SGD with Nesterov momentum, whose steps of matrices are orthogonalised.

    Each gradient becomes its Nesterov momentum, and the step without momentum that SGD makes takes
    it from there: with a weight decay that is decoupled that way, so that it means the same to all
    groups, and skipped where fp16 overflows. A convolution (out, in, height, width) is taken as a
    matrix of `out` rows, and its step made about orthogonal, times sqrt(max(1, rows / columns)); so
    is a linear layer's (out, in), times sqrt(rows / columns), which moves its outputs alike however
    many there are. Biases, and what else has one dimension, step as with SGD. Nothing waits for the
    device.
    """

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype, momentum: float, **options: Any
    ) -> None:
        super().__init__([{"own_momentum": momentum, **group} for group in groups], **options)
        self.dtype = dtype  # of the orthogonalisation

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients, which it replaces; no closure is called."""
        for group in self.param_groups:
            self._replace_gradients(group)
        super().step(closure)

    def _replace_gradients(self, group: dict[str, Any]) -> None:
        # As torch.amp.GradScaler tells it to optimizers that skip and unscale by themselves.
        overflow = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        momentum = group["own_momentum"]
        buffers = [self.state[weight]["momentum_buffer"] for weight in group["params"]]
        scaled = [weight.grad for weight in group["params"]]
        gradients = scaled if scale is None else torch._foreach_div(scaled, scale)
        added = torch._foreach_add(gradients, buffers, alpha=momentum)
        steps = torch._foreach_add(gradients, added, alpha=momentum)
        for buffer, new in zip(buffers, added, strict=True):
            buffer.copy_(new if overflow is None else torch.where(overflow > 0, buffer, new))
        self._orthogonalize([step for step in steps if step.ndim > 1])
        torch._foreach_copy_(scaled, steps if scale is None else torch._foreach_mul(steps, scale))

    def _orthogonalize(self, steps: list[torch.Tensor]) -> None:
        same_shape = defaultdict(list)
        for step in steps:
            # Stored channels last, a convolution's is a matrix as it lies in memory.
            channels_last = step.movedim(1, -1)
            matrix = channels_last.flatten(1)
            same_shape[step.ndim, *matrix.shape].append((channels_last, matrix))
        for (dimensions, rows, columns), some in same_shape.items():
            matrices = orthogonalize(torch.stack([matrix for _, matrix in some]), self.dtype)
            matrices *= max(1 if dimensions == 4 else 0, rows / columns) ** 0.5
            for (step, _), matrix in zip(some, matrices, strict=True):
                step.copy_(matrix.view(step.shape))
