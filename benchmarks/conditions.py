"""Under what a benchmark ran. No Ray, no torch."""

import platform as python_platform
import subprocess
from pathlib import Path


def commit() -> str:
    """Of this tree; a copy without its history does not know."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known here"


def cpu_model() -> str:
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return named[0].split(":", 1)[1].strip() if named else python_platform.processor()
