"""The watcher of one node: a separate process, so that it continues when the ranks stop. No torch.

It reads the states of its ranks a few times a second. Without progress it collects the states of all ranks, gives one
verdict and ends the ranks. It ends when they have ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.cli import tell_torchrun
from qwen3_npu.files import write_text
from qwen3_npu.watch import flight, report
from qwen3_npu.watch.judge import HangVerdict, disagreement, judge_hang
from qwen3_npu.watch.node import Node, Report, from_text, to_text
from qwen3_npu.watch.settings import Settings
from qwen3_npu.watch.state import INSIDE, RankSnapshot
from qwen3_npu.watch.stragglers import Stragglers

_LEAST, _STEPS, _MEDIANS = 60.0, 5, 10  # default timeout: seconds, steps that a median needs, times the median
_ALLOWANCE = 600.0  # seconds at least for the first step, evaluation and saving
_DEAD = 10.0  # seconds until a dead rank is reported; torchrun is faster where it can act
_OTHER_NODES = 20.0  # seconds to wait for the other nodes' reports
_POLL = 0.2
_CALLS = 5.0  # seconds between comparisons of the ranks' calls
PATIENT = ("start", "save", "eval")  # phases that may take long


def limit(timeout: float | None, states: dict[int, RankSnapshot]) -> float:
    """The timeout in seconds for ranks in these states."""
    durations = [duration for read in states.values() for duration in read.durations]
    usual = timeout
    if usual is None:
        usual = max(_LEAST, _MEDIANS * statistics.median(durations)) if len(durations) >= _STEPS else _LEAST
    patient = any(read.phase in PATIENT or not read.durations for read in states.values())
    return max(_ALLOWANCE, 10 * usual) if patient else usual


def first_dead(dead: set[int], states: dict[int, RankSnapshot]) -> set[int]:
    """The first of several dead ranks, if it can be found: it was in no collective, and the others were in one.

    Other ranks have ended with an error then. If none has, the whole job was killed, and no rank was first.
    """
    outside = {rank for rank in dead if all(call.state != INSIDE for call in states[rank].last.values())}
    is_cause = len(dead) > 1 and len(outside) == 1 and any(read.ended for read in states.values())
    return outside if is_cause else dead


class Watcher:
    """The watcher of one node."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.node = settings, Node(Path(settings.folder))
        self.shared = Path(settings.shared) if settings.shared else None
        self.stragglers: Stragglers | None = None
        self.beats: dict[int, int] = {}
        self.moved = self.begun = time.monotonic()
        self.told = False  # whether this standstill is reported already
        self.slow: tuple[int, float] = (0, self.begun)  # steps done, and since when
        self.slow_told = False
        self.published = 0
        self.dead: set[int] = set()  # dead ranks at the last look
        self.named: set[int] = set()  # dead ranks that are reported already
        self.compared = self.begun  # when calls were compared last
        self.differ: tuple[int, ...] = ()  # the culprits that were found then
        self.differ_told = False

    def run(self) -> None:
        """Watch until the ranks have ended."""
        try:
            while self.look():
                time.sleep(_POLL)
        finally:
            shutil.rmtree(self.settings.folder, ignore_errors=True)
            for info in self.node.infos.values():
                flight.remove_flights(info["flight"])

    def look(self) -> bool:
        """Look at the ranks once. Returns whether to continue."""
        states = self.node.states()
        living = self.node.living()
        if any(rank not in living and not read.ended for rank, read in states.items()):
            states = self.node.states()  # a rank that ended between the two looks has said so by now
        running = [rank for rank, read in states.items() if rank in living and not read.ended]
        now, beats = time.monotonic(), {rank: read.beats for rank, read in states.items()}
        dead = {rank for rank, read in states.items() if rank not in living and not read.ended}
        self._notice_dead(first_dead(dead, states), is_over=not running)
        if moves := beats != self.beats:
            if self.told:
                log.info(f"watch: progress again after {now - self.moved:.0f} s")
                self._withdraw()
            self.beats, self.moved, self.told = beats, now, False
        if len(states) == self.settings.local and self.settings.interval:
            self._compare(states)
        if moves:
            self._compare_calls(states, now)
        if not running:
            return not states and now - self.begun < _ALLOWANCE
        if self.settings.timeout == 0 or self.told:
            return True
        allowed = limit(self.settings.timeout, states)
        self._notice_slow(states, now, allowed)
        if now - self.moved > (min(allowed, _DEAD) if dead else allowed) or self._asked():
            self.told = True
            return self._stands_still()
        return True

    def _notice_dead(self, dead: set[int], is_over: bool) -> None:
        """Name a single dead rank at once, or calls of which ranks die. If all ranks die, somebody ends the job."""
        again, self.dead = dead & self.dead, dead
        if dead <= self.named or not (again or is_over) or self.settings.local == 1:
            return
        self.named |= dead
        ranks = [each.rank for each in self.node.reports()]
        found = disagreement(ranks)
        if found or len(dead) == 1:
            texts = [found.text] if found else []
            log.warning("; ".join([*texts, judge_hang([rank for rank in ranks if rank.rank in dead]).text]))

    def _compare_calls(self, states: dict[int, RankSnapshot], now: float) -> None:
        """Calls that do not fit each other and hold nobody up: what they compute is wrong. Told once."""
        if self.differ_told or (not self.differ and now - self.compared < _CALLS):
            return
        self.compared, before = now, self.differ
        found = disagreement(self.node.calls(states))
        self.differ = found.ranks if found else ()
        if found and self.differ == before:  # at the first look a call may just have been written
            log.warning(f"watch: {found.text}; what is computed from it is wrong")
            self.differ_told = True

    def _notice_slow(self, states: dict[int, RankSnapshot], now: float, allowed: float) -> None:
        """Log a slow step whose ranks still make progress; it is no hang."""
        steps = min(read.steps for read in states.values())
        if steps != self.slow[0] or any(read.phase in PATIENT for read in states.values()):
            self.slow, self.slow_told = (steps, now), False
        elif not self.slow_told and now - self.slow[1] > allowed and now - self.moved < allowed / 2:
            self.slow_told = True
            log.info(f"watch: step {steps + 1} has taken {now - self.slow[1]:.0f} s so far; it is slow: its ranks move")

    def _compare(self, states: dict[int, RankSnapshot]) -> None:
        """Compare the own work of the ranks, on this node or on the first one."""
        windows = {rank: read.windows for rank, read in states.items()}
        newest = max(max(own, default=0) for own in windows.values())
        if newest == self.published:
            return
        self.published = newest
        if self.settings.node:
            if self.shared:
                names = {rank: self._name(rank) for rank in states}
                text = json.dumps([[r, names[r], n, w] for r, own in windows.items() for n, w in own.items()])
                write_text(self.shared / f"windows_{self.settings.node}.json", text)
            return
        names = {rank: self._name(rank) for rank in states}
        for number in range(1, self.settings.nodes if self.shared else 1):
            with contextlib.suppress(OSError, ValueError):  # not there yet
                assert self.shared is not None
                for rank, name, n, work in json.loads((self.shared / f"windows_{number}.json").read_text()):
                    windows.setdefault(rank, {})[n] = tuple(work)
                    names[rank] = name
        if len(windows) < self.settings.world and self.shared:
            self.published = newest - 1  # look again
            return
        if self.stragglers is None:
            self.stragglers = Stragglers(self.settings.interval, names)
        for line in self.stragglers.compare(windows):
            log.warning(line)

    def _name(self, rank: int) -> str:
        info = self.node.infos[rank]
        return f"rank {rank} ({info['node']}, device {info['device']})"

    def _asked(self) -> bool:
        """Whether the first node has given its verdict already."""
        return self.settings.node > 0 and self.shared is not None and (self.shared / "verdict.txt").is_file()

    def _stands_still(self) -> bool:
        """Collect the states and give a verdict. Returns whether to continue watching."""
        reports = self.node.reports()
        missing: list[str] = []
        if self.settings.node:
            text = self._verdict_of_first(reports)
        else:
            if self.shared and self.settings.nodes > 1:
                others, missing = self._others()
                reports += others
            text = self._tell(judge_hang([each.rank for each in reports], missing), reports)
        if text and self.settings.abort:
            self._end(text)
            return False
        return True

    def _tell(self, verdict: HangVerdict, reports: list[Report]) -> str:
        still = time.monotonic() - self.moved
        text = f"no progress for {still:.0f} s: {verdict.text}"
        try:
            folder = report.write(Path(self.settings.logs), verdict, reports)
            self._keep_flights(folder)
            text += f"; stacks of all ranks: {folder}/"
        except OSError as error:
            text += f"; the stacks of all ranks could not be written to {self.settings.logs}: {error.strerror}"
        log.warning(text)
        if self.shared and self.settings.nodes > 1:
            with contextlib.suppress(OSError):
                write_text(self.shared / "verdict.txt", text)
        return text

    def _keep_flights(self, folder: Path) -> None:
        """Keep the dumps of the backend's flight recorders of this node's ranks. Raises: OSError."""
        places = [(pipe, dump) for pipe, dump in (info["flight"] for info in self.node.infos.values()) if pipe]
        for name, content in flight.dumped(places).items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"flight_{Path(name).name}").write_bytes(content)

    def _others(self) -> tuple[list[Report], list[str]]:
        """Reports of the other nodes, and the names of those without."""
        assert self.shared is not None
        found: dict[int, list[Report]] = {}
        end = time.monotonic() + _OTHER_NODES
        while len(found) < self.settings.nodes - 1 and time.monotonic() < end:
            for number in range(1, self.settings.nodes):
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    found[number] = from_text((self.shared / f"node_{number}.json").read_text())
            time.sleep(_POLL)
        missing = [f"node {number} of {self.settings.nodes}" for number in range(1, self.settings.nodes)]
        missing = [name for number, name in enumerate(missing, start=1) if number not in found]
        return [each for number in sorted(found) for each in found[number]], missing

    def _verdict_of_first(self, reports: list[Report]) -> str:
        """Send this node's states to the first node and wait for its verdict; "" without one."""
        if self.shared is None:
            return ""
        write_text(self.shared / f"node_{self.settings.node}.json", to_text(reports))
        with contextlib.suppress(OSError):
            self._keep_flights(Path(self.settings.logs) / f"flight_node_{self.settings.node}")
        path, end = self.shared / "verdict.txt", time.monotonic() + 2 * _OTHER_NODES
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                return path.read_text(encoding="utf-8")
            time.sleep(_POLL)
        return ""

    def _withdraw(self) -> None:
        if self.shared:
            name = f"node_{self.settings.node}.json" if self.settings.node else "verdict.txt"
            (self.shared / name).unlink(missing_ok=True)

    def _end(self, text: str) -> None:
        """End all ranks of this node, stopped ones too; torchrun shows the text and starts the job again."""
        for rank in self.node.infos:
            file = self.node.infos[rank]["error_file"]
            if file and not Path(file).exists():  # keep an earlier error of this rank
                tell_torchrun(text, file)
        # Stopped first: a rank whose peer is gone would replace the verdict with an error of its own.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for rank in self.node.living():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.node.infos[rank]["pid"], number)


def main() -> None:
    """`python -m qwen3_npu.watch.watcher SETTINGS`, started by the first rank of a node."""
    log.setup()
    Watcher(Settings(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
