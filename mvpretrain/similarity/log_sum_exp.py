"""Log-sum-exps that grow by one set of terms after another, and what stands for the logarithm of an empty sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOG_ZERO = -1e30  # stands for log 0, of which the gradient of a log-sum-exp would make NaN


class LogSumExp(NamedTuple):
    """For each row (or column): the log-sum-exp over what it is paired with, and the index of the largest term."""

    lse: Float[Tensor, " b"]
    argmax: Int[Tensor, " b"]


class OnlineLogSumExp(NamedTuple):
    """Log-sum-exps that grow tile by tile, or block by block, in place; with leading dimensions, several of them."""

    lse: Float[Tensor, "*s b"]
    top: Float[Tensor, "*s b"]  # the largest term so far
    argmax: Int[Tensor, "*s b"]  # its index

    @classmethod
    def empty(cls, like: Tensor, *shape: int) -> OnlineLogSumExp:
        nothing = like.new_full(shape, -torch.inf)
        return cls(nothing, nothing.clone(), torch.zeros_like(nothing, dtype=torch.int64))

    def select(self, index: int) -> OnlineLogSumExp:
        """One of several: a view of the same memory."""
        return OnlineLogSumExp(*(x[index] for x in self))

    def add(self, at: slice, lse: Float[Tensor, " m"]) -> None:
        """Take the log-sum-exps of more terms of the rows `at` into theirs."""
        self.lse[at] = torch.logaddexp(self.lse[at], lse)

    def update_argmax(self, at: slice, start: int, top: Tensor, argmax: Callable[[Tensor], Tensor]) -> None:
        """Take the largest of more terms into account; `start` is the index of the first of these terms.

        `argmax(rows)` is asked only for rows whose new terms are larger: after the first tiles, hardly any.
        """
        new = (top > self.top[at]).nonzero().squeeze(1)
        self.argmax[at][new] = argmax(new) + start
        self.top[at][new] = top[new]

    def result(self) -> LogSumExp:
        return LogSumExp(self.lse, self.argmax)


def add_log_sums(log_sums: Sequence[Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
    """The logarithm of the sum of sums that are given by their logarithms; LOG_ZERO where all are empty."""
    return torch.stack(list(log_sums)).clamp_min(LOG_ZERO).logsumexp(dim=0)


def without_empty(lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, gradient), both 0 where the sum is of nothing."""
    empty = lse == -torch.inf
    return lse.masked_fill(empty, 0), grad.masked_fill(empty, 0)


def finite(top: Tensor) -> Tensor:
    """0 in place of -inf, the largest term of nothing: subtracting -inf would make NaN of it."""
    return top.masked_fill(top == -torch.inf, 0)


def or_inf(top: Tensor) -> Tensor:
    """inf in place of -inf, so that a minimum passes over what is paired with nothing."""
    return top.masked_fill(top == -torch.inf, torch.inf)
