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
    """torch.optim.SGD, for which groups of convolutions may have an "orthogonal_momentum" above 0.

    A weight (out, in, height, width) is taken as a matrix of `out` rows. Its gradient becomes
    sqrt(max(1, rows / columns)) times the orthogonalised Nesterov momentum, and the step that the
    group's own momentum of 0 makes takes it from there: with weight decay, which is decoupled that
    way, and skipped where fp16 overflows. Nothing waits for the device.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype  # of the orthogonalisation

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients, some of which it replaces; no closure is called."""
        for group in self.param_groups:
            if group.get("orthogonal_momentum"):
                self._replace_gradients(group["params"], group["orthogonal_momentum"])
        super().step(closure)

    def _replace_gradients(self, weights: list[torch.nn.Parameter], momentum: float) -> None:
        # As torch.amp.GradScaler tells it to optimizers that skip and unscale by themselves.
        overflow = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        same_shape = defaultdict(list)
        for weight in weights:
            gradient = weight.grad if scale is None else weight.grad / scale
            buffer = self.state[weight]["momentum_buffer"]
            added = momentum * buffer + gradient
            buffer.copy_(added if overflow is None else torch.where(overflow > 0, buffer, added))
            # Stored channels last, this is a matrix as it lies in memory.
            nesterov = gradient.add(added, alpha=momentum).permute(0, 2, 3, 1).flatten(1)
            same_shape[nesterov.shape].append((weight, nesterov))
        for (rows, columns), some in same_shape.items():
            factor = max(1, rows / columns) ** 0.5 * (1 if scale is None else scale)
            steps = orthogonalize(torch.stack([matrix for _, matrix in some]), self.dtype) * factor
            for (weight, _), step in zip(some, steps, strict=True):
                out, inside, height, width = weight.shape
                weight.grad.copy_(step.view(out, height, width, inside).permute(0, 3, 1, 2))
