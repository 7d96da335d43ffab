"""The slot table by hand, and under any sequence of operations beside a naive model of its rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fate_moe.core import EvictionPolicy, ExpertId, Lookup
from fate_moe.kernels.extension import native
from fate_moe.memory.native_residency import native_policy
from fate_moe.memory.policies import LRU
from fate_moe.memory.table import WHOLE, SlotTable
from fate_moe.registry import POLICIES, make_policy

NUM_LAYERS, NUM_EXPERTS, SECTIONS = 3, 5, 4
ALL = [ExpertId(layer, number) for layer in range(NUM_LAYERS) for number in range(NUM_EXPERTS)]
HIT, IN_FLIGHT, MISS = Lookup.HIT, Lookup.IN_FLIGHT, Lookup.MISS


class Journal(EvictionPolicy):
    """A policy that also writes down what it is told."""

    def __init__(self, inner: EvictionPolicy) -> None:
        self.inner = inner
        self.told: list[tuple[Any, ...]] = []

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        self.told.append(("routed", layer, tuple(experts), counts, num_tokens))
        self.inner.routed(layer, experts, counts, num_tokens)

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self.told.append(("admitted", expert, prefetched))
        self.inner.admitted(expert, prefetched=prefetched)

    def touched(self, expert: ExpertId) -> None:
        self.told.append(("touched", expert))
        self.inner.touched(expert)

    def removed(self, expert: ExpertId) -> None:
        self.told.append(("removed", expert))
        self.inner.removed(expert)

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        return self.inner.victim(incoming, evictable, probability)


class Model:
    """The rules, one record an expert; only what design.md says, with no thought of speed."""

    def __init__(self, policy: Journal, class_of_slot: list[int], class_of_expert: dict[ExpertId, int], num_experts: int) -> None:
        self.policy, self.class_of_slot, self.class_of_expert = policy, class_of_slot, class_of_expert
        self.num_experts = num_experts
        self.slot: dict[ExpertId, int] = {}
        self.state = dict.fromkeys(ALL, "missing")
        self.sections = dict.fromkeys(ALL, 0)
        self.locks: Counter[ExpertId] = Counter()
        self.protected: set[ExpertId] = set()
        self.unused: set[ExpertId] = set()
        self.drafts: set[ExpertId] = set()
        self.counted: Counter[str] = Counter()

    def route(
        self, experts: list[ExpertId], counts: list[int] | None, num_tokens: int, wanted: dict[ExpertId, int]
    ) -> list[Lookup]:
        self.teach(experts, counts, num_tokens)
        self.protected = {e for e in self.protected if not experts or e.layer != experts[0].layer}
        return [self.look_up(expert, wanted.get(expert, WHOLE)) for expert in experts]

    def teach(self, experts: list[ExpertId], counts: list[int] | None, num_tokens: int) -> None:
        if not experts:
            return
        if not 0 < self.num_experts <= sum(state != "missing" for state in self.state.values()):
            self.policy.routed(experts[0].layer, [e.expert for e in experts], counts, num_tokens)
        self.drafts -= set(experts)
        for expert in experts:
            if expert in self.slot:
                self.policy.touched(expert)

    def look_up(self, expert: ExpertId, wanted: int) -> Lookup:
        if self.state[expert] == "missing":
            self.counted["misses"] += 1
            return MISS
        self.counted["prefetch_used"] += expert in self.unused
        self.unused.discard(expert)
        if self.state[expert] == "in flight":
            self.counted["in_flight"] += 1
            return IN_FLIGHT
        if self.sections[expert] < wanted:
            self.counted["misses"] += 1
            self.counted["upgrades"] += 1
            return MISS
        self.counted["hits"] += 1
        return HIT

    def expect(self, experts: list[ExpertId]) -> list[int]:
        self.protected |= {e for e in experts if self.state[e] == "resident"}
        return [index for index, e in enumerate(experts) if self.state[e] == "missing"]

    def free(self, number: int) -> set[int]:
        return {slot for slot, of in enumerate(self.class_of_slot) if of == number} - set(self.slot.values())

    def victim(self, incoming: ExpertId, demand: bool, probability: float) -> ExpertId | None:
        number = self.class_of_expert[incoming]
        may_go = {
            e for e in ALL if self.state[e] == "resident" and not self.locks[e] and self.class_of_slot[self.slot[e]] == number
        }
        victim = self.policy.victim(incoming, lambda e: e in may_go - self.protected, 1.0 if demand else probability)
        return self.policy.victim(incoming, lambda e: e in may_go) if victim is None and demand else victim

    def begin(self, expert: ExpertId, demand: bool, probability: float, slot: int | None) -> None:
        """The table gave ``slot``: that must be right."""
        if self.state[expert] == "resident":
            assert slot == self.slot[expert]
            self.state[expert] = "in flight"
            return
        free = self.free(self.class_of_expert[expert])
        victim = None if free else self.victim(expert, demand, probability)
        if victim is None and not free:
            assert slot is None
            return
        if victim is not None:
            assert slot == self.slot[victim]
            self.remove(victim)
        else:
            assert slot in free
        assert slot is not None
        self.slot[expert], self.state[expert] = slot, "in flight"
        self.policy.admitted(expert, prefetched=not demand or expert in self.drafts)
        if demand and expert not in self.drafts:
            self.policy.touched(expert)
        self.drafts.discard(expert)
        if not demand:
            self.counted["prefetched"] += 1
            self.unused.add(expert)
            self.protected.add(expert)

    def remove(self, expert: ExpertId) -> None:
        self.policy.removed(expert)
        del self.slot[expert]
        self.state[expert], self.sections[expert] = "missing", 0
        self.unused.discard(expert)
        self.protected.discard(expert)


class Native:
    """The extension's table, with the face of its twin."""

    def __init__(
        self, policy: EvictionPolicy, class_of_slot: list[int], class_of_expert: dict[ExpertId, int], num_experts: int
    ) -> None:
        experts, classes = list(class_of_expert), list(class_of_expert.values())
        self.native = native.SlotTable(native_policy(policy), class_of_slot, experts, classes, num_experts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def route(
        self, experts: list[ExpertId], counts: list[int] | None, num_tokens: int, sections: dict[ExpertId, int] | None
    ) -> dict[ExpertId, Lookup]:
        wanted = [sections.get(expert, WHOLE) for expert in experts] if sections else None
        codes = self.native.route(experts, counts, num_tokens, wanted)
        return dict(zip(experts, [(HIT, IN_FLIGHT, MISS)[code] for code in codes], strict=True))

    def look_up(self, experts: list[ExpertId]) -> dict[ExpertId, Lookup]:
        return dict(zip(experts, [(HIT, IN_FLIGHT, MISS)[code] for code in self.native.look_up(experts, None)], strict=True))

    def lock(self, experts: list[ExpertId]) -> None:
        for expert in experts:
            self.native.lock(expert)

    def unlock(self, experts: list[ExpertId]) -> None:
        for expert in experts:
            self.native.unlock(expert)

    def expect(self, experts: list[ExpertId]) -> list[int]:
        return [index for index, expert in enumerate(experts) if self.native.expect(expert)]

    def begin(self, expert: ExpertId, demand: bool, probability: float) -> int | None:
        slot = self.native.begin(expert, demand, probability)
        return None if slot < 0 else int(slot)

    def missing(self, experts: list[ExpertId]) -> list[bool]:
        slots = self.slots()
        return [expert not in slots for expert in experts]

    def slots(self) -> dict[ExpertId, int]:
        return {ExpertId(*expert): slot for expert, slot in self.native.slots()}

    def check_integrity(self) -> None:
        assert not self.native.broken()


class Twins:
    """The table and the extension's: whatever is called, both give the same, or raise the same."""

    def __init__(self, table: SlotTable, other: Native) -> None:
        self.table, self.other = table, other

    def __getattr__(self, name: str) -> Any:
        mine, its = getattr(self.table, name), getattr(self.other, name)
        if name == "counters":
            assert {field: getattr(its, field) for field in asdict(mine)} == asdict(mine)
            return mine
        if not callable(mine):
            assert mine == its
            return mine

        def both(*args: Any) -> Any:
            answers, errors = list[Any](), list[BaseException]()
            for call in (mine, its):
                try:
                    answers.append(call(*args))
                except (KeyError, ValueError) as error:
                    errors.append(error)
            assert len(errors) in (0, 2), (name, args, answers, errors)
            if errors:
                assert type(errors[0]) is type(errors[1])
                raise errors[0]
            assert answers[0] == answers[1], (name, args)
            return answers[0]

        return both


class TableMachine(RuleBasedStateMachine):
    """Every operation at any time, with slots of one class or two, under each policy; all tell their policies the same.

    Beside the model runs the extension's table, with its own policies where it has them.
    """

    @initialize(
        policy=st.sampled_from(list(POLICIES)),
        slots=st.lists(st.integers(1, 4), min_size=1, max_size=2),
        others=st.sets(st.sampled_from(ALL)),
        num_experts=st.sampled_from([0, 2, len(ALL)]),  # with 2 it is as if the others never came
    )
    def begin_with(self, policy: str, slots: list[int], others: set[ExpertId], num_experts: int) -> None:
        class_of_slot = [number for number, count in enumerate(slots) for _ in range(count)]
        last = len(slots) - 1
        classes = {expert: 0 if expert in others else last for expert in ALL}
        sizes = [NUM_EXPERTS] * NUM_LAYERS
        mine, its = (Journal(make_policy(policy, len(class_of_slot), sizes)) for _ in range(2))
        self.model = Model(mine, class_of_slot, classes, num_experts)
        given = {e: n for e, n in classes.items() if n != last}  # those of the last class may be omitted
        self.table: Any = SlotTable(its, class_of_slot, given, num_experts)
        self.policy = its
        if native is not None:
            other = make_policy(policy, len(class_of_slot), sizes)
            self.table = Twins(self.table, Native(other, class_of_slot, given, num_experts))

    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        numbers=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),
        num_tokens=st.integers(1, 3),
        sections=st.dictionaries(st.sampled_from(ALL), st.sampled_from([1, 2, 3, WHOLE]), max_size=4),
    )
    def route(self, layer: int, numbers: list[int], num_tokens: int, sections: dict[ExpertId, int]) -> None:
        experts = [ExpertId(layer, number) for number in numbers]
        counts = None if num_tokens == 1 else [1 + number % num_tokens for number in numbers]
        found = self.table.route(experts, counts, num_tokens, sections or None)
        assert list(found) == experts
        assert list(found.values()) == self.model.route(experts, counts, num_tokens, sections)

    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        numbers=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),
        certain=st.integers(0, NUM_EXPERTS),
        kept=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),
    )
    def read_drafts(self, layer: int, numbers: list[int], certain: int, kept: list[int]) -> None:
        """A step of which the first ``certain`` experts are of a text's own token; then some drafts turn out to be right."""
        experts = [ExpertId(layer, number) for number in numbers]
        self.table.draft(experts)
        self.model.drafts |= {expert for expert in experts if expert not in self.model.slot}
        for some in (experts[:certain], None, [ExpertId(layer, number) for number in kept]):
            if some is not None:
                self.table.teach(some, None, 1)
                self.model.teach(some, None, 1)
                continue
            found = self.table.look_up(experts)
            if experts:
                self.model.protected = {e for e in self.model.protected if e.layer != layer}
            assert list(found.values()) == [self.model.look_up(expert, WHOLE) for expert in experts]

    @rule(experts=st.lists(st.sampled_from(ALL), unique=True, max_size=3))
    def lock(self, experts: list[ExpertId]) -> None:
        self.table.lock(experts)
        self.model.locks.update(experts)

    @precondition(lambda self: +self.model.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        experts = data.draw(st.lists(st.sampled_from(sorted(+self.model.locks)), unique=True, min_size=1))
        self.table.unlock(experts)
        self.model.locks.subtract(experts)

    @rule(experts=st.lists(st.sampled_from(ALL), unique=True))
    def expect(self, experts: list[ExpertId]) -> None:
        assert self.table.expect(experts) == self.model.expect(experts)

    @precondition(lambda self: self.model.slot)
    @rule(data=st.data())
    def protect(self, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from(sorted(self.model.slot)))
        self.table.protect(expert)
        self.model.protected.add(expert)

    @rule(expert=st.sampled_from(ALL), demand=st.booleans(), probability=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    def begin(self, expert: ExpertId, demand: bool, probability: float) -> None:
        state, held = self.model.state[expert], self.model.sections[expert]
        if state == "in flight" or held == WHOLE:
            with pytest.raises(ValueError, match="in flight" if state == "in flight" else "resident"):
                self.table.begin(expert, demand, probability)
            return
        can = self.table.can_begin(expert, demand, probability)
        slot = self.table.begin(expert, demand, probability)
        assert can == (slot is not None)
        self.model.begin(expert, demand, probability, slot)

    @precondition(lambda self: "in flight" in self.model.state.values())
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def end(self, data: st.DataObject, fails: bool) -> None:
        expert = data.draw(st.sampled_from([e for e in ALL if self.model.state[e] == "in flight"]))
        if fails:
            self.table.fail(expert)
            self.model.remove(expert)
            return
        held = self.model.sections[expert]
        sections = data.draw(st.sampled_from([*range(held + 1, SECTIONS), WHOLE]))
        self.table.finish(expert, sections)
        self.model.state[expert], self.model.sections[expert] = "resident", sections

    @rule(expert=st.sampled_from(ALL))
    def misuse(self, expert: ExpertId) -> None:
        if self.model.state[expert] != "in flight":
            for call in (self.table.finish, self.table.fail):
                with pytest.raises(KeyError):
                    call(expert)
        if not self.model.locks[expert]:
            with pytest.raises(KeyError):
                self.table.unlock([expert])
        if self.model.state[expert] == "missing":
            for ask in (self.table.protect, self.table.slot_of):
                with pytest.raises(KeyError):
                    ask(expert)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "model"):
            return
        table, model = self.table, self.model
        table.check_integrity()
        assert table.slots() == model.slot
        assert table.missing(ALL) == [model.state[e] == "missing" for e in ALL]
        assert table.num_in_flight == sum(state == "in flight" for state in model.state.values())
        for expert in ALL:
            assert table.is_resident(expert) == (model.state[expert] == "resident")
            assert table.is_in_flight(expert) == (model.state[expert] == "in flight")
            assert table.is_protected(expert) == (expert in model.protected)
            assert table.is_locked(expert) == (model.locks[expert] > 0)
            assert table.sections_of(expert) == model.sections[expert]
            assert table.class_of(expert) == model.class_of_expert[expert]
            assert expert not in model.slot or table.slot_of(expert) == model.slot[expert]
        counted = {name: count for name, count in table.counters.as_dict().items() if name != "ready_on_time" and count}
        assert counted == +model.counted
        assert self.policy.told == model.policy.told


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)

A, B, C = (ExpertId(0, number) for number in range(3))
OTHER = ExpertId(1, 0)


def table(num_slots: int) -> SlotTable:
    return SlotTable(LRU(), [0] * num_slots)


def fill(table: SlotTable, *experts: ExpertId, demand: bool = True) -> None:
    for expert in experts:
        assert table.begin(expert, demand) is not None
        table.finish(expert)


def test_an_expert_is_missing_then_in_flight_then_a_hit() -> None:
    slots = table(1)
    found = []
    found.append(slots.route([A])[A])
    slots.begin(A)
    found.append(slots.route([A])[A])
    slots.finish(A)
    found.append(slots.route([A])[A])
    assert found == [MISS, IN_FLIGHT, HIT]
    assert (slots.counters.misses, slots.counters.in_flight, slots.counters.hits) == (1, 1, 1)


def test_a_demand_takes_a_protected_slot_a_prefetch_does_not_and_neither_a_locked_one() -> None:
    slots = table(1)
    fill(slots, A)
    assert slots.expect([A, B]) == [1]
    assert slots.begin(B, demand=False) is None
    slots.lock([A])
    assert slots.begin(B) is None
    slots.unlock([A])
    assert slots.begin(B) == 0
    assert not slots.is_resident(A)


def test_protection_ends_when_the_layer_is_routed() -> None:
    slots = table(1)
    fill(slots, OTHER)
    slots.expect([OTHER])
    slots.route([A])
    assert not slots.can_begin(A, demand=False), "another layer was routed"
    slots.route([ExpertId(1, 4)])
    assert slots.begin(A, demand=False) == 0


def test_a_prefetch_is_counted_and_its_first_use_too() -> None:
    slots = table(2)
    fill(slots, A, demand=False)
    for _ in range(2):
        slots.route([A])
    assert (slots.counters.prefetched, slots.counters.prefetch_used) == (1, 1)


def test_what_only_drafts_asked_for_is_not_used_until_they_are_right() -> None:
    for is_right, goes in ((False, B), (True, A)):
        slots = table(2)
        fill(slots, A)
        slots.draft([A, B])
        slots.teach([A])
        assert list(slots.look_up([A, B]).values()) == [HIT, MISS]
        fill(slots, B)
        if is_right:
            slots.teach([B])
        slots.begin(C)
        assert not slots.is_resident(goes)


def test_two_locks_need_two_unlocks() -> None:
    slots = table(1)
    fill(slots, A)
    slots.lock([A])
    slots.lock([A])
    slots.unlock([A])
    assert not slots.can_begin(B)
    slots.unlock([A])
    assert slots.can_begin(B)


def test_classes_do_not_share_slots() -> None:
    slots = SlotTable(LRU(), [0, 1], {A: 0, B: 0})
    assert (slots.begin(A), slots.begin(C)) == (0, 1)
    slots.finish(C)
    assert slots.begin(B) is None, "C has a slot of another class, A is in flight"
    slots.finish(A)
    assert slots.begin(B) == 0


def test_no_experts_no_layer() -> None:
    slots = table(1)
    assert slots.route([]) == {}
    assert slots.counters.lookups == 0


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda t: t._free[0].append(0), "one place"),
        (lambda t: t._slots.pop(B), "one place"),
        (lambda t: t._in_flight.add(C), "in flight have slots"),
        (lambda t: t._short.update({B: WHOLE}), "fewer than all"),
        (lambda t: t._protected.update({0: {C}}), "protected"),
        (lambda t: t._unused.add(C), "unused"),
        (lambda t: t._locks.update({C: 0}), "locks"),
    ],
)
def test_broken_books_are_named(spoil: Callable[[Any], None], complaint: str) -> None:
    slots = table(3)
    fill(slots, A, B)
    slots.check_integrity()
    spoil(slots)
    with pytest.raises(RuntimeError, match=complaint):
        slots.check_integrity()
