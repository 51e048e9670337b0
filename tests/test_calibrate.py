"""Forward passes in lockstep, and the moments taken on the way."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sapq_triton import calibrate
from sapq_triton.calibrate import ChannelMoments, Lockstep, Replay


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


ORDER = "abcdefyz"


class Trace:
    """Passes that walk from station to station, and what happened in which order.

    "0>a": pass 0 arrives at station a, "a": the action of a is done, "0.": pass 0 is finished.
    """

    def __init__(self, *routes: str, kind: type[Lockstep] | type[Replay] = Lockstep) -> None:
        self.events: list[str] = []
        self.running = 0
        passes = [partial(self._walk, number, route) for number, route in enumerate(routes)]
        self.lockstep = kind(passes, {station: partial(self._work, station) for station in ORDER})

    def _walk(self, number: int, route: str) -> None:
        for station in route:
            if self.lockstep.is_new(station):
                self._work(f"{number}>{station}")
            self.lockstep.meet(station)
        self._work(f"{number}.")

    def _work(self, event: str) -> None:
        self.running += 1
        time.sleep(0.0005)  # a chance for another pass to run at the same time
        assert self.running == 1
        self.events.append(event)
        self.running -= 1

    def run(self) -> str:
        self.lockstep.run()
        return " ".join(self.events)


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        pytest.param([], "", id="no-pass"),
        pytest.param([""], "0.", id="no-station"),
        pytest.param(["ab"], "0>a a 0>b b 0.", id="one-pass"),
        pytest.param(
            ["ab", "ab", "ab"],
            "0>a 1>a 2>a a 0>b 1>b 2>b b 0. 1. 2.",
            id="all-alike",
        ),
        pytest.param(["ba", "ab"], "0>b 1>a a 1>b b 0>a 1. a 0.", id="against-the-order"),
        pytest.param(
            ["abc", "c", "bc"],
            "0>a 1>c 2>b a 0>b b 0>c 2>c c 0. 1. 2.",
            id="stations-skipped",
        ),
        pytest.param(["", "a", ""], "0. 1>a 2. a 1.", id="passes-that-end-early"),
        pytest.param(["ac", "bc"], "0>a 1>b a 0>c b 1>c c 0. 1.", id="branches"),
        pytest.param(["aa", "a"], "0>a 1>a a 0>a 1. a 0.", id="station-met-twice"),
    ],
)
def test_passes_meet_in_order(routes: list[str], expected: str) -> None:
    assert Trace(*routes).run() == expected


def test_many_passes_do_each_action_once() -> None:
    trace = Trace(*["abcdef"] * 40)
    trace.run()
    assert [event for event in trace.events if event in "abcdef"] == list("abcdef")
    assert [e for e in trace.events if ">" in e] == [
        f"{n}>{s}" for s in "abcdef" for n in range(40)
    ]


def test_two_runs_are_alike() -> None:
    routes = ["abd", "bcd", "acd", "d", "bd"]
    assert Trace(*routes).run() == Trace(*routes).run()


@pytest.mark.parametrize("kind", [Lockstep, Replay])
def test_stations_that_other_processes_agree_on_are_done_as_well(
    kind: type[Lockstep] | type[Replay],
) -> None:
    """Passes here go from a to c, and elsewhere through b."""
    done: list[str] = []
    elsewhere = [(0, False), (1, True), (1, False), (2, True)]

    def agree(place: tuple[int, bool] | None) -> tuple[int, bool] | None:
        other = elsewhere.pop(0) if elsewhere else None
        both = [x for x in (place, other) if x is not None]
        if not both:
            return None
        first = min(number for number, _ in both)
        if other is not None and other[0] != first:
            elsewhere.insert(0, other)
        return first, any(due for number, due in both if number == first)

    def walk() -> None:
        for station in "ac":
            meeting.meet(station)

    actions = {station: partial(done.append, station) for station in "abc"}
    meeting = kind([walk, walk], actions, agree)
    meeting.run()
    assert done == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [Lockstep, Replay])
def test_nothing_is_done_where_all_passes_only_wait(kind: type[Lockstep] | type[Replay]) -> None:
    done: list[str] = []

    def walk(acts: bool) -> None:
        meeting.meet("a", acts=False)
        meeting.meet("b", acts=acts)

    meeting = kind(
        [partial(walk, False), partial(walk, True)],
        {"a": partial(done.append, "a"), "b": partial(done.append, "b")},
    )
    meeting.run()
    assert done == ["b"]


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        pytest.param([], "", id="no-pass"),
        pytest.param([""], "0.", id="no-station"),
        pytest.param(["ab", "ab"], "0>a 1>a a 0>b 1>b b 0. 1.", id="all-alike"),
        pytest.param(
            ["abc", "c", "bc"], "0>a 1>c 2>b a 0>b b 0>c 2>c c 0. 1. 2.", id="stations-skipped"
        ),
        pytest.param(["ac", "bc"], "0>a 1>b a 0>c b 1>c c 0. 1.", id="branches"),
        pytest.param(["ba", "ab"], "0>b 1>a a 1>b b 0>a 0. 1.", id="against-the-order"),
    ],
)
def test_replayed_passes_arrive_as_in_lockstep(routes: list[str], expected: str) -> None:
    assert Trace(*routes, kind=Replay).run() == expected


def test_replay_comes_again_where_it_is_told_to_forget() -> None:
    seen: list[tuple[int, int]] = []
    forgotten: list[str] = []

    def walk(number: int) -> None:
        if replay.is_new("a"):
            seen.append((number, len(forgotten)))
        if number == 1 and not forgotten:
            forgotten.append("a")
            replay.forget("a")
        replay.meet("a")

    done: list[int] = []
    replay = Replay([partial(walk, n) for n in range(3)], {"a": lambda: done.append(len(seen))})
    replay.run()
    # pass 2 came after it was forgotten, and is new when it comes again
    assert seen == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]
    assert done == [5]


def test_what_an_action_did_is_seen_behind_the_station() -> None:
    seen: list[int] = []
    total = 0

    def add(value: int) -> None:
        nonlocal total
        total += value
        lockstep.meet("sum")
        seen.append(total)

    lockstep = Lockstep([partial(add, value) for value in (1, 2, 3)], {"sum": nothing})
    lockstep.run()
    assert seen == [6, 6, 6]


def test_no_thread_before_it_runs() -> None:
    before = threading.active_count()
    trace = Trace("a", "a")
    assert threading.active_count() == before
    assert trace.events == []


def nothing() -> None:
    pass


def test_a_pass_whose_thread_was_interrupted_at_its_start_never_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        thread_id = thread.ident
        start(thread)
        started.append(thread)
        thread._ident = thread_id  # type: ignore[attr-defined]  # as it is until the thread says so
        raise Interrupt

    ran: list[int] = []
    monkeypatch.setattr("threading.Thread.start", interrupted)
    with pytest.raises(Interrupt):
        Lockstep([partial(ran.append, 1)], {}).run()
    started[0].join(timeout=20)
    assert not started[0].is_alive()
    assert ran == []


class Accident(Exception):
    """Raised on purpose."""


class Interrupt(BaseException):
    """Raised on purpose, and no Exception, as KeyboardInterrupt is none."""


@pytest.mark.parametrize("kind", [Accident, Interrupt])
@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_error_in_one_pass_ends_all(where: str, kind: type[BaseException]) -> None:
    left: list[str] = []

    def walk(number: int) -> None:
        try:
            for place in ("start", "middle", "end"):
                if number == 1 and place == where:
                    raise kind("in pass 1")
                if place != "end":
                    lockstep.meet(place)
            left.append(f"{number} finished")
        finally:
            left.append(str(number))

    lockstep = Lockstep([partial(walk, n) for n in range(3)], {"start": nothing, "middle": nothing})
    with pytest.raises(kind, match="in pass 1"):
        lockstep.run()
    expected = {
        "start": ["1", "0"],  # pass 2 was never begun
        "middle": ["1", "0", "2"],
        "end": ["0 finished", "0", "1", "2"],
    }
    assert left == expected[where]


def test_error_in_an_action_ends_all() -> None:
    left: list[int] = []

    def fail() -> None:
        raise Accident("in the action")

    def walk(number: int) -> None:
        try:
            lockstep.meet("a")
        finally:
            left.append(number)

    lockstep = Lockstep([partial(walk, number) for number in range(3)], {"a": fail})
    with pytest.raises(Accident, match="in the action"):
        lockstep.run()
    assert left == [0, 1, 2]


def test_a_pass_that_handles_exceptions_ends_as_well() -> None:
    handled: list[Exception] = []

    def walk(number: int) -> None:
        try:
            lockstep.meet("a")
            if number == 1:
                raise Accident
            lockstep.meet("b")
        except ValueError as error:
            handled.append(error)

    lockstep = Lockstep(
        [partial(walk, number) for number in range(3)], {"a": nothing, "b": nothing}
    )
    with pytest.raises(Accident):
        lockstep.run()
    assert handled == []


def test_a_pass_that_meets_again_on_its_way_out_does_not_hang() -> None:
    def fail() -> None:
        lockstep.meet("a")
        raise Accident

    def walk() -> None:
        try:
            lockstep.meet("a")
        finally:
            lockstep.meet("b")

    lockstep = Lockstep([fail, walk, walk], {"a": nothing, "b": nothing})
    with pytest.raises(Accident):
        lockstep.run()


def test_no_gradients_inside_and_the_mode_of_the_caller_outside() -> None:
    weight = nn.Parameter(torch.ones(2))
    inside: list[bool] = []

    def run() -> None:
        inside.append((weight * 2).requires_grad)
        lockstep.meet("a")
        inside.append((weight * 2).requires_grad)

    lockstep = Lockstep([run, run], {"a": nothing})
    lockstep.run()
    assert inside == [False] * 4
    assert (weight * 2).requires_grad


def one_shot(values: Tensor) -> tuple[Tensor, Tensor]:
    rest = [d for d in range(values.ndim) if d != 1]
    variance, mean = torch.var_mean(values.double(), rest, correction=0)
    return mean, variance


def assert_moments(moments: ChannelMoments, values: Tensor) -> None:
    mean, variance = one_shot(values)
    total = moments.total
    assert total is not None and total.mean.dtype == total.variance.dtype == torch.float64
    assert total.number == values.numel() // values.shape[1]
    torch.testing.assert_close(total.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.variance, variance, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "shape",
    [(60, 5), (24, 5, 7), (24, 3, 4, 5), (24, 4, 2, 3, 2)],
    ids=["rows", "signals", "images", "volumes"],
)
@pytest.mark.parametrize("sizes", [None, [1, 2, 21], [8, 8, 8], [0, 5, 0, 19]], ids=str)
def test_moments_of_chunks(shape: tuple[int, ...], sizes: list[int] | None) -> None:
    channels = [-1 if d == 1 else 1 for d in range(len(shape))]
    size, offset = torch.linspace(0.1, 10, shape[1]), torch.linspace(-3, 100, shape[1])
    values = torch.randn(shape) * size.view(channels) + offset.view(channels)
    sizes = sizes or [len(values)]
    sizes = [*sizes[:-1], len(values) - sum(sizes[:-1])]
    moments = ChannelMoments()
    for number, chunk in enumerate(values.split(sizes)):
        moments.add(chunk, number)
    assert_moments(moments, values)


def test_moments_of_a_large_mean() -> None:
    values = 1000 + torch.randn(64, 3, 4, 4)
    moments = ChannelMoments()
    for chunk in values.split(1):
        moments.add(chunk)
    mean, variance = one_shot(values)
    assert moments.total is not None
    torch.testing.assert_close(moments.total.mean, mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(moments.total.variance, variance, rtol=1e-3, atol=0)


def test_moments_of_half_precision_are_taken_in_full() -> None:
    values = (300 + torch.randn(2000, 2)).half()
    moments = ChannelMoments()
    moments.add(values)
    assert_moments(moments, values)


def test_moments_of_a_constant_channel() -> None:
    moments = ChannelMoments()
    for _ in range(3):
        moments.add(torch.full((7, 2, 5), 0.1))
    assert moments.total is not None
    assert torch.equal(moments.total.variance, torch.zeros(2).double())


def test_moments_of_nothing() -> None:
    moments = ChannelMoments()
    moments.add(torch.ones(0, 3))
    assert moments.total is None


def test_moments_do_not_depend_on_the_order_in_which_batches_come() -> None:
    batches = list((100 * torch.randn(5, 7, 3)).unbind())
    one, other = ChannelMoments(), ChannelMoments()
    for number in range(5):
        one.add(batches[number], number)
    for number in (3, 0, 4, 2, 1):
        other.add(batches[number], number)
    assert one.total is not None and other.total is not None
    assert torch.equal(one.total.mean, other.total.mean)
    assert torch.equal(one.total.variance, other.total.variance)


def test_hessians_of_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(input=self.first(x))
            return result

    model, x = Model().double(), torch.randn(10, 4).double()
    hessians = calibrate.collect_hessians(model, x.split(4), dtype=torch.float64)
    hidden = model.first(x)
    assert list(hessians) == ["first", "last"]
    torch.testing.assert_close(hessians["first"], 2 / 10 * x.T[None] @ x)
    torch.testing.assert_close(hessians["last"], (2 / 10 * hidden.T[None] @ hidden).detach())


def test_hessians_leave_no_hooks_after_an_error() -> None:
    model = nn.Linear(4, 3)

    def fail(model: nn.Module, batch: Tensor) -> None:
        raise Accident

    with pytest.raises(Accident):
        calibrate.collect_hessians(model, [torch.ones(1, 4)], forward=fail)
    assert not model._forward_pre_hooks
