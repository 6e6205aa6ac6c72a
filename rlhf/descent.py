"""The gradient of one optimizer step, summed up over micro-batches, workers and processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.engine import Engine
from rlhf.zero import ShardedAdamW


@dataclass(frozen=True)
class Descent:
    """Who computes, the optimizer that will step, and the parameters whose gradients are summed."""

    engine: Engine
    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]

    def descend(
        self, terms: Callable[[Any], Tensor], pieces: Sequence[Any], *, model: int = 0, last: bool = True
    ) -> list[float]:
        """Accumulate the gradient of the sum over pieces of the first term; return the sums of the others.

        Each worker goes through its pieces, one forward and backward after the other, and sums its own
        gradients: the result does not depend on which is first. An optimizer that is shared out learns
        whose gradient it is, and whether it is the `last` before a step.
        """
        if isinstance(self.optimizer, ShardedAdamW):
            return self._descend_sharded(terms, pieces, self.optimizer, model=model, last=last)
        no_gradients: list[Tensor | None] = [None] * len(self.parameters)
        processes = self.engine.processes
        pieces = processes.share(pieces)

        def work(mine: Sequence[Any]) -> tuple[Tensor, list[Tensor | None]]:
            totals, gradients = torch.zeros(()), no_gradients
            for piece in mine:
                found = terms(piece)
                with self.engine.no_autocast():
                    own = torch.autograd.grad(found[0], self.parameters, allow_unused=True)
                gradients = _add(gradients, own)
                totals = totals + found.detach().cpu()
            return totals, gradients

        shares = [pieces[k :: self.engine.workers] for k in range(min(self.engine.workers, len(pieces)))]
        with self.engine.autocast():  # around all pieces, so that trained weights are rounded once
            results = self.engine.side_by_side(work, shares)
        totals, gradients = torch.zeros(()), no_gradients  # where there is less than a piece for each process
        for terms_of_one, gradients_of_one in results:
            totals, gradients = totals + terms_of_one, _add(gradients, gradients_of_one)
        gradients = processes.sum_gradients(self.parameters, gradients)
        sums = _add([parameter.grad for parameter in self.parameters], gradients)
        for parameter, gradient in zip(self.parameters, sums, strict=True):
            parameter.grad = gradient
        return functools.reduce(torch.add, processes.all_of(totals))[1:].tolist()

    def _descend_sharded(
        self,
        terms: Callable[[Any], Tensor],
        pieces: Sequence[Any],
        optimizer: ShardedAdamW,
        *,
        model: int,
        last: bool,
    ) -> list[float]:
        rounds, totals = self.engine.processes.rounds(pieces), torch.zeros(())
        with self.engine.autocast():
            for number, (piece, weight) in enumerate(rounds, start=1):
                found = weight * terms(piece)
                with self.engine.no_autocast():
                    optimizer.backward(found[0], model=model, last=last and number == len(rounds))
                totals = totals + found.detach().cpu()
        return functools.reduce(torch.add, self.engine.processes.all_of(totals))[1:].tolist()


def _add(sums: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add gradients into those so far; no second set of them is held."""
    both = [(a, b) for a, b in zip(sums, new, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(sums, new, strict=True)]
