"""A sample on its way from its source to its shard, and where its bytes wait meanwhile."""

from dataclasses import dataclass

from .buffers import Buffer, Pool
from .files import Scratch


class Held:
    """Bytes that wait: in memory, or in the scratch file."""

    __slots__ = ("_data", "_slot", "_table", "length")

    def __init__(self, table: "Table", data: Buffer) -> None:
        self._table, self.length = table, data.length
        self._data: Buffer | None = data
        self._slot: tuple[int, int] | None = None

    def spill(self) -> None:
        """Move the bytes to the scratch file, if they are in memory."""
        if self._slot is None and self._data is not None:
            self._slot = self._table.scratch.write(self._data.view)
            self._table.pool.give(self._data)
            self._data = None

    def load(self) -> memoryview:
        """The bytes, in memory; good until `release`. May be called in another thread than `spill`."""
        if self._slot is not None:
            buffer = self._table.pool.take(self.length)
            self._table.scratch.read(self._slot, buffer.view)
            self._table.scratch.give_back(self._slot)
            self._data, self._slot = buffer, None
        assert self._data is not None, "loaded after release"
        return self._data.view

    def release(self) -> None:
        """The bytes are no longer needed."""
        if self._slot is not None:
            self._table.scratch.give_back(self._slot)
        elif self._data is not None:
            self._table.pool.give(self._data)
        self._data = self._slot = None


class Table:
    """Where bytes wait, in memory up to a budget that all sources of a task share."""

    def __init__(self, pool: Pool, budget: int, scratch: Scratch) -> None:
        self.pool, self.scratch = pool, scratch
        self._budget = budget - budget // 4  # the rest is for what is read back, and for buffers that fit nobody

    def hold(self, data: Buffer) -> Held:
        held = Held(self, data)
        if self.pool.outstanding > self._budget:
            held.spill()
        return held


@dataclass(slots=True, eq=False)
class Sample:
    """A jpg and its packed annotations, ready to be written."""

    key: str
    image_id: int
    source: int
    """Number of the source in the plan."""
    jpg_ordinal: int
    """Which member of its source the jpg was, from 0."""
    json_ordinal: int
    jpg: Held
    """As it stands in the shard: a block for the tar header, the jpg, room up to a whole block."""
    jpg_size: int
    packed: Held
    """The packed annotations, likewise."""
    packed_size: int
    annotations: int
    area_mismatches: int
    stored_source: bool

    @property
    def span(self) -> int:
        """Bytes in the shard: two headers, two members, padding."""
        return self.jpg.length + self.packed.length

    def release(self) -> None:
        self.jpg.release()
        self.packed.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A member that goes to quarantine."""

    source: str
    name: str
    """As the source had it; bytes that are not UTF-8 as `\\udcff`."""
    offset: int
    """Byte of its header in the source tar (inflated)."""
    key: str
    reason: str
    data: bytes | None
    """None: it has no data, or more than a member may have."""
