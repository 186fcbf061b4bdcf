"""How the weights are updated: Muon for matrices, AdamW for all others, and the learning rate.

    optimizer = Optimizer([encoder, llm], peak_lr=4e-3)
    loss.backward()
    norm = optimizer.step(schedule(step, steps))

The gradient of a matrix often has a few large singular values, so that a step along it changes the
matrix in few directions. Muon (Jordan et al., 2024) makes the step nearly orthogonal: then all
directions count alike. Here it is as large as a step of AdamW, so that both take one rate. On the
built-in task the warm-up ends at 1.00 so, and at 0.92 with AdamW alone (docs/lab.md).
"""
import math

import torch


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the embeddings and all vectors, as one.

    What is a matrix is decayed. A weight without a gradient stays as it is.
    """

    def __init__(self, models, peak_lr):
        self.peak_lr = peak_lr
        self.parameters = [p for model in models for p in model.parameters()]
        blocks = [{"params": [p for p in model.h.parameters() if p.dim() == 2]}
                  for model in models]
        embeddings = [e.weight for model in models for e in (model.wte, model.wpe)]
        vectors = [p for p in self.parameters if p.dim() < 2]
        adamw = [{"params": embeddings}, {"params": vectors, "weight_decay": 0.0}]
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.both = (
            Muon(blocks, weight_decay=0.1),
            torch.optim.AdamW(adamw, weight_decay=0.1, betas=(0.9, 0.95), fused=fused))

    def step(self, rate):
        """Clip the gradients, update the weights at this share of the peak rate, clear.

        Returns the norm that the gradients had, a tensor.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for one in self.both:
            for group in one.param_groups:
                group["lr"] = self.peak_lr * rate
            one.step()
            one.zero_grad(set_to_none=True)
        return norm

    def state_dict(self):
        return [one.state_dict() for one in self.both]

    def load_state_dict(self, states):
        for one, state in zip(self.both, states, strict=True):
            one.load_state_dict(state)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in float32 on all but CUDA.

    That one calculates in bfloat16, for which many CPUs have no instructions: there more than half
    of the time of a training step goes into it.
    """

    def __init__(self, groups, weight_decay, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike = {}  # a few large products take a GPU less time than many small ones
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(mean, momentum)  # Nesterov: this gradient counts once more
                alike.setdefault(p.shape, []).append((p, ahead))
            for shape, pairs in alike.items():
                updates = orthogonalize(torch.stack([ahead for _, ahead in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - lr * group["weight_decay"])
                    # the entries of U Vᵀ have the root mean square 1/√max(shape), and those of a
                    # step of AdamW mostly about 0.2
                    p.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * lr)


def orthogonalize(matrices):
    """Matrices U S Vᵀ, (M, rows, columns), with the larger singular values brought to 0.7 … 1.2.

    That is roughly U Vᵀ. Each of five steps of a Newton–Schulz iteration takes a singular value s
    to s · (3.4445 − 4.7750 s² + 2.0315 s⁴); `even` is this factor without its 3.4445. Values below
    about a hundredth of the largest stay small.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.size(1) > x.size(2)
    x = x.mT.contiguous() if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                                    # (M, rows, rows)
        even = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, even, x, beta=3.4445)                         # (M, rows, columns)
    return x.mT if tall else x


def schedule(step, steps):
    """The learning rate as a share of its peak: a ramp over the first 5 %, a cosine down to 0."""
    ramp = (step + 1) / max(1, steps // 20)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(ramp, cosine)
