"""Loads a checkpoint into a model, gated or not, so that the model evaluates as the checkpoint's did.

Three kinds of weights go by the same names: *stock* ones (never gated, gated with the default scaling, or
folded), *gated* ones, which need the evaluation scales of ``scaling="paper"``, and *divided* ones, which need
them because ``keep_eval=True`` divided them. A file that notes no scales may hold either of the first two:
other libraries' savers drop the note. Such weights are taken as stock ones, and the report says no more.

Seen from evaluation there is one rule. Where the checkpoint's model multiplied a branch by ``c`` (1 without a
gate) and this model multiplies it by ``d``,
the weights of the branch have to take ``c / d``, by the plan of a fold (`surgeon._folding.fold`).
"""

import glob
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from surgeon._checkpoint import (
    check_state,
    loadable,
    read_weights,
    split_scales,
)
from surgeon._entry import taken
from surgeon._folding.fold import FoldPlan, check_products, commit
from surgeon._gating.gate import Gate
from surgeon._gating.gated import Placed, placed_gates, recorded_inputs
from surgeon._meant import says_the_call
from surgeon._plain import check_filled, check_plain
from surgeon._plan import Settings, prepared
from surgeon._removal import remove
from surgeon._scales import plan_gates
from surgeon._surgery import install
from surgeon._text import Listed, Part
from surgeon._tracing.example import Example
from surgeon.errors import CheckpointError, FoldError, NoResidualsError, UsageError

Weights = Literal["stock", "unknown", "gated", "divided"]

_SPOKEN: dict[Weights, str] = {
    "stock": "stock weights",
    "unknown": "no note of scales: taken as stock weights",
    "gated": "weights that need evaluation scales",
    "divided": "weights that were divided by evaluation scales",
}


@dataclass(frozen=True, slots=True)
class LoadReport(Listed[str]):
    """What a load found and did; iterating gives the parameters that were multiplied.

    Attributes:
        path: The file or folder.
        entry: Where in it the weights are; empty where it holds nothing else.
        others: What else of the kind it holds: entries that fit as well, and tensors beside the model's.
        found: What its weights are: ``"stock"``, ``"gated"``, ``"divided"``, or ``"unknown"`` where it notes
            no scales; those are taken as stock weights.
        into: What the model's weights are, likewise.
        scales: The evaluation scale of each gate that the checkpoint notes, by the gate's name.
        converted: The parameters that were multiplied on the way.
        metadata: What the file says of itself.
    """

    path: str
    entry: str
    others: tuple[str, ...]
    found: Weights
    into: Weights
    scales: dict[str, float]
    converted: tuple[str, ...]
    metadata: dict[str, str]

    def _entries(self) -> Sequence[str]:
        return self.converted

    def parts(self) -> Sequence[Part]:
        """One sentence, and what to do where a guess was wrong."""
        done = f"converted in {len(self.converted)} parameters" if self.converted else "as they are"
        same = self.into == self.found or (self.found, self.into) == ("unknown", "stock")
        into = "" if same else f" into a model with {_SPOKEN[self.into]}"
        lines = (f"{self.path}: {_SPOKEN[self.found]}{into}, {done}", *self._source(), *self._doubt())
        return (Part(lines=lines),)

    def _source(self) -> tuple[str, ...]:
        return (taken(self.entry, self.others),) if self.entry or self.others else ()

    def _doubt(self) -> tuple[str, ...]:
        return (f"if gates with scaling='paper' trained them: {_OPTION}",) if self.found == "unknown" else ()


_OPTION = (
    "surgeon.load(model, path, scales=surgeon.status(trained).scales), or scales='model' where this model "
    "has the gates of that training"
)


@says_the_call
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    scales: Mapping[str, float] | Literal["model"] | None = None,
    example: Example = None,
) -> LoadReport:
    """Loads a checkpoint into ``model``, in place, so that it evaluates as the checkpoint's model did.

    Whatever the two are gated with: stock weights go into a model gated with ``keep_eval=True`` (divided by
    its scales), gated weights into a stock model (folded), and either into its like, as they are. What was
    found and done is in the report. Everything is checked first; on an error the model is as it was.

    Args:
        model: The model, gated or not.
        path: A file of safetensors or torch, or a folder with such files, shards or a checkpoint of
            ``torch.distributed``: whatever a training of any library has left. Files of torch are read with
            ``weights_only=True``, and no code in them is run. Scales may be noted in the file, or under
            ``"surgeon_scales"`` in a ``config.json`` beside it.
        entry: Which weights, where there are several: their name, or a part of it that no other name has
            (``"ema"``, ``"state_dict"``). By default those that fit best; of several an average; of several
            still, what is called ``state_dict`` or ``model``. The report says what was taken.
        scales: For a file without a note of scales whose weights gates with ``scaling="paper"`` have trained:
            the evaluation scale of each gate by its name, as in ``surgeon.status(model).scales``, in (0, 1].
            ``"model"``: those of this model's gates, with which it was trained.
        example: As in `surgeon.find`; only a conversion needs it.

    Raises:
        CheckpointError: The file cannot be read, does not fit the model, holds values that are not finite, or
            its weights cannot be converted; the message says which.
        RecordError: A conversion needs to know the model's gates, and it does not run on the example.
        WrappedModelError: The model is wrapped.
        UsageError: The model is on the meta device, where no weights are.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5, scaling="paper", keep_eval=True)
        >>> path = surgeon.save_checkpoint(model, "trained.safetensors")
        >>> stock = timm.create_model("test_resnet", num_classes=10)
        >>> report = surgeon.load(stock, path)  # the scales are multiplied in: the stock model has none
        >>> images = torch.randn(2, 3, 160, 160)
        >>> torch.allclose(stock.eval()(images), model.eval()(images), atol=1e-4)
        True
    """
    check_plain(model)
    check_filled(model)
    held = read_weights(model, path, entry)
    metadata = held.metadata
    noted = {name.removeprefix(held.prefix): scale for name, scale in noted_scales(metadata).items()}
    state, divided = split_scales(model, held.state)
    own = {one.name: one.gate for one in placed_gates(model) if one.gate.scale != 1.0}
    if scales is not None:
        noted = _told(scales, own, noted | divided, path)
    trained = _by_first_name(model, noted | divided, path)  # one file may hold both
    found: Weights = "divided" if divided else "gated" if noted else _without_note(metadata)
    into: Weights = (
        "divided" if any(gate.keeps_eval for gate in own.values()) else "gated" if own else "stock"
    )
    rest, _ = split_scales(model, model.state_dict())
    check_state(model, state, path, metadata.get("model"), own=rest)
    if found in ("stock", "unknown") and into == "gated":
        raise CheckpointError(f"{path} {_doubtful(found)} {_FIRST}. Nothing was loaded.")
    factors = _factors(trained, own)
    conversion = _conversion(model, factors, example, path)
    _check_products(model, state, conversion, factors, path)
    model.load_state_dict(loadable(model, state, held.noted))
    commit(model, conversion, factors)
    converted = tuple(dict.fromkeys(product.parameter for product in conversion.products))
    return LoadReport(str(path), held.name, held.others, found, into, trained, converted, metadata)


def _without_note(metadata: Mapping[str, str]) -> Weights:
    """What weights are that come with no scales: of its own files surgeon knows that they need none."""
    return "stock" if "weights" in metadata else "unknown"


_FIRST = "load them before surgeon.apply(model, scaling='paper'), or apply with keep_eval=True"


def _doubtful(found: Weights) -> str:
    if found == "stock":
        return "holds stock weights, which the model's gates would scale:"
    return (
        "does not say whether its weights were trained with the evaluation scales of the model's gates. If "
        "so, surgeon.load(model, path, scales='model') takes them as they are. If they are those of a stock "
        "model,"
    )


def _told(
    scales: Mapping[str, float] | str,
    own: Mapping[str, Gate],
    noted: Mapping[str, float],
    path: str | os.PathLike[str],
) -> dict[str, float]:
    """The scales that the caller gives for a file without a note."""
    if noted:
        raise CheckpointError(f"{path} notes its scales itself; leave scales out. Nothing was loaded.")
    if isinstance(scales, str):
        if scales != "model":
            raise UsageError(f"scales is {scales!r}; give 'model', or the scale of each gate by its name")
        if not own:
            raise UsageError("scales='model', but the model has no gates with evaluation scales")
        return {name: gate.scale for name, gate in own.items()}
    if bad := [name for name, scale in scales.items() if not 0 < scale <= 1]:
        raise UsageError(f"scales: {bad[0]} has {scales[bad[0]]!r}; an evaluation scale lies in (0, 1]")
    return dict(scales)


def noted_scales(metadata: Mapping[str, str]) -> dict[str, float]:
    """The evaluation scale of each gate that a checkpoint's metadata notes, by the gate's name."""
    try:
        found = json.loads(metadata.get("scales", "{}"))
        scales = {str(name): float(scale) for name, scale in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's metadata notes no scales by gate: {error}") from error
    bad = [name for name, scale in scales.items() if not 0 < scale <= 1]
    if bad:
        raise CheckpointError(f"the checkpoint's metadata notes a scale outside (0, 1] for {bad[0]}")
    return scales


def _by_first_name(
    model: nn.Module, scales: Mapping[str, float], path: str | os.PathLike[str]
) -> dict[str, float]:
    """The scales by the first name of each block; a block that is in several places has several."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first, found = {module: name for name, module in model.named_modules()}, dict[str, float]()
    for name, scale in scales.items():
        block, dot, add = name.rpartition(".")
        own = f"{first[modules[block]]}{dot}{add}".removeprefix(".") if block in modules else name
        if found.setdefault(own, scale) != scale:
            raise CheckpointError(
                f"{path} notes the scales {found[own]:.4g} and {scale:.4g} for {name}, which is one block "
                f"with {own} in this model. Nothing was loaded."
            )
    return found


def regate(model: nn.Module, scales: Mapping[str, float], *, example: Example = None) -> nn.Module:
    """Gates a plain ``model``, in place, as a checkpoint's model was: these adds, these scales.

    Raises:
        CheckpointError: The model has no such residual add.
    """
    patterns = {glob.escape(name): 1 - scale for name, scale in scales.items()}
    as_noted = Settings(
        "uniform",
        drop_rate=0.0,
        unit="batch",
        scaling="paper",
        include=list(patterns),
        overrides=patterns,
        example=example,
    )
    try:
        install(model, prepared(model, as_noted))
    except (UsageError, NoResidualsError) as error:
        raise CheckpointError(f"the checkpoint's gates do not fit {type(model).__name__}: {error}") from error
    for one in placed_gates(model):
        one.gate.scale = scales[one.name]
    return model


def _factors(scales: Mapping[str, float], own: Mapping[str, Gate]) -> dict[str, float]:
    """What the weights of each branch have to take, where that is not 1."""
    factors = {
        name: scales.get(name, 1.0) / (own[name].scale if name in own else 1.0)
        for name in dict.fromkeys((*scales, *own))
    }
    return {name: f for name, f in factors.items() if not math.isclose(f, 1.0, rel_tol=1e-6)}


def _conversion(
    model: nn.Module,
    factors: Mapping[str, float],
    example: Example,
    path: str | os.PathLike[str],
) -> FoldPlan:
    """Which parameters take the factors."""
    if not factors:
        return FoldPlan((), ())
    try:
        with _gates(model, factors, example, path) as gates:
            args, kwargs = recorded_inputs(model, gates[0].gate.decided, example)
            found = plan_gates(model, gates, factors, args, kwargs)
    except FoldError as error:
        raise CheckpointError(f"{path} could not be converted: {error}. Nothing was loaded.") from error
    if found.kept:
        listed = "; ".join(f"{kept.gate}: {kept.reason}" for kept in found.kept)
        raise CheckpointError(
            f"{path} cannot be converted for this model: no weight takes the scale of {len(found.kept)} "
            f"gates ({listed}). Gate the model as the checkpoint's was. Nothing was loaded."
        )
    return found


@contextmanager
def _gates(
    model: nn.Module, factors: Mapping[str, float], example: Example, path: str | os.PathLike[str]
) -> Iterator[list[Placed]]:
    """The gates of a model; one that is plain gets for the while those that the factors name."""
    own = placed_gates(model)
    if own:
        names = {one.name for one in own}
        if missing := [name for name in factors if name not in names]:
            raise CheckpointError(
                f"{path} was trained with a gate on {missing[0]}, where the model has none. Load it before "
                "surgeon.apply, or apply as for the checkpoint. Nothing was loaded."
            )
        yield own
        return
    regate(model, dict.fromkeys(factors, 0.5), example=example)
    try:
        yield placed_gates(model)
    finally:
        remove(model)


def _check_products(
    model: nn.Module,
    state: Mapping[str, Tensor],
    conversion: FoldPlan,
    factors: Mapping[str, float],
    path: str | os.PathLike[str],
) -> None:
    """Checks what the conversion will yield before anything is loaded."""
    own = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    try:
        loaded = {name: tensor.to(own[name].dtype) for name, tensor in state.items() if name in own}
        check_products(conversion, factors, loaded)
    except FoldError as error:
        raise CheckpointError(f"{path} could not be converted: {error}. Nothing was loaded.") from error
