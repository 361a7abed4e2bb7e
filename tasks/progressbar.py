"""The bar in Prefect's UI: a progress artifact for each map of shards, at most one update a second.

A thread of its own keeps it, so that a server that is slow, or gone, never holds up the work.
"""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tasks.progress import Progress, say

SECONDS = 1.0  # between updates
PATIENCE = 5.0  # seconds that a finished map waits for its last update


@contextmanager
def kept_bar(progress: Progress, key: str) -> Iterator[None]:
    """Keep an artifact of the current flow run abreast of `progress`, and a line in long silence.

    Args:
        progress: what to show.
        key: the artifact's; lower-case letters, digits and dashes.
    """
    ended = threading.Event()
    # With the context, or the thread would not know whose run this is.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(_keep, progress, key, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE)


def _keep(progress: Progress, key: str, ended: threading.Event) -> None:
    bar = _Bar(key)
    while not ended.wait(SECONDS):
        progress.tell_if_quiet()
        bar.show(progress)
    bar.show(progress)


class _Bar:
    """One artifact; made when there is something to show."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._id: Any = None
        self._shown = -1  # items; a bar at 0 % is news too
        self._failed = False

    def show(self, progress: Progress) -> None:
        """Send how far it is if that is news; whatever goes wrong, the shards go on."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        done, percent, phrase = progress.standing()
        if done == self._shown:
            return
        try:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=self._key, description=phrase)
            else:
                update_progress_artifact(self._id, percent, description=phrase)
            self._shown = done
        except Exception as error:
            if not self._failed:
                say(f"the progress bar in Prefect's UI stands still ({error}); the work goes on")
            self._failed = True
