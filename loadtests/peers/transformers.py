"""transformers as a peer: `python -m loadtests.peers.transformers`, requests and answers as JSON lines.

It runs at its best: fp32, inference mode, KV cache, and of its attention and expert implementations those that a short
trial of each kind of work found fastest. A request is `{"op": …, …}`, an answer the op's result or `{"error": …}`:

- `load {model, num_threads}` -> `{version, parameters}`
- `trial {prompts, prompt, num_tokens}` -> `{"batch": …, "single": …, "prefill": …, "continuous": …}`: the
  implementations chosen for each kind of work, kept for the ops below
- `batch {prompts, num_tokens}` -> `{duration_s, output_tokens}`: one `generate` over prompts of equal length
- `sequential {prompts, num_tokens, times_s}` -> the same: one request after another, none before its arrival
- `continuous {prompts, num_tokens, times_s}` -> the same, through transformers' continuous batching
- `single {prompt, num_tokens}` -> `{ttft_s, tpot_s}`
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch
import transformers
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.generation.streamers import BaseStreamer

# The likely first: what is far slower than the fastest so far is not tried again.
ATTENTION = ("sdpa", "eager")
EXPERTS = ("grouped_mm", "eager", "batched_mm")
CONTINUOUS_ATTENTION = ("sdpa", "paged|eager")  # those that run without a GPU
NEVER = -1  # as the id of the end of a text: generate to the full length
TRIALS = 3  # of which the fastest counts
HOPELESS = 3.0  # times slower, at first sight
WAIT_S = 600.0  # longest wait for one answer of the continuous batching


@dataclass(frozen=True)
class Implementation:
    """`attn_implementation` and `experts_implementation`; None: the model has no experts."""

    attention: str
    experts: str | None


class TokenTimes(BaseStreamer):
    """Notes when `generate` hands on the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Peer:
    """A loaded model and the implementations chosen for each kind of work."""

    def __init__(self, model: str, num_threads: int | None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        # The checkpoint's own sampling defaults would otherwise be merged into every call.
        self.model.generation_config = transformers.GenerationConfig()
        self.chosen: dict[str, Implementation] = {}

    # ------------------------------------------------------------------------------------------------- kinds of work

    def batch(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        self._use("batch")
        started = time.perf_counter()
        output_tokens = self._generate(prompts, num_tokens)
        return {"duration_s": time.perf_counter() - started, "output_tokens": output_tokens}

    def sequential(self, prompts: list[list[int]], num_tokens: list[int], times_s: list[float]) -> dict[str, Any]:
        self._use("single")
        started = time.perf_counter()
        output_tokens = 0
        for prompt, count, time_s in zip(prompts, num_tokens, times_s, strict=True):
            time.sleep(max(0.0, started + time_s - time.perf_counter()))
            output_tokens += self._generate([prompt], count)
        return {"duration_s": time.perf_counter() - started, "output_tokens": output_tokens}

    def continuous(self, prompts: list[list[int]], num_tokens: list[int], times_s: list[float]) -> dict[str, Any]:
        self._use("continuous")
        return self._continuous(prompts, num_tokens, times_s)

    def single(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        self._use("single" if num_tokens > 1 else "prefill")
        times = TokenTimes()
        started = time.perf_counter()
        self._generate([prompt], num_tokens, times)
        first, last = times.times[1], times.times[-1]  # the prompt is handed on before any work
        return {"ttft_s": first - started, "tpot_s": (last - first) / (num_tokens - 1) if num_tokens > 1 else None}

    # ------------------------------------------------------------------------------------------------------- the trial

    def trial(self, prompts: list[list[int]], prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Choose the fastest implementations: `prompts` and `num_tokens` of decoding, `prompt` for the prefill."""
        equal = [num_tokens] * len(prompts)
        at_once = [0.0] * len(prompts)
        kinds: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
            "batch": (ATTENTION, lambda: self._generate(prompts, num_tokens)),
            "single": (ATTENTION, lambda: self._generate(prompts[:1], 2 * num_tokens)),
            "prefill": (ATTENTION, lambda: self._generate([prompt], 1)),
        }
        for kind, (attention, work) in kinds.items():
            self.chosen[kind] = self._fastest(attention, self._experts(), work)
        # Its cost is in its attention; the experts' work is that of a batch.
        with contextlib.suppress(RuntimeError, ValueError, TypeError, AttributeError):
            self.chosen["continuous"] = self._fastest(
                CONTINUOUS_ATTENTION,
                (self.chosen["batch"].experts,),
                lambda: self._continuous(prompts, equal, at_once),
                repeats=1,
            )
        return {kind: asdict(chosen) for kind, chosen in self.chosen.items()}

    def _experts(self) -> tuple[str | None, ...]:
        config = self.model.config.get_text_config()
        has_experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
        return EXPERTS if has_experts else (None,)

    def _fastest(
        self,
        attention: tuple[str, ...],
        experts: tuple[str | None, ...],
        work: Callable[[], Any],
        repeats: int = TRIALS,
    ) -> Implementation:
        seconds: dict[Implementation, float] = {}
        for implementation in itertools.starmap(Implementation, itertools.product(attention, experts)):
            try:
                self._set(implementation)
                cold = _seconds(work)
                if not seconds or cold < HOPELESS * min(seconds.values()):
                    seconds[implementation] = min(_seconds(work) for _ in range(repeats))
            except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
                print(f"{implementation} does not run here: {error}", file=sys.stderr)
        if not seconds:
            raise RuntimeError("none of the implementations runs")
        return min(seconds, key=lambda implementation: seconds[implementation])

    # --------------------------------------------------------------------------------------------------------- helpers

    def _use(self, kind: str) -> None:
        if kind not in self.chosen:
            raise ValueError(f"the trial found no implementation for {kind!r}")
        self._set(self.chosen[kind])

    def _set(self, implementation: Implementation) -> None:
        if self.model.config._attn_implementation != implementation.attention:
            self.model.set_attn_implementation(implementation.attention)
        if implementation.experts is not None:
            self.model.set_experts_implementation(implementation.experts)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], num_tokens: int, streamer: BaseStreamer | None = None) -> int:
        """Greedy, exactly `num_tokens` for each of `prompts` of one length; -> tokens generated."""
        ids = torch.tensor(prompts, device=self.model.device)
        config = transformers.GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer)
        return (out.shape[1] - ids.shape[1]) * len(prompts)

    @torch.inference_mode()
    def _continuous(self, prompts: list[list[int]], num_tokens: list[int], times_s: list[float]) -> dict[str, Any]:
        longest = max(map(len, prompts)), max(num_tokens)
        settings = transformers.ContinuousBatchingConfig(auto_switch_to_flash=False, allow_block_sharing=False)
        pages_each = -(-sum(longest) // settings.page_size)
        settings.num_blocks = pages_each * len(prompts) + 1
        settings.max_batch_tokens = max(512, sum(map(len, prompts)))
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=NEVER, max_new_tokens=longest[1])
        hints = WorkloadHints(*longest, len(prompts))
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings, workload_hints=hints, timeout=WAIT_S
        ) as manager:
            started = time.perf_counter()
            for prompt, count, time_s in zip(prompts, num_tokens, times_s, strict=True):
                time.sleep(max(0.0, started + time_s - time.perf_counter()))
                manager.add_request(prompt, max_new_tokens=count)
            output_tokens = 0
            for _ in prompts:
                result = manager.get_result(timeout=WAIT_S)
                if result is None or result.error:
                    raise RuntimeError(f"continuous batching failed: {result.error if result else 'no answer'}")
                output_tokens += len(result.generated_tokens)
            return {"duration_s": time.perf_counter() - started, "output_tokens": output_tokens}


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def answers(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The answer to each request; an op that fails says so and leaves the process as it was."""
    peer: Peer | None = None
    for line in lines:
        request = msgspec.json.decode(line, type=dict[str, Any])
        op = request.pop("op")
        try:
            if op == "load":
                peer = Peer(**request)
                yield {"version": transformers.__version__, "parameters": peer.model.num_parameters()}
            elif peer is None:
                yield {"error": f"{op!r} came before 'load'"}
            elif op in ("trial", "batch", "sequential", "continuous", "single"):
                yield getattr(peer, op)(**request)
            else:
                yield {"error": f"unknown op {op!r}"}
        except Exception as error:  # whatever a third party raises: its caller reports it and goes on
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # What libraries print must not get between the answers.
    answer_pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for answer in answers(iter(sys.stdin.buffer.readline, b"")):
        answer_pipe.write(msgspec.json.encode(answer) + b"\n")
        answer_pipe.flush()


if __name__ == "__main__":
    main()
