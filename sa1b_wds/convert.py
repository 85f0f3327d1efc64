"""Source tars → shards: the converter's line, one task at a time.

    source bytes → members → samples → packed samples → dealt to shards → receipt   (`run_task`)
    receipts → manifest                                                             (`publication.finalize`)

A task runs as a pipeline of threads with bounded queues between them: one reads and inflates each source, one pairs,
packs and deals, four hash and write. All of their heavy work drops the GIL. Whatever runs ahead is put back in order,
so the bytes written never depend on timing.
"""

import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import recoding
from .ahead import Ahead
from .annotations import Packer
from .buffers import Pool
from .clouds import PART
from .errors import (
    DataError,
    FormatError,
    LinkExpired,
    NoSpace,
    NotFound,
    PlanMismatch,
    StorageError,
    TooFewSamples,
    TooManyQuarantined,
    UsageError,
)
from .files import Scratch, free_bytes, is_memory
from .lanes import Lanes
from .limits import Limits
from .manifest import (
    PLAN_NAME,
    RECEIPT_FORMAT,
    Receipt,
    SkippedFact,
    SourceFact,
    load_receipt,
    quarantine_names,
    quarantine_stem,
    receipt_name,
)
from .memory import Need
from .plan import Plan, Recoding, Source, Task, difference, load_plan, make_plan
from .remote import is_remote
from .sample import Sample, Table
from .shard import Quarantine, ShardWriter, deal
from .source import Account, OnDamage, Recoder, SourceReader, rounds, turns
from .storage import (
    Attempt,
    Destination,
    Raw,
    expand,
    is_local,
    local_size,
    name_of,
    open_raw,
    size_of,
)
from .traffic import COUNTS, Traffic

MIB = 1 << 20
_READ_AHEAD = 64 * MIB  # of all sources of a task: in memory beside what waits for its partner
_WRITERS = 4  # threads of a task that hash and write: two busy, two waiting for the disk
_LANE = 4  # samples that wait for each of them
_ASKERS = 16  # servers asked for sizes at once: a thousand in a row would take minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How tasks run; none of these changes a byte of what a sound source becomes."""

    on_damage: OnDamage = "fail"
    pairing_buffer: int = 512 * MIB
    """Bytes of members that may wait in memory."""
    scratch: Path | None = None
    """Where further ones wait; None: $SLURM_TMPDIR, $TMPDIR, or the system's folder for temporary files."""
    max_quarantine: float = 0.001
    """Share of a task's members that may be quarantined."""
    delete_source: bool = False
    """Sources go when their task is done; see `deletion`."""
    replaced: frozenset[str] = frozenset()
    """Names of sources that may be of another size than was planned."""
    threads: int = 2
    """That make photographs smaller, where the plan says so."""
    network: Limits | None = None
    """How sources far away are read; None: as the environment says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a task needs, wherever it runs."""

    destination: Destination
    plan: Plan
    locations: dict[str, str]
    """name of a source → where it lies now."""
    options: Options
    command: str = ""
    """What a user would type to have all of the plan done; `status` shows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a task is."""

    task: int
    bytes_read: int
    """Of its sources, as they lie there."""
    bytes_total: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a task ended."""

    task: int
    already_done: bool
    receipt: Receipt
    seconds: float
    spilled_bytes: int = 0
    """Bytes that waited in the scratch file."""
    peak_memory: int = 0
    """Bytes, the most that this process ever had resident."""
    traffic: Traffic = field(default_factory=Traffic)
    """What this process read from far away while it ran; never part of a receipt, which is the same every time."""
    deleted: tuple[str, ...] = ()
    """Names of sources that were deleted."""
    kept: tuple[str, ...] = ()
    """Where and why sources were not, though that was asked for."""


def locate(urls: list[str], links: Mapping[str, str] | None = None, *, may_be_empty: bool = False) -> dict[str, str]:
    """name → URL of the sources that `urls` mean, braces and folders expanded, and of those of a links file."""
    found = dict(links or {})
    for url in expand(urls, may_be_empty=may_be_empty):
        name = name_of(url)
        if found.setdefault(name, url) != url:
            raise UsageError(url, f"a second source named {name}, beside {found[name]}: names tell sources apart")
    return found


def survey(
    urls: list[str],
    assume_size: int | None = None,
    links: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    gone: Mapping[str, int] | None = None,
    plan: Plan | None = None,
    replaced: Collection[str] = (),
) -> dict[str, tuple[str, int]]:
    """name → (URL, bytes) of the sources that `urls` mean, braces and folders expanded, and of a links file's.

    Args:
        gone: name → bytes of sources that may be gone, since they were deleted when they were done (`converted`).
        plan: the one that is there: servers and commands are not asked again for sizes that stand in it.
        replaced: names of files that are others now than when it was made, and count with their sizes in it.
    """
    gone = gone or {}
    known = {} if plan is None else {source.name: source.size for source in plan.sources}
    if unknown := sorted(set(replaced) - set(known)):
        raise UsageError("--replaced", f"{unknown[0]} is not a source of a plan that is there")

    def size(url: str) -> int:
        name = name_of(url)
        if name in known and (name in replaced or not is_local(url)):
            return known[name]
        try:
            return size_of(url, limits)
        except NotFound:
            if name not in gone:
                raise
            return gone[name]
        except LinkExpired:
            raise
        except StorageError:
            if assume_size is None:
                raise
            return int(assume_size)  # a plan can be written of plain numbers only

    found = locate(urls, links, may_be_empty=bool(gone))
    if not any("://" in url for url in found.values()):
        return {name: (url, size(url)) for name, url in found.items()}
    with ThreadPoolExecutor(_ASKERS, "sa1b-wds-sizes") as askers:
        return {name: (found[name], n) for name, n in zip(found, askers.map(size, found.values()), strict=True)}


def write_plan(destination: Destination, plan: Plan) -> bool:
    """Put the plan in its place; False if the same one was there.

    Raises:
        PlanMismatch: another one is there.
    """
    if destination.put_new(PLAN_NAME, plan.to_bytes()):
        return True
    there = read_plan(destination)
    if there != plan:
        raise PlanMismatch(
            destination.place(PLAN_NAME),
            f"another plan is there; use another --out, or its options: {difference(plan, there)}",
        )
    return False


def plan_sources(
    found: dict[str, tuple[str, int]],
    *,
    shard_size: int,
    mix: int,
    seed: int,
    recoding: Recoding | None = None,
    excluded: Sequence[int] = (),
) -> Plan:
    sources = [Source(name=name, size=size) for name, (_, size) in found.items()]
    return make_plan(sources, shard_size=shard_size, mix=mix, seed=seed, recoding=recoding, excluded=excluded)


def read_plan(destination: Destination) -> Plan:
    where = destination.place(PLAN_NAME)
    try:
        return load_plan(destination.read(PLAN_NAME), where)
    except NotFound:
        raise NotFound(where, "no plan there: run `sa1b-wds plan SOURCES --out DEST` first") from None


def existing_plan(destination: Destination) -> Plan | None:
    """The plan, if one is there."""
    try:
        return read_plan(destination)
    except NotFound:
        return None


def missing_tasks(destination: Destination, plan: Plan) -> list[int]:
    """Tasks without a receipt; one listing, where the store has any."""
    names = [receipt_name(i) for i in range(len(plan.tasks))]
    try:
        there = set(destination.files_in("receipts"))
    except UsageError:  # a web server
        with ThreadPoolExecutor(_ASKERS, "sa1b-wds-receipts") as askers:
            there = {
                name for name, is_there in zip(names, askers.map(destination.exists, names), strict=True) if is_there
            }
    return [i for i, name in enumerate(names) if name not in there]


def converted(destination: Destination) -> dict[str, int]:
    """name → bytes of the sources of tasks that are done; none where there is no plan yet."""
    if (plan := existing_plan(destination)) is None:
        return {}
    missing = set(missing_tasks(destination, plan))
    done = (plan.sources[n] for i, task in enumerate(plan.tasks) if i not in missing for n in task.sources)
    return {source.name: source.size for source in done}


def ranges(numbers: list[int]) -> str:
    """`0,3-5`: as Slurm's --array takes it."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


# ---------------------------------------------------------------------------------------------------------- one task


def run_task(job: Job, index: int, report: Callable[[Progress], None] = lambda progress: None) -> Outcome:
    """Convert one task's sources into its shards, and write its receipt.

    Raises:
        SourceDamaged: a source cannot be read to its end, and `on_damage` is "fail".
        TooFewSamples: fewer samples than shards.
        PlanMismatch: photographs are to be made smaller, and the JPEG library here would give other bytes.
        TooManyQuarantined: more members rejected than `max_quarantine` allows.
        StorageError: reading or writing failed. In all of these cases nothing of the task is visible.
    """
    begun, before = time.monotonic(), COUNTS.now()
    destination, plan, options = job.destination, job.plan, job.options
    task, label = plan.tasks[index], label_of(index)
    receipt = _receipt(job, index)
    if receipt is not None:
        destination.sweep(label)
        return Outcome(task=index, already_done=True, receipt=receipt, seconds=0.0)
    if plan.recoding is not None:
        recoding.check(plan.recoding)
    scratch = Scratch(checked_scratch(plan, task, options))
    _allow_files(label, task.shards)
    pool = Pool(idle=64 * MIB)
    table = Table(pool, options.pairing_buffer, scratch)
    with contextlib.ExitStack() as stack:
        stack.callback(scratch.close)
        stack.callback(pool.close)
        attempt = stack.enter_context(destination.attempt(label))
        quarantine = Quarantine(outlet=attempt, stem=quarantine_stem(index))
        stack.callback(quarantine.close)
        shards = []
        for name in plan.shard_names(task):
            shards.append(ShardWriter(name, attempt))
            stack.callback(shards[-1].close)
        counter = _Counter()
        excluded = frozenset(plan.excluded)
        recoder = _recoder(plan, options.threads, stack)
        readers = [
            stack.enter_context(
                SourceReader(
                    number=number,
                    name=plan.sources[number].name,
                    raw=counter.counted(open_raw(url, options.network)),
                    where=url,
                    table=table,
                    packer=Packer(plan.recoding),
                    reject=quarantine.add,
                    on_damage=options.on_damage,
                    ahead=max(_READ_AHEAD // len(task.sources), 6 * MIB),
                    recoder=recoder,
                    excluded=excluded,
                )
            )
            for number, url in ((n, _location(job, plan.sources[n].name)) for n in task.sources)
        ]
        samples = turns([iter(reader) for reader in readers])
        total, said, written = plan.bytes_of(task), 0.0, 0

        def tell() -> None:
            report(Progress(task=index, bytes_read=counter.bytes, bytes_total=total, samples=written))

        tell()
        dealt = Ahead(
            _deal(rounds(samples, task.shards), task.shards),
            name="deal",
            budget=48 * MIB,
            weigh=_weigh,
            idle=tell,  # with all jpgs before all jsons there is no sample before most is read
        )
        stack.callback(dealt.close)
        for reader in readers:  # before that: who is stopped must not wait for a server that hangs
            stack.callback(reader.interrupt)
        # In random order most pairs meet late: then hashing and writing are all there is to do.
        with Lanes[Sample](
            lambda number, sample: shards[number].add(sample), _WRITERS, name="write", depth=_LANE
        ) as writers:
            for number, sample in dealt:
                writers.put(number, sample)
                written += 1
                if (now := time.monotonic()) - said > 0.2:
                    said = now
                    tell()
            writers.finish()
        accounts = [reader.account for reader in readers]
        _check(index, plan, task, accounts, quarantine, written, options)
        with ThreadPoolExecutor(_WRITERS, "sync") as syncers:
            facts = list(syncers.map(ShardWriter.finish, shards))
        receipt = Receipt(
            format=RECEIPT_FORMAT,
            plan=plan.digest,
            task=index,
            on_damage=options.on_damage,
            sources=[_source_fact(account) for account in accounts],
            shards=facts,
            quarantine=quarantine.finish(),
        )
        theirs = _publish(job, index, attempt, receipt)
        report(Progress(task=index, bytes_read=total, bytes_total=total, samples=written))
    return Outcome(
        task=index,
        already_done=theirs is not None,
        receipt=theirs or receipt,
        seconds=time.monotonic() - begun,
        spilled_bytes=scratch.bytes_written,
        traffic=COUNTS.now() - before,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _recoder(plan: Plan, threads: int, stack: contextlib.ExitStack) -> Recoder | None:
    if plan.recoding is None:
        return None
    pool = ThreadPoolExecutor(threads, "recode")
    stack.callback(pool.shutdown, cancel_futures=True)
    return Recoder(how=plan.recoding, threads=pool)


def check_sizes(job: Job, index: int) -> None:
    """Whether a task's sources are those of the plan, where their size can be had for nothing.

    A link's is not compared: a plan may have been written with an assumed one.

    Raises:
        PlanMismatch: a source on this machine is not as long as the plan says, and the task is not done.
    """
    for source in (job.plan.sources[number] for number in job.plan.tasks[index].sources):
        url = None if source.name in job.options.replaced else job.locations.get(source.name)
        try:
            found = None if url is None else local_size(url)
        except StorageError:  # of a task that is done it may be gone; else whoever opens it says so
            continue
        if url is not None and found not in (None, source.size) and not job.destination.exists(receipt_name(index)):
            what = (
                "another file than was planned (bytes): give the one that was; or, if this is a better copy of it, "
                f"say --replaced {source.name}"
            )
            raise PlanMismatch(url, what, source.size, found)


def memory_of(job: Job) -> Need:
    """What a worker needs of memory at most: for the task of the job that needs most."""
    plan, options = job.plan, job.options
    network = options.network or Limits.of(os.environ)
    uploads = is_remote(job.destination.where)

    def need(task: Task) -> Need:
        far = sum(is_remote(job.locations.get(plan.sources[number].name, "")) for number in task.sources)
        return Need(
            pairing_buffer=options.pairing_buffer,
            sources=far,
            ahead=max(network.ahead, network.window),
            shards=task.shards if uploads else 0,
            part=PART,
            pictures=options.threads if plan.recoding is not None else 0,
        )

    return max((need(task) for task in plan.tasks), key=lambda found: found.total)


def label_of(index: int) -> str:
    return f"task-{index:06d}"


def _publish(job: Job, index: int, attempt: Attempt, receipt: Receipt) -> Receipt | None:
    """Make the task's files visible, its receipt last; the other's receipt if another process was first."""
    destination = job.destination
    if (theirs := _receipt(job, index)) is not None:
        return theirs
    try:
        if not receipt.quarantine:  # an attempt that was killed between its renames may have left one
            for name in quarantine_names(index):
                destination.remove(name)
        attempt.publish(receipt_name(index), receipt.to_bytes())
    except StorageError:
        # Another process may have finished the task, and `finalize` removed this attempt, while this one was stopped.
        if (theirs := _receipt(job, index)) is not None:
            return theirs
        raise
    return None


def _receipt(job: Job, index: int) -> Receipt | None:
    try:
        receipt = load_receipt(job.destination.read(receipt_name(index)), job.destination.place(receipt_name(index)))
    except NotFound:
        return None
    check_receipt(job.destination, receipt, job.plan.digest, index)
    return receipt


def check_receipt(destination: Destination, receipt: Receipt, plan: str, index: int) -> None:
    if (receipt.plan, receipt.task) != (plan, index):
        found = f"task {receipt.task} of plan {receipt.plan[:12]}"
        raise FormatError(
            destination.place(receipt_name(index)),
            "a receipt of another plan",
            f"task {index} of plan {plan[:12]}",
            found,
        )


def _deal(hands: Iterator[list[Sample]], shards: int) -> Iterator[tuple[int, Sample]]:
    loads = [0] * shards
    for hand in hands:
        yield from zip(deal([sample.span for sample in hand], loads), hand, strict=True)


def _weigh(item: tuple[int, Sample]) -> int:
    return item[1].jpg.length


def _location(job: Job, name: str) -> str:
    try:
        return job.locations[name]
    except KeyError:
        raise NotFound(name, "the plan has this source, but it is not among those given") from None


def _check(
    index: int, plan: Plan, task: Task, accounts: list[Account], quarantine: Quarantine, samples: int, options: Options
) -> None:
    for account in accounts:
        if not account.balances():  # a fault of this program, never of the data; must not pass under `python -O` either
            raise DataError(account.name, "members were lost", account.members, str(account))
    names = ", ".join(plan.sources[n].name for n in task.sources)
    members = sum(account.members for account in accounts)
    if quarantine.members > options.max_quarantine * members:
        raise TooManyQuarantined(
            f"task {index} ({names})",
            f"{quarantine.members:,} of {members:,} members are no good, "
            f"more than --max-quarantine {options.max_quarantine:g} allows; the first: {quarantine.first_reason}. "
            "To keep the others, and all of these with their reasons in quarantine/, give a larger one (up to 1)",
        )
    if samples < task.shards:
        # The shard size may move by a tenth, and K is rounded: with this one, K stays below the number of samples.
        wanted = plan.bytes_of(task) * 10 // (9 * max(samples, 1))
        raise TooFewSamples(
            f"task {index} ({names})",
            f"fewer samples than shards; plan again with a larger --shard-size (more than {wanted:,} bytes)",
            f"at least {task.shards:,}",
            f"{samples:,}",
        )


def _source_fact(account: Account) -> SourceFact:
    return SourceFact(
        name=account.name,
        members=account.members,
        samples=account.samples,
        quarantined=account.quarantined,
        ignored=dict(sorted(account.ignored.items())),
        skipped=[SkippedFact(byte=byte, bytes=length, reason=reason) for byte, length, reason in account.skipped],
        greatest_distance=account.greatest_distance,
        excluded=account.excluded,
    )


class _Counter:
    """Counts what is read through the sources it has wrapped."""

    def __init__(self) -> None:
        self.bytes = 0

    def counted(self, raw: Raw) -> Raw:
        return _CountedRaw(raw, self)


class _CountedRaw:
    def __init__(self, raw: Raw, counter: _Counter) -> None:
        self._raw, self._counter, self._mine = raw, counter, 0
        self.close, self.interrupt = raw.close, raw.interrupt

    def readinto(self, buffer: memoryview, /) -> int:
        got = self._raw.readinto(buffer)
        self._mine += got
        self._counter.bytes += got
        return got

    def rewind(self) -> bool:
        rewind = getattr(self._raw, "rewind", None)
        if rewind is None or not rewind():
            return False
        self._counter.bytes -= self._mine
        self._mine = 0
        return True


def scratch_folder() -> Path:
    """Where scratch files go if nobody says: on the node's own disk, as far as the environment knows it."""
    return Path(os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir())


def scratch_bytes(plan: Plan, task: Task, options: Options) -> int:
    """Bytes of scratch that a task may need."""
    # In random order a quarter of the bytes wait when half is read; a little more by chance.
    return max(0, plan.bytes_of(task) * 28 // 100 - options.pairing_buffer)


def checked_scratch(plan: Plan, task: Task, options: Options) -> Path:
    """The folder for waiting members, if what may have to wait there fits.

    Raises:
        NotFound, UsageError, NoSpace: it is not there, lies in memory, or is too small.
    """
    folder = options.scratch or scratch_folder()
    need = scratch_bytes(plan, task, options)
    if need > 0:
        advice = "give --scratch a folder on a local disk, a smaller --mix, or a larger --pairing-buffer"
        if not folder.is_dir():
            raise NotFound(f"scratch {folder}", f"no such folder; {advice}")
        if is_memory(folder):
            raise UsageError(
                f"scratch {folder}", f"lies in memory (tmpfs), and {need:,} bytes may have to wait there; {advice}"
            )
        if (free := free_bytes(folder)) < need:
            raise NoSpace(f"scratch {folder}", f"too small; {advice}", f"{need:,} bytes free", f"{free:,}")
    return folder


def _allow_files(label: str, shards: int) -> None:
    """All shards of a task are open at once: ask for as many files as that takes, or say what to do."""
    need = shards + 128  # its sources, its quarantine, its pipes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or need <= soft:
        return
    if hard != resource.RLIM_INFINITY and need > hard:
        raise UsageError(
            label,
            f"its {shards:,} shards are open at once, and this process may not open so many files: raise the limit "
            "(ulimit -Hn), or plan with a larger --shard-size or a smaller --mix",
            f"{need:,} files",
            f"{hard:,}",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
