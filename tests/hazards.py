"""Blocks in which a gate may go wrong, each with its own forward and with one written by hand, gate included.

In the latter ``g`` multiplies the branch; where it drops, the branch is not computed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from blocks import Branch
from torch import Tensor, nn

G = Callable[[Callable[[], Tensor]], Tensor | None]


def plus(shortcut: Tensor, branch: Tensor | None) -> Tensor:
    return shortcut if branch is None else shortcut + branch


def fresh(shortcut: Tensor, branch: Tensor | None) -> Tensor:
    return shortcut.clone() if branch is None else shortcut + branch


class Hazard(Branch):
    """A block and its gated form by hand; ``g(lambda: branch)`` gives the gated branch, None if dropped."""

    skips = True


class ReluAfterInPlaceAdd(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x
        return F.relu(out, inplace=True)

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return F.relu(fresh(x, g(lambda: self.f(x))))


class InPlaceHead(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.relu_())

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        x = x.relu()
        return plus(x, g(lambda: self.f(x)))


class InPlaceHeadModule(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(x)
        return self.f(out) + x

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        x = x.relu()
        return plus(x, g(lambda: self.f(x)))


class OntoTheInput(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        x += self.f(x * 2)
        return x

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.f(x * 2)))


class OntoTheInputMethod(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.f(x * 2)).sin()

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.f(x * 2))).sin()


class UnusedGain(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out.mul_(self.gain)
        return out * 0.2 + x

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.f(x) * self.gain * 0.2))


class SizesFirst(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        half = c // 2
        y = self.f(x).reshape(n, 2, half).transpose(1, 2).reshape(n, c)
        return x + y

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        n, c = x.shape
        return plus(x, g(lambda: self.f(x).reshape(n, 2, c // 2).transpose(1, 2).reshape(n, c)))


class Escapes(Hazard):
    skips = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return x + y, y

    def by_hand(self, x: Tensor, g: G) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return plus(x, g(lambda: y)), y


class AttentionBeside(Hazard):
    """The weights escape and are computed always; what they weigh is skipped."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weights = torch.softmax(self.f(x) @ x.t(), -1)
        return {"out": x + weights @ x, "weights": weights}

    def by_hand(self, x: Tensor, g: G) -> dict[str, Tensor]:
        weights = torch.softmax(self.f(x) @ x.t(), -1)
        return {"out": plus(x, g(lambda: weights @ x)), "weights": weights}


class TailEscapesHeadStays(Hazard):
    """What escapes is computed before the branch; the branch itself may be lifted."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return x + self.f(gate), gate

    def by_hand(self, x: Tensor, g: G) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return plus(x, g(lambda: self.f(gate))), gate


class FunctionsOfWeights(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.table = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
        self.register_buffer("index", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        gain = torch.sigmoid(self.gain)
        bias = self.table[self.index].mean(0)
        return x + gain * F.gelu(self.f(x) + bias)

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(
            x, g(lambda: torch.sigmoid(self.gain) * F.gelu(self.f(x) + self.table[self.index].mean(0)))
        )


class Factories(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) / 10
        pad = torch.zeros(x.shape[0], 1, dtype=x.dtype)
        wide = torch.cat([self.f(x + ramp), pad + torch.ones_like(pad)], -1)
        return x + torch.tanh(wide[:, :-1])

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        ramp = torch.arange(x.shape[-1], dtype=x.dtype) / 10
        return plus(x, g(lambda: torch.tanh(self.f(x + ramp))))


def split_heads(x: Tensor, heads: int) -> Tensor:
    b, c = x.shape
    return x.reshape(b, heads, c // heads)


class Helpers(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        q, k = split_heads(self.f(x), 2).unbind(1)
        a, b = torch.tanh(torch.cat([q, k], -1)).chunk(2, dim=-1)
        first, *rest = torch.cat([b, a], -1).split(1, -1)
        return x + torch.cat([first, *rest], -1)

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: torch.tanh(self.f(x)).roll(2, -1)))


class ChunkedInput(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x + torch.cat([torch.tanh(b), torch.tanh(a)], -1) * self.f(x)

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: torch.tanh(x.roll(2, -1)) * self.f(x)))


class OwnSuper(nn.Sequential):
    skips = True

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: nn.Sequential.forward(self, x)))


class ScaledShortcut(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.f(x)

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(0.5 * x, g(lambda: self.f(x)))


class Dropout(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.f(self.drop(x)))

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.drop(self.f(self.drop(x)))))


class KeywordAdd(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.f(x))

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.f(x)))


class SumOfAList(Hazard):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.f(x)])

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.f(x)))


class WriteToTheShortcutLater(Hazard):
    """When the branch is dropped, the sum and the shortcut must not be one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        a = torch.mul(x, 2)
        y = a + self.f(a * 2).tanh()
        z = a.mul_(0.5)
        return y * 3 + z

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        a = torch.mul(x, 2)
        y = plus(a, g(lambda: self.f(a * 2).tanh()))
        return y * 3 + a * 0.5


class FloatFunctional(Hazard):
    def __init__(self) -> None:
        super().__init__()
        self.ff = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.ff.add(x, self.f(x))

    def by_hand(self, x: Tensor, g: G) -> Tensor:
        return plus(x, g(lambda: self.f(x)))


HAZARDS = [
    *(
        ReluAfterInPlaceAdd,
        InPlaceHead,
        InPlaceHeadModule,
        OntoTheInput,
        OntoTheInputMethod,
        UnusedGain,
        SizesFirst,
    ),
    *(
        Escapes,
        AttentionBeside,
        TailEscapesHeadStays,
        FunctionsOfWeights,
        Factories,
        Helpers,
        ChunkedInput,
        OwnSuper,
    ),
    *(ScaledShortcut, Dropout, SumOfAList, WriteToTheShortcutLater, KeywordAdd, FloatFunctional),
]
