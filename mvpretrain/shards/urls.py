"""Shard urls: patterns to lists, and remote shards to local copies."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shlex
import shutil
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from mvpretrain.files import whole_file

ATTEMPTS = 3
PAUSE = 2.0  # seconds before the second attempt; the next waits twice as long


def expand(urls: str | Sequence[str]) -> list[str]:
    """Shard urls from patterns; local ones become absolute paths.

    A pattern may have brace lists (`{0000..0003}`, `{a,b}`), `::` between patterns, `${name}` (environment variable
    WDS_name), globs, or be a folder (its .tar files, sorted). Remote are `pipe:`, http(s), s3 and what webdataset's
    gopen reads. ValueError: a pattern without a match, a missing file, or a shard that is listed twice.
    """
    found = [url for pattern in ([urls] if isinstance(urls, str) else urls) for url in matches(pattern)]
    if len(set(found)) < len(found):
        twice = next(url for k, url in enumerate(found) if url in found[:k])
        raise ValueError(f"the shard {twice!r} is listed twice; list every shard once")
    return found


def expanded(pattern: str) -> list[str]:
    """A pattern without its braces, `::` and variables. ValueError: a variable that is not set."""
    try:
        return expand_urls(pattern)
    except AssertionError as error:
        raise ValueError(f"shards {pattern!r}: {error}; set it, or write the value itself") from error


def matches(pattern: str) -> list[str]:
    """The shards of one pattern. ValueError: nothing is there."""
    parts = expanded(pattern)
    found: list[str] = []
    missing = []
    for part in parts:
        here = [part] if is_remote(part) else local_matches(part)
        missing += [] if here else [part]
        found += here
    if missing:
        of = f" and {len(missing) - 1:,} more of {len(parts):,}" if len(missing) > 1 else ""
        raise ValueError(
            f"shards {pattern!r}: nothing at {missing[0]!r}{of} (relative paths start at {os.getcwd()!r}); "
            "correct the path, or pack shards with `mvpretrain shards pack`"
        )
    return found


def spelled_commands(urls: str | Sequence[str]) -> frozenset[str]:
    """The shell commands (`pipe:...`) that patterns say themselves: the only ones that may be run.

    Others come out of an index, an environment variable or an expansion, and whoever wrote the patterns may not know.
    """
    return frozenset(url for part in command_patterns(urls) for url in expanded(part))


def command_patterns(urls: str | Sequence[str]) -> list[str]:
    """The parts of patterns that begin with `pipe:`, as they are written."""
    parts = [part for pattern in ([urls] if isinstance(urls, str) else urls) for part in pattern.split("::")]
    return [part for part in parts if part.startswith("pipe:")]


def local_matches(path: str) -> list[str]:
    at = os.path.abspath(os.path.expanduser(path.removeprefix("file://").removeprefix("file:")))
    if os.path.isdir(at):
        return sorted(glob.glob(os.path.join(glob.escape(at), "*.tar")))
    if os.path.exists(at):
        return [at]
    return sorted(p for p in glob.glob(at) if os.path.isfile(p))


def is_remote(url: str) -> bool:
    """Whether a url names something that must be fetched, not a path."""
    return bool(re.match(r"[a-z][a-z0-9+]*:", url)) and not url.startswith("file:")


def local_copy(url: str, cache: str | Path | None, filesize: int | None = None, commands: Collection[str] = ()) -> Path:
    """A path with the contents of a shard; remote shards are fetched whole into `cache`, once a machine.

    Waits for another process that fetches the same shard. ValueError: a remote shard without a cache, one that cannot
    be fetched in three attempts, one of another size than `filesize`, or a command that is not among `commands`.
    """
    if not is_remote(url):
        return Path(url)
    if url.startswith("pipe:") and url not in commands:
        raise ValueError(
            f"the shard {url!r} is a shell command that the recipe or command line does not spell, but an index or a "
            "variable; it is not run: if you trust it, write it out as a url"
        )
    if cache is None:
        raise ValueError(f"the shard {url!r} is remote; set data.cache to a folder that can hold a copy of all shards")
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{blake2b(url.encode(), digest_size=8).hexdigest()}.tar"
    if not path.exists():
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                fetch(url, path)
    if filesize is not None and path.stat().st_size != filesize:
        raise ValueError(
            f"the shard {url!r} has {path.stat().st_size:,} bytes, its index says {filesize:,}; remove {str(path)!r} "
            "and write the index anew with `mvpretrain shards index`"
        )
    return path


def fetch(url: str, path: Path) -> None:
    """Copy what is at a url to a path that appears only when it is whole."""
    source = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3:") else url
    with whole_file(path) as part:
        for attempt in range(ATTEMPTS):
            try:
                with closing(gopen(source)) as stream, part.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                break
            except Exception as error:  # gopen's schemes raise what their libraries raise
                if attempt == ATTEMPTS - 1:
                    raise ValueError(f"the shard {url!r} cannot be fetched: {error}; try the url by hand") from error
                time.sleep(PAUSE * 2**attempt)
