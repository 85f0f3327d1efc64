"""How patiently, how far ahead and by how many connections objects are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the network is trusted with. Each can be set by `SA1B_WDS_<NAME>` in the environment."""

    attempts: int = 8
    """Requests in a row that bring nothing before giving up."""
    first_wait: float = 0.25
    """Seconds: bound of the first pause; doubles from attempt to attempt."""
    longest_wait: float = 30.0
    """Seconds: bound of any pause; a Retry-After may ask for ten times as much."""
    stall: float = 30.0
    """Seconds without a byte after which a connection counts as dead."""
    window: int = 8 * MIB
    """Bytes a request while reading ahead, at most; smaller ones where many are on their way."""
    ahead: int = 32 * MIB
    """Bytes read ahead of the consumer, for each open source."""
    connections: int = 32
    """Requests for bytes of one server that are on their way at once, for each process; fewer after a 429."""
    hedge: float = 0.05
    """Share of the bytes asked for that may be asked for a second time, where an answer is late; 0: none."""

    @classmethod
    def of(cls, environment: Mapping[str, str], **said: float | None) -> "Limits":
        """Those that are said, else those of the environment, else the defaults.

        Raises:
            ConfigError: a variable that is no positive number.
        """
        found: dict[str, float] = {name: value for name, value in said.items() if value is not None}
        for field in fields(cls):
            name = f"SA1B_WDS_{field.name.upper()}"
            text = environment.get(name)
            if text and field.name not in found:
                try:
                    value = (int if isinstance(field.default, int) else float)(text)
                except ValueError:
                    value = math.nan
                if not (0 < value < 1 << 40 or (field.name == "hedge" and value == 0)):
                    raise ConfigError(name, "not a positive number", None, text)
                found[field.name] = value
        return cls(**found)  # type: ignore[arg-type]  # each has the type of its default
