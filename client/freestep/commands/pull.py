"""`freestep pull`: a point of a run as a file, or as a folder that the transformers library loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from freestep.api.models import Point, PointDtype
from freestep.client import DEFAULT_URL
from freestep.commands.shared import Json, OfCheckpoint, RunName, Token, Url, connect, fail, slow_imports
from freestep.errors import FreestepError
from freestep.files import is_stdout
from freestep.terminal import print_error, print_json, print_line

__all__ = ["pull"]


def pull(
    run: RunName,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write, or the folder for hf; - is the standard output.")
    ],
    point: Annotated[Point, typer.Option(help="x: the average; y: where gradients are taken; z: the iterate.")] = "x",
    dtype: Annotated[
        PointDtype, typer.Option(help="The tensors' dtype; I8 is sent as int8 and is F32 in the file.")
    ] = "F32",
    format: Annotated[
        Literal["safetensors", "torch", "hf"],
        typer.Option(help="torch: a state_dict for torch.load; hf: a folder for from_pretrained, with --like."),
    ] = "safetensors",
    like: Annotated[
        Path | None,
        typer.Option(help="For hf: a folder of the same model, whose config and tokenizer are copied."),
    ] = None,
    checkpoint: OfCheckpoint = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write a run's parameters to a file, whole or not at all; pipes and devices are written through."""
    to_stdout = is_stdout(output)
    if (format == "hf") != (like is not None):
        fail(2, "--format hf and --like FOLDER go together: the folder has the model's config.json")
    if to_stdout and (as_json or format == "hf"):
        fail(
            2, f"the standard output takes one thing: no {'folder' if format == 'hf' else '--json'} beside -o {output}"
        )
    with slow_imports():
        from freestep.export import write_safetensors, write_torch
        from freestep.pretrained import PretrainedFolder
    try:
        model = None if like is None else PretrainedFolder(like)
    except (FreestepError, OSError) as error:
        fail(2, str(error))
    with connect(url, token) as client:
        x, step = client.run(run).pull(point, dtype=dtype, checkpoint=checkpoint)
    notes: list[str] = []
    try:
        if model is not None:
            notes = model.write(output, x)
        elif format == "torch":
            write_torch(output, x)
        else:
            write_safetensors(output, x)
    except FreestepError as error:
        fail(2, str(error))
    except OSError as error:
        fail(2, f"{output} cannot be written: {error.strerror}")
    for note in notes:
        print_error(f"freestep: {note}")
    if as_json:
        print_json({"run": run, "point": point, "epoch": x.epoch, "step": step, "output": str(output)})
    else:
        (print_error if to_stdout else print_line)(f"{point} of {run} at step {step} is in {output}")
