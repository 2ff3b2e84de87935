"""Kill storylab's commands at random moments, and see that nothing is lost.

    python tests/faults/soak.py --kills 210 --minutes 60

After each kill the next command must succeed, and its result must be that of a command that nobody killed.
Half of the kills come in the middle of a change to a file, which is half written then; a third of the rest
are power cuts, which lose what was never synced; the others come at any time.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from fork_server import Ended, Fault, ForkServer  # noqa: E402
from scenarios import Scenario, make_scenarios  # noqa: E402

SIGKILLED = -9
# They take several times as long as the others, so they have half as many turns.
SLOW = ("scheduling", "reporting")


@dataclass(frozen=True)
class Reference:
    """A command that nobody killed: how it ended, and its result."""

    ended: Ended
    result: Any


def reference(server: ForkServer, scenario: Scenario, place: Path) -> Reference:
    """Run a scenario to its end.

    Raises:
        AssertionError: it fails by itself.
    """
    scenario.begin(place)
    ended = scenario.run(server, place)
    assert ended.code == 0, f"{scenario.phase}: {ended.code}\n{ended.output}"
    return Reference(ended, scenario.result(place))


def draw_fault(draw: random.Random, scenario: Scenario, known: Reference) -> Fault:
    """A kill or a power cut at a random moment of a scenario."""
    point = draw.choice(scenario.points(known.ended))
    kind = draw.choice(("change", "change", "change", "cut", "time", "time"))
    if kind == "change":
        return Fault(kill_at=point)
    if kind == "cut":
        return Fault(power_cut=point, seed=draw.randrange(2**31))
    return Fault(kill_after=draw.uniform(0.001, known.ended.seconds))


def kill_once(
    server: ForkServer, scenario: Scenario, known: Reference, fault: Fault, place: Path
) -> tuple[str, str]:
    """Run a scenario with a fault, and then to its end.

    Returns:
        How the first command ended, ``killed`` or ``ended before``, and what is wrong afterwards; empty if
        nothing is.
    """
    scenario.begin(place)
    ended = scenario.run(server, place, fault)
    how = "killed" if ended.code == SIGKILLED else "ended before"
    try:
        result = scenario.finish(server, place)
    except Exception as error:
        return how, f"{type(error).__name__}: {error}"
    return how, "" if result == known.result else "the result is another one"


def main() -> int:
    """Kill, report, and return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=210, help="over all phases")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after these")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="*", default=[], help="these phases")
    flags = parser.parse_args()
    draw, began = random.Random(flags.seed), time.monotonic()
    killed: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="storylab-soak-") as root, ForkServer() as server:
        scenarios = make_scenarios(server, Path(root))
        chosen = [s for s in scenarios.values() if s.phase in (flags.only or scenarios)]
        place = Path(root) / "work"
        known = {s.phase: reference(server, s, place) for s in chosen}
        print(f"{len(chosen)} phases; commit {_commit()}; seed {flags.seed}", flush=True)
        turns = [*chosen, *(s for s in chosen if s.phase not in SLOW)]
        turn = 0
        while killed.total() < flags.kills and time.monotonic() - began < 60 * flags.minutes:
            scenario = turns[turn % len(turns)]
            turn += 1
            fault = draw_fault(draw, scenario, known[scenario.phase])
            how, wrong = kill_once(server, scenario, known[scenario.phase], fault, place)
            if turn % 20 == 0:
                print(f"{turn} tries: {dict(killed)}", flush=True)
            if how == "killed":
                killed[scenario.phase] += 1
                cut[scenario.phase] += fault.power_cut > 0
            if wrong:
                faults.append(f"{scenario.phase}: {fault}: {wrong}")
                print(faults[-1], flush=True)
    minutes = (time.monotonic() - began) / 60
    for phase in known:
        print(f"{phase}: {killed[phase]} kills, {cut[phase]} of them power cuts")
    print(f"{killed.total()} kills in {minutes:.0f} minutes, {len(faults)} faults found")
    return 1 if faults else 0


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
