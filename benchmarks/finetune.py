"""Fine-tuning on real text: through three servers, and the same in one process.

    python benchmarks/finetune.py [--methods prompt deep-prompt lora] [--steps 40]

The data are the help texts of Python itself (``pydoc_data.topics``). Each method trains from the
same first values, on the same batches, through a swarm of three daemons with `petalctl.torch`, and
in this process with Hugging Face's model (and PEFT, which loads the first values from its own
format). Printed are the held-out loss before and after, of both, and how far their loss curves lie
apart: the largest difference of a step's losses. For a scale, the run in this process is repeated
with first values that differ by a part in a million: where training is chaotic, that alone drives
the curves apart.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.report import describe_machine, write_results
from kernels.model_config import ModelConfig, load_model_config
from kernels.model_store import find_model
from kernels.tokenizer import Tokenizer
from petalctl.passes import TrainingClient
from petalctl.private_swarm import PrivateSwarm
from petalctl.stop_signals import StopSignals
from petalctl.torch import DeepPrompt, RemoteCausalLM, RemoteLora, SoftPrompt
from petalctl.training.checkpoints import RunFolder
from petalctl.training.data_files import load_sequences
from petalctl.training.data_order import split_held_out
from petalctl.training.settings import DEFAULT_LR, METHODS, TrainSettings
from petalctl.training.trainer import LossModel, RunHistory, StepReport, Trainer, TrainingData

DISTURBANCE = 1e-6

Trained = RemoteLora | DeepPrompt | SoftPrompt


@dataclass(frozen=True)
class Loss:
    """What a model gives."""

    loss: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        losses: of each step.
        held_out: by step.
        seconds: of all of it.
    """

    losses: list[float]
    held_out: dict[int, float]
    seconds: float


class Quiet:
    """Listens to a run, and says little."""

    def on_stage(self, text: str) -> None:
        pass

    def on_step(self, report: StepReport) -> None:
        print(f"\r  step {report.step}, loss {report.loss:.4f} ", end="", file=sys.stderr)

    def on_eval(self, step: int, loss: float) -> None:
        pass

    def on_saved(self, step: int) -> None:
        pass


def make_data(folder: Path, model: Path, length: int, held_out: int) -> TrainingData:
    path = folder / "topics.txt"
    path.write_text("\n".join(topics.topics.values()), "utf-8")
    sequences, _ = load_sequences(path, Tokenizer.load(model), length)
    chosen, of_eval = split_held_out(len(sequences), 0.05, seed=0)
    return TrainingData(sequences, chosen, sequences, of_eval[:held_out])


def make_trained(method: str, config: ModelConfig, prompt_PD: torch.Tensor) -> Trained:
    if method == "lora":
        return RemoteLora(config, seed=0)
    if method == "deep-prompt":
        return DeepPrompt(config, seed=0)
    return SoftPrompt(config, initial=prompt_PD)


def make_local(
    trained: Trained, model: Path, folder: Path
) -> tuple[LossModel, dict[str, torch.nn.Parameter]]:
    """Hugging Face's model with the same first values, and what is trained of it."""
    import peft
    from transformers import AutoModelForCausalLM

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    local: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    local.requires_grad_(False)
    if isinstance(trained, SoftPrompt):
        prompt = SoftPrompt(trained.config, initial=trained.prompt)

        def with_prompt(*, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Loss:
            embeddings = local.get_input_embeddings()(input_ids)
            rows, mask, targets = prompt.prepend(embeddings, attention_mask, labels)
            return Loss(local(inputs_embeds=rows, attention_mask=mask, labels=targets).loss)

        return with_prompt, dict(prompt.named_parameters())
    trained.save(folder, base_model=str(model))
    is_lora = isinstance(trained, RemoteLora)
    adapted = peft.PeftModel.from_pretrained(local, folder, is_trainable=is_lora)
    if not is_lora:
        for parameter in adapted.prompt_encoder.parameters():
            parameter.requires_grad_()

    def run(*, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Loss:
        given = {"attention_mask": attention_mask, "labels": labels}
        return Loss(adapted(input_ids=input_ids, **given).loss)

    named = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    return run, named


def train(
    model: LossModel,
    parameters: Mapping[str, torch.nn.Parameter],
    settings: TrainSettings,
    data: TrainingData,
) -> Run:
    started_at = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as place,
        RunFolder(Path(place) / "run") as folder,
        StopSignals() as signals,
    ):
        trainer = Trainer(
            model,
            parameters,
            settings=settings,
            data=data,
            folder=folder,
            arguments={},
            save_adapter=lambda path: None,
            listener=Quiet(),
            signals=signals,
            now=time.monotonic,
        )
        trainer.run()
    history: RunHistory = trainer.history
    print(file=sys.stderr)
    seconds = time.monotonic() - started_at
    return Run(losses=history.losses, held_out=history.held_out, seconds=seconds)


def disturb(trained: Trained) -> Trained:
    """The same with values that differ by a part in a million."""
    other = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in other.parameters():
            values *= 1 + DISTURBANCE * torch.randn(values.shape, generator=generator)
    return other


def distance(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def print_run(method: str, swarm: Run, local: Run, disturbed: Run) -> None:
    last = max(swarm.held_out)
    print(
        f"{method:12} held-out loss {swarm.held_out[0]:.4f} to {swarm.held_out[last]:.4f} "
        f"({swarm.seconds:.0f} s), local {local.held_out[0]:.4f} to {local.held_out[last]:.4f} "
        f"({local.seconds:.0f} s); apart by {distance(swarm, local):.1e}, "
        f"disturbed {distance(disturbed, local):.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=32)
    args = parser.parse_args()
    machine = describe_machine()
    print(f"{machine}; {args.steps} steps of {args.batch_size} x {args.length} tokens")
    folder = find_model(args.model).path
    config = load_model_config(folder)
    borders = [round(config.num_blocks * i / 3) for i in range(4)]
    results: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as place,
        PrivateSwarm(
            args.model, spans=list(itertools.pairwise(borders)), threads=1, dtype="float32"
        ) as swarm,
        TrainingClient(swarm.router.socket) as client,
    ):
        data = make_data(Path(place), folder, args.length, args.held_out)
        for method in args.methods:
            settings = TrainSettings(
                steps=args.steps,
                batch_size=args.batch_size,
                lr=DEFAULT_LR[method],
                eval_every=args.steps,
                checkpoint_every=args.steps,
            )
            remote = RemoteCausalLM.from_pretrained(args.model, client=client)
            prompt_PD = remote.embed_tokens(torch.arange(1000, 1016))
            trained = make_trained(method, config, prompt_PD)
            locals_ = [
                make_local(first, folder, Path(place) / f"{method}-{number}")
                for number, first in enumerate((trained, disturb(trained)))
            ]
            options = {"soft_prompt" if method == "prompt" else "adapter": trained}
            remote = RemoteCausalLM.from_pretrained(args.model, client=client, **options)
            runs = [
                train(remote, dict(trained.named_parameters()), settings, data),
                *(train(local, parameters, settings, data) for local, parameters in locals_),
            ]
            print_run(method, *runs)
            names = ("swarm", "local", "disturbed")
            results[method] = dict(zip(names, map(asdict, runs), strict=True))
    write_results("finetune", machine, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
