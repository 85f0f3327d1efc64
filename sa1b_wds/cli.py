"""The command line: options from flags and a config file, one line for every error, exit codes 0 to 3.

0 done · 1 the data or the storage · 2 the call or its config · 3 `verify` found a difference · 130 Ctrl-C.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import App, CycloptsError, Parameter
from msgspec import structs

from . import config as options
from .errors import DataError, Different, PlanMismatch, Sa1bError, UsageError

if TYPE_CHECKING:
    from types import FrameType

    from .convert import Job
    from .engines import Engine
    from .limits import Limits
    from .log import Log
    from .plan import Plan
    from .status import Overview

HELP = """Turn SA-1B's tars into training-ready WebDataset shards, and check, inspect and undo the result.

Every option may stand in a TOML file given with --config; the command line wins. Sizes are written 512MiB, 1GiB or
in plain bytes. Sources are paths or URLs (s3://, gs://, az://, http(s)://) of tars, folders of tars, names with braces
('sa_0000{00..49}.tar'), pipe:COMMAND that writes a tar to its standard output, or a links file (--links).
"""

app = App(
    name="sa1b-wds",
    help=HELP,
    help_format="plaintext",
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `main` has something to say
)

T = TypeVar("T")

Config = Annotated[Path | None, Parameter(help="A TOML file with options; see configs/local.toml.")]
Out = Annotated[str | None, Parameter(help="The folder of the data set.")]
Size = Annotated[str | None, Parameter()]
Links = Annotated[Path | None, Parameter()]
Only = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
ConvertSources = Annotated[list[str] | None, Parameter(help="Source tars, folders of them, or paths with braces.")]


def _required(value: T | None, option: str) -> T:
    if value is None or value in ([], "") or (isinstance(value, list) and "" in value):  # "" as of "$UNSET"
        raise UsageError(option, "is missing: give it on the command line or in the config file")
    return value


def _local(path: Path | None, option: str) -> Path:
    """A place on this machine, which is all that these commands write to."""
    place = _required(path, option)
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(place)):  # of a path, one of the two slashes is gone
        raise UsageError(f"{option} {place}", "not a local path: write it here, and copy it")
    return place


@app.command
def synth(
    out: str | None = None,
    /,
    *,
    tars: int | None = None,
    samples: int | None = None,
    plain: bool | None = None,
    seed: int | None = None,
    workers: int | None = None,
    config: Config = None,
) -> None:
    """Make synthetic SA-1B tars in Meta's layout, to try everything without the data.

    Example: sa1b-wds synth demo/tars --tars 2 --samples 100

    Parameters
    ----------
    out
        The folder to write sa_000000.tar, sa_000001.tar, … into.
    tars
        How many (2).
    samples
        Images a tar (100).
    plain
        Plain tar instead of gzip under `.tar`, which is what Meta published.
    seed
        The same seed gives the same bytes (0).
    workers
        Processes (1).
    """
    from .progress import megabytes
    from .synth import synthesise

    o = options.load(
        config, options.Synth, out=out, tars=tars, samples=samples, plain=plain, seed=seed, workers=workers
    )
    folder = _local(o.out, "OUT")
    begun = time.monotonic()
    made = synthesise(folder, tars=o.tars, samples=o.samples, plain=o.plain, seed=o.seed, workers=o.workers)
    size = sum(path.stat().st_size for path in made)
    images = len(made) * o.samples
    _say(f"{folder}: {len(made):,} tars, {images:,} images, {megabytes(size)} in {time.monotonic() - begun:.1f} s")


@app.command
def plan(
    sources: ConvertSources = None,
    /,
    *,
    links: Links = None,
    only: Only = None,
    out: Out = None,
    shard_size: Size = None,
    mix: int | None = None,
    seed: int | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    exclude: Only = None,
    assume_size: Size = None,
    dry_run: bool | None = None,
    rate: Size = None,
    config: Config = None,
) -> None:
    """Decide which task reads which sources and writes which shards, and write DEST/plan.json.

    Example: sa1b-wds plan /data/sa1b --out /data/shards --dry-run

    Parameters
    ----------
    sources
        Source tars, folders of them, or names with braces: paths, s3://, gs://, az://, http(s)://, pipe:COMMAND.
    links
        A links file (segment_anything_links.txt), whose tars are sources too.
    only
        Tars to take of the links file: names, braces allowed ('sa_0000{00..99}.tar').
    shard_size
        Bytes a shard should have (1GiB); moved by up to a tenth so that all shards of the run are as equal as possible.
    mix
        Source tars that a task reads together, and mixes in its shards (4).
    seed
        Of the grouping (0).
    max_side
        Photographs whose longest side has more pixels are stored at this size; masks, boxes and points stay in pixels
        of the original. Without it they keep their bytes.
    quality
        JPEG quality of those, 1 to 100 (90).
    exclude
        Images to leave out: ids (sa_123 or 123), or files with one a line and # before comments. Their members are
        counted, and their bytes kept nowhere, not in quarantine either.
    assume_size
        Bytes to assume for a source whose size cannot be asked for.
    dry_run
        Print the plan and write nothing.
    rate
        Bytes a second that one task reads, for the estimate of its time (as finished tasks of DEST have shown, else
        a cautious 200MB).
    """
    given: dict[str, object] = {"shard_size": shard_size, "mix": mix, "seed": seed, "assume_size": assume_size}
    given |= {"max_side": max_side, "quality": quality, "exclude": exclude}
    given |= {"links": links, "only": only}
    o = options.load(config, options.Plan, sources=sources, out=out, dry_run=dry_run, rate=rate, **given)
    _quality_of_something(quality, o)
    from .convert import write_plan
    from .progress import plan_lines
    from .status import expected_rate
    from .storage import Destination

    made, _ = _plan(o)
    _say_plan(made)
    destination = Destination(_required(o.out, "--out"))
    for line in plan_lines(made, expected_rate(destination, o.rate, now=time.time())):
        _say(line)
    if o.dry_run:
        _say("dry run: nothing written")
        return
    write_plan(destination, made)
    _say(f"written: {destination.place('plan.json')}")


def _plan(o: "options.Plan | options.Convert", network: "Limits | None" = None) -> "tuple[Plan, dict[str, str]]":
    """The plan, and where its sources lie."""
    from .convert import converted, existing_plan, plan_sources, survey
    from .exclusion import image_ids
    from .recoding import recoding
    from .storage import Destination

    destination, links = Destination(_required(o.out, "--out"), network), _links(o)
    gone = converted(destination) if isinstance(o, options.Convert) and o.delete_source else {}
    there = existing_plan(destination) if isinstance(o, options.Convert) else None
    replaced = o.replaced if isinstance(o, options.Convert) else ()
    urls = o.sources if links else _required(o.sources, "SOURCES")
    found = survey(urls, o.assume_size, links, network, gone, there, replaced)
    _outside(o.out, [url for url, _ in found.values()])
    how = recoding(o.max_side, o.quality) if o.max_side is not None else None
    whole = {name: ("", size) for name, size in gone.items()} | found
    made = plan_sources(
        whole, shard_size=int(o.shard_size), mix=o.mix, seed=o.seed, recoding=how, excluded=image_ids(o.exclude)
    )
    return made, {name: url for name, (url, _) in found.items()}


def _quality_of_something(quality: int | None, o: "options.Plan | options.Convert") -> None:
    if quality is not None and o.max_side is None:
        raise UsageError("--quality", "is that of photographs made smaller: give --max-side too")


def _outside(out: str | None, urls: list[str]) -> None:
    """Below a data set every tar is a shard, to all readers."""
    from .storage import Destination

    destination = Destination(_required(out, "--out"))
    for url in urls:
        if destination.holds(url):
            raise UsageError(url, f"a source in {destination.where}, where readers would take it for a shard")


def _links(o: "options.Plan | options.Convert") -> dict[str, str]:
    """name → URL, from the links file; says what of it is left out."""
    if o.links is None:
        if o.only:
            raise UsageError("--only", "says which tars of a links file to take: give --links too")
        return {}
    from .links import read_links

    found = read_links(o.links, o.only)
    if found.left_out:
        _say(f"{o.links}: {len(found.left_out):,} rows are no tars and left out: {', '.join(found.left_out)}")
    return found.locations


def _say_plan(made: "Plan") -> None:
    from .progress import megabytes

    sizes = made.expected_sizes()
    total = sum(source.size for source in made.sources)
    smaller = f"; photographs of at most {made.max_side:,} pixels: shards will be smaller" if made.recoding else ""
    _say(
        f"{len(made.sources):,} sources, {megabytes(total)} → {made.shards:,} shards "
        f"of about {megabytes(total / made.shards)} in {len(made.tasks):,} tasks; "
        f"largest/smallest expected {max(sizes) / min(sizes):.3f}{smaller}"
    )


@app.command
def convert(
    sources: ConvertSources = None,
    /,
    *,
    links: Links = None,
    only: Only = None,
    out: Out = None,
    task: Annotated[
        str | None,
        Parameter(help="One task of a written plan: its number, or auto (from the batch system's variables)."),
    ] = None,
    workers: int | None = None,
    engine: Literal["local", "ray"] | None = None,
    cpus_per_task: int | None = None,
    shard_size: Size = None,
    mix: int | None = None,
    seed: int | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    exclude: Only = None,
    assume_size: Size = None,
    replaced: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    on_damage: Literal["fail", "salvage"] | None = None,
    pairing_buffer: Size = None,
    memory: Size = None,
    scratch: Path | None = None,
    max_quarantine: float | None = None,
    delete_source: bool | None = None,
    log_format: Literal["text", "json"] | None = None,
    attempts: int | None = None,
    first_wait: float | None = None,
    longest_wait: float | None = None,
    stall: float | None = None,
    window: Size = None,
    ahead: Size = None,
    connections: int | None = None,
    hedge: float | None = None,
    config: Config = None,
) -> None:
    """Convert source tars into shards: plan, all tasks that are not done yet, finalize. Run it again to go on.

    Example: sa1b-wds convert /data/sa1b --out /data/shards --workers 8
    Example: sa1b-wds convert /data/sa1b --out /data/shards --task auto      (inside an array job; then finalize)

    Parameters
    ----------
    sources
        Source tars, folders of them, or names with braces: paths, s3://, gs://, az://, http(s)://, pipe:COMMAND.
    links
        A links file (segment_anything_links.txt), whose tars are sources too.
    only
        Tars to take of the links file: names, braces allowed ('sa_0000{00..99}.tar').
    workers
        Processes, each with threads of its own (half the cores); with Ray the most tasks at once (all there is room
        for).
    engine
        What runs the tasks: processes on this machine, or a Ray cluster (RAY_ADDRESS, else one of this machine's own).
    cpus_per_task
        Cores that Ray reserves for a task (2).
    shard_size
        Bytes a shard should have (1GiB).
    mix
        Source tars that a task reads together, and mixes in its shards (4).
    seed
        Of the grouping of sources (0).
    max_side
        Photographs whose longest side has more pixels are stored at this size; masks, boxes and points stay in pixels
        of the original. Without it they keep their bytes.
    quality
        JPEG quality of those, 1 to 100 (90).
    exclude
        Images to leave out: ids (sa_123 or 123), or files with one a line and # before comments. Their members are
        counted, and their bytes kept nowhere, not in quarantine either.
    assume_size
        Bytes to assume for a source whose size cannot be asked for.
    replaced
        Names of tars that are better copies now than those of the plan, of another size, such as one that was damaged.
    on_damage
        A source that cannot be read to its end: fail (say where), or salvage what stands around the damage.
    pairing_buffer
        Bytes of members that may wait for their partner in memory, for each worker (512MiB).
    memory
        Bytes that all workers together may have: what may need more is refused before anything is read.
    scratch
        The folder, on a local disk, where more of them wait ($SLURM_TMPDIR, $TMPDIR, /tmp).
    max_quarantine
        Share of a task's members that may be unusable (0.001).
    delete_source
        Delete each source file once its task is done and every member was found again in the shards, byte for byte.
        One with anything in it that no shard has is kept. Only files on this machine.
    log_format
        What is said while tasks run: text, or json for one object a line on standard error, errors too.
    attempts
        Requests in a row that bring nothing before giving up on a server (8).
    first_wait
        Seconds: bound of the first, random pause between them, which doubles (0.25).
    longest_wait
        Seconds: bound of any pause (30); a Retry-After may ask for ten times as much.
    stall
        Seconds without a byte after which a connection is dead (30).
    window
        Bytes of a request while reading ahead, at most (8MiB).
    ahead
        Bytes read ahead of each source (32MiB).
    connections
        Requests of a process to one server at once (32); fewer while it says that it has too many.
    hedge
        Share of the bytes asked for that may be asked for twice, where an answer is late (0.05).
    """
    from .log import Log

    planning: dict[str, object] = {
        "shard_size": shard_size,
        "mix": mix,
        "seed": seed,
        "max_side": max_side,
        "quality": quality,
    }
    planning["exclude"] = exclude
    o = options.load(
        config,
        options.Convert,
        sources=sources,
        links=links,
        only=only,
        out=out,
        assume_size=assume_size,
        replaced=replaced,
        workers=workers,
        engine=engine,
        cpus_per_task=cpus_per_task,
        on_damage=on_damage,
        pairing_buffer=pairing_buffer,
        memory=memory,
        scratch=scratch,
        max_quarantine=max_quarantine,
        delete_source=delete_source,
        log_format=log_format,
        attempts=attempts,
        first_wait=first_wait,
        longest_wait=longest_wait,
        stall=stall,
        window=window,
        ahead=ahead,
        connections=connections,
        hedge=hedge,
        **planning,
    )
    file = options.section(config, "convert") if config is not None else {}
    said = [name for name, value in planning.items() if value is not None or name in file]
    log = Log(o.log_format)
    with log.last_words():
        if task is None:
            _quality_of_something(quality, o)
        elif engine == "ray":
            raise UsageError("--engine ray", "runs all tasks of a plan, --task one of them: leave out one of the two")
        _convert(o, task, said, log)


def _convert(o: options.Convert, task: str | None, said: list[str], log: "Log") -> None:
    """`said`: which options of the plan were given, there or in the config."""
    from . import engines
    from .convert import Job, Options, locate, missing_tasks, read_plan, write_plan
    from .deletion import is_left
    from .publication import finalize
    from .status import command, planned
    from .storage import Destination

    run_tasks = _engine(o, log, here=task is not None)  # what it lacks is said before anything is written
    network = options.limits(o, os.environ)
    destination = Destination(_required(o.out, "--out"), network)
    if task is None:
        made, locations = _plan(o, network)
        if o.delete_source:
            _deletable(made, locations)
    else:
        made = read_plan(destination)
        _same_options(destination.place("plan.json"), made, o, said)
        # The other tasks' sources need not be within reach of this machine.
        links_ = _links(o)
        locations = locate(
            o.sources if links_ else _required(o.sources, "SOURCES"), links_, may_be_empty=o.delete_source
        )
        _outside(o.out, list(locations.values()))
        if o.delete_source:
            _deletable(made, locations)
    count = o.workers or max(1, engines.cores() // 2)
    how = Options(
        on_damage=o.on_damage,
        pairing_buffer=int(o.pairing_buffer),
        scratch=o.scratch,
        max_quarantine=o.max_quarantine,
        delete_source=o.delete_source,
        replaced=frozenset(o.replaced),
        threads=max(1, engines.cores() // min(count, len(made.tasks))),
        network=network,
    )
    # A task takes its options from the plan, where the command for all of them would have to say them.
    whole = structs.replace(o, **planned(made) | ({"exclude": o.exclude} if o.exclude else {}))
    job = Job(destination=destination, plan=made, locations=locations, options=how, command=command(whole))
    mine = None if task is None else tasks_of(task, len(made.tasks), os.environ)
    here = mine is not None or o.engine == "local"
    if (fewer := _fitting(job, o, len(made.tasks if mine is None else mine), log, here=here)) is not None:
        run_tasks = engines.pool(fewer)
    if mine is None:
        write_plan(destination, made)
        tasks = missing_tasks(destination, made)
        done = len(made.tasks) - len(tasks)
        if o.delete_source:  # a run that was killed may have left some of those that are done
            tasks += [i for i in sorted(set(range(len(made.tasks))) - set(tasks)) if is_left(job, i)]
        if log.is_json:
            size = sum(source.size for source in made.sources)
            about = {"sources": len(made.sources), "bytes": size, "shards": made.shards}
            log.say("plan", "", out=destination.where, **about, tasks=len(made.tasks), done=done)
        else:
            _say_plan(made)
            if done:
                _say(f"{done:,} of {len(made.tasks):,} tasks are done already")
    else:
        tasks = mine
    _run(job, tasks, run_tasks, log)
    if task is None:
        manifest = finalize(destination)
        if log.is_json:
            log.say("published", "", out=destination.where, **structs.asdict(manifest.totals))
            return
        sizes = [shard.bytes for shard in manifest.shards]
        _say(
            f"{destination.where}: {manifest.totals.samples:,} images, {manifest.totals.annotations:,} masks in "
            f"{len(sizes):,} shards; largest/smallest {max(sizes) / min(sizes):.3f}; "
            f"{manifest.totals.quarantined:,} members quarantined"
        )


def _deletable(made: "Plan", locations: dict[str, str]) -> None:
    """Whether sources may be deleted at all: nothing is begun that could not be ended as it was asked for."""
    from .storage import is_local

    if made.recoding is not None:
        raise UsageError("--delete-source", "with --max-side the photographs as they are would be lost")
    if far := [url for url in locations.values() if not is_local(url)]:
        raise UsageError("--delete-source", "deletes files on this machine alone", "paths", far[0])


def _fitting(job: "Job", o: options.Convert, tasks: int, log: "Log", *, here: bool) -> int | None:
    """Refuses what does not fit into memory, before anything is read; how many workers are as many as fit, if fewer.

    Args:
        tasks: that there may be to run.
        here: they run on this machine.
    """
    from . import engines, memory, world
    from .convert import memory_of

    need = memory_of(job)
    count = wanted = min(o.workers or (max(1, engines.cores() // 2) if here else 1), tasks)
    if o.memory is not None:
        if o.workers is None:
            count = memory.workers(need, o.memory, wanted)
        memory.check(need, count, o.memory)
    elif here and (there := world.memory()) is not None and (warning := memory.look(need, wanted, there)):
        log.say("memory", warning, warning=warning)
    return count if count < wanted else None


def _same_options(where: str, made: "Plan", o: options.Convert, said: list[str]) -> None:
    """A task takes its options from the plan; those said again, there or in its config, must be the same."""
    from .exclusion import image_ids

    for name in said:
        if name == "exclude":
            if (ids := image_ids(o.exclude)) != made.excluded:
                counts = f"{len(made.excluded):,} images are excluded in it, {len(ids):,} here"
                raise PlanMismatch(where, f"another plan is there: {counts}, or others")
            continue
        here, there = getattr(o, name), getattr(made, name)
        if here != there and (name != "quality" or made.recoding is not None):
            shown = [f"{value:,}" if value is not None else "not given" for value in (there, here)]
            raise PlanMismatch(where, f"another plan is there: {name} is {shown[0]} in it, {shown[1]} here")


def _engine(o: options.Convert, log: "Log", *, here: bool) -> "Engine":
    """What runs the tasks: what the options say, or, `here`, this machine in any case."""
    from . import engines

    if o.engine == "ray" and not here:
        from .engines_ray import engine

        def say(text: str) -> None:
            log.say("ray", f"sa1b-wds: {text}", message=text)

        return engine(cpus_per_task=o.cpus_per_task, at_once=o.workers, say=say)
    return engines.pool(o.workers or max(1, engines.cores() // 2))


def _run(job: "Job", tasks: list[int], engine: "Engine", log: "Log") -> None:
    from . import engines
    from .progress import display

    failures: list[engines.Failure] = []
    with display(job.plan, tasks, log) as shown:
        for ended in engine(job, tasks, shown.report) if tasks else ():
            if isinstance(ended, engines.Failure):
                failures.append(ended)
                log.error(ended.error, ended.task)
            else:
                shown.ended(ended)
    if failures:
        if len(tasks) == 1:
            raise SystemExit(failures[0].error.exit_code)
        from .convert import ranges

        numbers = ranges(sorted(f.task for f in failures))
        kind = UsageError if all(f.error.exit_code == UsageError.exit_code for f in failures) else DataError
        raise kind(job.destination.where, f"{len(failures):,} of {len(tasks):,} tasks failed: {numbers}")


JOBS_VARIABLE = "SA1B_WDS_JOBS"
INDEX_VARIABLES = ("SLURM_ARRAY_TASK_ID", "AWS_BATCH_JOB_ARRAY_INDEX", "JOB_COMPLETION_INDEX", "CLOUD_RUN_TASK_INDEX")
_COUNT_VARIABLES = {"SLURM_ARRAY_TASK_ID": "SLURM_ARRAY_TASK_COUNT", "CLOUD_RUN_TASK_INDEX": "CLOUD_RUN_TASK_COUNT"}


def tasks_of(task: str, tasks: int, environment: Mapping[str, str]) -> list[int]:
    """The tasks that `--task` means: one number, or what this job of an array has to do.

    With fewer jobs n than tasks, job i does i, i + n, … where the batch system says how many jobs there are.
    """
    if task != "auto":
        number = _number(task)
        if number is None or number >= tasks:
            raise UsageError("--task", "not a task of the plan", f"auto, or 0 to {tasks - 1:,}", task)
        return [number]
    found = [name for name in INDEX_VARIABLES if environment.get(name, "") != ""]
    if len(found) != 1:
        what = "none of them is set" if not found else " and ".join(found) + " are set"
        raise UsageError("--task auto", f"takes the index from one of {', '.join(INDEX_VARIABLES)}, but {what}")
    name = found[0]
    index = _number(environment[name])
    if index is None:
        raise UsageError(name, "not an index", "0, 1, 2, …", environment[name])
    jobs = _jobs(name, environment)
    if jobs is None or jobs >= tasks:
        if index >= tasks:
            raise UsageError(name, "beyond the plan's tasks", f"0 to {tasks - 1:,}", index)
        return [index]
    if index >= jobs:
        raise UsageError(name, "beyond the number of jobs: indices begin with 0", f"0 to {jobs - 1:,}", index)
    return list(range(index, tasks, jobs))


def _jobs(name: str, environment: Mapping[str, str]) -> int | None:
    """How many jobs share the tasks; None: each does the one of its index."""
    if said := environment.get(JOBS_VARIABLE, ""):
        jobs = _number(said)
        if not jobs:
            raise UsageError(JOBS_VARIABLE, "not a number of jobs", "1, 2, 3, …", said)
        return jobs
    jobs = _number(environment.get(_COUNT_VARIABLES.get(name, ""), ""))
    if jobs and name == "SLURM_ARRAY_TASK_ID":
        # Only 0 … n−1 share everything. Other arrays, as `status` prints them, name the tasks to be done.
        first, last = (environment.get(f"SLURM_ARRAY_TASK_{end}", "") for end in ("MIN", "MAX"))
        if (first, last) not in (("", ""), ("0", str(jobs - 1))):
            return None
    return jobs or None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


@app.command
def status(
    dest: str | None = None,
    /,
    *,
    json: bool | None = None,
    left: bool | None = None,
    watch: Annotated[bool | float | None, Parameter(negative="")] = None,
    config: Config = None,
) -> None:
    """Which tasks are done, running, failed or missing, and what finishes the run; from the destination alone.

    Example: sa1b-wds status /data/shards --watch
    Example: sbatch --array=$(sa1b-wds status /data/shards --left) convert.sbatch

    Parameters
    ----------
    dest
        The folder of the data set.
    json
        For programs: one object; with --watch one a line.
    left
        Only the numbers of the tasks that are not done, as Slurm's --array takes them: 17,231-240. Those that run
        now are among them; nothing where all is done.
    watch
        Again and again until all is done, every so many seconds (10).
    """
    from .progress import status_lines
    from .progress import watch as show
    from .status import read_status
    from .storage import Destination

    o = options.load(config, options.Status, dest=dest, json=json, left=left, watch=watch)
    destination = Destination(_required(o.dest, "DEST"))
    if o.left:
        if rest := read_status(destination, now=time.time()).left:
            _say(rest)
        return

    def look() -> tuple[str, bool]:
        overview = read_status(destination, now=time.time())
        return _json_of(overview) if o.json else "\n".join(status_lines(overview)), overview.is_done

    if o.watch is False:
        _say(look()[0])
        return
    try:
        show(look, 10.0 if o.watch is True else o.watch)
    except KeyboardInterrupt:  # nothing was stopped but the looking
        return


def _json_of(overview: "Overview") -> str:
    import msgspec

    about = {
        "counts": overview.counts,
        "left": overview.left,
        "published": overview.is_published,
        "bytes_total": overview.bytes_total,
        "bytes_left": overview.bytes_left,
        "rate": overview.rate,
        "seconds_left": overview.seconds_left,
        "commands": overview.commands,
        "tasks": [{"task": x.task, "state": x.state, "beat": x.beat} for x in overview.tasks],
    }
    return msgspec.json.encode(about).decode()


@app.command(name="finalize")
def finalize_(dest: str | None = None, /, *, partial: bool | None = None, config: Config = None) -> None:
    """Make one data set of all finished tasks: key index, side files, manifest.

    Example: sa1b-wds finalize /data/shards

    Parameters
    ----------
    dest
        The folder of the data set.
    partial
        Publish without the tasks that are missing; the manifest lists them.
    """
    from .publication import finalize
    from .status import read_status
    from .storage import Destination

    o = options.load(config, options.Finalize, dest=dest, partial=partial)
    destination = Destination(_required(o.dest, "DEST"))
    alive = [t for t in read_status(destination, now=time.time()).tasks if t.state == "running"] if o.partial else []
    made = finalize(destination, partial=o.partial)
    for beat in (t.beat for t in alive if t.beat is not None and t.task in made.missing_tasks):
        share = beat.bytes_read / max(beat.bytes_total, 1)
        _say(
            f"task {beat.task} is at work, on {beat.host} pid {beat.pid} ({share:.0%}): published without it; "
            "finalize again when it is done"
        )
    _say(
        f"{destination.where}: {made.totals.samples:,} images, {made.totals.annotations:,} masks "
        f"in {made.totals.shards:,} shards"
        + (f"; {len(made.missing_tasks):,} tasks missing" if made.missing_tasks else "")
    )


@app.command
def verify(
    dest: str | None = None,
    /,
    *,
    deep: bool | None = None,
    against: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    workers: int | None = None,
    config: Config = None,
) -> None:
    """Hold the data set against its manifest; exit 3 and a list where it differs.

    Example: sa1b-wds verify /data/shards
    Example: sa1b-wds verify /data/shards --deep --against /data/sa1b

    Parameters
    ----------
    dest
        The folder of the data set.
    deep
        Parse every member, decode every RLE, recompute areas, hold jpg headers against the annotations.
    against
        The source tars: every member found again, equal.
    workers
        Processes.
    """
    from . import verify as checks
    from .progress import bytes_display
    from .storage import Destination

    o = options.load(config, options.Verify, dest=dest, deep=deep, against=against, workers=workers)
    destination = Destination(_required(o.dest, "DEST"))
    if against is not None:  # "no difference" from a comparison with nothing would be worse than an error
        _required(against, "--against")
    with bytes_display("verifying") as report:
        found = checks.verify(destination, deep=o.deep, against=o.against or None, report=report, workers=o.workers)
    for difference in found:
        _say(str(difference))
    if found:
        raise Different(destination.where, f"{len(found):,} difference{'s' * (len(found) != 1)}")
    _say(f"{destination.where}: no difference")


@app.command
def restore(
    dest: str | None = None,
    /,
    *,
    out: str | None = None,
    json_only: bool | None = None,
    config: Config = None,
) -> None:
    """Write the source tars again: every jpg and json byte for byte, pairs adjacent.

    Example: sa1b-wds restore /data/shards --out /data/tars
    Example: sa1b-wds restore /data/small --json-only --out /data/json

    Parameters
    ----------
    dest
        The folder of the data set.
    out
        The folder for the tars.
    json_only
        Leave the photographs out; all that can be done where they were made smaller.
    """
    from .progress import bytes_display
    from .restore import restore as run
    from .storage import Destination

    o = options.load(config, options.Restore, dest=dest, out=out, json_only=json_only)
    destination, folder = Destination(_required(o.dest, "DEST")), _local(o.out, "--out")
    with bytes_display("restoring") as report:
        done = run(destination, folder, json_only=o.json_only, report=report)
    _say(f"{folder}: {done}")


@app.command
def export(
    dest: str | None = None,
    /,
    *,
    out: str | None = None,
    annotations_only: bool | None = None,
    parquet: bool | None = None,
    coco: bool | None = None,
    split: str | None = None,
    workers: int | None = None,
    check: bool | None = None,
    config: Config = None,
) -> None:
    """The annotations without the photographs: shards, Parquet or COCO's JSON. Reads a few percent of the shards.

    Example: sa1b-wds export /data/shards --annotations-only --out /data/annotations
    Example: sa1b-wds export /data/shards --parquet --out masks.parquet
    Example: sa1b-wds export /data/shards --coco --split 'train[:1000]' --out instances.json

    Parameters
    ----------
    dest
        The folder of the data set.
    out
        A folder for --annotations-only, else the file to write.
    annotations_only
        The same samples without the jpg, about a twentieth of the bytes; run it again to go on.
    parquet
        All numbers in one file, one row a mask (needs pyarrow).
    coco
        One COCO JSON, boxes in COCO's convention; for a subset, since its readers hold it in memory.
    split
        Which samples: train, train[:1%], train[100:200], sums with +.
    workers
        Processes (1); what is written does not depend on it.
    check
        Read every sample whole, photographs too, and hold it against its CRC-32.
    """
    from . import export as exports
    from .dataset import open
    from .progress import bytes_display, megabytes

    given = {"annotations_only": annotations_only, "parquet": parquet, "coco": coco}
    o = options.load(config, options.Export, dest=dest, out=out, split=split, workers=workers, check=check, **given)
    kinds = {"annotations_only": exports.annotations_only, "parquet": exports.parquet, "coco": exports.coco}
    # What the command line asks for wins over what the file asks for.
    chosen = [name for name in kinds if given[name]] or [name for name in kinds if getattr(o, name)]
    if len(chosen) != 1:
        raise UsageError("export", "what to write", "one of --annotations-only, --parquet, --coco", len(chosen))
    ds, place = open(_required(o.dest, "DEST"), split=o.split), str(_local(o.out, "--out"))
    with bytes_display("exporting") as report:
        done = kinds[chosen[0]](ds, place, report=report, workers=o.workers, check=o.check)
    files = f"{done.files:,} shards, " if chosen == ["annotations_only"] else ""
    _say(f"{place}: {done.samples:,} images, {done.annotations:,} masks, {files}{megabytes(done.bytes)}")


@app.command
def stats(dest: str | None = None, /, *, json: bool | None = None, config: Config = None) -> None:
    """Totals and distributions: bytes and samples a shard, masks an image, counts length, scores.

    Example: sa1b-wds stats /data/shards

    Parameters
    ----------
    dest
        The folder of the data set.
    json
        For programs.
    """
    import msgspec

    from . import report
    from .storage import Destination

    o = options.load(config, options.Stats, dest=dest, json=json)
    found = report.statistics(Destination(_required(o.dest, "DEST")))
    _say(msgspec.json.encode(found).decode() if o.json else report.table(found))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  this is what the command is for


def _complain(error: Sa1bError) -> None:
    print(f"sa1b-wds: {error}", file=sys.stderr, flush=True)  # noqa: T201


STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""What ends a command cleanly beside Ctrl-C: batch systems preempt with the first, and say with the second that the
time limit is near, where they are asked to (`sbatch --signal=B:USR1@120`)."""


def _stop(number: int, frame: "FrameType | None") -> None:
    for other in STOPPING:  # a batch system says it again, and must not break off the cleaning up
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    for number in STOPPING:
        signal.signal(number, _stop)
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        print(f"sa1b-wds: {' '.join(str(error).split())} (see sa1b-wds --help)", file=sys.stderr)  # noqa: T201
        return 2
    except Sa1bError as error:
        _complain(error)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt as stopped:
        words = sys.argv[1:] if arguments is None else arguments
        # What is restored is never overwritten: the same command would refuse the first tar that is there.
        again = "the tars that are whole stay" if words[:1] == ["restore"] else "run the same command again to go on"
        by = f" by {stopped}" if str(stopped) else ""
        print(f"sa1b-wds: stopped{by}; {again}", file=sys.stderr)  # noqa: T201
        return 130
    except SystemExit as end:  # one task failed, and has said why
        return int(end.code or 0)
    return 0


def run() -> None:
    """The console script."""
    if isinstance(sys.stdout, TextIOWrapper):  # what a locale or a terminal cannot show must not end a conversion
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
