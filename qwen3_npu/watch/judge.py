"""Derive one verdict from the states of all ranks: which rank the others wait for, and where it is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from qwen3_npu.watch.state import INSIDE, LEFT


@dataclasses.dataclass(frozen=True)
class Entry:
    """One call of a channel, by names; see `state.Call`.

    Attributes:
        age: seconds since it was entered.
    """

    number: int
    operation: str
    dtype: str
    shape: tuple[int, ...] | None
    state: int
    age: float

    def __str__(self) -> str:
        return f"{self.function} #{self.number}"

    @property
    def function(self) -> str:
        """The operation without how numbers are reduced: `all_reduce` of `all_reduce(max)`."""
        return self.operation.partition("(")[0]

    @property
    def tensor(self) -> str:
        sizes = "" if self.shape is None else f" [{', '.join(map(str, self.shape))}]"
        reduced = self.operation.partition("(")[2].removesuffix(")")
        return f"{self.dtype}{sizes}{f' for {reduced}' if reduced else ''}"

    @property
    def signature(self) -> tuple[str, str, int | None]:
        """A value that is equal on all ranks of one call. Shapes of a tensor may differ, its number of elements not."""
        operation = "send or recv" if self.operation in ("send", "recv") else self.operation
        return operation, self.dtype, None if self.shape is None else math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Channel:
    """A channel of one rank, see `state`: its last call there, and the recent ones.

    Attributes:
        exchange: number of the last all-to-all, and the sizes that go to each member and come from it.
    """

    label: str
    ranks: tuple[int, ...]
    last: Entry
    calls: tuple[Entry, ...] = ()
    exchange: tuple[int, list[int], list[int]] = (0, [], [])


@dataclasses.dataclass(frozen=True)
class RankReport:
    """One rank at one moment.

    Attributes:
        node, device: for messages.
        alive, state, computes: see `probe.Process`.
        ended: whether it has reported its end.
        steps: number of finished steps.
        age: seconds since it entered its phase.
        at, inner: position of the thread that may go on, outside torch and innermost; "" if unknown.
        channels: name -> channel.
        main: position of its main thread, if that waits for its turn while another thread is `at`; else "".
        waits: whether one of its threads is inside a call now; None if unknown. A call that was begun and is not waited
            for yet holds nobody up.
    """

    rank: int
    node: str
    device: int
    pid: int
    alive: bool
    state: str
    waits_in: str
    computes: bool
    ended: bool
    steps: int
    phase: str
    age: float
    at: str
    inner: str
    channels: dict[str, Channel]
    waits: bool | None = None
    main: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node}, device {self.device})"

    @property
    def runs(self) -> bool:
        return self.state not in ("T", "t", "D")

    def is_held(self, entry: Entry) -> bool:
        """Whether this call may be what holds it up."""
        return entry.state != LEFT and not (entry.state == INSIDE and self.waits is False)

    @property
    def place(self) -> str:
        """Its position, for messages."""
        if self.ended:
            return f"it has ended after step {self.steps}"
        text = f"it is in {self.phase} since {self.age:.0f} s, {'computing' if self.computes else 'waiting'}"
        if self.at:
            text += f" at {self.at}"
        if self.inner and self.inner != self.at:
            text += f", inside {self.inner}"
        if self.main:
            text += f"; the main thread waits for its turn at {self.main}"
        return text


@dataclasses.dataclass(frozen=True)
class HangVerdict:
    """The reason why a job makes no progress.

    Attributes:
        kind: "missing", "shape", "order", "dead", "stopped", "elsewhere", "network" or "alone".
        ranks: the culprits.
        text: one line.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str


def judge_hang(ranks: Sequence[RankReport], missing: Sequence[str] = ()) -> HangVerdict:
    """One verdict on ranks of a job without progress.

    Args:
        missing: nodes that have not reported their ranks.
    """
    if missing:
        return HangVerdict("missing", (), f"{', '.join(missing)} gave no report: the node or its watcher has ended")
    if found := disagreement(ranks):
        first = next(rank for rank in ranks if rank.rank == found.ranks[0])
        return dataclasses.replace(found, text=f"{found.text}; {first}: {first.place}")
    if dead := [rank for rank in ranks if not rank.alive and not rank.ended]:
        texts = [f"{rank} is dead: process {rank.pid} has ended; {_last(rank)}" for rank in dead[:4]]
        return HangVerdict("dead", _numbers(dead), "; ".join(texts))
    if stopped := [rank for rank in ranks if rank.alive and not rank.runs]:
        texts = [_stopped(rank, ranks) for rank in stopped[:4]]
        roots = [rank for rank in _roots(_edges(ranks), ranks) if rank.runs]  # several roots are possible
        texts += [_missed(root, _edges(ranks)) for root in roots[:4]]
        return HangVerdict("stopped", _numbers([*stopped, *roots]), "; ".join(texts))
    return _waiting(ranks)


def _numbers(ranks: Sequence[RankReport]) -> tuple[int, ...]:
    return tuple(rank.rank for rank in ranks)


def _last(rank: RankReport) -> str:
    if not rank.channels:
        return f"step {rank.steps + 1}, {rank.phase}"
    channel = min(rank.channels.values(), key=lambda channel: channel.last.age)
    where = "inside" if channel.last.state == INSIDE else "after"
    return f"step {rank.steps + 1}, {rank.phase}, {where} {channel.last} of group {channel.label}"


def _stopped(rank: RankReport, ranks: Sequence[RankReport]) -> str:
    stuck = "cannot be interrupted: it waits for a disk or a driver"
    how = stuck if rank.state == "D" else "does not run: it is stopped (SIGSTOP or a debugger)"
    kernel = f" in {rank.waits_in}" if rank.waits_in else ""
    waiters = [other for other, on in _edges(ranks) if on is rank]
    wait = f"; {len({r.rank for r, *_ in waiters})} wait for it" if waiters else ""
    return f"{rank} {how}{kernel}: process {rank.pid}, {_last(rank)}{wait}"


def disagreement(ranks: Sequence[RankReport]) -> HangVerdict | None:
    """Ranks whose calls with one number of one channel cannot be the same call; of several the oldest calls.

    Not every backend stands still then: gloo adds up numbers of other dtypes, and one rank's sum to another's maximum.
    """
    found: list[tuple[float, HangVerdict]] = []
    for name in sorted({name for rank in ranks for name in rank.channels}):
        members = [(rank, rank.channels[name]) for rank in ranks if name in rank.channels]
        calls: dict[int, list[tuple[RankReport, Entry]]] = {}
        for rank, channel in members:
            for entry in {entry.number: entry for entry in (*channel.calls, channel.last)}.values():
                calls.setdefault(entry.number, []).append((rank, entry))
        found += _exchanges(members)
        judged = ((calls[number], _judge_call(calls[number], members[0][1].label)) for number in sorted(calls))
        found += next(([(max(entry.age for _, entry in each), v)] for each, v in judged if v is not None), [])
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _exchanges(members: Sequence[tuple[RankReport, Channel]]) -> Iterator[tuple[float, HangVerdict]]:
    """An all-to-all in which one rank sends more or less than another expects of it."""
    places = {rank: place for place, rank in enumerate(members[0][1].ranks)}
    for (one, sender), (two, receiver) in itertools.permutations(members, 2):
        (number, sent, _), (same, _, received) = sender.exchange, receiver.exchange
        to, of = places.get(two.rank, 0), places.get(one.rank, 0)
        if number and number == same and len(sent) == len(received) == len(places) and sent[to] != received[of]:
            text = f"mismatch in all_to_all_single #{number} of group {sender.label}: {one} sends {sent[to]} rows to "
            verdict = HangVerdict("shape", (one.rank, two.rank), f"{text}{two}, which expects {received[of]}")
            yield sender.last.age, verdict
            return


def _judge_call(calls: Sequence[tuple[RankReport, Entry]], label: str) -> HangVerdict | None:
    """Compare the members' calls with one number; the culprits are those that differ from the most."""
    votes = Counter(entry.signature for _, entry in calls)
    if len(votes) < 2:
        return None
    common, most = votes.most_common(1)[0]
    right = [call for call in calls if call[1].signature == common]
    wrong = [call for call in calls if call[1].signature != common]
    (_, entry), (other, usual) = wrong[0], right[0]
    culprits = tuple(rank.rank for rank, _ in (wrong if most > len(wrong) else [*wrong, *right]))
    others = f"{most} others such as {other}" if most > 1 else str(other)
    if entry.signature[0].partition("(")[0] != common[0].partition("(")[0]:
        one = ", ".join(f"{who} calls {its.function} ({its.tensor})" for who, its in wrong[:4])
        two = f"{others} {usual.function} ({usual.tensor})"
        return HangVerdict(
            "order", culprits, f"order mismatch at call #{entry.number} of group {label}: {one}, and {two}"
        )
    one = ", ".join(f"{who} gives {its.tensor}" for who, its in wrong[:4])
    return HangVerdict("shape", culprits, f"mismatch in {entry} of group {label}: {one}, and {others} {usual.tensor}")


_Edges = Sequence[tuple[tuple[RankReport, str, Entry], RankReport]]


def _edges(ranks: Sequence[RankReport]) -> _Edges:
    """(waiting rank, channel, call) -> the rank that it waits for: a member that has not entered that call."""
    known = {rank.rank: rank for rank in ranks}
    found = []
    for rank in ranks:
        for name, channel in rank.channels.items():
            if not rank.is_held(channel.last):
                continue
            for member in channel.ranks:
                other = known.get(member)
                if other is None or other is rank:
                    continue
                there = other.channels.get(name)
                if there is None or there.last.number < channel.last.number:
                    found.append(((rank, name, channel.last), other))
    return found


def _waiting(ranks: Sequence[RankReport]) -> HangVerdict:
    edges = _edges(ranks)
    if not edges:
        return _nobody_waits(ranks)
    roots = _roots(edges, ranks)
    if not roots:
        return _circle(edges)
    return HangVerdict("elsewhere", _numbers(roots), "; ".join(_missed(root, edges) for root in roots[:4]))


def _roots(edges: _Edges, ranks: Sequence[RankReport]) -> list[RankReport]:
    """Who is waited for and waits for nobody."""
    return [rank for rank in ranks if rank.rank in {on.rank for _, on in edges} - {w.rank for (w, *_), _ in edges}]


def _missed(root: RankReport, edges: _Edges) -> str:
    """The call that others wait in for this rank, the oldest one."""
    missed = [(entry, name, waiter) for (waiter, name, entry), on in edges if on is root]
    entry, name, waiter = max(missed, key=lambda each: each[0].age)
    channel = waiter.channels[name]
    count = len({each.rank for e, n, each in missed if n == name})
    wait = f"{count} wait{'s' if count == 1 else ''} since {entry.age:.0f} s"
    return f"{root} never entered {entry} of group {channel.label} ({len(channel.ranks)} ranks; {wait}): {root.place}"


def _circle(edges: _Edges) -> HangVerdict:
    """The verdict on a cycle of waiting ranks: groups are entered in different orders.

    The culprit is the rank that is steps ahead: it passed a call that others are still in. If no rank is ahead, it is
    the one that most others wait for, else all ranks of the cycle.
    """
    waits_for = {waiter.rank: (waiter, name, entry, on) for (waiter, name, entry), on in edges}
    waiters = {on.rank: {waiter.rank for (waiter, *_), other in edges if other is on} for _, on in edges}
    seen: list[int] = []
    at = max(waiters, key=lambda rank: len(waiters[rank]))
    while at not in seen:
        seen.append(at)
        at = waits_for[at][3].rank
    ahead = {rank: (waits_for[rank][0].steps, len(waiters[rank])) for rank in seen[seen.index(at) :]}
    circle = sorted(ahead, key=ahead.__getitem__, reverse=True)
    texts = []
    for number in circle[:4]:
        waiter, name, entry, on = waits_for[number]
        label, age = waiter.channels[name].label, entry.age
        wait = f"is in {entry} of group {label} since {age:.0f} s"
        texts.append(f"{waiter} {wait}, which {on} never entered ({waiter.at})")
    most = [rank for rank in circle if ahead[rank] == ahead[circle[0]]]
    return HangVerdict("order", tuple(sorted(most)), f"order mismatch between groups: {'; '.join(texts)}")


def _nobody_waits(ranks: Sequence[RankReport]) -> HangVerdict:
    calls = [(rank, c) for rank in ranks for c in rank.channels.values() if rank.is_held(c.last)]
    inside = [(rank, channel) for rank, channel in calls if channel.last.state == INSIDE]
    if inside:
        rank, channel = max(inside, key=lambda each: each[1].last.age)
        text = (
            f"all {len(channel.ranks)} ranks of group {channel.label} have entered {channel.last} and {rank} has not "
            f"left it for {channel.last.age:.0f} s: look at the network and the devices; {rank.place}"
        )
        return HangVerdict("network", (rank.rank,), text)
    oldest = max((rank for rank in ranks if not rank.ended), key=lambda rank: rank.age, default=None)
    if oldest is None:
        return HangVerdict("alone", (), "all ranks have ended")
    return HangVerdict("alone", (oldest.rank,), f"no rank waits for another; {oldest}: {oldest.place}")
