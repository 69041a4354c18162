"""The command `textldm checkpoint`: what is in a checkpoint, and whether all of it is there. Needs no DeepSpeed.

textldm checkpoint inspect runs/vae_base      what is in the newest checkpoint
textldm checkpoint verify runs/vae_base       read every byte of it
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from data_pipeline.core.errors import cli
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import Manifest, read_manifest
from pretrain.checkpoint.read import verify


def _describe(manifest: Manifest) -> str:
    num_parameters = sum(parameter.numel for parameter in manifest.parameters.values())
    num_bytes = sum(file.bytes for file in manifest.files.values())
    lines = [
        f"{manifest.checkpoint}: step {manifest.step:,}, saved by {manifest.world_size} rank(s), "
        f"ZeRO-{manifest.zero_stage}, {manifest.precision}",
        f"{num_parameters:,} parameters in {len(manifest.parameters)} tensors; {num_bytes / 1e6:,.1f} MB in"
        f" {len(manifest.files)} file(s)",
        f"versions {manifest.versions}; kept beside: {', '.join(manifest.extra) or 'nothing'}",
    ]
    rows = [
        (
            name,
            "x".join(map(str, parameter.shape)) or "1",
            "yes" if parameter.decays else "no",
            ", ".join(parameter.states),
        )
        for name, parameter in manifest.parameters.items()
    ]
    headers = ("parameter", "shape", "decays", "states")
    return "\n".join([*lines, "", tabulate(rows, headers, tablefmt="simple", disable_numparse=True)])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm checkpoint", description="Look into a checkpoint without DeepSpeed.")
    parser.add_argument("action", choices=["inspect", "verify"])
    parser.add_argument("path", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint's folder")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Command line: inspect or verify a checkpoint."""
    arguments = make_parser().parse_args(argv)
    checkpoint = checkpoint_of(arguments.path, state=None)
    if arguments.action == "inspect":
        print(_describe(read_manifest(checkpoint)))
    else:
        manifest = verify(checkpoint)
        print(f"{checkpoint}: complete and unaltered; {len(manifest.files)} file(s), step {manifest.step:,}")


if __name__ == "__main__":
    sys.exit(main(None))
