"""What a conversion says while it runs: a sentence, or with `--log-format json` one object a line on standard error.

Every object has `time` (UTC) and `event`: `plan`, `shard`, `task`, `kept` and
`deleted` (sources, with `--delete-source`), `error`, `stopped`, `published`, `ray`. Sizes are bytes,
times are seconds, `mb_per_second` is 10⁶ bytes a second: a task's of its sources, a shard's its own.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

import msgspec

from .errors import Sa1bError

Format = Literal["text", "json"]


def _now() -> datetime:
    return datetime.now(UTC)


class Log:
    """Where it is said."""

    def __init__(self, form: Format = "text", out: TextIO | None = None, now: Callable[[], datetime] = _now) -> None:
        self.is_json = form == "json"
        self.out = out or sys.stderr
        self._now = now
        self._print: Callable[[str], None] = self._line

    def say(self, event: str, text: str, **facts: object) -> None:
        """Say `text`, or of the event its facts."""
        if not self.is_json:
            self._print(text)
            return
        when = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        # Names may hold bytes that are not UTF-8, as surrogates, which JSON cannot hold.
        about = {"time": when, "event": event} | {k: _text(v) if isinstance(v, str) else v for k, v in facts.items()}
        self._line(msgspec.json.encode(about).decode())

    def error(self, error: Sa1bError, task: int | None = None) -> None:
        """Say an error; `task`: which one it has ended."""
        about: dict[str, object] = {} if task is None else {"task": task}
        about |= {"kind": type(error).__name__, "where": error.where, "what": error.what}
        about |= {k: str(v) for k, v in (("expected", error.expected), ("found", error.found)) if v is not None}
        self.say("error", f"sa1b-wds: {error}", **about, message=str(error))

    @contextmanager
    def through(self, show: Callable[[str], None]) -> Iterator[None]:
        """Sentences go this way meanwhile, so that they do not cut through a bar on a terminal."""
        self._print = show
        try:
            yield
        finally:
            self._print = self._line

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """What ends the program is said as an object too, where objects are said; else it passes.

        Raises:
            SystemExit: with the exit code, once it is said.
        """
        try:
            yield
        except Sa1bError as error:
            if not self.is_json:
                raise
            self.error(error)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt as stopped:
            if not self.is_json:
                raise
            self.say("stopped", "", by=str(stopped) or "SIGINT")
            raise SystemExit(130) from None

    def _line(self, text: str) -> None:
        print(text, file=self.out, flush=True)


def _text(words: str) -> str:
    return words.encode("utf-8", "backslashreplace").decode()
