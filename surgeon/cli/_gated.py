"""Puts the evaluation scales of a training by the paper's rule onto a command's model."""

from dataclasses import replace

from surgeon.cli._subject import GateOptions, Subject
from surgeon.errors import UsageError


def with_scales(subject: Subject, gating: GateOptions) -> Subject:
    """Gates the subject's model, in place, where its weights need an evaluation scale; returns the subject.

    They do when they were trained with ``scaling="paper"`` and nobody has folded them: the option says so, or
    the checkpoint does. Weights trained with ``"inverted"`` need no scales.

    Raises:
        UsageError: The options ask for scales that the checkpoint has in its weights already, or leave open
            whether there are any.
        NoResidualsError: There is nothing to scale.
    """
    import surgeon

    if "scales" in subject.metadata and _agrees(subject, gating):
        return _regated(subject)
    settings = gating.settings(subject.metadata)
    plain = subject.metadata.get("weights") == "plain"
    if plain and gating.scaling == "paper":
        raise UsageError(
            "the checkpoint's weights are plain: they hold their evaluation scales already, and --scaling "
            "paper would apply them twice; leave it out"
        )
    if plain or settings["scaling"] != "paper":
        return _noted(subject, gating)
    if not subject.random and not {**gating.given(), **subject.metadata}.keys() & {"schedule", "drop_rate"}:
        raise UsageError(
            "nothing says with which survival probabilities the weights were trained; give --schedule and "
            "--drop-rate"
        )
    surgeon.apply(subject.model, unit="batch", example=subject.example, **settings)
    return subject


def _agrees(subject: Subject, gating: GateOptions) -> bool:
    """Whether the scales that the checkpoint itself notes are the ones to use; options win over them.

    Raises:
        UsageError: Options would put other scales onto weights that were divided by the noted ones.
    """
    asked = gating.given() or gating.scaling == "inverted"
    if asked and subject.metadata.get("weights") == "divided":
        raise UsageError(
            "the checkpoint's weights were divided by the scales of its gates, which it notes; leave "
            "--schedule, --drop-rate, --scaling, --include and --exclude out"
        )
    return not asked


def _regated(subject: Subject) -> Subject:
    """The subject with the gates that its checkpoint notes."""
    from surgeon._load import noted_scales, regate

    regate(subject.model, noted_scales(subject.metadata), example=subject.example)
    return subject


def _noted(subject: Subject, gating: GateOptions) -> Subject:
    """The subject with the options among what is known of it, for the record; there is nothing to fold."""
    from surgeon._checkpoint import strings

    given = gating.given()
    if given and gating.scaling is None:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"{names} without --scaling: give --scaling paper if the weights were trained by the paper's "
            "rule and need their evaluation scales, --scaling inverted (the default) if they need none"
        )
    return replace(subject, metadata={**subject.metadata, **strings({**given, "scaling": gating.scaling})})
