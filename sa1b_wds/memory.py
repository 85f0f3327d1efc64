"""What a conversion needs of memory, before it begins: numbers in, numbers out.

A worker's need is a sum: the process with its libraries and what is on its way inside a task, the pairing buffer, what
is read ahead of sources far away, two parts of each shard that goes up to an object store, and the pictures that are
made smaller. A test holds what conversions are measured at to be below it.
"""

from dataclasses import dataclass

from .errors import UsageError

MIB = 1 << 20

PROCESS = 256 * MIB
"""The interpreter, libraries, and what is between the threads of a task; 100 to 190 MiB were measured."""
_LEAST_PROCESS = 64 * MIB
_PICTURE = 48 * MIB  # a photograph of SA-1B, decoded, beside its smaller self
_SMALLEST_BUFFER = 64 * MIB  # below it nearly all would be spilled


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that one worker needs at most, by what needs them."""

    pairing_buffer: int
    sources: int = 0
    """That are far away."""
    ahead: int = 0
    """Bytes read ahead of each of them."""
    shards: int = 0
    """That go up at once."""
    part: int = 0
    """Bytes of a part of an upload."""
    pictures: int = 0
    """Made smaller at once."""

    @property
    def total(self) -> int:
        """Never more than this."""
        return (
            PROCESS
            + self.pairing_buffer
            + self.sources * self.ahead
            + self.shards * (2 * self.part + MIB)
            + self.pictures * _PICTURE
        )

    @property
    def least(self) -> int:
        """Never less, whatever order the members have: a part of every shard fills, and what is ahead is read."""
        return _LEAST_PROCESS + self.sources * self.ahead + self.shards * self.part

    def __str__(self) -> str:
        parts = [f"{shown(PROCESS)} for the process", f"{shown(self.pairing_buffer)} --pairing-buffer"]
        if self.sources:
            parts.append(f"{self.sources:,} sources read {shown(self.ahead)} ahead")
        if self.shards:
            parts.append(f"{self.shards:,} open shards of {shown(2 * self.part)}")
        if self.pictures:
            parts.append(f"{self.pictures:,} photographs of {shown(_PICTURE)}")
        return ", ".join(parts)


def workers(need: Need, memory: int, wanted: int) -> int:
    """As many workers as fit, at most `wanted` and at least 1."""
    return max(1, min(wanted, memory // need.total))


def check(need: Need, count: int, memory: int) -> None:
    """Refuse what may not fit.

    Raises:
        UsageError: so many workers may need more; says what needs how much, and what to lower.
    """
    if count * need.total > memory:
        what = f"{_words(count)} may need more, each {shown(need.total)} ({need}); {_advice(need, count, memory)}"
        raise UsageError("--memory", what, f"at least {shown(count * need.total)}", shown(memory))


def look(need: Need, count: int, memory: int) -> str:
    """What is to be said where nobody gave a limit; empty where all fits.

    Args:
        memory: of this machine, or of the container.

    Raises:
        UsageError: it certainly does not fit.
    """
    if count * need.least > memory:
        what = f"not enough memory: each worker takes {shown(need.least)} or more; {_advice(need, count, memory)}"
        raise UsageError(_words(count), what, f"at least {shown(count * need.least)}", shown(memory))
    if count * need.total > memory:
        return (
            f"{_words(count)} may need {shown(count * need.total)} of memory, each {need}; there is {shown(memory)}: "
            f"{_advice(need, count, memory)}"
        )
    return ""


def _advice(need: Need, count: int, memory: int) -> str:
    if count > 1 and memory >= need.total:
        return f"lower --workers to {memory // need.total:,}"
    buffer = (memory - (need.total - need.pairing_buffer)) // MIB * MIB
    fewer = "lower --workers to 1, and " if count > 1 else "lower "
    if buffer >= _SMALLEST_BUFFER:
        return f"{fewer}--pairing-buffer to {buffer // MIB:,}MiB"
    if need.shards * need.part > need.sources * need.ahead:
        return f"{fewer}the number of shards a task: plan with a smaller --mix or a larger --shard-size"
    return f"{fewer}--ahead or --mix" if need.sources else "it needs a larger machine"


def _words(count: int) -> str:
    return "1 worker" if count == 1 else f"{count:,} workers"


def shown(count: int) -> str:
    """Bytes as options are written."""
    return f"{count / (1 << 30):.1f}GiB" if count >= 1 << 30 else f"{count // MIB:,}MiB"
