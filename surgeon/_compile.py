"""Gated models and `torch.compile`."""

from typing import Any

from torch import nn

from surgeon._gating.gated import gates_of
from surgeon._gating.regions import Compiler
from surgeon._meant import says_the_call
from surgeon.errors import NotGatedError


@says_the_call
def compile(model: nn.Module, **options: Any) -> nn.Module:  # noqa: A001 - as torch has it
    """Compiles a gated model in place, so that what is dropped costs nothing, and returns ``model``.

    With unit ``"sample"`` this is ``model.compile(**options)``: one graph, in which each branch runs on the
    ``p B`` rows, rounded up, that survive. With unit ``"batch"`` every branch is compiled with its addition,
    equal ones once, and the coin falls outside: nothing is compiled anew whatever falls, and parameters of a
    dropped branch have no gradient, as ever. The rest of such a model runs as it did.

    Args:
        model: A gated model.
        **options: Of `torch.compile`. With unit ``"batch"``, ``dynamic`` is False and ``fullgraph`` True
            unless given: a batch of another size compiles once more.

    Raises:
        NotGatedError: The model has no gates.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5, unit="batch")
        >>> surgeon.compile(model, backend="eager") is model
        True
    """
    gates = gates_of(model)
    if not gates:
        raise NotGatedError("the model has no gates; surgeon.apply(model) puts them in")
    if gates[0].decided.unit == "sample":
        model.compile(**options)
        return model
    compiler = Compiler({"dynamic": False, "fullgraph": True} | options)
    for gate in gates:
        gate.compiler = compiler
    return model
