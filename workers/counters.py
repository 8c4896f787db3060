"""An engine's counters, as `EngineState` has them: each step makes the next value of the last."""

from __future__ import annotations

from bisect import bisect_left

from msgspec import structs

from cluster.protocol import STEP_TOKEN_BOUNDS, EngineState
from workers.step import StepPlan


def with_step(
    state: EngineState, plan: StepPlan, *, num_prompt: int, num_generated: int, forward_s: float, step_s: float
) -> EngineState:
    """`state` with one step more: of its tokens `num_prompt` were of prompts, and it generated `num_generated`."""
    return structs.replace(
        state,
        steps=state.steps + 1,
        step_tokens=state.step_tokens + plan.num_tokens,
        sequence_steps=state.sequence_steps + len(plan.scheduled),
        forward_s=state.forward_s + forward_s,
        step_s=state.step_s + step_s,
        prompt_tokens=state.prompt_tokens + num_prompt,
        generated_tokens=state.generated_tokens + num_generated,
        step_token_counts=_counted(state.step_token_counts, plan.num_tokens),
    )


def _counted(counts: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """`EngineState.step_token_counts` with one step more of so many tokens."""
    place = bisect_left(STEP_TOKEN_BOUNDS, num_tokens)
    counts = counts or (0,) * (len(STEP_TOKEN_BOUNDS) + 1)
    return (*counts[:place], counts[place] + 1, *counts[place + 1 :])
