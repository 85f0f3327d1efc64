"""A sample on its way from its source to its shard, and where its bytes wait meanwhile."""

from dataclasses import dataclass

from . import tar
from .buffers import Buffer, Pool
from .storage import Scratch


class Held:
    """Bytes that wait: in memory, or in the scratch file."""

    __slots__ = ("_data", "_slot", "_table", "length")

    def __init__(self, table: "Table", data: Buffer | memoryview) -> None:
        self._table, self._data = table, data
        self._slot: tuple[int, int] | None = None
        self.length = data.length if isinstance(data, Buffer) else data.nbytes

    def spill(self) -> None:
        """Move the bytes to the scratch file, if they are in memory."""
        if self._slot is None and self._data is not None:
            data = self._data
            self._slot = self._table.scratch.write(data.view if isinstance(data, Buffer) else data)
            self._table.let_go(data)
            self._data = None

    def load(self) -> memoryview:
        """The bytes, in memory; good until `release`. May be called in another thread than `spill`."""
        if self._slot is not None:
            buffer = self._table.pool.take(self.length)
            self._table.scratch.read(self._slot, buffer.view)
            self._table.scratch.give_back(self._slot)
            self._data, self._slot = buffer, None
        data = self._data
        assert data is not None, "loaded after release"
        return data.view if isinstance(data, Buffer) else data

    def release(self) -> None:
        """The bytes are no longer needed."""
        if self._slot is not None:
            self._table.scratch.give_back(self._slot)
        elif self._data is not None:
            self._table.let_go(self._data)
        self._data = self._slot = None


class Table:
    """Where bytes wait, in memory up to a budget that all sources of a task share."""

    def __init__(self, pool: Pool, budget: int, scratch: Scratch) -> None:
        self.pool, self.scratch = pool, scratch
        self._budget = budget
        self._small = 0

    def hold(self, data: Buffer | memoryview) -> Held:
        held = Held(self, data)
        if not isinstance(data, Buffer):
            self._small += data.nbytes
        if self.full:
            held.spill()
        return held

    @property
    def full(self) -> bool:
        return self.pool.outstanding + self._small > self._budget

    def let_go(self, data: Buffer | memoryview) -> None:
        if isinstance(data, Buffer):
            self.pool.give(data)
        else:
            self._small -= data.nbytes


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
    """A block for the tar header, the jpg, and zeros up to a whole block."""
    jpg_size: int
    packed: Held
    annotations: int
    area_mismatches: int
    stored_source: bool

    @property
    def span(self) -> int:
        """Bytes in the shard: two headers, two members, padding."""
        return self.jpg.length + tar.BLOCK + self.packed.length + tar.padding(self.packed.length)

    def release(self) -> None:
        self.jpg.release()
        self.packed.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A member that goes to quarantine."""

    source: str
    name: str
    """As the source had it."""
    offset: int
    """Byte of its header in the source tar (inflated)."""
    key: str
    reason: str
    data: bytes | None
    """None: it has no data, or more than a member may have."""
