"""The floor of a step: what its indispensable work takes when nothing else is done, each piece at its best.

    N tokens, H width of the head's input, V vocabulary

Of a model with a softmax over its vocabulary:
- logits, x gradient, weight gradient: the head's three matrix products, each in the best of several layouts of its
  operands and cut into the best number of chunks, into memory that is there already;
- recurrence: the vendor's kernel of each layer forward and backward, its input products and all its gradients;
- softmax: one pass from logits to probabilities in the precision of the step, from memory to memory;
- embedding gather, embedding scatter: token vectors looked up, and their gradients summed into a zeroed matrix;
- update: PyTorch's fused Adam over all parameters in fp32.

It is no lower bound of nature: a kernel that makes logits and softmax at once could be below it. And it cannot quite be
reached: two products may each have their best layout where a step must choose one, and a step also casts weights to a
low precision, drops out, finds the loss, sums the bias's gradient, clips, and checks. Nothing is charged for these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from step_speed.measuring import Work, in_turn, seconds_of
from step_speed.presets import Preset

CHUNKS = (2, 4, 8)  # besides 1; tried with the best layouts


class Floor:
    """The pieces of the floor, each a piece of work, in the form that was found to be the fastest.

    Args:
        dtype: of products, recurrence and softmax.
        targets: (T, B) int64 on the device, whose repetitions matter for the embedding.
        parameters: of the model, for the update.
    """

    def __init__(self, preset: Preset, dtype: torch.dtype, targets: Tensor, parameters: list[Tensor]):
        self.device = targets.device
        self.works: dict[str, Work] = {}
        self.chosen: dict[str, str] = {}  # piece -> the fastest form of it

        self._head(preset.tokens, preset.hidden_size, preset.vocab_size, dtype)
        self._embedding(preset.vocab_size, preset.embedding_size, targets.flatten())
        self.works["recurrence"] = _recurrence(preset, dtype, self.device)
        self.works["update"] = _update(parameters)

    def _choose(self, piece: str, forms: dict[str, Work]) -> str:
        self.chosen[piece] = name = fastest(forms, self.device)
        self.works[piece] = forms[name]
        return name

    def _head(self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        """The products and the softmax; inputs and outputs are apart, so that no number grows from call to call."""

        def filled(rows: int, columns: int) -> Tensor:
            return torch.randn(rows * columns, device=self.device, dtype=dtype)

        x, weight, slope = filled(tokens, width), filled(vocabulary, width), filled(tokens, vocabulary)
        logits, grad_x, grad_weight = (torch.empty_like(each) for each in (slope, x, weight))
        self._product("logits", x, weight, logits, (tokens, width, vocabulary))
        self._product("x gradient", slope, weight, grad_x, (tokens, vocabulary, width))
        self._product("weight gradient", slope, x, grad_weight, (vocabulary, tokens, width))

        source, result = logits.view(tokens, vocabulary), slope.view(tokens, vocabulary)
        self._choose("softmax", {f"{n} chunks": _softmax(source, result, n) for n in (1, *CHUNKS)})

    def _product(self, piece: str, left: Tensor, right: Tensor, out: Tensor, sizes: tuple[int, int, int]) -> None:
        """out (m, n) = left (m, k) @ right (k, n), all given flat: the best layout, then the best number of chunks."""
        layouts = list(itertools.product((False, True), repeat=3))
        forms = {_layout_name(layout): product(left, right, out, sizes, layout, 1) for layout in layouts}
        best = layouts[list(forms).index(fastest(forms, self.device))]

        name = _layout_name(best)
        chunked = {f"{name}, {n} chunks": product(left, right, out, sizes, best, n) for n in CHUNKS}
        self._choose(piece, {name: forms[name], **chunked})

    def _embedding(self, vocabulary: int, width: int, tokens: Tensor) -> None:
        """In fp32, as weights and their gradients are: tokens (N,)."""
        weight = torch.randn(vocabulary, width, device=self.device)
        gradient = torch.randn(len(tokens), width, device=self.device)
        sums = torch.zeros_like(weight)
        backward = torch.ops.aten.embedding_dense_backward
        self.works["embedding gather"] = lambda: nn.functional.embedding(tokens, weight)
        self._choose(
            "embedding scatter",
            {
                "embedding_dense_backward": lambda: backward(gradient, tokens, vocabulary, -1, False),
                "index_add_": lambda: sums.zero_().index_add_(0, tokens, gradient),
            },
        )


def fastest(forms: dict[str, Work], device: torch.device) -> str:
    """The name of the fastest: those that are far behind at first are not run again."""
    first: dict[str, float] = {}
    for name, work in forms.items():
        if device.type == "cuda" or not first:
            work()  # the first call of a kernel loads it
        first[name] = seconds_of(work, device)

    close = {name: forms[name] for name in forms if first[name] <= 1.3 * min(first.values())}
    seconds = in_turn(close, device, 3)
    return min(seconds, key=seconds.__getitem__)


def product(
    left: Tensor, right: Tensor, out: Tensor, sizes: tuple[int, int, int], layout: tuple[bool, bool, bool], chunks: int
) -> Work:
    """The product left (m, k) @ right (k, n) -> out (m, n), of matrices that lie flat in memory.

    Args:
        left, right, out: (m * k,), (k * n,), (m * n,)
        sizes: (m, k, n)
        layout: for each of the three whether it lies transposed; with the third, right' @ left' is what is computed.
        chunks: pieces of the rows of what is computed, one product each.
    """
    m, k, n = sizes
    a, b = _matrix(left, m, k, layout[0]), _matrix(right, k, n, layout[1])
    if layout[2]:
        a, b, result = b.t(), a.t(), out.view(n, m)
    else:
        result = out.view(m, n)

    size = -(-len(a) // chunks)
    pieces = list(zip(torch.split(a, size), torch.split(result, size), strict=True))

    def run() -> None:
        for part, target in pieces:
            torch.mm(part, b, out=target)

    return run


def _matrix(flat: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    """(rows, columns) of flat memory in the order of rows, or of columns."""
    return flat.view(columns, rows).t() if transposed else flat.view(rows, columns)


def _layout_name(layout: tuple[bool, bool, bool]) -> str:
    """As BLAS names it: n or t for left, right and result."""
    return "".join("nt"[transposed] for transposed in layout)


def _softmax(logits: Tensor, out: Tensor, chunks: int) -> Work:
    """Probabilities (N, V) of logits (N, V), a chunk of rows at a time."""
    size = -(-len(logits) // chunks)
    pieces = list(zip(torch.split(logits, size), torch.split(out, size), strict=True))

    def run() -> None:
        for part, target in pieces:
            torch.softmax(part, 1, out=target)

    return run


def _recurrence(preset: Preset, dtype: torch.dtype, device: torch.device) -> Work:
    """Forward and backward of all layers, each by itself, from inputs (T, B, E or H) in `dtype`."""
    passes: list[Callable[[], object]] = []
    for layer in range(preset.layers):
        width = preset.hidden_size if layer else preset.embedding_size
        lstm = nn.LSTM(width, preset.hidden_size).to(device, dtype)
        x = torch.randn(preset.window, preset.batch, width, device=device, dtype=dtype, requires_grad=True)
        slope = torch.randn(preset.window, preset.batch, preset.hidden_size, device=device, dtype=dtype)

        def run(lstm: nn.LSTM = lstm, x: Tensor = x, slope: Tensor = slope) -> object:
            return torch.autograd.grad(lstm(x)[0], [x, *lstm.parameters()], slope)

        passes.append(run)
    return lambda: [run() for run in passes]


def _update(parameters: list[Tensor]) -> Work:
    copies = [nn.Parameter(each.detach().clone()) for each in parameters]
    for copy in copies:
        copy.grad = torch.full_like(copy, 1e-3)
    return torch.optim.Adam(copies, fused=True).step
