"""Guard a download of pretrained weights: it works, or it fails within seconds in one sentence that says what to do."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from rdeploy.errors import ConfigError

_CONNECT_S = 4.0
_READ_S = 20.0


def advice(family: str, name: str) -> str:
    """Return what to do without the pretrained weights."""
    return f"use --random-init, or a weights file with --arch {family}:{name}"


@contextlib.contextmanager
def guarded(
    family: str,
    name: str,
    *,
    url: str | None,
    offline: bool,
    what: str = "pretrained weights",
    ways_out: str | None = None,
) -> Iterator[None]:
    """Run a block that downloads weights: from `url` through torch.hub, or (None) from the Hugging Face hub.

    Cached weights are used in either case. Where the host does not answer within seconds, or `offline` is set, the hub
    is told not to try (its own retries take most of a minute) and a missing file is an error.

    Raises:
        ConfigError: the weights are not here and cannot be fetched.
    """
    ways = ways_out or advice(family, name)
    host = url or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    cached = url is not None and _in_torch_cache(url)
    reachable = cached or (not offline and _answers(host))
    if url is not None and not reachable:
        raise ConfigError(_sentence(f"{what} of {family}:{name}", host, ways, offline=offline))
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_READ_S)
    try:
        with _hub_offline(url is None and not reachable):
            yield
    except OSError as error:
        raise ConfigError(_sentence(f"{what} of {family}:{name}", host, ways, offline=offline)) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _sentence(what: str, host: str, ways: str, *, offline: bool) -> str:
    why = "--offline is set" if offline else f"{urlparse(host).netloc or host} cannot be reached"
    return f"the {what} are not on this machine and {why}: {ways}"


def _answers(url: str) -> bool:
    """Try to connect within seconds; behind a proxy the proxy is what has to answer, and it is trusted to."""
    parts = urlparse(url)
    if parts.scheme in getproxies() or not parts.hostname:
        return True
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _in_torch_cache(url: str) -> bool:
    import torch

    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


@contextlib.contextmanager
def _hub_offline(active: bool) -> Iterator[None]:
    """Set huggingface_hub's offline switch; it reads the environment once, at import, hence the constant too."""
    if not active:
        yield
        return
    from huggingface_hub import constants

    before, variable = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if variable is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = variable
