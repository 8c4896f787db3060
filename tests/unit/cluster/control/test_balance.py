"""Experts to workers against the exact optimum (mixed-integer programs, solved by scipy's HiGHS) on small cases."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from cluster.control.balance import Expert, ShardProblem, assign, cost, num_moves

pytestmark = pytest.mark.needs("scipy")

BALANCE_FACTOR = 1.2  # our cost over the least there is with as many copies of each expert
FREE_FACTOR = 1.5  # and over the least with any number of copies: fewer may balance better than memory allows
MOVES_FACTOR = 2.5  # our moves over the fewest that reach our cost, when loads have drifted; all cases together


def _problem(seed: int, slack: float = 0.0) -> ShardProblem:
    """Skewed loads, two to four workers of unequal size, now and then two of them in one domain."""
    rng = random.Random(seed)
    num_workers = rng.randint(2, 4)
    num_layers, num_experts = rng.choice([(1, 4), (1, 8), (2, 4), (2, 6), (3, 4)])
    load = [[round(rng.paretovariate(1.1), 3) for _ in range(num_experts)] for _ in range(num_layers)]
    least = -(-num_layers * num_experts // num_workers)
    slots = [least + rng.randint(0, least) for _ in range(num_workers)]
    domains = [f"d{rng.randint(0, 3)}" if seed % 3 == 0 else f"d{w}" for w in range(num_workers)]
    return ShardProblem(load, slots, domains, rng.randint(1, 2), slack)


def _drifted(problem: ShardProblem, seed: int, slack: float = 0.0) -> ShardProblem:
    rng = random.Random(1000 + seed)
    load = [[value * rng.choice([0.3, 1.0, 3.0]) for value in row] for row in problem.load]
    return ShardProblem(load, problem.slots, problem.domains, problem.max_copies, slack)


def _optimum(
    problem: ShardProblem,
    *,
    held: Sequence[set[Expert]] | None = None,
    cost_at_most: float = math.inf,
    num_copies: dict[Expert, int] | None = None,
) -> float:
    """Without `held` the least cost, else the fewest moves from there at a cost of at most `cost_at_most`.

    Binary x[e, k, w]: worker w has one of the k copies of e. Binary z[e, k]: e has k copies. Real m[l]: the greatest
    load in layer l. `num_copies` fixes the z.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    experts, workers = list(problem.experts), range(len(problem.slots))
    copies = range(1, problem.max_copies + 1)
    columns: dict[tuple[object, ...], int] = {}
    for key in (
        *(("x", e, k, w) for e in experts for k in copies for w in workers),
        *(("z", e, k) for e in experts for k in copies),
        *(("m", layer) for layer in range(len(problem.load))),
    ):
        columns[key] = len(columns)
    rows: list[list[float]] = []
    lower: list[float] = []
    upper: list[float] = []

    def constrain(terms: dict[tuple[object, ...], float], least: float, most: float) -> None:
        row = [0.0] * len(columns)
        for key, factor in terms.items():
            row[columns[key]] = factor
        rows.append(row)
        lower.append(least)
        upper.append(most)

    for e in experts:
        constrain({("z", e, k): 1.0 for k in copies}, 1, 1)
        for k in copies:
            constrain({("z", e, k): -float(k)} | {("x", e, k, w): 1.0 for w in workers}, 0, 0)
            for w in workers:
                constrain({("x", e, k, w): 1.0, ("z", e, k): -1.0}, -1, 0)
        for domain in set(problem.domains):
            inside = [w for w in workers if problem.domains[w] == domain]
            constrain({("x", e, k, w): 1.0 for k in copies for w in inside}, 0, 1)
        if num_copies is not None:
            constrain({("z", e, num_copies[e]): 1.0}, 1, 1)
    for w in workers:
        constrain({("x", e, k, w): 1.0 for e in experts for k in copies}, 0, problem.slots[w])
        for layer, load in enumerate(problem.load):
            terms: dict[tuple[object, ...], float] = {("m", layer): -1.0}
            terms |= {("x", e, k, w): load[e.idx] / k for e in experts if e.layer == layer for k in copies}
            constrain(terms, -math.inf, 0)
    constrain({("m", layer): 1.0 for layer in range(len(problem.load))}, 0, cost_at_most)

    objective = [0.0] * len(columns)
    for key, column in columns.items():
        if held is None:
            objective[column] = float(key[0] == "m")
        elif key[0] == "x":
            objective[column] = float(key[1] not in held[key[3]])  # type: ignore[call-overload]
    most = [math.inf if key[0] == "m" else 1.0 for key in columns]
    solved = milp(
        objective,
        constraints=LinearConstraint(rows, lower, upper),
        integrality=[float(key[0] != "m") for key in columns],
        bounds=Bounds([0.0] * len(columns), most),
        options={"time_limit": 30.0},
    )
    assert solved.status == 0, solved.message
    return float(solved.fun)


def _check(problem: ShardProblem, held: Sequence[set[Expert]]) -> None:
    assert all(len(experts) <= slots for experts, slots in zip(held, problem.slots, strict=True))
    assert set().union(*held) == set(problem.experts)
    for expert in problem.experts:
        domains = [domain for experts, domain in zip(held, problem.domains, strict=True) if expert in experts]
        assert 1 <= len(domains) <= problem.max_copies
        assert len(set(domains)) == len(domains)


def _num_copies(problem: ShardProblem, held: Sequence[set[Expert]]) -> dict[Expert, int]:
    return {expert: sum(expert in experts for experts in held) for expert in problem.experts}


@pytest.mark.parametrize("seed", [*range(20), 36, 50])  # the last two are the worst of the first sixty
def test_the_cost_is_near_the_least_there_is(seed: int) -> None:
    problem = _problem(seed)
    held = assign(problem, [()] * len(problem.slots))
    _check(problem, held)
    with_our_copies = _optimum(problem, num_copies=_num_copies(problem, held))
    with_any = _optimum(problem)
    found = cost(problem, held) * (1 + 1e-6)
    assert with_any <= with_our_copies * (1 + 1e-6)
    assert with_our_copies <= found <= BALANCE_FACTOR * with_our_copies
    assert found <= FREE_FACTOR * with_any


@pytest.mark.parametrize("seed", range(24))
def test_a_repair_takes_the_fewest_moves_there_are(seed: int) -> None:
    """The last worker is lost, and nobody has what it had: no other way to as many copies has fewer moves."""
    whole = _problem(seed)
    before = assign(whole, [()] * len(whole.slots))
    lost = before[-1]
    held = [experts - lost for experts in before[:-1]]
    slots = [num + len(lost) // 2 + 1 for num in whole.slots[:-1]]
    problem = ShardProblem(whole.load, slots, whole.domains[:-1], whole.max_copies, whole.slack)
    if sum(slots) < problem.num_experts:
        slots[0] += problem.num_experts
    after = assign(problem, held)
    _check(problem, after)
    assert num_moves(held, after) == round(_optimum(problem, held=held, num_copies=_num_copies(problem, after)))


def test_balancing_drifted_loads_takes_few_moves() -> None:
    ours, fewest = 0, 0
    for seed in range(24):
        before = _problem(seed)
        held = assign(before, [()] * len(before.slots))
        problem = _drifted(before, seed, slack=0.1)
        after = assign(problem, held)
        _check(problem, after)
        fresh = assign(problem, [()] * len(problem.slots))
        assert cost(problem, after) <= 1.1 * cost(problem, fresh) * (1 + 1e-6)
        assert num_moves(held, after) <= num_moves(held, fresh)
        ours += num_moves(held, after)
        fewest += round(_optimum(problem, held=held, cost_at_most=cost(problem, after) * (1 + 1e-6)))
    assert 0 < fewest <= ours <= MOVES_FACTOR * fewest


def test_within_the_slack_nothing_moves() -> None:
    before = ShardProblem([[4.0, 3.0, 2.0, 1.0]], [2, 2], ["a", "b"], 1, 0.5)
    held = assign(before, [(), ()])
    assert cost(before, held) == 5.0
    drifted = ShardProblem([[5.0, 3.0, 2.0, 2.0]], [2, 2], ["a", "b"], 1, 0.5)
    assert assign(drifted, held) == held
    swapped = ShardProblem([[9.0, 1.0, 1.0, 9.0]], [2, 2], ["a", "b"], 1, 0.5)
    assert cost(swapped, held) == 18.0
    after = assign(swapped, held)
    assert cost(swapped, after) == 10.0
    assert num_moves(held, after) == 2


def test_layers_are_balanced_each_by_itself() -> None:
    """Equal sums are not enough: a worker with all of one layer would make the others wait."""
    problem = ShardProblem([[1.0] * 4, [1.0] * 4], [4, 4], ["a", "b"], 1, 0.0)
    held = assign(problem, [(), ()])
    assert [sorted(expert.layer for expert in experts) for experts in held] == [[0, 0, 1, 1]] * 2
    assert cost(problem, held) == 4.0


def test_a_cold_replica_gives_way_to_an_expert_without_a_copy() -> None:
    problem = ShardProblem([[3.0, 2.0, 1.0]], [2, 2], ["a", "b"], 2, 0.0)
    held = [{Expert(0, 0), Expert(0, 1)}, {Expert(0, 0), Expert(0, 1)}]
    after = assign(problem, held)
    _check(problem, after)
    assert num_moves(held, after) == 1
    assert sum(Expert(0, 0) in experts for experts in after) == 2


def test_a_new_worker_takes_a_share() -> None:
    before = ShardProblem([[3.0, 2.0, 2.0, 2.0]], [4, 4], ["a", "b"], 1, 0.0)
    held = assign(before, [(), ()])
    problem = ShardProblem(before.load, [4, 4, 4], ["a", "b", "c"], 1, 0.0)
    after = assign(problem, [*held, set()])
    _check(problem, after)
    assert num_moves([*held, set()], after) == len(after[2]) == 1  # 3+2 and 2+2 before, then 3 and 2+2 and 2


def test_without_slots_for_all_twice_the_hottest_experts_have_replicas() -> None:
    problem = ShardProblem([[4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 5.0]], [5, 5], ["a", "b"], 2, 0.1)
    held = assign(problem, [(), ()])
    _check(problem, held)
    assert {expert for expert, num in _num_copies(problem, held).items() if num == 2} == {Expert(0, 0), Expert(1, 3)}


def test_copies_never_share_a_failure_domain() -> None:
    problem = ShardProblem([[4.0, 1.0, 1.0, 1.0]], [4, 4, 4], ["a", "rack", "rack"], 3, 0.1)
    held = assign(problem, [(), (), ()])
    _check(problem, held)
    assert max(_num_copies(problem, held).values()) == 2


@pytest.mark.parametrize("seed", range(40))
def test_whatever_changes_it_settles(seed: int) -> None:
    """Other loads, slots and domains: the second assignment may repair, the third balance; then nothing moves."""
    before, problem = _problem(seed), _problem(500 + seed, slack=(0.0, 0.1, 1.0)[seed % 3])
    held = [*assign(before, [()] * len(before.slots)), set(), set()][: len(problem.slots)]
    for _ in range(2):
        held = assign(problem, held)
        _check(problem, held)
    assert assign(problem, held) == held


def test_a_large_model_is_placed_in_seconds_near_its_lower_bound() -> None:
    """61 layers of 256 experts on 16 workers: a layer's cost is at least its mean, and its hottest copy."""
    rng = random.Random(0)
    load = [[rng.paretovariate(1.5) for _ in range(256)] for _ in range(61)]
    problem = ShardProblem(load, [1200] * 16, [f"d{w // 2}" for w in range(16)], 2, 0.1)
    held = assign(problem, [()] * 16)
    _check(problem, held)
    bound = sum(max(sum(row) / 16, max(row) / 2) for row in load)
    assert cost(problem, held) <= 1.02 * bound
