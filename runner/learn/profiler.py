"""`train.profile=true`: a torch profiler trace of a few steps, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# Skip the first steps (caches, compilation), then record a few.
_WAIT, _WARMUP, _ACTIVE = 3, 1, 3


class StepProfiler:
    """Writes `trace.json.gz` into the attempt's folder once the recorded steps are over."""

    def __init__(self, folder: Path) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(folder / "trace.json.gz")),
            record_shapes=True,
        )
        self._profile.start()
        self._left = _WAIT + _WARMUP + _ACTIVE

    def step(self) -> None:
        """Mark the end of a training step."""
        if self._left:
            self._left -= 1
            self._profile.step()
            if not self._left:
                self._profile.stop()

    def stop(self) -> None:
        """Write what was recorded if the run ends during the recording."""
        if self._left:
            self._left = 0
            self._profile.stop()
