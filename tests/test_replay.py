"""The replay memory, against a plain model that keeps everything."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import sse_relay
from sse_relay import FRAME_OVERHEAD_BYTES, Frame, Memory

CHANNELS = ["a", "b", "c", "d", "e", "f"]
EVERYTHING = 10**9


@pytest.fixture(autouse=True)
def only_frames_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory count frames alone, so that sizes here are sums of theirs."""
    monkeypatch.setattr(sse_relay, "SHELF_OVERHEAD_BYTES", 0)


def make_frame(number: int, channel: str, size: int = FRAME_OVERHEAD_BYTES + 50) -> Frame:
    return Frame(number, channel, b"x" * (size - FRAME_OVERHEAD_BYTES), False)


def size_of(frame: Frame) -> int:
    return len(frame.block) + FRAME_OVERHEAD_BYTES


def numbers(frames: list[Frame]) -> list[int]:
    return [frame.number for frame in frames]


@dataclass
class Model:
    """What `Memory` says of itself, in the plainest way: all frames ever, and who was dropped."""

    limit: int
    history: list[Frame] = field(default_factory=list)
    kept: list[Frame] = field(default_factory=list)
    floors: dict[str, int] = field(default_factory=dict)
    base: int | None = None

    def floor(self, channel: str) -> int | None:
        return self.floors.get(channel, self.base)

    def held(self, channel: str) -> int:
        return sum(size_of(frame) for frame in self.kept if frame.channel == channel)

    def append(self, frame: Frame) -> None:
        if self.floor(frame.channel) is None:
            return
        self.history.append(frame)
        self.kept.append(frame)
        while sum(map(size_of, self.kept)) > self.limit:
            loud = [old for old in self.kept if self.held(old.channel) > self.limit / 8]
            victim = min(loud or self.kept)
            self.kept.remove(victim)
            channel = victim.channel
            self.floors[channel] = max(self.floors.get(channel, 0), victim.number)
            if self.base is not None and not self.held(channel):
                # Not one number for each channel that ever was.
                self.base = max(self.base, self.floors.pop(channel))

    def end(self, channel: str) -> None:
        self.floors.pop(channel, None)
        self.kept = [frame for frame in self.kept if frame.channel != channel]

    def clear(self) -> None:
        self.floors.clear()
        self.kept.clear()
        self.base = None

    def after(self, since: Mapping[str, int]) -> list[Frame]:
        return [f for f in self.history if f.channel in since and f.number > since[f.channel]]


class MemoryMachine(RuleBasedStateMachine):
    """Any order of begin, append, end, clear; the memory agrees with the model at every step."""

    @initialize(
        limit=st.sampled_from([0, 200, 900, 2_400, 4_000, 9_000]),
        channels=st.sets(st.sampled_from(CHANNELS)),
        whole=st.booleans(),
    )
    def start(self, limit: int, channels: set[str], whole: bool) -> None:
        self.number = 0
        self.memory = Memory(limit)
        self.model = Model(limit)
        if whole:
            self.begin_all()
        for channel in sorted(channels):
            self.begin(channel)

    def next_number(self) -> int:
        self.number += 1
        return self.number

    @rule(channel=st.sampled_from(CHANNELS))
    def begin(self, channel: str) -> None:
        # Also anew, as where an event could not be read.
        self.model.floors[channel] = self.next_number()
        self.memory.begin(channel, self.number)

    @precondition(lambda self: not self.model.floors)
    @rule()
    def begin_all(self) -> None:
        self.model.base = self.next_number()
        self.memory.begin_all(self.number)

    @precondition(lambda self: self.model.base is None)
    @rule(channel=st.sampled_from(CHANNELS))
    def end(self, channel: str) -> None:
        self.memory.end(channel)
        self.model.end(channel)

    @precondition(lambda self: self.number > 20)
    @rule()
    def clear(self) -> None:
        self.next_number()
        self.memory.clear()
        self.model.clear()

    @rule(
        burst=st.lists(
            st.tuples(st.sampled_from(CHANNELS), st.sampled_from([1, 50, 200, 250, 900])),
            min_size=1,
            max_size=8,
        ),
    )
    def append(self, burst: list[tuple[str, int]]) -> None:
        for channel, size in burst:
            frame = make_frame(self.next_number(), channel, FRAME_OVERHEAD_BYTES + size)
            self.memory.append(frame)
            self.model.append(frame)

    @rule(channel=st.sampled_from(CHANNELS), count=st.sampled_from([1, 5, 25]))
    def append_loudly(self, channel: str, count: int) -> None:
        self.append([(channel, 50)] * count)

    @rule(
        channels=st.lists(st.sampled_from(CHANNELS), unique=True),
        backs=st.lists(st.integers(0, 60), min_size=6, max_size=6),
        limit=st.sampled_from([1, FRAME_OVERHEAD_BYTES + 1, 700, 2_000, EVERYTHING]),
    )
    def page_through(self, channels: list[str], backs: list[int], limit: int) -> None:
        # Each channel from a number of its own: where its floor or the stream's cursor is.
        since = {
            channel: max(0, self.number - back)
            for channel, back in zip(channels, backs, strict=False)
            if self.memory.covers(channel, max(0, self.number - back))
        }
        expected = self.model.after(since)
        found: list[Frame] = []
        complete = False
        while not complete:
            number = found[-1].number if found else 0
            frames, complete = self.memory.page({c: max(n, number) for c, n in since.items()}, limit)
            assert frames or complete
            assert sum(map(size_of, frames[:-1])) < limit
            assert complete or sum(map(size_of, frames)) >= limit
            found += frames
        assert found == expected

    @rule(channel=st.sampled_from(CHANNELS), count=st.sampled_from([1, 3, 25]), back=st.integers(0, 5))
    def find_the_newest(self, channel: str, count: int, back: int) -> None:
        floor = self.model.floor(channel)
        kept = [frame for frame in self.model.kept if frame.channel == channel]
        if floor is None or any(frame.number <= floor for frame in kept):
            return
        until = kept[-1 - back].number if back < len(kept) else EVERYTHING
        held = [frame for frame in kept if frame.number <= until]
        before, found = self.memory.before_newest(channel, count, until)
        assert found == min(count, len(held))
        assert self.memory.covers(channel, before)
        newest = [frame for frame in kept if frame.number > until]
        assert self.memory.page({channel: before}, EVERYTHING) == (
            [*held[len(held) - found :], *newest],
            True,
        )

    @invariant()
    def what_is_covered_and_counted_agrees_with_the_model(self) -> None:
        assert self.memory.size == sum(map(size_of, self.model.kept)) <= self.memory.limit
        for channel in [*CHANNELS, "never"]:
            floor = self.model.floor(channel)
            assert self.memory.floor(channel) == floor
            for number in {0, (floor or 1) - 1, floor or 0, self.number}:
                covered = floor is not None and floor <= number
                assert self.memory.covers(channel, number) is covered
                if covered:
                    missed = self.model.after({channel: number})
                    assert self.memory.missed(channel, number) == (len(missed), sum(map(size_of, missed)))


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(
    max_examples=80, stateful_step_count=20, deadline=None, report_multiple_bugs=False
)


def test_a_channel_with_one_event_counts_with_what_it_takes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse_relay, "SHELF_OVERHEAD_BYTES", 550)
    memory = Memory(100_000)
    memory.begin_all(0)
    for number in range(1, 1_001):
        memory.append(make_frame(number, f"c{number}"))
    kept = sum(memory.missed(f"c{number}", 0)[0] for number in range(1, 1_001))
    assert kept == 100_000 // (FRAME_OVERHEAD_BYTES + 50 + 550)
    assert memory.size == kept * (FRAME_OVERHEAD_BYTES + 50 + 550)


def test_channels_that_come_and_go_and_frames_too_large_for_an_eighth_leave_nothing_behind() -> None:
    listened, whole = Memory(10**9), Memory(2_000)
    whole.begin_all(0)

    def work(first: int) -> None:
        for number in range(first, first + 3_000, 2):
            listened.begin("a", number)
            listened.append(make_frame(number + 1, "a"))
            listened.end("a")
            whole.append(make_frame(number, f"channel {number}", 1_500))

    tracemalloc.start()
    try:
        work(1)
        before = tracemalloc.get_traced_memory()[0]
        work(10_001)
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()
    assert (listened.size, whole.size) == (0, 1_500)


class Counted(int):
    """A number that counts how often it is compared, sums included."""

    comparisons: ClassVar[int] = 0

    def __hash__(self) -> int:
        return hash(int(self))

    def __add__(self, other: int) -> Counted:
        return Counted(int(self) + int(other))

    __radd__ = __add__

    def __sub__(self, other: int) -> Counted:
        return Counted(int(self) - int(other))


for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__"):

    def compare(self: Counted, other: object, name: str = name) -> object:
        Counted.comparisons += 1
        return getattr(int, name)(self, other)

    setattr(Counted, name, compare)


class CountedBlock(bytes):
    """A block that counts how often somebody looks at its length."""

    looks: ClassVar[int] = 0

    def __len__(self) -> int:
        CountedBlock.looks += 1
        return super().__len__()


def operations(work: Callable[[], object]) -> int:
    """Count the comparisons of numbers and the looks at blocks that some work takes."""
    Counted.comparisons = CountedBlock.looks = 0
    work()
    return Counted.comparisons + CountedBlock.looks


def filled(frames: int, limit: int = EVERYTHING, channels: int = 3) -> Memory:
    """Return a memory whose channels hold so many frames of 300 bytes in turn."""
    memory = Memory(Counted(limit))
    memory.begin_all(Counted(0))
    for number in range(1, frames + 1):
        memory.append(counted_frame(number, channels))
    return memory


def counted_frame(number: int, channels: int = 3) -> Frame:
    return Frame(Counted(number), f"c{number % channels}", CountedBlock(b"x" * 50), False)


def since(number: int) -> dict[str, int]:
    return dict.fromkeys(("c0", "c1", "c2"), Counted(number))


@pytest.mark.parametrize("missed", [0, 1, 30])
def test_resuming_costs_what_was_missed_and_not_what_is_kept(missed: int) -> None:
    costs = []
    for frames in (100, 12_800):
        resume = functools.partial(filled(frames).page, since(frames - missed), Counted(EVERYTHING))
        found, complete = resume()
        assert (numbers(found), complete) == (list(range(frames - missed + 1, frames + 1)), True)
        costs.append(operations(resume))
    # 128 times as much is seven doublings: seven more comparisons at most for each search.
    assert 0 < costs[1] <= costs[0] + 3 * 2 * 8
    assert costs[1] < 100 + 12 * missed


def test_a_small_page_of_a_long_absence_costs_what_the_page_holds_and_counting_it_nothing() -> None:
    memory = filled(12_800)
    page = functools.partial(memory.page, since(0), Counted(3_000))
    assert (numbers(page()[0]), page()[1]) == (list(range(1, 11)), False)
    assert operations(page) < 300
    for number in (0, 6_000, 12_800):
        missed = functools.partial(memory.missed, "c0", Counted(number))
        assert missed()[1] == 300 * missed()[0]
        assert operations(missed) < 20


@pytest.mark.parametrize("frames", [100, 12_800])
def test_keeping_a_frame_costs_the_same_whatever_is_kept_and_however_many_channels_are_quiet(
    frames: int,
) -> None:
    for memory in (filled(frames), filled(2 * frames, limit=300 * frames)):
        assert operations(functools.partial(memory.append, counted_frame(99_999))) < 40
    channels = frames // 4
    memory = filled(2 * channels, 300 * channels, channels)

    def append_hundred() -> None:
        for number in range(2 * channels + 1, 2 * channels + 101):
            memory.append(counted_frame(number, channels))

    # Nearly every frame replaces one: some comparisons for each, in a heap of at most 2**13 entries.
    assert operations(append_hundred) < 100 * 100
    assert memory.size == memory.limit
