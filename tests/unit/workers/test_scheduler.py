"""Which tokens run next."""

from tests.support.models import make_request
from workers.cache.page_table import PageTable
from workers.cache.pages import PagePool
from workers.request import Request, Status
from workers.scheduler import Scheduler, SchedulerOptions
from workers.step import StepPlan

PAGE = 4


def make_scheduler(num_pages: int = 64, **options: object) -> tuple[Scheduler, PageTable]:
    table = PageTable(PagePool(num_pages), PAGE, lambda *_: None, lambda _: None, ("model",))
    return Scheduler(SchedulerOptions(**options), table), table  # type: ignore[arg-type]


def advance(scheduler: Scheduler, table: PageTable) -> dict[str, int]:
    """One step in which every complete sequence grows by a token; -> tokens scheduled by request."""
    plan = scheduler.schedule()
    for item in plan.scheduled:
        item.request.num_computed += item.num_tokens
        table.publish(item.request)
        if item.request.num_uncomputed == 0:
            item.request.tokens.append(1)
    return counts(plan)


def counts(plan: StepPlan) -> dict[str, int]:
    return {item.request.request_id: item.num_tokens for item in plan.scheduled}


def add(scheduler: Scheduler, name: str, length: int, arrival: float, **changes: object) -> Request:
    request = make_request(name, range(100, 100 + length), arrival=arrival, **changes)
    scheduler.add(request)
    return request


def test_a_long_prompt_is_chunked_and_never_stops_the_others() -> None:
    scheduler, table = make_scheduler(token_budget=10)
    add(scheduler, "short", 3, 0)
    assert advance(scheduler, table) == {"short": 3}
    add(scheduler, "long", 25, 1)
    steps = [advance(scheduler, table) for _ in range(3)]
    assert steps == [{"short": 1, "long": 9}, {"short": 1, "long": 9}, {"short": 1, "long": 7}]
    assert advance(scheduler, table) == {"short": 1, "long": 1}


def test_requests_join_and_leave_at_any_step() -> None:
    scheduler, table = make_scheduler()
    first = add(scheduler, "a", 4, 0)
    advance(scheduler, table)
    add(scheduler, "b", 4, 1)
    assert advance(scheduler, table) == {"a": 1, "b": 4}
    scheduler.remove(first)
    assert advance(scheduler, table) == {"b": 1}


def test_the_urgent_go_first_then_the_old() -> None:
    scheduler, _ = make_scheduler(max_num_seqs=2)
    add(scheduler, "late", 4, 2)
    add(scheduler, "early", 4, 1)
    add(scheduler, "urgent", 4, 3, priority=-1)
    assert list(counts(scheduler.schedule())) == ["urgent", "early"]


def test_the_youngest_is_preempted_and_computed_again() -> None:
    scheduler, table = make_scheduler(num_pages=5)
    old, young = add(scheduler, "old", 7, 0), add(scheduler, "young", 7, 1)
    assert advance(scheduler, table) == {"old": 7, "young": 7}
    assert advance(scheduler, table) == {"old": 1, "young": 1}  # fills the second page of each
    plan = scheduler.schedule()  # "old" takes the fifth page, "young" has none to grow into
    assert counts(plan) == {"old": 1}
    assert young.status is Status.WAITING
    assert young.page_ids == []
    assert scheduler.num_preemptions == 1
    scheduler.remove(old)
    assert counts(scheduler.schedule())["young"] > 0
    assert len(young.tokens) == 9, "a preempted request keeps its tokens"


def test_pages_are_conserved_whatever_happens() -> None:
    scheduler, table = make_scheduler(num_pages=12, token_budget=9)
    requests = [add(scheduler, str(i), 3 + 5 * i % 11, i) for i in range(8)]
    for step in range(60):
        advance(scheduler, table)
        table.pool.check()
        for request in requests:
            if request.status is not Status.FINISHED and len(request.tokens) > 20:
                scheduler.remove(request)
        assert step < 59 or all(request.status is Status.FINISHED for request in requests)
    assert table.pool.num_used == 0


def test_static_batching_admits_only_when_nothing_runs() -> None:
    scheduler, table = make_scheduler(static_batching=True)
    first = add(scheduler, "a", 4, 0)
    advance(scheduler, table)
    add(scheduler, "b", 4, 1)
    assert advance(scheduler, table) == {"a": 1}
    scheduler.remove(first)
    assert advance(scheduler, table) == {"b": 4}


def test_a_group_computes_its_prompt_once() -> None:
    scheduler, table = make_scheduler(token_budget=8)
    for i in range(3):
        add(scheduler, str(i), 13, i, group="g")
    assert [advance(scheduler, table) for _ in range(2)] == [{"0": 8}, {"0": 5}]
    assert advance(scheduler, table) == {"0": 1, "1": 1, "2": 1}  # twelve of their tokens came from the cache


def test_forks_that_wait_give_up_their_pages_rather_than_block() -> None:
    scheduler, table = make_scheduler(num_pages=6, max_num_seqs=1)
    source = add(scheduler, "source", 12, 0)
    advance(scheduler, table)
    fork = make_request("fork", source.tokens, arrival=2)
    table.share(source, fork, 12)
    scheduler.add(fork)
    scheduler.remove(source)
    big = make_request("big", range(200, 221), arrival=1)
    scheduler.add(big)
    assert counts(scheduler.schedule()) == {}  # no room: the fork that waits behind gives its pages up
    assert counts(scheduler.schedule()) == {"big": 21}
    scheduler.remove(big)
    assert counts(scheduler.schedule()) == {"fork": 13}
    table.pool.check()
