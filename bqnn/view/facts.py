"""Who made a page, when, and with what: the block at its top."""

from __future__ import annotations

from datetime import date

from bqnn.core.machine import describe_cpu, versions

Fact = tuple[str, str]
NAMES = {"python": "Python", "torch": "PyTorch", "bqnn": "bqnn"}


def made_here() -> list[Fact]:
    """The day, the machine, and the versions that a page is made with."""
    cpu = describe_cpu()
    threads = f"{cpu['threads']} thread{'s' * (cpu['threads'] > 1)}"
    return [
        ("Page made", date.today().isoformat()),
        ("Machine", f"{cpu['cpu']}, {cpu['cpu_isa']}, {threads}"),
        ("Versions", ", ".join(f"{NAMES[name]} {version}" for name, version in versions().items())),
    ]
