"""Whether a cache outside the process is the one that was evicted from: the marks that it bears."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheinval.coherence.marks import MOST_MARKS, SPARE, Marks


@dataclass
class Cache:
    """Holds what was evicted, in order, and bears a mark for each; it can go back."""

    marks: Marks = field(default_factory=Marks)
    borne: list[str] = field(default_factory=list)  # the newest first
    copy: list[str] = field(default_factory=list)
    made: int = 0
    begun: list[tuple[str, int]] = field(default_factory=list)  # and how many marks before it are asked for
    carried_out: list[tuple[str, list[str]]] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)

    def begin(self) -> str:
        self.made += 1
        mark = f"m{self.made}"
        self.marks.replacing(mark)
        self.begun.append((mark, self.marks.history))
        return mark

    def carry_out(self, at: int = 0) -> str:
        mark, asked = self.begun.pop(at)
        self.carried_out.append((mark, self.borne[:asked]))
        self.borne.insert(0, mark)
        return mark

    def answer(self, at: int = 0) -> str:
        mark, history = self.carried_out.pop(at)
        self.marks.replaced(mark, history)
        self.answered.add(mark)
        return mark

    def evict(self) -> str:
        self.begin()
        self.carry_out(-1)
        return self.answer(-1)

    def stands(self) -> bool:
        return self.marks.stand(self.borne[:1] or [None], self.marks.at)


STEPS = ("begin", "carry out", "answer", "do not carry out", "do not answer", "copy", "go back")


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), max_size=40))
def test_what_stands_lacks_nothing_that_was_evicted(steps: list[tuple[str, int]]) -> None:
    cache = Cache()
    went_back = False
    for step, which in steps:
        if step == "begin":
            cache.begin()
        elif step == "copy":
            cache.copy = list(cache.borne)
        elif step == "go back":
            went_back |= cache.copy != cache.borne
            cache.borne = list(cache.copy)
        elif waiting := cache.begun if "carry out" in step else cache.carried_out:
            at = which % len(waiting)
            if step == "carry out":
                cache.carry_out(at)
            elif step == "answer":
                cache.answer(at)
            else:
                del waiting[at]
        if cache.answered and cache.stands():
            assert cache.answered <= set(cache.borne)
        assert went_back or not cache.marks.lost, "nothing is wrong with it"
    if cache.answered and not cache.answered <= set(cache.borne):
        cache.evict()
        assert cache.marks.lost, "the next one that is answered notices"


def test_a_look_may_see_what_was_the_newest_since_it_began() -> None:
    cache = Cache()
    first, second = cache.evict(), cache.evict()
    since = cache.marks.at
    third = cache.begin()
    assert not cache.marks.stand([first], since)
    assert cache.marks.stand([second], since)
    assert not cache.marks.stand([third], since), "nobody knows what it replaced"
    cache.carry_out()
    cache.answer()
    fourth = cache.evict()
    assert all(cache.marks.stand([mark], since) for mark in (second, third, fourth))
    assert not cache.marks.stand([first, fourth], since)


def test_an_answer_that_comes_late_changes_nothing() -> None:
    cache = Cache()
    first, second = cache.begin(), cache.begin()
    cache.carry_out(), cache.carry_out()
    assert cache.answer(1) == second
    assert cache.stands()
    assert cache.answer(0) == first
    assert cache.marks.last == second
    assert cache.stands()


def test_a_command_that_the_driver_repeats_replaces_its_own_mark() -> None:
    cache = Cache()
    before = cache.evict()
    mark = cache.begin()
    cache.borne.insert(0, mark)
    cache.marks.replaced(cache.carry_out(), [mark, before])
    assert cache.stands()


def test_a_strange_mark_is_of_another_history() -> None:
    cache = Cache()
    cache.evict()
    cache.borne.insert(0, "another process of this name")
    assert not cache.stands()
    cache.evict()
    assert cache.marks.lost
    assert not cache.stands()
    cache.evict()
    assert cache.marks.lost, "until it starts over"
    cache.borne = []
    cache.marks.start_over(None)
    assert not cache.stands(), "what has been evicted before may be there"
    cache.evict()
    assert cache.stands()


def test_of_a_process_that_has_evicted_nothing_nothing_is_lacking() -> None:
    marks = Marks()
    assert marks.stand(["of a process before this one"], marks.at)
    marks.replacing("m")
    assert not marks.stand(["of a process before this one"], marks.at)


@pytest.mark.parametrize(
    ("after", "history", "resumes"),
    [("b", ["c", "b", "a"], True), ("c", ["c"], True), ("d", ["c", "b", "a"], False), ("a", [], False)],
)
def test_what_was_kept_counts_in_the_history_that_it_is_of(
    after: str, history: list[str], *, resumes: bool
) -> None:
    marks = Marks()
    assert marks.resumes(after, history) is resumes
    assert marks.last == ("c" if resumes else None)


def test_a_process_resumes_only_what_it_knows() -> None:
    marks = Marks()
    marks.start_over("b")
    assert marks.resumes("a", ["c", "b", "a"])
    assert marks.last == "c"
    assert not marks.resumes("a", ["b", "a"]), "it went back while nobody looked"
    marks.lose()
    assert not marks.resumes("b", ["c", "b", "a"]), "nor goes it on where it was found out"


def test_what_was_not_answered_is_forgotten_after_many_that_were() -> None:
    cache = Cache()
    for _ in range(2 * MOST_MARKS):
        cache.begin()
    assert cache.marks.history == MOST_MARKS + SPARE
    cache.begun.clear()
    for _ in range(2 * MOST_MARKS + 1):
        cache.evict()
    assert cache.marks.history == SPARE
    assert len(cache.marks._known) == MOST_MARKS
    assert cache.stands()
