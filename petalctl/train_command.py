"""``petalctl train``: fine-tunes a model whose blocks run in the swarm.

Puts the parts together: the data, the model at the daemon's socket, the run's folder, the display.
"""

from __future__ import annotations

import argparse
import random
import shlex
import time
from collections.abc import Mapping
from typing import Any

from kernels.errors import KernelError
from kernels.model_config import ModelConfig
from kernels.model_store import ModelFolder, find_model, fingerprint
from kernels.tokenizer import Tokenizer
from p2p.wire.control_messages import Progress
from petalctl.errors import CommandError
from petalctl.generate_command import describe_move
from petalctl.passes import TrainingClient
from petalctl.stop_signals import StopSignals
from petalctl.terminal import tell
from petalctl.torch.adapters import DeepPrompt, RemoteAdapter, RemoteLora
from petalctl.torch.blocks import OnProgress
from petalctl.torch.causal_lm import RemoteCausalLM, load_config
from petalctl.torch.soft_prompt import SoftPrompt
from petalctl.training.checkpoints import RunFolder, check_arguments
from petalctl.training.data_files import BadData, file_digest, load_sequences
from petalctl.training.data_order import split_held_out
from petalctl.training.display import Display, make_display, print_event
from petalctl.training.sequences import TokenSequences
from petalctl.training.settings import DEFAULT_LR, TrainSettings, default_eval_every
from petalctl.training.trainer import RunHistory, Trainer, TrainingData, read_history

_OF_LORA = {"rank": 8, "alpha": 16.0, "targets": "q_proj,v_proj"}
_OF_PROMPTS = {"prompt_tokens": 16}


def run_train(args: argparse.Namespace) -> int:
    """Carries out ``petalctl train``.

    Raises:
        CommandError: it could not, or not to its end; the text says how to go on.
    """
    try:
        shape = choose_shape(args)
        settings = read_settings(args)
        model = find_model(args.model)
        with RunFolder(args.out, is_restart=args.restart) as folder:
            return _train(args, shape, settings, model, folder)
    except KernelError as error:
        raise CommandError(str(error), code=error.code) from error


def choose_shape(args: argparse.Namespace) -> dict[str, Any]:
    """What is trained, with the defaults of its method.

    Raises:
        CommandError: an option is of another method.
    """
    is_lora = args.method == "lora"
    own, other = (_OF_LORA, _OF_PROMPTS) if is_lora else (_OF_PROMPTS, _OF_LORA)
    for name in other:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            kind = "a prompt" if is_lora else "--method lora"
            raise CommandError(
                f"{option} is for {kind}; --method is {args.method}", code="usage", exit_status=2
            )
    return {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in own.items()
    }


def read_settings(args: argparse.Namespace) -> TrainSettings:
    """The numbers of the run, with the defaults of its method."""
    return TrainSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        lr=DEFAULT_LR[args.method] if args.lr is None else args.lr,
        warmup=args.warmup,
        schedule=args.schedule,
        seed=args.seed,
        max_grad_norm=args.max_grad_norm,
        weight_decay=args.weight_decay,
        eval_every=args.eval_every or default_eval_every(args.steps),
        checkpoint_every=args.checkpoint_every,
    )


def describe_arguments(
    args: argparse.Namespace,
    shape: Mapping[str, Any],
    settings: TrainSettings,
    model: ModelFolder,
) -> dict[str, Any]:
    """All that a run must have in common with the one that it goes on from, by option.

    Raises:
        BadData: a file cannot be read.
        KernelError: the model cannot be.
    """
    held_out: dict[str, Any] = {"--held-out": args.held_out}
    if args.eval_data is not None:
        held_out = {"--eval-data": file_digest(args.eval_data)}
    return {
        "--model": fingerprint(model),
        "--method": args.method,
        "--data": file_digest(args.data),
        **held_out,
        **{f"--{name.replace('_', '-')}": value for name, value in shape.items()},
        "--adapter": args.adapter,
        "--length": args.length,
        "--batch-size": settings.batch_size,
        "--accumulate": settings.accumulate,
        "--lr": settings.lr,
        "--warmup": settings.warmup,
        "--schedule": settings.schedule,
        "--seed": settings.seed,
        "--max-grad-norm": settings.max_grad_norm,
        "--weight-decay": settings.weight_decay,
    }


def check_length(config: ModelConfig, length: int, prompt_tokens: int) -> None:
    """Sees to it that the model has seen so long texts.

    Raises:
        CommandError: it has not.
    """
    if length + prompt_tokens > config.max_positions:
        prompt = f" and {prompt_tokens} of the prompt" if prompt_tokens else ""
        raise CommandError(
            f"--length {length}{prompt} is more than the {config.max_positions} tokens that the "
            "model can take; choose a smaller one",
            code="usage",
            exit_status=2,
        )


def load_data(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[TrainingData, list[str]]:
    """Reads the files.

    Returns:
        The data, and what the user should be told of it.

    Raises:
        BadData: they cannot be read, or have too little.
    """
    sequences, notes = load_sequences(args.data, tokenizer, args.length)
    count = len(sequences)
    if args.eval_data is not None:
        held_out, more = load_sequences(args.eval_data, tokenizer, args.length)
        data = TrainingData(sequences, range(count), held_out, range(len(held_out)))
        notes += more
    else:
        chosen, of_eval = split_held_out(count, args.held_out, args.seed)
        data = TrainingData(sequences, chosen, sequences, of_eval)
        if not chosen:
            raise BadData(
                f"{args.data} makes a single sequence of {sequences.tokens} tokens, and one is "
                "held out; give more data, a smaller --length, or --held-out 0"
            )
    notes.append(
        f"{len(data.indices)} sequences to train on, {len(data.held_out_indices)} held out; "
        f"{sequences.tokens} tokens in {args.data}"
    )
    return data, notes


def make_model(
    args: argparse.Namespace,
    shape: Mapping[str, Any],
    sequences: TokenSequences,
    client: TrainingClient,
    on_progress: OnProgress,
) -> tuple[RemoteCausalLM, RemoteAdapter | SoftPrompt]:
    """The model, and what is trained of it.

    Args:
        args: of the command.
        shape: of what is trained, as `choose_shape` gives it.
        sequences: a prompt begins as tokens that they have.
        client: of the daemon.
        on_progress: told what happens to the passes.

    Raises:
        KernelError: the model cannot be read, or what is to be trained does not fit it.
    """
    adapter: RemoteAdapter | None = None
    config = load_config(args.model)
    if args.method == "lora":
        targets = tuple(name.strip() for name in shape["targets"].split(","))
        adapter = RemoteLora(
            config, rank=shape["rank"], alpha=shape["alpha"], targets=targets, seed=args.seed
        )
    elif args.method == "deep-prompt":
        adapter = DeepPrompt(config, tokens=shape["prompt_tokens"], seed=args.seed)
    model = RemoteCausalLM.from_pretrained(
        args.model,
        client=client,
        adapter=adapter,
        hosted=args.adapter,
        max_wait_s=args.max_wait,
        on_progress=on_progress,
    )
    if adapter is not None:
        return model, adapter
    ids_P = sequences.sample(shape["prompt_tokens"], random.Random(f"prompt {args.seed}"))
    model.soft_prompt = SoftPrompt(config, initial=model.embed_tokens(ids_P))
    return model, model.soft_prompt


def _train(
    args: argparse.Namespace,
    shape: Mapping[str, Any],
    settings: TrainSettings,
    model: ModelFolder,
    folder: RunFolder,
) -> int:
    config = load_config(args.model)
    check_length(config, args.length, shape.get("prompt_tokens", 0))
    arguments = describe_arguments(args, shape, settings, model)
    checkpoint = folder.load()
    done = 0 if checkpoint is None else read_history(checkpoint).step
    if not done:
        checkpoint = None  # nothing is lost where nothing was done, so what was wrong may change
    if checkpoint is not None:
        check_arguments(checkpoint.state.get("arguments", {}), arguments)
        history = read_history(checkpoint)
        if done >= settings.steps and (not history.held_out or done in history.held_out):
            _say_end(args, model, history, is_new=False)
            return 0
    with TrainingClient(args.socket) as client:
        data, notes = load_data(args, Tokenizer.load(model.path))
        with (
            make_display(steps=settings.steps, done=done, wants_json=args.json) as display,
            StopSignals() as signals,
        ):
            for note in notes:
                display.on_note("data", note)
            if done:
                display.on_note("resumed", f"after step {done}, which is in {folder.path}")
            remote, trained = make_model(
                args, shape, data.sequences, client, _tell_progress(display)
            )
            trainer = Trainer(
                remote,
                dict(trained.named_parameters()),
                settings=settings,
                data=data,
                folder=folder,
                arguments=arguments,
                save_adapter=lambda path: trained.save(path, base_model=_base_model(model)),
                listener=display,
                signals=signals,
                now=time.monotonic,
            )
            if checkpoint is not None:
                trainer.resume(checkpoint)
            trainer.run()
    _say_end(args, model, trainer.history, is_new=True)
    return 0


def _tell_progress(display: Display) -> OnProgress:
    def on_progress(progress: Progress) -> None:
        move = progress.move
        if progress.event == "waiting":
            display.on_note("waiting", progress.text)
        elif move is not None and move.old != move.new:  # a server that came back is no news
            display.on_note("moved", describe_move(move))

    return on_progress


def _base_model(model: ModelFolder) -> str:
    """What PEFT is to look for on the hub, or else the name here."""
    kind, _, where = model.source.partition(":")
    return where if kind == "hub" else model.name


def _say_end(
    args: argparse.Namespace, model: ModelFolder, history: RunHistory, *, is_new: bool
) -> None:
    first = min(history.held_out, default=None)
    before = None if first is None else history.held_out[first]
    after = history.held_out.get(history.step)
    command = (
        f"petalctl generate --model {shlex.quote(args.model)} --adapter "
        f"{shlex.quote(str(args.out))} 'your prompt'"
    )
    if args.json:
        print_event(
            "done",
            step=history.step,
            loss=history.losses[-1],
            held_out_before=before,
            held_out_after=after,
            out=str(args.out),
            was_finished=not is_new,
        )
        return
    if is_new:
        tell(f"trained {history.step} steps of {model.name}; the adapter is in {args.out}")
    else:
        tell(
            f"{args.out} has this run already, finished after step {history.step}; raise --steps "
            "to go on, or begin anew with --restart"
        )
    if before is not None and after is not None:
        tell(f"held-out loss: {before:.4f} before, {after:.4f} after")
    if args.adapter:
        tell(
            f"it belongs on top of the hosted adapter {args.adapter}: use both with "
            f"petalctl.torch.RemoteCausalLM and hosted={args.adapter!r}"
        )
    else:
        tell(f"use it: {command}")
