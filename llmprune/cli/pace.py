"""How much time is left: in a stage, from the pace of its layers, and in a run, from what its stages cost so far."""

from collections.abc import Mapping

from llmprune.progress import Progress

# Its cost says little about that of the other stages: a decode step reads all weights for a few tokens.
_SAMPLING = "sampling"


class Pace:
    """Estimates the time left in a stage from the mean time of its finished layers, or of smaller units."""

    def __init__(self) -> None:
        self._stage = ""
        self._layer = self._layers = 0
        self._since = 0.0
        self._seconds, self._units = 0.0, 0
        self.replaying = False

    def update(self, progress: Progress, now: float) -> float | None:
        """Note a step at time `now`; returns the seconds that a layer took if this step finished it."""
        seconds = None
        if progress.stage != self._stage:
            self._seconds, self._units, self.replaying = 0.0, 0, False
        elif progress.layer == self._layer:
            self.replaying = self.replaying or progress.step == "replaying"
            return None
        else:
            seconds = now - self._since
            # Replaying a layer that an earlier run has finished is much faster, and would spoil the estimate.
            if not self.replaying:
                self._seconds, self._units = self._seconds + seconds, self._units + progress.layer - self._layer
        self._stage, self._layer, self._layers, self._since = progress.stage, progress.layer, progress.layers, now
        self.replaying = progress.step == "replaying"
        return seconds

    def left(self, now: float) -> float | None:
        """Seconds to the end of the stage; None until its first layer is finished, and after its last."""
        layers = self._layers - self._layer
        if self._units <= 0 or not layers:
            return None
        return max(self._seconds / self._units * layers - (now - self._since), 0.0)


class RunPace:
    """Estimates the time left in a whole run: the stage's own pace, and what the stages ahead are expected to take.

    Expected are their shares, times the seconds that a share has taken in the stages so far. Without shares, only the
    current stage is known.
    """

    def __init__(self) -> None:
        self.stage = Pace()
        self._shares: Mapping[str, float] = {}
        self._spent: dict[str, float] = {}
        self._current: Progress | None = None
        self._entered = 0.0

    def update(self, progress: Progress, now: float) -> float | None:
        """Note a step at time `now`; returns the seconds that a layer took if this step finished it."""
        if progress.shares is not None:
            self._shares, self._spent = progress.shares, {}
        before = self._current
        if before is None or progress.stage != before.stage:
            if before is not None:
                self._spent[before.stage] = self._spent.get(before.stage, 0.0) + now - self._entered
            self._entered = now
        self._current = progress
        return self.stage.update(progress, now)

    def left(self, now: float) -> float | None:
        """Seconds to the end of the run; None as long as nothing was measured that tells."""
        own, ahead = self.stage.left(now), self._ahead()
        if self._current is None or not self._shares:
            return own
        paces = self._paces(now)
        if not paces:
            return own
        if own is None and self._current.stage in self._shares and self._current.fraction < 1:
            expected = self._expected(self._current.stage, paces) * (1 - self._current.fraction)
            # Since the last step; before the first unit is finished that is since the stage began.
            own = max(expected - (now - self._entered), 0.0)
        return (own or 0.0) + sum(self._expected(stage, paces) for stage in ahead)

    def _ahead(self) -> list[str]:
        """The stages after the last one that has begun: one that was left out is not made up for."""
        stages = list(self._shares)
        begun = {*self._spent, *([] if self._current is None else [self._current.stage])}
        last = max((place for place, stage in enumerate(stages) if stage in begun), default=-1)
        return stages[last + 1 :]

    def _paces(self, now: float) -> dict[bool, float]:
        """Seconds for each unit of the shares, of sampling and of everything else, as far as they were measured."""
        sums: dict[bool, tuple[float, float]] = {}
        for stage, seconds, share in self._measured(now):
            if share > 0:
                kind = _SAMPLING in stage
                before = sums.get(kind, (0.0, 0.0))
                sums[kind] = before[0] + seconds, before[1] + share
        return {kind: seconds / share for kind, (seconds, share) in sums.items()}

    def _measured(self, now: float) -> list[tuple[str, float, float]]:
        """Stage, seconds and the share that they took for."""
        current = self._current
        found = [(stage, seconds, self._shares.get(stage, 0.0)) for stage, seconds in self._spent.items()]
        left = 0.0 if current is not None and current.fraction == 1 else self.stage.left(now)
        if current is not None and left is not None and not self.stage.replaying:
            elapsed, share = now - self._entered, self._shares.get(current.stage, 0.0)
            found.append((current.stage, elapsed, share * elapsed / max(elapsed + left, 1e-9)))
        return found

    def _expected(self, stage: str, paces: Mapping[bool, float]) -> float:
        kind = _SAMPLING in stage
        return self._shares[stage] * paces.get(kind, paces.get(not kind, 0.0))
