"""Speed of a chain over links as homes have them, by the codec of its hidden states.

    python benchmarks/links.py [--mbits 10 100 1000] [--round-trip-ms 20] [--rounds 3]

Three servers of SmolLM2 and a router, as real daemons, whose connections go through an emulator of
links in user space: so many Mbit/s, and such a round trip, between any two. One swarm for each
codec, all on the same cores; at any time one of them has a job. Every round measures each codec at
each speed once, in turn. Printed are the time to the first token of a long prompt and the decode
steps a second, each with its ratio to raw: medians over the rounds, with the least and the most.
The first job at a speed is not counted: in it, *auto* measures.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.decode import make_prompt
from benchmarks.link_emulator import LinkEmulator
from benchmarks.report import describe_machine, spread, write_results
from kernels.checkpoint import Checkpoint
from kernels.model_store import find_model
from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm, split_blocks

CODECS = ("raw", "int8", "auto")
SERVERS = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One job."""

    first_token_s: float
    steps_per_s: float


@dataclass(eq=False)
class Way:
    """A swarm whose jobs ask for one codec."""

    codec: str
    swarm: PrivateSwarm
    links: LinkEmulator
    client: Client
    vocabulary: int

    def set_speed(self, mbits: float, round_trip_s: float) -> None:
        names = [daemon.name for daemon in self.swarm.daemons]
        for one, other in itertools.combinations(names, 2):
            self.links.set_link(one, other, latency_s=round_trip_s / 2, bytes_per_s=mbits * 1e6 / 8)

    def run(self, prompt: int, steps: int, seed: int) -> Sample:
        tokens = make_prompt(prompt + seed, self.vocabulary)[:prompt]
        result = self.client.generate(prompt_tokens=tokens, max_new_tokens=steps + 1).result()
        timings = result.timings
        return Sample(first_token_s=timings.first_token_s, steps_per_s=timings.steps_per_s)

    def sent(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for server in self.swarm.servers:
            with Client(server.socket) as own:
                counts.update({each.codec: each.messages for each in own.status().sent})
        return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--mbits", type=float, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--round-trip-ms", type=float, default=20.0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    machine = describe_machine()
    folder = find_model(args.model).path
    config = Checkpoint(folder).config
    samples: dict[tuple[float, str], list[Sample]] = {}
    messages: dict[tuple[float, str], Counter[str]] = {}
    with contextlib.ExitStack() as stack:
        ways = []
        for codec in CODECS:
            links = stack.enter_context(LinkEmulator())
            swarm = stack.enter_context(
                PrivateSwarm(
                    str(folder),
                    split_blocks(config.num_blocks, SERVERS),
                    threads=1,
                    route={"codec": codec},
                    links=links,
                )
            )
            swarm.wait_covered()
            client = stack.enter_context(swarm.client())
            ways.append(Way(codec, swarm, links, client, config.vocab_size))
        for mbits in args.mbits:
            for way in ways:
                way.set_speed(mbits, args.round_trip_ms / 1e3)
                way.run(args.prompt, args.steps, 0)
                messages[mbits, way.codec] = way.sent()
            for number in range(args.rounds):
                for way in ways:
                    sample = way.run(args.prompt, args.steps, number + 1)
                    samples.setdefault((mbits, way.codec), []).append(sample)
                    print(f"{mbits:g} Mbit/s, {way.codec}: {sample}", file=sys.stderr)
            for way in ways:
                key = mbits, way.codec
                messages[key] = way.sent() - messages[key]
    show(args, samples, messages)
    results = [
        {
            "mbits": mbits,
            "codec": codec,
            "first_token_s": [each.first_token_s for each in found],
            "steps_per_s": [each.steps_per_s for each in found],
            "messages": dict(messages[mbits, codec]),
        }
        for (mbits, codec), found in samples.items()
    ]
    write_results("links", machine, args, results)


def show(
    args: argparse.Namespace,
    samples: dict[tuple[float, str], list[Sample]],
    messages: dict[tuple[float, str], Counter[str]],
) -> None:
    print(f"\n{args.prompt} tokens of prompt, {args.steps} steps, {args.round_trip_ms:g} ms\n")
    for mbits in args.mbits:
        for codec in CODECS:
            found, base = samples[mbits, codec], samples[mbits, "raw"]
            first = [each.first_token_s for each in found]
            steps = [each.steps_per_s for each in found]
            pairs = list(zip(found, base, strict=True))
            sooner = [other.first_token_s / each.first_token_s for each, other in pairs]
            faster = [each.steps_per_s / other.steps_per_s for each, other in pairs]
            sent = ", ".join(f"{n} {name}" for name, n in messages[mbits, codec].most_common())
            speed = "no limit" if math.isinf(mbits) else f"{mbits:g} Mbit/s"
            print(f"{speed:>11} {codec:5} first token s {spread(first)}, sooner {spread(sooner)}")
            print(f"{'':17} steps/s       {spread(steps)}, faster {spread(faster)}")
            print(f"{'':17} sent by servers: {sent}")


if __name__ == "__main__":
    main()
