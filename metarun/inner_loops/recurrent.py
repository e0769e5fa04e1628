"""Learned optimizers: recurrent networks that map the gradients of a weight to its updates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError, check_above_0
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.per_task import Params, flatten, unflatten


class LSTMCell(nn.LSTMCell):
    """`nn.LSTMCell`, optimised for far more rows than units: here every weight of a network is a row.

    On a CPU the gates are computed with the units as the first dimension, so that each gate is contiguous in
    memory. This takes half the time.
    """

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The next state (hidden, cell), [B, units] each, from x [B, inputs] and a state (None: zeros)."""
        if x.is_cuda:  # PyTorch has a fused kernel
            return super().forward(x, state)
        zeros = x.new_zeros(self.hidden_size, len(x))
        hidden, cell = (zeros, zeros) if state is None else (state[0].mT, state[1].mT)
        biases = (self.bias_ih + self.bias_hh).unsqueeze(1)
        gates = torch.addmm(torch.addmm(biases, self.weight_ih, x.mT), self.weight_hh, hidden)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4)  # [units, B] each
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return (output_gate.sigmoid() * cell.tanh()).mT, cell.mT


class MetaLSTM(InnerLoop):
    """The LSTM meta-learner (Ravi and Larochelle 2017, "Optimization as a Model for Few-Shot Learning").

    The weights are the cell state of an LSTM (equation 2), theta_t = f_t theta_(t-1) - i_t g_t.
    Inputs of its gates are the gradient and the loss, encoded by an ordinary LSTM of `hidden` units, the
    weight, and the gate's previous value (section 3.2). All weights share the two networks, and
    the first cell state is the meta-learned initialisation. Gradients and losses
    are constants of the meta-gradient (the paper's gradient independence assumption).

    Args:
        hidden: units of the LSTM.
        steps, test_steps: see `InnerLoop`; at least one step.
        forget_bias: the bias of the forget gate starts uniformly between these; 4 and 5 in the paper's code.
    """

    learned = True

    def __init__(
        self,
        hidden: int = 20,
        steps: int = 5,
        test_steps: int | None = None,
        forget_bias: tuple[float, float] = (4.0, 6.0),
    ) -> None:
        super().__init__(steps, test_steps, order=1)
        require_steps(steps)
        if forget_bias[0] > forget_bias[1]:
            raise ConfigError(
                f"inner_loop.forget_bias={list(forget_bias)}: must be two numbers, the second not below the "
                "first"
            )
        self.cell = LSTMCell(4, hidden)
        self.forget = nn.Linear(hidden + 2, 1)
        self.input = nn.Linear(hidden + 2, 1)
        # As in the paper: with a large forget gate and a small input gate, training starts near gradient
        # descent.
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.01, 0.01)
        nn.init.uniform_(self.forget.bias, *forget_bias)
        nn.init.uniform_(self.input.bias, -5, -4)

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        theta = flatten(params)  # [T, P]
        state = None
        forget_gate = input_gate = torch.zeros_like(theta)  # their previous values
        for step in range(self.step_count()):
            losses, grads = self.losses_and_gradients(loss, unflatten(theta, params), step)
            grad = flatten(grads)
            inputs = torch.cat(
                [preprocessed(grad), preprocessed(losses).unsqueeze(1).expand(*grad.shape, 2)], 2
            )  # [T, P, 4]
            state = self.cell(inputs.flatten(0, 1), state)
            hidden = state[0].unflatten(0, grad.shape)  # [T, P, hidden]
            forget_gate = self.gate(self.forget, hidden, theta, forget_gate)
            input_gate = self.gate(self.input, hidden, theta, input_gate)
            theta = forget_gate * theta - input_gate * grad
            yield unflatten(theta, params)

    @staticmethod
    def gate(layer: nn.Linear, hidden: Tensor, theta: Tensor, before: Tensor) -> Tensor:
        """sigmoid(W [hidden, theta, before] + b), [T, P], computed without concatenating the inputs."""
        weight = layer.weight[0]
        return (hidden @ weight[:-2] + weight[-2] * theta + weight[-1] * before + layer.bias).sigmoid()


class LearnedOptimizer(InnerLoop):
    """Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016).

    theta_(t+1) = theta_t + g_t, where g_t is the output of a two-layer LSTM of `hidden` units, which
    takes the gradient of each weight (equation 3 and section 2.1) and is shared by all weights.
    Gradients are constants of the meta-gradient (section 2).

    Departure: the paper trains the optimizer alone, on the summed losses of the steps; here it is trained
    on the query loss, together with the initialisation of the learner.

    Args:
        hidden: units of each layer.
        scale: multiplies the updates.
        steps, test_steps: see `InnerLoop`; at least one step.
    """

    learned = True

    def __init__(
        self, hidden: int = 20, scale: float = 0.1, steps: int = 5, test_steps: int | None = None
    ) -> None:
        super().__init__(steps, test_steps, order=1)
        require_steps(steps)
        check_above_0("inner_loop", scale=scale)
        self.scale = scale
        self.cells = nn.ModuleList([LSTMCell(2, hidden), LSTMCell(hidden, hidden)])
        self.output = nn.Linear(hidden, 1)

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        theta = flatten(params)  # [T, P]
        states: list[tuple[Tensor, Tensor] | None] = [None, None]
        for step in range(self.step_count()):
            grad = flatten(self.gradients(loss, unflatten(theta, params), step))
            x = preprocessed(grad).flatten(0, 1)  # [T*P, 2]
            for i, cell in enumerate(self.cells):
                states[i] = cell(x, states[i])
                x = states[i][0]  # type: ignore[index]
            theta = theta + self.scale * self.output(x).view_as(theta)
            yield unflatten(theta, params)


def preprocessed(x: Tensor, p: float = 10.0) -> Tensor:
    """Logarithm of the magnitude, and sign, of x; [*shape, 2] (Andrychowicz et al., appendix A)."""
    small = math.exp(-p)
    is_large = x.abs() >= small
    size = torch.where(is_large, x.abs().clamp(min=small).log() / p, -1.0)
    sign = torch.where(is_large, x.sign(), x / small)
    return torch.stack([size, sign], -1)


def require_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"inner_loop.steps={steps}: a learned optimizer needs at least one step")
