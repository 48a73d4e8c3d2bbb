"""Tokens through chains of real processes, against Hugging Face on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import NEW_TOKENS, PROMPTS, even_spans, wait_until_free

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]


@pytest.mark.parametrize("hops", [1, 2, 3, 5])
def test_greedy_tokens_equal_hugging_faces(
    hops: int, model_folder: Path, expected_tokens: dict[str, list[int]]
) -> None:
    with (
        PrivateSwarm(str(model_folder), spans=even_spans(hops), threads=1) as swarm,
        swarm.client() as client,
    ):
        for prompt in PROMPTS:
            result = client.generate(prompt=prompt, max_new_tokens=NEW_TOKENS).result()
            assert list(result.tokens) == expected_tokens[prompt]
            assert [(hop.start, hop.end) for hop in result.chain] == list(even_spans(hops))
        wait_until_free(swarm)
        # The work was done where the chain says: each server did every step.
        for server in swarm.servers:
            with Client(server.socket) as own:
                span = own.status().span
            assert span is not None
            tokens = sum(len(expected_tokens[prompt]) for prompt in PROMPTS)
            assert span.decode_steps + span.prefill_steps >= tokens


def test_a_long_prompt_is_prefilled_in_pieces(client: Client) -> None:
    """The same prompt, alone and after a first part was cached, gives the same tokens."""
    long = " ".join(f"Item {number} costs {number * 7} coins." for number in range(60))
    seen = []
    whole = client.generate(prompt=long, max_new_tokens=16, on_progress=seen.append).result()
    assert whole.prompt_tokens > 512
    assert [event.done for event in seen if event.event == "prefill"][-1] == whole.prompt_tokens
    client.generate(prompt=long[:900], max_new_tokens=4, session="kept").result()
    again = client.generate(prompt=long, max_new_tokens=16, session="kept").result()
    assert again.tokens == whole.tokens
    assert again.timings.prefilled_tokens < whole.prompt_tokens / 2 + 100


def test_a_kept_session_is_used_again_at_once(client: Client) -> None:
    answers = {
        client.generate(prompt="One, two,", max_new_tokens=1, session="quick").result().tokens
        for _ in range(30)
    }
    assert len(answers) == 1


def test_sampling_with_a_seed_is_repeatable(client: Client) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        return (
            client.generate(
                prompt="My favourite animal is", max_new_tokens=24, temperature=1.0, seed=seed
            )
            .result()
            .tokens
        )

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_two_sessions_at_once_do_not_mix(
    swarm: PrivateSwarm, expected_tokens: dict[str, list[int]]
) -> None:
    with swarm.client() as one, swarm.client() as other:
        first = one.generate(prompt=PROMPTS[0], max_new_tokens=NEW_TOKENS)
        second = other.generate(prompt=PROMPTS[1], max_new_tokens=NEW_TOKENS)
        results = {PROMPTS[1]: second.result(), PROMPTS[0]: first.result()}
    for prompt, result in results.items():
        assert list(result.tokens) == expected_tokens[prompt]
