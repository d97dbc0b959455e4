"""``surgeon recommend``: where to start with the drop rate."""

import click

from surgeon.cli._complete import models
from surgeon.cli._run import MODEL_HELP, Output
from surgeon.cli._run import command as surgeon_command

_EXAMPLES = """
surgeon recommend timm:convnext_tiny --images 4000 --epochs 30
surgeon recommend timm:vit_small_patch16_224 --images 50000 --epochs 100 --json
surgeon recommend timm:convnext_base --images 1281167 --epochs 300 --scratch
"""


@surgeon_command("recommend", "Say where to start with the drop rate.", examples=_EXAMPLES, more=MODEL_HELP)
@click.argument("model", shell_complete=models)
@click.option("--images", required=True, type=click.IntRange(min=1), help="Images to train on.")
@click.option("--epochs", required=True, type=click.IntRange(min=1), help="How often each is seen.")
@click.option("--scratch", is_flag=True, help="The model begins with random weights.")
def command(out: Output, *, model: str, images: int, epochs: int, scratch: bool) -> None:
    """Looks up which drop rates were published for models like MODEL, and says where to start.

    The published rates, their sources and what speaks against them are printed with it.
    """
    from surgeon._recommend import recommend
    from surgeon._source import load_model, resolve

    spec = resolve(model)
    millions = sum(p.numel() for p in load_model(spec).parameters()) / 1e6
    name = spec.rpartition(":")[2]
    found = recommend(name, millions, images=images, epochs=epochs, scratch=scratch)
    out.result({"model": spec, "millions": millions, **found.to_dict()}, found.parts())
