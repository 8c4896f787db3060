"""What an expert worker holds: assignments that succeed, grow, shrink and fail while calls are served."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from cluster.errors import CheckpointError, ConfigError, PeerLostError
from tests.support.experts import (
    LIMIT_BYTES,
    PipeLink,
    experts_of,
    in_moe_layers,
    make_host,
    serve_in_thread,
    take_shard,
)
from tests.support.models import TINY, random_weights
from tests.support.numerics import numerics
from workers.experts.frame import TensorSpec
from workers.experts.host import ExpertHost
from workers.experts.shard import ExpertIds, Shard, expert_rows
from workers.experts.wire import OK, Call, recv_reply, send_call, send_stop
from workers.models.loader import expert_bytes

WEIGHTS = random_weights(TINY)
DEADLINE_S = 30.0
KINDS = [pytest.param("native", marks=pytest.mark.needs("compiler")), "blocks"]


def make_call(expert_ids: list[int], layer: int = 2) -> Call:
    rows = torch.randn(len(expert_ids), TINY.hidden, generator=torch.Generator().manual_seed(len(expert_ids)))
    return Call(layer, torch.tensor(expert_ids), rows)


def ask(link: PipeLink, call: Call) -> tuple[torch.Tensor, int]:
    send_call(link, call, DEADLINE_S)
    return recv_reply(link, call, DEADLINE_S)


def expected(call: Call, kind: str) -> torch.Tensor:
    weights = experts_of(WEIGHTS)[call.layer]
    assert weights is not None
    return expert_rows(weights, call.rows, call.expert_ids, numerics(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_an_expert_do_not_depend_on_how_it_came_to_be_held(kind: str) -> None:
    host = make_host(TINY, WEIGHTS, numerics(kind))
    link = serve_in_thread(host)
    for ids in [(3,), (1, 3, 6), (1, 6), (0, 1, 5, 6, 7), (7,), tuple(range(8)), (2,)]:
        host.assign(in_moe_layers(TINY, ids))
        assert host.experts == (ids, (), ids)
        call = make_call([*ids, *reversed(ids)] * 3)
        output, missing = ask(link, call)
        assert missing == OK
        assert torch.equal(output, expected(call, kind))
    host.assign(((), (), (4,)))
    assert host.experts == ((), (), (4,))


def test_an_expert_that_is_not_here_is_said_so_and_the_link_goes_on() -> None:
    link = serve_in_thread(make_host(TINY, WEIGHTS, numerics("blocks"), (1, 5)))
    for ids, layer, missing in [([1, 4, 5], 0, 4), ([1], 1, 1), ([700], 2, 700)]:
        assert ask(link, make_call(ids, layer))[1] == missing
    call = make_call([5, 1])
    assert torch.equal(ask(link, call)[0], expected(call, "blocks"))


def test_what_is_computed_is_counted_and_what_is_not_here_is_not() -> None:
    host = make_host(TINY, WEIGHTS, numerics("blocks"), (1, 5))
    links = [serve_in_thread(host), serve_in_thread(host)]
    for link in links:
        ask(link, make_call([1, 5, 5]))
        ask(link, make_call([1, 4]))
    assert (host.num_calls, host.num_rows) == (2, 6)
    assert host.computing_s > 0.0


def test_rows_come_back_in_the_dtype_in_which_they_were_sent() -> None:
    link = serve_in_thread(make_host(TINY, WEIGHTS, numerics("blocks"), (1,)))
    call = make_call([1, 1])
    half = Call(call.layer, call.expert_ids, call.rows.bfloat16())
    output, _ = ask(link, half)
    wide = Call(call.layer, call.expert_ids, half.rows.float())
    assert torch.equal(output, expected(wide, "blocks").bfloat16())


@pytest.mark.parametrize("header", [[3, 1, 0], [-2, 1, 0], [0, 0, 0], [0, 1 << 40, 0], [0, 1, 3]])
def test_what_is_no_call_ends_the_link_alone(header: list[int]) -> None:
    host = make_host(TINY, WEIGHTS, numerics("blocks"), (1,))
    bad, good = serve_in_thread(host), serve_in_thread(host)
    bad.send([torch.tensor(header)], DEADLINE_S)
    with pytest.raises(PeerLostError):
        bad.recv([TensorSpec((1,))], DEADLINE_S)
    call = make_call([1])
    assert torch.equal(ask(good, call)[0], expected(call, "blocks"))


def test_serve_ends_when_no_more_calls_come() -> None:
    here, there = PipeLink.pair()
    send_stop(here, DEADLINE_S)
    make_host(TINY, WEIGHTS, numerics("blocks"), (1,)).serve(there)


class ScriptedLoad:
    """Loads experts of `WEIGHTS` and remembers what was asked for; `before` runs first."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.asked: list[ExpertIds] = []
        self.limits: list[int] = []

    def __call__(self, expert_ids: ExpertIds, limit_bytes: int) -> Shard:
        self.before()
        self.asked.append(expert_ids)
        self.limits.append(limit_bytes)
        return take_shard(experts_of(WEIGHTS), expert_ids)


def test_only_what_is_new_is_loaded_into_what_room_is_left() -> None:
    load = ScriptedLoad()
    host = ExpertHost(load, TINY, numerics("blocks"), LIMIT_BYTES)
    host.assign(((1, 2), (), (3,)))
    host.assign(((0, 2), (), (3,)))
    assert load.asked == [((1, 2), (), (3,)), ((0,), (), ())]
    assert load.limits == [LIMIT_BYTES, LIMIT_BYTES - 3 * expert_bytes(TINY, torch.float32)]


def test_calls_are_served_while_experts_are_loaded() -> None:
    loading, go_on = threading.Event(), threading.Event()
    load = ScriptedLoad()
    host = ExpertHost(load, TINY, numerics("blocks"), LIMIT_BYTES)
    host.assign(in_moe_layers(TINY, (1, 2)))
    link = serve_in_thread(host)

    def wait() -> None:
        loading.set()
        assert go_on.wait(DEADLINE_S)

    load.before = wait
    thread = threading.Thread(target=host.assign, args=(in_moe_layers(TINY, (2, 6)),))
    thread.start()
    assert loading.wait(DEADLINE_S)
    call = make_call([1, 2])
    assert torch.equal(ask(link, call)[0], expected(call, "blocks"))
    go_on.set()
    thread.join(DEADLINE_S)
    assert ask(link, call)[1] == 1
    call = make_call([2, 6])
    assert torch.equal(ask(link, call)[0], expected(call, "blocks"))


def test_an_assignment_that_fails_changes_nothing() -> None:
    def fail() -> None:
        raise CheckpointError("the file ends before it")

    load = ScriptedLoad()
    host = ExpertHost(load, TINY, numerics("blocks"), LIMIT_BYTES)
    host.assign(in_moe_layers(TINY, (1, 2)))
    load.before = fail
    with pytest.raises(CheckpointError, match="ends before"):
        host.assign(in_moe_layers(TINY, (3,)))
    for wrong in [((1,), ()), ((1,), (1,), ()), ((8,), (), ()), ((2, 1), (), ()), ((1, 1), (), ()), ((-1,), (), ())]:
        with pytest.raises(ConfigError, match="experts") as caught:
            host.assign(wrong)
        assert caught.value.param == "experts"
    assert host.experts == ((1, 2), (), (1, 2))
    call = make_call([1, 2])
    assert torch.equal(ask(serve_in_thread(host), call)[0], expected(call, "blocks"))
